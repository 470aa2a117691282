"""How jsonargparse opens files: those of ``--config``, since no value is the name of another."""

from collections.abc import Iterator
from contextlib import contextmanager

from jsonargparse._paths import Path as ArgumentPath  # public by its subclasses only

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.untrusted import MAX_CONFIG_BYTES, read_text

__all__ = ["bounded_includes"]


@contextmanager
def bounded_includes() -> Iterator[None]:
    """While it lasts, jsonargparse reads files by :func:`~bpn_lightning.untrusted.read_text`.

    By itself it waits for FIFOs, and has no bound. Whether a config has been read before or is put there
    in between, and whatever value it may still take for a file, this is how it is opened.
    """
    theirs = ArgumentPath.read_text

    def ours(path: ArgumentPath) -> str:
        try:
            return read_text(path.absolute, max_bytes=MAX_CONFIG_BYTES)
        except OSError as error:
            raise ConfigurationError(
                f"Expected {path} to be a config that can be read, but got: "
                f"{error.strerror}. Set its keys one by one, or name another file."
            ) from error

    ArgumentPath.read_text = ours  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ArgumentPath.read_text = theirs  # type: ignore[method-assign]
