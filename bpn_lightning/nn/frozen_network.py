"""A network that was trained elsewhere as a fixed feature extractor, and files of its features."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError, DataError, did_you_mean
from bpn_lightning.files.untrusted import open_untrusted
from bpn_lightning.files.writing import write_atomically
from bpn_lightning.nn.fronts import Front
from bpn_lightning.nn.weights import digest_tensors, hash_of, load_weights, read_state_dict
from bpn_lightning.random_state import seeded_generator

__all__ = ["FeatureFiles", "FrozenNetwork"]

MAX_BYTES = 4 * 10**9
"""Of all files in a folder of features, up to which more are written."""


CHUNK = 64
"""Images of a forward, whose maps would take gigabytes for a whole batch of an evaluation."""


class FrozenNetwork(Front):
    """The features of a network that was trained elsewhere, and never is here.

    One deviation divides all features, as a unit that is almost silent on the images of the first task may be
    loud on those of later ones.

    Args:
        network: maps ``(n, channels, height, width)`` to ``(n, features)``; a
            :class:`~bpn_lightning.nn.Pretrained` resizes and normalizes images as its weights need it.
        weights_file: a file with its ``state_dict``; nothing but tensors is loaded from it.
        layers: names of modules in the network whose outputs are features, too: maps ``(n, channels,
            height, width)``, averaged over height and width, or vectors. They come before the network's
            own, in the order in which they are computed.
        cache_dir: a folder where features are kept for later fits: a batch that the same network has seen
            there is not computed again. It gets up to 4 GB. None: no files.

    State:
        the network's, next to mean and deviation of its features.

    Raises:
        ConfigurationError: the network has no such layer.
        DataError: the file is missing, damaged, or of another network.
    """

    one_deviation: ClassVar[bool] = True

    def __init__(
        self,
        network: nn.Module,
        weights_file: str | None = None,
        *,
        layers: Sequence[str] = (),
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(layers=list(layers))
        self.network = network.requires_grad_(False).eval()
        self._given = weights_file is not None
        if weights_file is not None:
            self._load(Path(weights_file).expanduser())
        self.layers = list(layers)
        known = [name for name, _ in network.named_modules() if name]
        for layer in self.layers:
            if layer not in known:
                raise ConfigurationError(
                    f"Expected layers of the front to name modules of its network, but got {layer!r:.80}."
                    f"{did_you_mean(layer, known)} [name for name, _ in network.named_modules()] lists them."
                )
        folder = None if cache_dir is None else Path(cache_dir).expanduser()
        self.files = None if folder is None else FeatureFiles(folder)
        self.network_hash: str | None = None
        self.register_load_state_dict_post_hook(_forget_hash)  # type: ignore[no-untyped-call]

    def _load(self, path: Path) -> None:
        advice = "Name a file that torch.save(network.state_dict(), ...) wrote."
        what = f"{path} to hold the weights of the front's network"
        load_weights(self.network, read_state_dict(path, advice), what, advice)

    def given_state(self) -> Mapping[str, Tensor]:
        """The network's, where it was loaded from a file."""
        state = self.network.state_dict(prefix="network.") if self._given else {}
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def width(self, input_shape: Sequence[int]) -> int:
        """Found by a forward of zeros.

        Raises:
            ConfigurationError: the network takes no such inputs, or gives no vectors.
        """
        remedy = "Pass a network that gives vectors; Pretrained resizes images for one."
        rule = f"Expected the front's network to map (n, {', '.join(map(str, input_shape))}) to (n, features), but"
        held = next(chain(self.network.parameters(), self.network.buffers()), torch.empty(0))
        try:
            with torch.no_grad():
                features = self._compute(torch.zeros(1, *input_shape, device=held.device))
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigurationError(
                f"{rule} its forward raised {type(error).__name__}: {error}. {remedy}"
            ) from error
        if not isinstance(features, Tensor) or features.ndim != 2:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ConfigurationError(f"{rule} got {got} for one input. {remedy}")
        return features.shape[1]

    def extract(self, inputs: Tensor) -> Tensor:
        """Forward, or what a file has of it."""
        if self.files is None or torch.compiler.is_compiling():
            return self._compute(inputs)
        if self.network_hash is None:
            self.network_hash = self._hash(inputs)
        return self.files.look_up(self.network_hash, inputs, self._compute)

    def _compute(self, inputs: Tensor) -> Tensor:
        """A chunk of images at a time; all at once in an exported program, whose batch has any size."""
        if torch.compiler.is_compiling() or len(inputs) <= CHUNK:
            return self._forward(inputs)
        return torch.cat([self._forward(chunk) for chunk in torch.split(inputs, CHUNK)])

    def _forward(self, inputs: Tensor) -> Tensor:
        if inputs.ndim == 4:  # convolutions are faster in this order on a CPU
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        if not self.layers:
            return self.network(inputs)  # type: ignore[no-any-return]
        kept: list[Tensor] = []

        def keep(layer: nn.Module, given: Any, output: Any) -> None:
            kept.append(_pooled(output))

        with ExitStack() as hooks:
            for name in self.layers:
                hooks.enter_context(self.network.get_submodule(name).register_forward_hook(keep))
            own = self.network(inputs)
        return torch.cat([*kept, own], 1)

    def _hash(self, inputs: Tensor) -> str:
        """Of its tensors, and of what it does to noise: weights do not tell how images are resized."""
        shape = inputs.shape[1:]
        noise = torch.rand(1, *shape, generator=seeded_generator("noise")).to(inputs)
        features = {"features of noise": self._compute(noise), **self.network.state_dict()}
        return hash_of({key: value for key, value in features.items() if isinstance(value, Tensor)})


