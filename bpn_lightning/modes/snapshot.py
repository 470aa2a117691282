"""A bundle in memory: never changed, so that any number of threads may answer from it."""

import copy
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.modes.bundle import ACCURACY, FRONT, MODEL, Bundle, structure_of
from bpn_lightning.modes.chain import Chain
from bpn_lightning.modes.folding import fold_layers
from bpn_lightning.modes.joining import from_backbone, gate_records, parts_of
from bpn_lightning.modes.networks import build_network
from bpn_lightning.modes.splitting import assembled, fill
from bpn_lightning.nn.answering import AnsweringNetwork
from bpn_lightning.nn.common_normalization import CommonNormalization
from bpn_lightning.nn.head import BY_COLUMN
from bpn_lightning.nn.inference import FixedModeNetwork
from bpn_lightning.preparation import Preparation, find_preparation, prepare_raw

__all__ = ["Snapshot"]


class Snapshot:
    """What a bundle answers.

    Args:
        bundle: as it was read.
        backbone: that its weights are put into; None: the one that it names.
        trust: import paths that it may name.
        device: where it answers.

    Attributes:
        names: of its tasks, in the order of their IDs.
        ids: of its tasks.
        learned: places in the table of the tasks that are learned.
        gates: kind, arguments and state of each gate.
        places_by_id: places in the table by task ID, -1 where there is no such task.
        outside: which columns take no part in each task's mode, ``(tasks, num_classes)``; None: all do.
        classes: the name of each of the head's columns.

    Raises:
        CheckpointError: a file does not fit the network, or the network needs trust.
    """

    def __init__(
        self,
        bundle: Bundle,
        backbone: nn.Module | None = None,
        trust: Collection[str] = (),
        device: str | torch.device = "cpu",
    ) -> None:
        structure = structure_of(bundle, compact=True)
        held = None if bundle.record.get("pretrained") else bundle.shared_bytes
        if backbone is None:
            made = build_network(bundle.record["network"], trust, held)
        else:
            made = copy.deepcopy(backbone)
        network = AnsweringNetwork(made, structure.mask)
        parts = parts_of(bundle, structure)
        parts.shared |= from_backbone(bundle.record.get("pretrained", []), network)
        fill(network, structure, parts)
        entries = [*bundle.tasks.values()]
        places = range(len(entries))
        network.opened = max((p for p in places if entries[p].progress != "planned"), default=-1)
        network.closed = max((p for p in places if entries[p].progress == "learned"), default=-1)
        self.gates = gate_records(bundle)
        self.structure = network.structure
        self.names = [*bundle.tasks]
        self.ids = [one.task.id for one in entries]
        self.learned = [p for p in places if entries[p].progress == "learned"]
        self.device = torch.device(device)
        self.apart = network._kept_apart() if entries else []
        self._weights = _own_weights(network)
        network.weight_bank = None
        network.switch(0)
        network.requires_grad_(False).eval().to(self.device)
        self._chain = None if self._weights else Chain.of(network)
        self.bundle = _sharing_tensors(bundle, network)
        self._network = network
        self._dtype = network.built_head.weight.dtype
        self._of_thread = threading.local()
        self.outside = _outside(network, parts.spare)
        self.places_by_id = self._lookup()
        common = Preparation.of_record(bundle.record["structure"]["preparation"])
        own = self.structure.preparations
        # The first task's normalization, also where that task was removed.
        gone = not own or replace(own[0], tasks=1) != replace(common, tasks=1)
        self.common = CommonNormalization([common, *own] if gone else own)
        self._first = int(gone)
        self.classes = self._class_names()

    # --- tasks -----------------------------------------------------------------------------------

    def place(self, task: str | int) -> int:
        """A task's place in the table.

        Raises:
            ConfigurationError: there is no such task; lists those that there are.
        """
        known: Sequence[Any] = self.names if isinstance(task, str) else self.ids
        if isinstance(task, bool) or task not in known:
            listed = [f"{n} ({i})" for n, i in zip(self.names, self.ids, strict=True)]
            shown = ", ".join(listed[:20]) + (" ..." if len(listed) > 20 else "")
            raise ConfigurationError(
                f"Expected task to be one of {shown or 'the tasks, of which there are none'}, but got "
                f"{task!r:.80}.{did_you_mean(str(task), self.names)}"
            )
        return known.index(task)

    def places(self, tasks: Any, samples: int) -> Tensor:
        """The places in the table of the tasks of a batch, ``(batch,)`` int64.

        Args:
            tasks: ``(batch,)`` IDs, integers in a tensor, an array or a list; or names in an array or a list.
            samples: how many there have to be.

        Raises:
            ConfigurationError: they are of another length or type, or one of them is none.
        """
        if isinstance(tasks, np.ndarray) and tasks.dtype.kind == "U":
            tasks = tasks.tolist()
        if isinstance(tasks, list | tuple) and any(isinstance(one, str) for one in tasks):
            tasks = [self.ids[self.place(one)] for one in tasks]
        try:
            if isinstance(tasks, list | tuple) and any(isinstance(one, bool) for one in tasks):
                raise TypeError("a truth value is no ID")
            ids = torch.as_tensor(tasks)
            if ids.is_meta or ids.layout != torch.strided:
                raise TypeError("a tensor without values, or a sparse one")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigurationError(
                f"Expected task to be a name, an ID, or an ID for each input, but got {tasks!r:.80}."
            ) from error
        if ids.shape == (0,) == (samples,):
            ids = ids.long()
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ConfigurationError(
                f"Expected task to hold IDs, which are integers, but got {ids.dtype}. Convert them: "
                "task.long()."
            )
        if ids.shape != (samples,):
            raise ConfigurationError(
                f"Expected task to be one ID, or one for each of the {samples} inputs, but got the shape "
                f"{tuple(ids.shape)}."
            )
        ids = ids.to(self.device, torch.int64)
        if samples:
            low, high = torch.stack(ids.aminmax()).tolist()
            if low < 0 or high >= len(self.places_by_id):
                self.place(low if low < 0 else high)
        if len(self.ids) == len(self.places_by_id):  # each ID is its place
            return ids
        found = self.places_by_id.index_select(0, ids)
        if bool((found < 0).any()):
            self.place(int(ids[found < 0][0]))
        return found

    def _lookup(self) -> Tensor:
        table = torch.full((max(self.ids, default=0) + 1,), -1, dtype=torch.int64)
        table[self.ids] = torch.arange(len(self.ids))
        return table.to(self.device)

    def _class_names(self) -> list[str]:
        found = [""] * self.structure.num_classes
        for task in self.structure.tasks:
            found[slice(*task.columns)] = task.class_names
        return found

    # --- inputs ----------------------------------------------------------------------------------

    def prepared(self, images: Tensor, places: "int | Tensor") -> Tensor:
        """Raw inputs as the network takes them, ``(batch, *input_shape)``.

        Raises:
            ConfigurationError: the inputs are of another shape, type or range, or their preparation is code.
        """
        self.check_preparable()
        front = self._network.front
        if front is None:
            return prepare_raw(self.structure.preparations, images, places)
        features: Tensor = front(self.as_gates_see(images, places))
        return features

    def as_gates_see(self, images: Tensor, places: "int | Tensor") -> Tensor:
        """Raw inputs under the first task's normalization, before the front."""
        return prepare_raw(self.common.preparations, images, places + self._first)

    def features(self, images: Tensor) -> Tensor:
        """What gates look at, ``(batch, d)``: the front's features, or the inputs, flattened."""
        inputs = self.as_gates_see(images, 0)
        front = self._network.front
        return (inputs if front is None else front(inputs)).flatten(1)

    def check_preparable(self) -> None:
        """Refuse a preparation that a file cannot hold."""
        code = next((one.code for one in self.structure.preparations if one.steps is None), "")
        if code:
            raise ConfigurationError(
                f"Expected a bundle whose preparation a file can hold, but its inputs go through {code}, which "
                "is code. Prepare them yourself, and call net.answer(inputs, task)."
            )

    def one_preparation(self) -> bool:
        """Whether all tasks prepare a raw input alike."""
        own = self.structure.preparations
        return len(own) == 1 and not own[0].differs_by_task

    def batch(self, images: Any, place: int) -> tuple[Any, bool]:
        """Raw inputs as a batch on the device, and whether it is of one input alone."""
        own, _ = find_preparation(self.structure.preparations, place)
        images = _as_tensor(images, own)
        if images.layout != torch.strided or images.is_meta:
            raise ConfigurationError(
                f"Expected images to be a dense tensor with values, but got one of layout {images.layout} on "
                f"{images.device}. Convert it: images.to_dense()."
            )
        single = own.is_one(images)
        return (images[None] if single else images).to(self.device), single

    # --- answers ---------------------------------------------------------------------------------

    @property
    def network(self) -> AnsweringNetwork:
        """This thread's network: its layers remember a mode, its tensors are everybody's."""
        found: AnsweringNetwork | None = getattr(self._of_thread, "network", None)
        if found is None:
            found = self._of_thread.network = _replica(self._network)
        return found

    def logits(self, inputs: Tensor, places: "int | Tensor") -> Tensor:
        """Logits ``(batch, num_classes)`` of prepared inputs, -inf for columns that take no part.

        Args:
            inputs: of :meth:`prepared`.
            places: of all inputs, or ``(batch,)``, of each.
        """
        if isinstance(places, int):
            logits = self._of_one(inputs, places)
        elif self.apart or self._weights:
            order = places.argsort(stable=True)
            each = sorted(set(places.tolist())) or [0]
            found = [self._of_one(inputs[places == p], p) for p in each]
            logits = torch.cat(found)[order.argsort()]
        else:
            logits = self._computed(inputs, places)
        if self.outside is None:
            return logits
        return logits.masked_fill(self.outside[places], float("-inf"))

    def _computed(self, inputs: Tensor, places: "int | Tensor") -> Tensor:
        """Logits of all open columns, of a network whose tasks share its weights."""
        if self._chain is not None:
            if inputs.is_floating_point():
                inputs = inputs.to(self._dtype)
            return self._chain(inputs, places)
        network = self._switched(places)
        return network.all_logits(inputs)

    def _of_one(self, inputs: Tensor, place: int) -> Tensor:
        if not self._weights:
            return self._computed(inputs, place)
        network = self._switched(place)
        own = {f"of.{name}": value for name, value in self._weights[place].items()}
        logits: Tensor = functional_call(_Whole(network), own, (inputs,))
        return logits

    def _switched(self, places: "int | Tensor") -> AnsweringNetwork:
        """This thread's network, in a mode."""
        network = self.network
        network.switch(places)
        if isinstance(places, int) and network.mask == "task":
            # Products of another width are rounded differently.
            network.built_head.open_outputs(network.columns(places)[1])
        return network

    def folded(self, place: int) -> nn.Module:
        """One task's network without modes, of inputs that are prepared."""
        source = self.network
        source.switch(place)
        columns = torch.arange(self.structure.num_classes)
        outside = self.outside
        gone = [] if outside is None else columns[outside[place].cpu()].tolist()
        fixed = FixedModeNetwork(
            source.backbone,
            source.built_head,
            [(0, self.structure.num_classes)],
            source.front,
            gone,
        )
        if self._weights:
            fixed.load_state_dict(self._weights[place], strict=False)
        fold_layers(fixed, place)
        return fixed

    @property
    def has_own_weights(self) -> bool:
        """Whether each task has a whole set of weights."""
        return bool(self._weights)

    def shared_state(self) -> Mapping[str, Tensor]:
        """Weights that all tasks share, with the rows of all tasks in the head."""
        return assembled(self.structure, parts_of(self.bundle, self.structure))

    @property
    def nbytes(self) -> int:
        """Bytes of weights in memory."""
        held = {**self._network.state_dict(keep_vars=True)}
        sizes = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in held.values()
            if isinstance(t, Tensor)
        }
        own = [v.nbytes for one in self._weights for v in one.values()]
        return sum(sizes.values()) + sum(own)


