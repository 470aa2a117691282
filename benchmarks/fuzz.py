"""Run the fuzz tests of the readers with many more generated files than in the test suite.

    python benchmarks/fuzz.py --times 20

Needs the ``dev`` extra. The same number makes the same examples.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests" / "test_fuzz.py"


def main() -> int:
    """Run the tests, and exit with their status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--times", type=int, default=20, help="multiple of the number of examples in the tests"
    )
    times = parser.parse_args().times
    line = [sys.executable, "-m", "pytest", "-q", "-s", "-o", "log_level=ERROR", str(TESTS)]
    return subprocess.run(line, check=False, env={**os.environ, "BPN_FUZZ": str(times)}).returncode


if __name__ == "__main__":
    sys.exit(main())
