"""Parameter superposition: the networks of all tasks in one set of weights, each behind its key."""

from collections.abc import Mapping, Sequence
from math import pi
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bpn_lightning.costs import DeclaredBytes, HeldTensors, tensor_bytes
from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.layers import ComplexLinear, Keys, TaskModule, evaluation_mode
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import ContinualStream, dry_inputs

__all__ = ["KeyKind", "ParameterSuperposition", "binary_key", "phase_key", "turned"]

KeyKind = Literal["binary", "complex", "ones"]
KINDS = ("binary", "complex", "ones")


def binary_key(size: int, generator: torch.Generator) -> Tensor:
    """``(size,)`` signs, 1 or -1 with the same probability."""
    return torch.randint(2, (size,), generator=generator, dtype=torch.int8) * 2 - 1


def phase_key(size: int, generator: torch.Generator) -> Tensor:
    r"""``(size,)`` phases, uniform between :math:`-\pi` and :math:`\pi`."""
    return (torch.rand(size, generator=generator) * 2 - 1) * pi


def turned(weight: Tensor, phases: Tensor) -> tuple[Tensor, Tensor]:
    r"""Real and imaginary part of :math:`w e^{i \varphi}`."""
    return weight * phases.cos(), weight * phases.sin()


class ParameterSuperposition(ContinualStrategy):
    r"""One set of weights holds the networks of all tasks, each behind a key of random signs.

    .. math:: y = W (x \odot k_t) + b, \quad k_t \in \{-1, 1\}^n; \qquad
              W \odot k_t = W_t + \sum_{s \neq t} W_s \odot k_s \odot k_t

    Cheung, Terekhov, Chen, Agrawal, Olshausen, "Superposition of many models into one" (2019),
    https://arxiv.org/abs/1902.05522; the first equation is in Alg. 3 of Wen et al. The key multiplies
    what enters a layer, which is the same as multiplying each row of its weights. What other tasks have
    written into the weights then arrives with random signs, as noise of mean 0. With ``complex`` keys
    :math:`k_t = e^{i \varphi_t}`, weights and activations are complex, nonlinearities act on real and
    imaginary parts separately, and the logits are real parts.

    Differs from the published code: keys are never learned, are the same on every machine (drawn by
    seed, task and layer), and biases are added (without a key). Complex weights begin with the modulus
    that the network gives them, not with Xavier's, and with uniform phases.

    Args:
        keys: ``binary``, ``complex``, or ``ones``: the control, which is fine-tuning.
        layers: names of the linear layers and convolutions to key (``"head"`` and names within
            ``backbone``); by default every linear layer, the head among them, as in Wen et al. The keys
            of a convolution multiply its weights, one sign for each place of its patches.
        key_input: whether the default includes the first layer of the network, where it is linear: its
            key multiplies the pixels.
        key_output: whether the default includes the head.
        first_key: ``random``, or ``ones``: the first task starts as the network that it is given, such
            as a pretrained one. (Loading W times a random first key instead is the same training in
            other coordinates.)

    State:
        in the module, per keyed layer of n inputs (a convolution has
        :math:`C_{in} k_h k_w`): a bank (T, n) of signs, n bytes for each task; complex: of phases,
        4 n bytes for each task, and once the imaginary parts of the weights, as large as the weights.

    Raises:
        ConfigurationError: a choice is unknown or contradicts another, there is no such layer, or a
            network is not fit for complex numbers.
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
        for argument, value, known in (
            ("keys", keys, KINDS),
            ("first_key", first_key, ("random", "ones")),
        ):
            if value not in known:
                raise ConfigurationError(
                    f"Expected {argument} to be one of {', '.join(known)}, but got {value!r}."
                    f"{did_you_mean(str(value), known)}"
                )
        if layers is not None and not layers:
            raise ConfigurationError(
                "Expected layers to name at least one layer, but got none. "
                "Leave it out to key every linear layer."
            )
        if not (key_input and key_output) and layers is not None:
            flag = "key_output" if key_input else "key_input"
            raise ConfigurationError(
                f"Expected {flag} to be true where layers are named, but got false. "
                "Leave the layer out of layers."
            )
        if keys == "complex" and not (layers is None and key_input and key_output):
            raise ConfigurationError(
                "Expected layers, key_input and key_output to be left alone where keys are 'complex', "
                "since a layer that follows a complex one has to be complex too. Set keys to 'binary'."
            )
        self.kind: KeyKind = keys
        self.layers = None if layers is None else list(layers)
        self.key_input = key_input
        self.key_output = key_output
        self.first_key = first_key
        self.reset()

    def reset(self) -> None:
        """Let go of the module that has the keys."""
        self.keys: dict[str, Keys] = {}

    # --- structure -------------------------------------------------------------------------------

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Give the chosen layers keys, 1 until the stream starts."""
        names = self.layers or self._default_layers(host)
        kind = "complex" if self.kind == "complex" else "binary"
        self.keys = {name: host.network.attach_keys(name, kind) for name in names}
        if kind == "complex":
            inputs = dry_inputs(stream, 2, host.device)
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
                "Expected key_input and key_output to leave at least one layer with keys, but the "
                f"network's linear layers are {', '.join(host.network.linear_layers())}. Set one of them to true."
            )
        return names

    # --- keys ------------------------------------------------------------------------------------

    def on_stream_start(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Draw every task's keys, and the phases of complex weights; from then on they are state."""
        for name, keys in self.keys.items():
            for task in host.network.tasks:
                generator = seeded_generator("keys", stream.seed, task.id, name)
                keys.write(task.id, self._draw(keys, task.id, generator))
        if self.first_key == "random":
            for name, layer in self._complex_layers(host).items():
                generator = seeded_generator("phases of weights", stream.seed, name)
                phases = phase_key(layer.weight.numel(), generator).view(layer.weight.shape)
                with torch.no_grad():
                    real, imaginary = turned(layer.weight, phases.to(layer.weight))
                    layer.weight.copy_(real)
                    layer.weight_imag.copy_(imaginary)

    def _draw(self, keys: Keys, task_id: int, generator: torch.Generator) -> Tensor:
        """A task's key: one that changes nothing, or a random one."""
        size = keys.bank.shape[1]
        if self.kind == "ones" or (task_id == 0 and self.first_key == "ones"):
            return torch.zeros(size) if self.kind == "complex" else torch.ones(size)
        return phase_key(size, generator) if self.kind == "complex" else binary_key(size, generator)

    def _complex_layers(self, host: ContinualHost) -> dict[str, ComplexLinear]:
        layers = host.network.linear_layers().items()
        return {name: layer for name, layer in layers if isinstance(layer, ComplexLinear)}

    # --- what it costs ---------------------------------------------------------------------------

    def held_tensors(self, host: ContinualHost) -> HeldTensors:
        """The keys of all tasks, and the imaginary parts of complex weights."""
        imaginary = [layer.weight_imag for layer in self._complex_layers(host).values()]
        return HeldTensors(inference=[*(keys.bank for keys in self.keys.values()), *imaginary])

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """For training as for inference, T n per layer; complex: 4 T n, and 4 per complex weight.

        A task adds one key of each layer, as it is stored: a byte for a sign, four for a phase. The paper
        has a float for each input of each keyed layer and each output of the head; complex: two. So
        counted, three hidden layers of 300 with 3,072 inputs and 20 classes give the 15,968 bytes of its
        table, 4 (3,072 + 3 * 300 + 20), which it does not derive. Logits have no keys here.
        """
        weights = [layer.weight for layer in self._complex_layers(host).values()]
        keys = tensor_bytes(keys.bank[0] for keys in self.keys.values())
        floats = sum(keys.bank.shape[1] for keys in self.keys.values())
        if "head" in self.keys:
            floats += host.network.linear_layers()["head"].out_features
        total = len(host.network.tasks) * keys + tensor_bytes(weights)
        return DeclaredBytes(total, total, keys, floats * (8 if self.kind == "complex" else 4))


def check_elementwise(network: nn.Module, inputs: Tensor) -> None:
    """Whether what stands between complex layers treats real and imaginary parts alike.

    Every part without children that runs after a complex layer is tried on both halves of what it
    gets; what functions do in between is seen only where it changes shapes.

    Args:
        network: its linear layers are complex.
        inputs: ``(batch, ...)``, for a dry forward.

    Raises:
        ConfigurationError: names the part that does not.
    """
    rule = "Expected a network that works element by element between linear layers where keys are 'complex', but"
    remedy = "Set keys to 'binary', or use activations and dropout only."
    after: list[nn.Module] = []

    def look(part: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(part, ComplexLinear):
            after.append(part)
        elif after and not _treats_halves_alike(part, args):
            name = next(name for name, other in network.named_modules() if other is part)
            raise ConfigurationError(f"{rule} {name} ({type(part).__name__}) does not. {remedy}")

    handles = [
        part.register_forward_pre_hook(look)
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
        said = f"its forward raised {type(error).__name__}: {error}."
        raise ConfigurationError(f"{rule} {said} {remedy}") from error
    finally:
        for handle in handles:
            handle.remove()


def _treats_halves_alike(part: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether a part gives the halves of its input what it gives the whole."""
    try:
        whole = part.forward(args[0].clone(), *args[1:])  # it may work in place
        halves = [part.forward(half.clone(), *args[1:]) for half in args[0].chunk(2, -1)]
        return torch.allclose(whole, torch.cat(halves, -1))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
