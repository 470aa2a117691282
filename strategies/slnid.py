"""Selfless sequential learning: sparse codes through neural inhibition and discounting."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from bpn_lightning.checks import check_above_zero, check_choice, check_number
from bpn_lightning.costs import DeclaredBytes
from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.functional.gradients import Columns
from bpn_lightning.functional.importance import mean_over_task, squared_lengths
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.execution import differentiable
from bpn_lightning.nn.layers import evaluation_mode, full_precision
from bpn_lightning.strategies.mas import MemoryAwareSynapses
from bpn_lightning.strategies.penalty import Update
from bpn_lightning.tasks import Batch, ContinualStream, Task, dry_inputs

__all__ = ["SLNID", "Discount", "inhibition", "inhibition_weights"]

Discount = Literal["product", "minimum"]
DISCOUNTS = ("product", "minimum")


def inhibition_weights(importance: Tensor, sigma: float, discount: Discount = "product") -> Tensor:
    r"""The strength of the inhibition between each pair of units.

    .. math:: K_{ij} = e^{-(i-j)^2 / 2\sigma^2} D_{ij}, \quad K_{ii} = 0

    with :math:`D_{ij} = e^{-(\alpha_i + \alpha_j)}` (``product``) or
    :math:`\min(e^{-\alpha_i}, e^{-\alpha_j})` (``minimum``).

    Args:
        importance: alpha, ``(units,)``.
        sigma: width of the neighborhood, in unit indices.
        discount: ``product`` or ``minimum``.

    Returns:
        ``(units, units)``, symmetric.
    """
    place = torch.arange(len(importance), dtype=importance.dtype, device=importance.device)
    near = torch.exp(-((place[:, None] - place).square()) / (2 * sigma**2))
    one, other = importance[:, None], importance[None]
    joint = one + other if discount == "product" else torch.maximum(one, other)
    return (near * torch.exp(-joint)).fill_diagonal_(0)


def inhibition(activations: Tensor, weights: Tensor) -> Tensor:
    r"""The penalty on units that are active together, :math:`h K h^T` of each sample.

    Each unordered pair counts twice, as in the paper's sum.

    Args:
        activations: h, ``(batch, units)``, not negative.
        weights: K, ``(units, units)``.

    Returns:
        ``(batch,)``; its mean is the paper's R of one layer.
    """
    return ((activations @ weights) * activations).sum(1)


class SLNID(MemoryAwareSynapses):
    r"""Selfless sequential learning: MAS, and a penalty on neighboring units that are active together.

    .. math:: \lambda_\Omega \sum_i \Omega_i (\theta_i - \theta^*_i)^2 + \lambda_S \sum_l \sum_{i \ne j}
        e^{-(i-j)^2 / 2\sigma_l^2}\, e^{-(\alpha_i + \alpha_j)}\, \frac{1}{B} \sum_m h_{mi} h_{mj}

    Aljundi, Rohrbach, Tuytelaars (2019), https://arxiv.org/abs/1806.05421. h are the activations of
    hidden units after their ReLU; sparse codes leave capacity for future tasks. alpha, the importance
    of a unit to past tasks, is the mean over a task's samples of
    :math:`|\partial \|f(x)\|^2 / \partial n_i|`, n the unit before its ReLU, summed over tasks:
    important units are not inhibited.

    Differs from the published code: its discount is the smaller of the two exponentials (``minimum``);
    here the default is the paper's product.

    Args:
        strength: lambda of MAS, dimensionless.
        sparsity: lambda of the inhibition, dimensionless; 0 is MAS.
        scale: a layer's number of units divided by the width sigma of the neighborhood.
        discount: ``product`` or ``minimum``.
        layers: names of the backbone's activations whose outputs, ``(batch, units)``, are inhibited;
            by default every ReLU with such an output.
        update: as in MAS.
        include_head: as in MAS.

    State:
        MAS's, and alpha, 4 bytes per unit; nothing is needed for inference.

    Raises:
        ConfigurationError: a value is out of range or unknown, or a layer does not exist.
    """

    penalty_name: ClassVar[str] = "slnid"
    plain_first_task: ClassVar[bool] = False
    needs_trainable_core: ClassVar[bool] = True
    null_arguments: ClassVar[Mapping[str, Any]] = {"strength": 0.0, "sparsity": 0.0}

    _handles: Sequence[RemovableHandle] = ()  # of the hooks on the layers

    def __init__(
        self,
        strength: float = 1.0,
        sparsity: float = 1e-3,
        *,
        scale: float = 6.0,
        discount: Discount = "product",
        layers: Sequence[str] | None = None,
        update: Update = "clamped",
        include_head: bool | None = None,
    ) -> None:
        super().__init__(strength, update=update, include_head=include_head)
        check_number("sparsity", sparsity, "0 is MAS; the authors use 0.001 for small networks.")
        check_above_zero("scale", scale, "The authors use 6.")
        check_choice("discount", discount, DISCOUNTS)
        if layers is not None and not layers:
            raise ConfigurationError(
                "Expected layers to name at least one module, but got none. "
                "Leave it out to inhibit the units of every ReLU."
            )
        self.sparsity = sparsity
        self.scale = scale
        self.discount: Discount = discount
        self.layers = None if layers is None else list(layers)

    def reset(self) -> None:
        """Start with an empty penalty and no importances of units, and remove the hooks."""
        super().reset()
        self.units: dict[str, int] = {}
        self.alpha: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._activations: dict[str, Tensor] = {}
        self._remove_hooks()

    # --- the layers ------------------------------------------------------------------------------

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Find the layers, and register hooks on them."""
        super().configure(host, stream)
        self._remove_hooks()
        if self.sparsity == 0:
            return
        self.units = self._find_units(host, stream)
        self._handles = [
            host.network.get_submodule(name).register_forward_hook(
                partial(self._record, host, name)
            )
            for name in self.units
        ]

    def _find_units(self, host: ContinualHost, stream: ContinualStream) -> dict[str, int]:
        """Names and widths of the layers, from one dry forward pass."""
        parts = dict(host.network.named_modules())
        known = [name for name, part in parts.items() if name.startswith("backbone.")]
        names = [name for name in known if isinstance(parts[name], nn.ReLU)]
        for name in self.layers or ():
            if name not in known:
                raise ConfigurationError(
                    f"Expected layers to be modules of the backbone, but got {name!r}."
                    f"{did_you_mean(name, known)} It has {', '.join(known)}."
                )
        names = self.layers or names
        shapes: dict[str, list[torch.Size]] = {name: [] for name in names}

        def note(name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            activates = args[0].shape == output.shape and not [*layer.parameters()]
            shapes[name].append(output.shape if activates else torch.Size())

        handles = [parts[name].register_forward_hook(partial(note, name)) for name in names]
        inputs = dry_inputs(host.network.structure, 1, host.device)
        with torch.no_grad(), evaluation_mode(host.network):
            host.network(inputs)
        for handle in handles:
            handle.remove()
        fit = {name: found[0][1] for name, found in shapes.items() if [*map(len, found)] == [2]}
        unfit = [name for name in self.layers or () if name not in fit]
        if unfit or not fit:
            got = f"{unfit[0]!r} is not" if unfit else "no ReLU is"
            raise ConfigurationError(
                "Expected layers to be activations without weights that run once per forward pass and "
                f"output (batch, units), but {got}. Name activations of fully connected layers, or "
                "set sparsity to 0."
            )
        return fit

    def _record(
        self, host: ContinualHost, name: str, layer: nn.Module, args: Any, output: Tensor
    ) -> None:
        if host.in_step_forward and layer.training:
            self._activations[name] = output.clone()  # the next layer may be in-place

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    # --- the penalty of a batch ------------------------------------------------------------------

    def loss_terms(self, host: ContinualHost, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """The inhibition of all layers."""
        recorded, self._activations = self._activations, {}
        if not recorded:
            return {}
        with torch.autocast(host.device.type, enabled=False):
            full = {name: full_precision(output) for name, output in recorded.items()}
            layers = [inhibition(h, self._weights_of(n, h).to(h.dtype)) for n, h in full.items()]
        return {"inhibition": self.sparsity * torch.stack(layers).sum(0)}

    def _weights_of(self, name: str, activations: Tensor) -> Tensor:
        if name not in self._weights:
            units, where = self.units[name], activations.device
            alpha = self.alpha.get(name, torch.zeros(units, device=where))
            self._weights[name] = inhibition_weights(alpha, units / self.scale, self.discount)
        return self._weights[name]

    # --- consolidation ---------------------------------------------------------------------------

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Add the task's importances of weights and units."""
        added: dict[str, Tensor] = {}
        if self.sparsity:
            added = self._unit_importance(host, task)
        super().on_task_end(host, task)
        self.alpha = {name: self.alpha.get(name, 0) + value for name, value in added.items()}
        self._weights = {}

    def _unit_importance(self, host: ContinualHost, task: Task) -> dict[str, Tensor]:
        network = host.network
        kind = next(network.parameters()).dtype
        like = {
            name: torch.zeros(units, device=host.device, dtype=kind)
            for name, units in self.units.items()
        }

        def absolutes(batch: Batch, columns: Columns) -> dict[str, Tensor]:
            parts = {name: network.get_submodule(name) for name in self.units}
            with torch.enable_grad(), differentiable(network), _before(parts) as edges:
                logits = network(batch.inputs)[:, columns]
                lengths = squared_lengths(logits, logits).sum()
                found = torch.autograd.grad(lengths, list(edges.values()))
            return {name: g.abs().sum(0) for name, g in zip(edges, found, strict=True)}

        return mean_over_task(host, task.id, like, absolutes)

    def forget(self, host: ContinualHost, task: Task) -> Sequence[str]:
        """MAS's; the importances of units are sums over tasks too."""
        units = ["importances of units, summed over tasks"] if self.alpha else []
        return [*super().forget(host, task), *units]

    # --- state and costs -------------------------------------------------------------------------

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """MAS's, and one number per unit after the first task, in the dtype of the weights."""
        weights = super().declared_bytes(host)
        units = sum(self.units.values()) if self.alpha else 0
        size = next(host.network.parameters()).element_size()
        return weights._replace(training=weights.training + size * units)

    def state_dict(self) -> dict[str, Any]:
        """MAS's, and the units' importances."""
        return {**super().state_dict(), "alpha": self.alpha}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the importances."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "alpha"})
        self.alpha = dict(state_dict["alpha"])
        self._weights = {}

    def move_state(self, host: ContinualHost) -> None:
        """Move the importances to the host's device."""
        super().move_state(host)
        self.alpha = {name: value.to(host.device) for name, value in self.alpha.items()}
        self._weights = {}


@contextmanager
def _before(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, GradientEdge]]:
    """Record the gradient edge of each layer's input: an in-place ReLU overwrites the tensor."""
    edges: dict[str, GradientEdge] = {}

    def note(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        edges[name] = get_gradient_edge(args[0])

    handles = [
        layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()
    ]
    try:
        yield edges
    finally:
        for handle in handles:
            handle.remove()
