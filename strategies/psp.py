"""Parameter superposition: the networks of all tasks in one set of weights, separated by keys."""

from collections.abc import Iterable, Mapping, Sequence
from math import pi
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bpn_lightning.checks import check_choice
from bpn_lightning.costs import DeclaredBytes, HeldTensors, tensor_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.choosing import chosen_layers
from bpn_lightning.nn.layers import ComplexLinear, Keys, TaskModule, evaluation_mode
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import ContinualStream, Task, dry_inputs

__all__ = ["KeyKind", "ParameterSuperposition", "binary_key", "phase_key", "turned"]

KeyKind = Literal["binary", "complex", "ones"]
KINDS = ("binary", "complex", "ones")


def binary_key(size: int, generator: torch.Generator) -> Tensor:
    """``(size,)`` signs, 1 or -1 with equal probability."""
    return torch.randint(2, (size,), generator=generator, dtype=torch.int8) * 2 - 1


def phase_key(size: int, generator: torch.Generator) -> Tensor:
    r"""``(size,)`` phases, uniform between :math:`-\pi` and :math:`\pi`."""
    return (torch.rand(size, generator=generator) * 2 - 1) * pi


def turned(weight: Tensor, phases: Tensor) -> tuple[Tensor, Tensor]:
    r"""Real and imaginary part of :math:`w e^{i \varphi}`."""
    return weight * phases.cos(), weight * phases.sin()