class _Whole(nn.Module):
    """A network whose forward is all of its logits."""

    def __init__(self, of: AnsweringNetwork) -> None:
        super().__init__()
        self.of = of

    def forward(self, inputs: Tensor) -> Tensor:
        return self.of.all_logits(inputs)


def _own_weights(network: AnsweringNetwork) -> list[Mapping[str, Tensor]]:
    """Each task's own set of weights, where tasks have such."""
    bank = network.weight_bank
    if bank is None:
        return []
    return [bank.learned.get(task, bank.beginning) for task in range(len(network.tasks))]


def _sharing_tensors(bundle: Bundle, network: AnsweringNetwork) -> Bundle:
    """A bundle with the network's tensors in place of its own, so that memory holds them once.

    The accuracy matrix, which grows with the square of the number of tasks, is left out: nothing answers from it.
    """
    own = {n: v for n, v in network.state_dict().items() if isinstance(v, Tensor)}
    files = {name: part for name, part in bundle.files.items() if name != ACCURACY}
    for name in {MODEL, FRONT} & files.keys():
        files[name] = {key: _shared(value, own.get(key)) for key, value in files[name].items()}
    keys = {key for one in bundle.tasks.values() for key in one.tensors}
    banks = {key: own[key].unbind() for key in keys & own.keys() if own[key].dim()}
    tasks = {}
    for place, (name, one) in enumerate(bundle.tasks.items()):
        tensors = {}
        for key, value in one.tensors.items():
            rows = None
            if key in BY_COLUMN:
                rows = own[key][slice(*one.task.columns)]
            elif key in banks and value.dim():
                rows = banks[key][place][: value.shape[0]]
            tensors[key] = _shared(value, rows)
        tasks[name] = replace(one, tensors=tensors)
    return replace(bundle, files=files, tasks=tasks)