def _pooled(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim not in (2, 4):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"a layer gives {got}, neither maps nor vectors")
    return output.mean((2, 3)) if output.ndim == 4 else output


def _forget_hash(front: "FrozenNetwork", keys: Any) -> None:
    front.network_hash = None


class FeatureFiles:
    """Features of batches in files, named by the hash of the network and of the batch.

    A file has the features of a whole batch, so that they are the same bits as without it; a damaged one is
    written again.

    Args:
        folder: of the files; made if needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bytes: int | None = None

    def look_up(self, network: str, inputs: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Features of a batch from its file, which is written where there is none.

        Args:
            network: hash of what computes them.
            inputs: the batch.
            compute: gives its features, ``(batch, width)`` float32.

        Raises:
            DataError: the folder cannot be written to.
        """
        digest = blake2b(network.encode(), digest_size=16)
        digest_tensors(digest.update, {"inputs": inputs})
        path = self.folder / f"{digest.hexdigest()}.f32"
        found = _read(path, len(inputs))
        if found is not None:
            return found.to(inputs.device)
        features = compute(inputs)
        self._write(path, features)
        return features

    def _write(self, path: Path, features: Tensor) -> None:
        try:
            if self._bytes is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._bytes = sum(file.stat().st_size for file in self.folder.glob("*.f32"))
            if self._bytes + features.nbytes > MAX_BYTES:
                return
            write_atomically(path, features.detach().cpu().float().numpy().tobytes())
            self._bytes += features.nbytes
        except OSError as error:
            raise DataError(
                f"Expected cache_dir to be a folder that can be written to, but writing {path} failed with "
                f"{type(error).__name__}: {error}. Make room there, name another folder, or leave it out."
            ) from error


def _read(path: Path, count: int) -> Tensor | None:
    if not path.is_file():
        return None
    with open_untrusted(path, max_bytes=MAX_BYTES) as file:
        values = file.read()
    if not count or not values or len(values) % (4 * count):
        return None
    return torch.from_numpy(np.frombuffer(bytearray(values), np.float32)).view(count, -1)
