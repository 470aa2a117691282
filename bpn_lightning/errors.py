"""The exceptions of this package.

::

    BPNLightningError
    ├── ConfigurationError   an argument, a config key or a combination of them is invalid
    ├── DataError            data are missing, unreadable or corrupt
    ├── CheckpointError      a checkpoint cannot be used for this run
    ├── ProcessesError       the state of a run differs between processes
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
    """Base class of all errors that this package raises deliberately."""

    def __str__(self) -> str:
        """The message, with control characters escaped so that quoted input cannot affect a terminal."""
        return printable(super().__str__())


class ConfigurationError(BPNLightningError, ValueError):
    """An argument, a config key or a combination of them is invalid."""


class DataError(BPNLightningError, RuntimeError):
    """Data are missing, unreadable or corrupt."""


class CheckpointError(BPNLightningError, RuntimeError):
    """A checkpoint cannot be used for this run."""


class ProcessesError(BPNLightningError, RuntimeError):
    """The state of a run differs between processes; raised in all of them."""


class ResultsError(BPNLightningError, RuntimeError):
    """The folder of a run cannot be used."""


class ExpectedForgettingWarning(UserWarning):
    """The run is valid, but its method is known to forget in this setting."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name that starts with or resembles ``name``, if any.

    >>> did_you_mean("epsilom", ["epsilon", "rank"])
    " Did you mean 'epsilon'?"
    >>> did_you_mean("zzz", ["epsilon", "rank"])
    ''
    >>> did_you_mean("eps", ["epsilon", "rank"])
    " Did you mean 'epsilon'?"
    >>> did_you_mean("gpus", ["runs", "plugins"])  # too different
    ''
    """
    names = sorted(known, key=len)
    begun = [one for one in names if len(name) > 2 and one.startswith(name)]
    matches = begun or get_close_matches(name, names, n=1, cutoff=0.65)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def needs_trust(subject: str, name: str, typed: bool = False) -> str:
    """The error message for a name that needs the user's trust.

    Args:
        subject: the key and its location.
        name: the value.
        typed: whether it comes from a command line that is treated like a file.
    """
    return (
        f"Expected {subject} to be a name that needs no trust, but got {name!r}. Using it runs its code: "
        f"read it, then {'' if typed else 'type its full name on the command line, or '}add --trust; "
        "docs/safety.md lists the names that need none."
    )
