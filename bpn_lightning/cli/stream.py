"""The stream of a command line of ``bpn-fit``, without the run: to look at its tasks before anything is trained."""

from collections.abc import Sequence

from bpn_lightning.cli.command import read_command
from bpn_lightning.cli.fit import ContinualCLI
from bpn_lightning.cli.output import quiet_lightning
from bpn_lightning.datamodules.base import ContinualDataModule

__all__ = ["read_stream"]


class _StreamCLI(ContinualCLI):
    """Parses and checks the whole configuration, and makes no trainer and no folder."""

    def before_instantiate_classes(self) -> None:
        """Check what files may name; no folder is touched."""
        if not self.command.trust.everything:
            self._check_trust()

    def instantiate_classes(self) -> None:
        """Instantiate everything but the trainer."""
        self.datamodule = self.parser.instantiate_classes(self.config).data


def read_stream(argv: Sequence[str]) -> ContinualDataModule:
    """The stream of a command line, after its setup.

    Args:
        argv: as ``bpn-fit`` takes it.

    Raises:
        BPNLightningError: a key, a value or the data are wrong, as ``bpn-fit`` would say.
    """
    with quiet_lightning():
        cli = _StreamCLI(read_command(argv))
    try:
        cli.datamodule.prepare_data()
        cli.datamodule.setup()
        return cli.datamodule
    finally:
        cli.close()