def _shared(value: Tensor, own: Tensor | None) -> Tensor:
    """The network's tensor, which was filled with this one, where it is of the same kind and on the same device."""
    if own is None or (own.shape, own.dtype, own.device) != (
        value.shape,
        value.dtype,
        value.device,
    ):
        return value
    return own


def _replica(network: AnsweringNetwork) -> AnsweringNetwork:
    """A copy that shares every tensor."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def _outside(network: AnsweringNetwork, spare: Sequence[Sequence[int]]) -> Tensor | None:
    """Which columns take no part in each task's mode, ``(tasks, num_classes)`` bool; None: all do."""
    structure = network.structure
    number = structure.num_classes
    nobody = torch.ones(number, dtype=torch.bool)
    for first, stop in [*spare, *(task.columns for task in structure.tasks)]:
        nobody[first:stop] = False
    columns = torch.arange(number)
    edges = torch.tensor([network.columns(task.id) for task in structure.tasks]).view(-1, 2)
    table = (columns < edges[:, :1]) | (columns >= edges[:, 1:]) | nobody
    return table.to(network.built_head.weight.device) if bool(table.any()) else None


def _of_arrays(images: Any) -> bool:
    return isinstance(images, list | tuple) and all(isinstance(one, np.ndarray) for one in images)


def _as_tensor(images: Any, own: Preparation) -> Any:
    """Arrays as tensors; images whose channels come last are turned."""
    if isinstance(images, Tensor):
        return images
    try:
        if hasattr(images, "__array__") or _of_arrays(images):
            images = np.array(
                images
            )  # a copy: torch takes no negative strides, and warns of read-only ones
        found = torch.as_tensor(images)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = f" of {images.dtype}" if isinstance(images, np.ndarray) else ""
        raise ConfigurationError(
            f"Expected images to be a tensor or an array of numbers, but got {type(images).__name__}{kind}. Pass "
            "np.asarray(image) of an image, and np.stack([...]) of several."
        ) from error
    channels = own.shape[0] if len(own.shape) == 3 else 0
    if channels and found.dim() in (3, 4) and found.shape[-1] == channels != found.shape[-3]:
        found = found.movedim(-1, -3)
    return found
