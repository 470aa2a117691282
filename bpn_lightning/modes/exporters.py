"""A bundle for other runtimes: ONNX with a task for each sample or an adapter for each task, and peft.

Both hold the head of all tasks: adding a task makes the files anew.
"""

import copy
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.modes.folding import make_plain
from bpn_lightning.modes.net import Modes
from bpn_lightning.modes.snapshot import Snapshot
from bpn_lightning.nn.answering import AnsweringNetwork
from bpn_lightning.nn.inference import closed_columns_added
from bpn_lightning.nn.layers import BiasUnits, TaskModule, is_linear
from bpn_lightning.nn.pretrained import import_extra
from bpn_lightning.tasks import dry_inputs

__all__ = ["peft_base", "write_onnx", "write_peft"]

OUTSIDE = "outside"


# --- ONNX ----------------------------------------------------------------------------------------


class _Mixed(nn.Module):
    """Prepared inputs and task IDs to logits; NaN for IDs that are none."""

    places: Tensor

    def __init__(self, now: Snapshot) -> None:
        super().__init__()
        self.network = _copied(now)
        self.register_buffer("places", now.places_by_id.cpu())
        self.register_buffer(OUTSIDE, _rows_outside(now))
        self.parts = [part for part in self.network.modules() if isinstance(part, TaskModule)]
        self.network.built_head.open_outputs(None)

    def forward(self, inputs: Tensor, tasks: Tensor) -> Tensor:
        inside = (tasks >= 0) & (tasks < len(self.places))
        places = self.places[torch.where(inside, tasks, 0)]
        inside = inside & (places >= 0)
        places = torch.where(inside, places, 0)
        for part in self.parts:
            part.switch(places)
        logits = _logits(self.network, inputs) + self.get_buffer(OUTSIDE)[places]
        return logits.masked_fill(~inside[:, None], float("nan"))


class _Base(nn.Module):
    """Prepared inputs, biases of one task and 0 or -inf for each column, to logits."""

    def __init__(self, now: Snapshot) -> None:
        super().__init__()
        self.network = _copied(now)
        self.network.built_head.open_outputs(None)
        self.units = [part for part in self.network.modules() if isinstance(part, BiasUnits)]

    def forward(self, inputs: Tensor, outside: Tensor, *rows: Tensor) -> Tensor:
        for part, row in zip(self.units, rows, strict=True):
            part.rows = row
        try:
            return _logits(self.network, inputs) + outside
        finally:
            for part in self.units:
                part.rows = None


def _copied(now: Snapshot) -> AnsweringNetwork:
    network = copy.deepcopy(now.network).cpu()
    return network.requires_grad_(False).eval()


def _logits(network: AnsweringNetwork, inputs: Tensor) -> Tensor:
    if network.front is not None:
        inputs = network.front.standardized(inputs)
    head = network.built_head
    logits: Tensor = head(network.backbone(inputs))
    return closed_columns_added(logits, head.out_features)


def _rows_outside(now: Snapshot) -> Tensor:
    """0, or -inf for the columns that take no part in a task's mode, ``(tasks, num_classes)``."""
    zeros = torch.zeros(len(now.names), now.structure.num_classes)
    found = now.outside
    return zeros if found is None else zeros.masked_fill(found.cpu(), float("-inf"))


def write_onnx(net: Modes, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ONNX files for inputs that are prepared, into a folder whose files are replaced.

    ``mixed.onnx`` takes inputs ``(batch, *input_shape)`` and task IDs ``(batch,)`` int64. Where tasks have biases
    alone, ``base.onnx`` takes inputs, and a task's ``<name>.onnx_adapter`` as an adapter of ONNX Runtime; without
    one it answers as the first task. The head of all tasks is in both networks.

    Args:
        net: a bundle that was loaded.
        folder: such as ``onnx`` in the bundle's folder.

    Returns:
        The files.

    Raises:
        ConfigurationError: a layer takes one task at a time, or a package is not installed.
        ResultsError: it cannot be written.
    """
    onnx = import_extra("onnx", "onnx", "ONNX files")
    import_extra("onnxscript", "onnx", "ONNX files")
    now = net.now
    if now.apart or now.has_own_weights:
        what = "a whole network for each task" if now.has_own_weights else now.apart[0]
        raise ConfigurationError(
            f"Expected layers that take a task for each sample where ONNX files are written, but this network has "
            f"{what}. Export the network of one task at a time: torch.onnx.export(net.fold(task), ...)."
        )
    with _replaced(Path(folder)) as place:
        inputs = dry_inputs(_sized(now), 2, torch.device("cpu"))
        _to_onnx(
            _Mixed(now),
            (inputs, torch.tensor(now.ids[:1] * 2)),
            ["inputs", "tasks"],
            2,
            place / "mixed.onnx",
        )
        if all(one.part == "bias_units" for one in now.structure.attached) and now.banks:
            _write_adapters(onnx, now, inputs, place)
    return sorted(Path(folder).iterdir())


def _sized(now: Snapshot) -> Any:
    front = now.network.front
    if front is None:
        return now.structure
    sized = copy.copy(now.structure)
    sized.input_shape, sized.input_dtype = tuple(front.input_shape or ()), torch.float32
    return sized


def _to_onnx(
    network: nn.Module, given: tuple[Tensor, ...], names: list[str], batched: int, path: Path
) -> None:
    batch = {0: torch.export.Dim.DYNAMIC}
    shapes = [batch if n < batched else {} for n in range(len(given))]
    dynamic: Any = tuple(shapes)
    if batched == 1:
        dynamic = (batch, {}, tuple({} for _ in given[2:]))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes .* were assigned during export")
        torch.onnx.export(
            network.eval(), given, path, dynamo=True, dynamic_shapes=dynamic, input_names=names,
            output_names=["logits"], verbose=False, external_data=False,
        )  # fmt: skip


def _write_adapters(onnx: Any, now: Snapshot, inputs: Tensor, place: Path) -> None:
    """``base.onnx``, whose biases are inputs with the first task's as their default, and adapters."""
    ort = import_extra("onnxruntime", "onnx", "adapters of ONNX Runtime")
    banks = now.banks
    assert banks is not None
    outside = _rows_outside(now)
    tables = {OUTSIDE: outside}
    tables |= {name: banks.table[:, a:b].cpu() for name, a, b in banks.places}
    first = {name: table[:1].contiguous() for name, table in tables.items()}
    path = place / "base.onnx"
    _to_onnx(_Base(now), (inputs, *first.values()), ["inputs", *first], 1, path)
    model = onnx.load(path)
    kept = {one.name for one in model.graph.input}
    for name, value in first.items():
        if name in kept:
            model.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))
    onnx.save(model, path)
    for number, task in enumerate(now.names):
        adapter = ort.AdapterFormat()
        adapter.set_adapter_version(1)
        adapter.set_model_version(1)
        values = {
            n: t[number : number + 1].contiguous().numpy() for n, t in tables.items() if n in kept
        }
        adapter.set_parameters(
            {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()}
        )
        adapter.export_adapter(str(place / f"{task}.onnx_adapter"))


