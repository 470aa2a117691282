"""How jsonargparse opens the files that values of a config name."""

from collections.abc import Iterator
from contextlib import contextmanager

from jsonargparse._paths import Path as ArgumentPath  # public by its subclasses only

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.untrusted import MAX_CONFIG_BYTES, read_text

__all__ = ["bounded_includes"]


@contextmanager
def bounded_includes() -> Iterator[None]:
    """While it lasts, jsonargparse reads included files by :func:`~bpn_lightning.untrusted.read_text`.

    Wherever a value may be a whole config, as ``data: birds.yaml`` is, jsonargparse opens what it names
    by itself: it waits for FIFOs, and has no bound. Where a value may be any text, one that names a file
    which cannot be included stays a text, such as the path of a large file of weights.
    """
    theirs = ArgumentPath.read_text

    def ours(path: ArgumentPath) -> str:
        try:
            return read_text(path.absolute, max_bytes=MAX_CONFIG_BYTES)
        except OSError as error:
            raise ConfigurationError(
                f"Expected {path} to be a config file that can be included, but got: "
                f"{error.strerror}. Set its keys one by one, or name another file."
            ) from error

    ArgumentPath.read_text = ours  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ArgumentPath.read_text = theirs  # type: ignore[method-assign]