class ParameterSuperposition(ContinualStrategy):
    r"""The networks of all tasks are superposed in one set of weights, separated by keys of random signs.

    .. math:: y = W (x \odot k_t) + b, \quad k_t \in \{-1, 1\}^n; \qquad
              W \odot k_t = W_t + \sum_{s \neq t} W_s \odot k_s \odot k_t

    Cheung, Terekhov, Chen, Agrawal, Olshausen, "Superposition of many models into one" (2019),
    https://arxiv.org/abs/1902.05522; the first equation is in Alg. 3 of Wen et al. The key multiplies
    the layer input, which is the same as multiplying each row of the weights. The weights of other
    tasks are then multiplied by random signs and act as noise of mean 0. With ``complex`` keys
    :math:`k_t = e^{i \varphi_t}`, weights and activations are complex, nonlinearities act on real and
    imaginary parts separately, and the logits are real parts.

    Differs from the published code: keys are never learned, are the same on every machine (seeded by
    seed, task and layer), and biases are added (without a key). Complex weights are initialized with
    the network's own modulus instead of Xavier's, and with uniform phases.

    Args:
        keys: ``binary``, ``complex``, or ``ones``: a control, which equals fine-tuning.
        layers: which linear layers and convolutions have keys: names (``"head"`` and names within
            ``backbone``), wildcards such as ``"backbone.layer4.*"``, and the kinds ``linear`` and
            ``conv``. By default every linear layer including the head, as in Wen et al. The keys of a
            convolution multiply its weights, with one sign per element of a patch.
        key_input: whether the default includes the first layer of the network, if it is linear: its
            key multiplies the pixels.
        key_output: whether the default includes the head.
        first_key: ``random``, or ``ones``: the first task starts from the unmodified network, such as
            a pretrained one. (Loading W times a random first key instead gives the same training in
            other coordinates.)

    State:
        in the module, per layer with keys and n inputs (:math:`C_{in} k_h k_w` for a convolution): a
        bank (T, n) of signs, n bytes per task; complex: of phases, 4 n bytes per task, and once the
        imaginary parts of the weights, as large as the weights.

    Raises:
        ConfigurationError: an option is unknown or incompatible with another, a layer does not exist,
            or the network does not support complex numbers.
    """

    needs_task_id = True
    plain_first_task = False
    null_arguments: ClassVar[Mapping[str, Any]] = {"keys": "ones"}

    def __init__(
        self,
        keys: KeyKind = "binary",
        *,
        layers: Sequence[str] | None = None,
        key_input: bool = True,
        key_output: bool = True,
        first_key: Literal["random", "ones"] = "random",
    ) -> None:
        check_choice("keys", keys, KINDS)
        check_choice("first_key", first_key, ("random", "ones"))
        if layers is not None and not layers:
            raise ConfigurationError(
                "Expected layers to name at least one layer, but got none. "
                "Leave it out to use keys in every linear layer."
            )
        if not (key_input and key_output) and layers is not None:
            flag = "key_output" if key_input else "key_input"
            raise ConfigurationError(
                f"Expected {flag} to be true when layers are named, but got false. "
                "Leave the layer out of layers."
            )
        if keys == "complex" and not (layers is None and key_input and key_output):
            raise ConfigurationError(
                "Expected layers, key_input and key_output to have their defaults when keys are 'complex', "
                "since a layer that follows a complex one has to be complex too. Set keys to 'binary'."
            )
        self.kind: KeyKind = keys
        self.layers = None if layers is None else list(layers)
        self.key_input = key_input
        self.key_output = key_output
        self.first_key = first_key
        self.reset()

    def reset(self) -> None:
        """Drop the references to the module's keys."""
        self.keys: dict[str, Keys] = {}

    # --- structure -------------------------------------------------------------------------------

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Attach keys to the selected layers, with value 1 until the stream starts."""
        kind = "complex" if self.kind == "complex" else "binary"
        if self.layers is None:
            names = self._default_layers(host)
        else:
            names = chosen_layers(self.layers, host.network.layers_for_keys(kind), "keys")
        self.keys = {name: host.network.attach_keys(name, kind) for name in names}
        if kind == "complex":
            inputs = dry_inputs(host.network.structure, 2, host.device)
            if inputs.is_floating_point():
                draw = torch.rand(inputs.shape, generator=seeded_generator("dry forward"))
                inputs = draw.to(host.device)
            check_elementwise(host.network, inputs)

    def _default_layers(self, host: ContinualHost) -> list[str]:
        weighted = (
            name
            for name, part in host.network.named_modules()
            if next(part.parameters(recurse=False), None) is not None or is_parametrized(part)
        )
        left_out = set() if self.key_input else {next(weighted)}
        left_out |= set() if self.key_output else {"head"}
        names = [name for name in host.network.linear_layers() if name not in left_out]
        if not names:
            raise ConfigurationError(
                "Expected at least one layer with keys, but key_input and key_output exclude all linear "
                f"layers of the network: {', '.join(host.network.linear_layers())}. Set one of them to true."
            )
        return names

    # --- keys ------------------------------------------------------------------------------------

    def on_stream_start(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Sample every task's keys, and the phases of complex weights; checkpoints store them."""
        self._write_keys(host, host.network.tasks)
        if self.first_key == "random":
            for name, layer in self._complex_layers(host).items():
                key = ("phases of weights", stream.seed, name)
                if name == "head":  # by column, so that they do not depend on how many there are
                    self._turn_rows(layer, key, range(layer.out_features))
                    continue
                phases = phase_key(layer.weight.numel(), seeded_generator(*key))
                self._turn(layer, slice(None), phases.view(layer.weight.shape))

    def on_stream_growth(self, host: ContinualHost, tasks: Sequence[Task]) -> None:
        """Sample the keys of new tasks, and the phases of new rows of a complex head."""
        self._write_keys(host, tasks)
        head = self._complex_layers(host).get("head")
        if head is not None and self.first_key == "random":
            before = max(task.columns[1] for task in host.network.tasks[: -len(tasks)])
            key = ("phases of weights", host.stream.seed, "head")
            self._turn_rows(head, key, range(before, head.out_features))

    def _write_keys(self, host: ContinualHost, tasks: Iterable[Task]) -> None:
        for name, keys in self.keys.items():
            for task in tasks:
                generator = seeded_generator("keys", host.stream.seed, task.id, name)
                keys.write(task.id, self._draw(keys, task.id, generator))

    def _turn_rows(
        self, layer: ComplexLinear, key: tuple[str | int, ...], columns: Iterable[int]
    ) -> None:
        for column in columns:
            phases = phase_key(layer.in_features, seeded_generator(*key, column))
            self._turn(layer, slice(column, column + 1), phases[None])

    @staticmethod
    def _turn(layer: ComplexLinear, rows: slice, phases: Tensor) -> None:
        """Turn real weights by phases, ``(rows, in)``."""
        with torch.no_grad():
            real, imaginary = turned(layer.weight[rows], phases.to(layer.weight))
            layer.weight[rows], layer.weight_imag[rows] = real, imaginary

    def _draw(self, keys: Keys, task_id: int, generator: torch.Generator) -> Tensor:
        """A task's key: the identity, or a random one."""
        size = keys.bank.shape[1]
        if self.kind == "ones" or (task_id == 0 and self.first_key == "ones"):
            return torch.zeros(size) if self.kind == "complex" else torch.ones(size)
        return phase_key(size, generator) if self.kind == "complex" else binary_key(size, generator)

    def _complex_layers(self, host: ContinualHost) -> dict[str, ComplexLinear]:
        layers = host.network.linear_layers().items()
        return {name: layer for name, layer in layers if isinstance(layer, ComplexLinear)}

    def forget(self, host: ContinualHost, task: Task) -> Sequence[str]:
        """The module overwrites its key, which the seed gives again."""
        return [
            "its network, superposed in the shared weights: its key follows from the stream's seed"
        ]

    # --- costs -----------------------------------------------------------------------------------

    def held_tensors(self, host: ContinualHost) -> HeldTensors:
        """The keys of all tasks, and the imaginary parts of complex weights."""
        imaginary = [layer.weight_imag for layer in self._complex_layers(host).values()]
        return HeldTensors(inference=[*(keys.bank for keys in self.keys.values()), *imaginary])

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """Training and inference: T n bytes per layer; complex: 4 T n, and 4 per complex weight.

        A task adds one key per layer: one byte per sign, four per phase. The paper counts one float
        per input of each layer with keys and per output of the head; complex: two. For three hidden
        layers of 300 with 3,072 inputs and 20 classes this gives the 15,968 bytes of its table,
        4 (3,072 + 3 * 300 + 20), which it does not derive. Logits have no keys here.
        """
        weights = [layer.weight for layer in self._complex_layers(host).values()]
        keys = tensor_bytes(keys.bank[0] for keys in self.keys.values())
        floats = sum(keys.bank.shape[1] for keys in self.keys.values())
        if "head" in self.keys:
            floats += host.network.linear_layers()["head"].out_features
        total = len(host.network.tasks) * keys + tensor_bytes(weights)
        return DeclaredBytes(total, total, keys, floats * (8 if self.kind == "complex" else 4))