# --- peft ----------------------------------------------------------------------------------------


def peft_base(net: Modes) -> nn.Module:
    """The network that peft puts a task's biases into: prepared inputs to logits of all columns.

    Its parts are ``backbone`` and ``head``, its layers torch's own, its biases those that tasks share.

    Raises:
        ConfigurationError: tasks have more than biases of linear layers.
    """
    now = net.now
    _check_peft(now)
    network = _copied(now)
    network.built_head.open_outputs(None)
    shared = now.shared_state()
    for name, part in list(network.named_modules()):
        if getattr(part, "bias_units", None) is not None or name == "head":
            bias = shared.get(f"{name}.bias")
            make_plain(part)
            part.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
    found = nn.Sequential()
    found.add_module("backbone", network.backbone)
    found.add_module("head", network.built_head)
    return found


def write_peft(net: Modes, folder: str | os.PathLike[str]) -> list[Path]:
    """Write a BEFT adapter of peft for each task, into a folder whose files are replaced.

    ``<name>/`` is what ``PeftModel.from_pretrained(peft_base(net), folder / name)`` loads. The head of all tasks is in
    ``base.safetensors``, and peft leaves no column out: ``columns`` in ``tasks.json`` says which a task's are.

    Returns:
        The folders of the tasks.

    Raises:
        ConfigurationError: tasks have more than biases of linear layers.
        ResultsError: it cannot be written.
    """
    now = net.now
    base = peft_base(net)
    layers = [str(one.arguments["layer"]) for one in now.structure.attached]
    with _replaced(Path(folder)) as place:
        save_file(
            {n: v.contiguous() for n, v in base.state_dict().items()}, place / "base.safetensors"
        )
        columns = {n: list(t.columns) for n, t in zip(now.names, now.structure.tasks, strict=True)}
        (place / "tasks.json").write_text(json.dumps({"columns": columns}), encoding="utf-8")
        for name, files in now.bundle.tasks.items():
            (place / name).mkdir()
            config = {
                "peft_type": "BEFT",
                "base_model_name_or_path": None,
                "inference_mode": True,
                "target_modules": layers,
                "init_weights": True,
            }
            (place / name / "adapter_config.json").write_text(
                json.dumps(config, indent=1), encoding="utf-8"
            )
            rows = {}
            for layer in layers:
                row = files.tensors[f"{layer}.bias_units.bank"]
                outputs: Any = base.get_submodule(layer)
                padded = nn.functional.pad(row, (0, outputs.out_features - len(row)))
                rows[f"base_model.model.{layer}.beft_bias"] = padded[None].contiguous()
            save_file(rows, place / name / "adapter_model.safetensors")
    return [Path(folder) / name for name in now.names]


def _check_peft(now: Snapshot) -> None:
    names = dict(now.network.named_modules())
    for one in now.structure.attached:
        layer = one.arguments.get("layer")
        if one.part == "bias_units" and is_linear(names[str(layer)]):
            continue
        what = f"{one.part} on {layer}" if layer else one.part
        raise ConfigurationError(
            f"Expected tasks with biases of linear layers alone, which peft has, but got {what}. Load the bundle by "
            "bpn_lightning.modes.load, export it to ONNX, or use net.fold(task)."
        )
    if not now.structure.attached:
        raise ConfigurationError(
            "Expected tasks with biases of linear layers, but they have none. Use net.fold(task)."
        )


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder, which takes the place of one that is there when it is complete."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except OSError as error:
        raise ResultsError(
            f"Expected to write {folder}, but got: {error}. Free some space or grant write access."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


#: What ``bpn-export`` and ``bpn-bundle`` write into a bundle, by the name of the folder.
WRITERS: dict[str, Callable[[Modes, Path], list[Path]]] = {"onnx": write_onnx, "peft": write_peft}
