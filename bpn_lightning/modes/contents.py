"""Which files a bundle has, by their paths: what is sent, and what is taken from others."""

from pathlib import Path, PurePosixPath

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.modes.bundle import (
    ACCURACY,
    CARD,
    CONFIG,
    FRONT,
    GATE,
    MODEL,
    TASK_CONFIG,
    TASK_MODEL,
    TASKS,
    check_task_name,
)
from bpn_lightning.modes.hashed import is_named_by_hash
from bpn_lightning.modes.training_state import FOLDER, RECORD

__all__ = ["contents", "is_content", "is_training_state", "leads_out"]

_TOP = (CONFIG, CARD, MODEL, FRONT, GATE, ACCURACY)
_OF_TASK = (TASK_CONFIG, TASK_MODEL, GATE)
_PEFT_TOP = ("base.safetensors", "tasks.json")
_FORMATS = ("onnx", "peft", "state_dict", "torch_export")


def is_content(path: str) -> bool:
    """Whether a path, with ``/`` and relative to the folder, is that of a file of bundles.

    >>> [is_content(path) for path in ("tasks/a/adapter_config.json", "tasks/a/notes", "tasks/../model.safetensors")]
    [True, False, False]
    """
    match path.split("/"):
        case [name]:
            return name in _TOP or is_named_by_hash(name)
        case ["tasks", task, name]:
            return _is_task(task) and name in _OF_TASK
        case [folder, name] if folder == FOLDER:
            return name == RECORD or is_named_by_hash(name)
        case ["onnx", name]:
            stem, _, ending = name.rpartition(".")
            return ending in ("onnx", "onnx_adapter") and _is_task(stem)
        case ["torch_export", name]:
            return name.endswith(".pt2") and _is_task(name.removesuffix(".pt2"))
        case ["state_dict", name]:
            stem = name.removesuffix(".safetensors")
            return name == "tasks.json" or (stem != name and _is_task(stem))
        case ["peft", name]:
            return name in _PEFT_TOP
        case ["peft", task, name]:
            return _is_task(task) and name in (TASK_CONFIG, TASK_MODEL)
    return False


def is_training_state(path: str) -> bool:
    """Whether a path is that of a file of a training state, which may hold samples of the training data."""
    return path.startswith(f"{FOLDER}/")


def _is_task(name: str) -> bool:
    try:
        check_task_name(name)
    except ConfigurationError:
        return False
    return True


def leads_out(path: str) -> bool:
    r"""Whether a path may name something outside of a folder, here or on another system.

    >>> [leads_out(path) for path in ("tasks/a/b", "../b", "/b", "a/../../b", "C:/b", "a\\..\\b")]
    [False, True, True, True, True, True]
    """
    parts = PurePosixPath(path).parts
    odd = not path or path.startswith("/") or "\\" in path or "\0" in path or ":" in path[:2]
    return odd or ".." in parts


def contents(folder: Path, training_state: bool = False) -> list[str]:
    """The paths of a bundle's files that are there, with ``/`` and relative to the folder, sorted.

    Args:
        folder: of the bundle.
        training_state: whether those of its training state are among them.
    """
    places = (TASKS, *_FORMATS, *((FOLDER,) if training_state else ()))
    inside = [path for place in places for path in (folder / place).rglob("*")]
    found = [*folder.iterdir(), *inside]
    paths = [path.relative_to(folder).as_posix() for path in found if path.is_file()]
    return sorted(path for path in paths if is_content(path))
