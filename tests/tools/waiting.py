"""How long a test waits for another process before it gives up."""

import os

#: Seconds. A safety net that ends a deadlock, and no judgment of how fast a machine is: nothing is
#: asserted about time. BPN_TEST_PATIENCE=3600 is for a machine that is slower still.
PATIENCE = float(os.environ.get("BPN_TEST_PATIENCE", "900"))
