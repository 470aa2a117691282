"""What a module refuses: classes of one's own that leave its work out, and exports that name no task."""

from collections.abc import Callable, Iterator
from inspect import unwrap
from types import CodeType, FunctionType
from typing import Any, NoReturn

import lightning as L

from bpn_lightning.errors import ConfigurationError

__all__ = ["check_overrides", "refused_export"]

REMEDIES = {
    "training_step": "Pass a loss of your own as ContinualModule(loss=...)",
    "configure_optimizers": "Pass optimizer and scheduler to ContinualModule",
    "forward": "Put the computation into the backbone",
}

EXPORTS = {
    "to_onnx": "torch.onnx.export(module.for_inference(task), (inputs,), dynamo=True)",
    "to_torchscript": "torch.export.export(module.for_inference(task), (inputs,))",
    "to_tensorrt": "torch_tensorrt.compile(module.for_inference(task), inputs=[inputs])",
}
"""Methods of Lightning's that export a module, and the calls that say for which task."""

HARMLESS = ("validation", "test", "predict")
"""In the names of hooks that may be replaced: nothing is learned in them."""


def check_overrides(module: L.LightningModule, base: type[L.LightningModule]) -> None:
    """Refuse a class that replaces what a stream is learned by, rather than adding to it.

    Args:
        module: of a class derived from ``base``.
        base: the class whose hooks do the work.

    Raises:
        ConfigurationError: names the method and the remedy.
    """
    if not module.automatic_optimization:
        raise ConfigurationError(
            "Expected automatic_optimization to be True, as strategies act on the trainer's own updates, "
            "but got False. Leave it as it is."
        )
    for home in type(module).__mro__[: type(module).__mro__.index(base)]:
        for name, method in vars(home).items():
            if not (_does_work(name, base) and isinstance(method, FunctionType)):
                continue
            if name not in _names(unwrap(method).__code__):
                first = REMEDIES.get(name, "Do what you need there as well")
                raise ConfigurationError(
                    f"Expected {home.__name__}.{name} to call super().{name}, without which the strategies "
                    f"of the run have no effect, but it does not. {first}, or call super().{name}."
                )


def _does_work(name: str, base: type[L.LightningModule]) -> bool:
    """Whether it is one of Lightning's methods, and ours on the way to Lightning's."""
    ours = base.__mro__[: base.__mro__.index(L.LightningModule)]
    return (
        hasattr(L.LightningModule, name)
        and any(name in vars(one) for one in ours)
        and not name.startswith("__")
        and not any(word in name for word in HARMLESS)
    )


def _names(code: CodeType) -> Iterator[str]:
    """The names that a function uses, in what it defines inside too."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def refused_export(method: str) -> Callable[..., Any]:
    """What takes the place of one of Lightning's methods of :data:`EXPORTS`, as nothing names the task.

    Args:
        method: its name.

    Returns:
        A method that raises ConfigurationError.
    """

    def refuse(self: L.LightningModule, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: nothing says for which task."""
        raise ConfigurationError(
            f"Expected a network in a task's mode to be exported, but got {method} of a module that has "
            f"one for each task. Use {EXPORTS[method]}."
        )

    return refuse
