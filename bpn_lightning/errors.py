"""What can go wrong, as one small tree of exceptions.

::

    BPNLightningError
    ├── ConfigurationError   an argument, a config key or a combination of them breaks a rule
    ├── DataError            data are missing, unreadable or corrupt
    ├── CheckpointError      a checkpoint cannot continue or serve this run
    ├── ProcessesError       the processes of a run hold different things
    └── ResultsError         the folder of a run cannot be used

The command line prints any of them as one message, without a traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from bpn_lightning.terminal import printable

__all__ = [
    "BPNLightningError",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "ExpectedForgettingWarning",
    "ProcessesError",
    "ResultsError",
    "did_you_mean",
    "needs_trust",
]


class BPNLightningError(Exception):
    """Base of every error that this package raises on purpose."""

    def __str__(self) -> str:
        """The message; what it quotes from outside cannot reach a terminal as anything but text."""
        return printable(super().__str__())


class ConfigurationError(BPNLightningError, ValueError):
    """An argument, a config key or a combination of them breaks a rule."""


class DataError(BPNLightningError, RuntimeError):
    """Data are missing, unreadable or corrupt."""


class CheckpointError(BPNLightningError, RuntimeError):
    """A checkpoint cannot continue or serve this run."""


class ProcessesError(BPNLightningError, RuntimeError):
    """The processes of a run hold different things; the same error in each of them."""


class ResultsError(BPNLightningError, RuntimeError):
    """The folder of a run cannot be used."""


class ExpectedForgettingWarning(UserWarning):
    """The run is valid, and its method is known to forget in it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name that ``name`` begins or nearly is, or nothing.

    >>> did_you_mean("epsilom", ["epsilon", "rank"])
    " Did you mean 'epsilon'?"
    >>> did_you_mean("zzz", ["epsilon", "rank"])
    ''
    >>> did_you_mean("eps", ["epsilon", "rank"])
    " Did you mean 'epsilon'?"
    >>> did_you_mean("gpus", ["runs", "plugins"])  # half of the letters are no likeness
    ''
    """
    names = sorted(known, key=len)
    begun = [one for one in names if len(name) > 2 and one.startswith(name)]
    matches = begun or get_close_matches(name, names, n=1, cutoff=0.65)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def needs_trust(subject: str, name: str, typed: bool = False) -> str:
    """What to say of a name that only a user may bring.

    Args:
        subject: the key, and where it stands.
        name: what was named.
        typed: whether it stands on a command line that counts as a file's.
    """
    return (
        f"Expected {subject} to name what needs no trust, but got {name!r}. Using it runs its code: read "
        f"it, then {'' if typed else 'type its whole name on the command line, or '}add --trust; "
        "docs/safety.md lists what needs none."
    )