def check_elementwise(network: nn.Module, inputs: Tensor) -> None:
    """Check that modules between complex layers act on real and imaginary parts separately.

    Every module without children that runs after a complex layer is called on each half of its input;
    plain functions in between are noticed only if they change shapes.

    Args:
        network: its linear layers are complex.
        inputs: ``(batch, ...)``, for a dry forward pass.

    Raises:
        ConfigurationError: names the first module that does not.
    """
    rule = "Expected only elementwise operations between linear layers when keys are 'complex', but"
    remedy = "Set keys to 'binary', or use activations and dropout only."
    after: list[nn.Module] = []

    def check(part: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(part, ComplexLinear):
            after.append(part)
        elif after and not _treats_halves_alike(part, args):
            name = next(name for name, other in network.named_modules() if other is part)
            raise ConfigurationError(f"{rule} {name} ({type(part).__name__}) is not. {remedy}")

    handles = [
        part.register_forward_pre_hook(check)
        for part in network.modules()
        if isinstance(part, ComplexLinear)
        or not (isinstance(part, TaskModule) or any(True for _ in part.children()))
    ]
    try:
        with torch.no_grad(), evaluation_mode(network):
            network(inputs)
    except ConfigurationError:
        raise
    except Exception as error:
        reason = f"the forward pass raised {type(error).__name__}: {error}."
        raise ConfigurationError(f"{rule} {reason} {remedy}") from error
    finally:
        for handle in handles:
            handle.remove()


def _treats_halves_alike(part: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether a module's output for the whole input equals its outputs for the two halves."""
    try:
        whole = part.forward(args[0].clone(), *args[1:])  # may be in-place
        halves = [part.forward(half.clone(), *args[1:]) for half in args[0].chunk(2, -1)]
        return torch.allclose(whole, torch.cat(halves, -1))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
