"""A bundle for other runtimes: ONNX with a task for each sample or an adapter for each task, torch's own, peft.

All hold the head of all tasks: adding a task makes the files anew.
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
from bpn_lightning.modes.graphs import BaseGraph, MixedGraph, copied, tables_of
from bpn_lightning.modes.net import Modes
from bpn_lightning.modes.snapshot import Snapshot
from bpn_lightning.nn.layers import TaskModule, is_linear
from bpn_lightning.nn.pretrained import import_extra
from bpn_lightning.tasks import dry_inputs

__all__ = ["peft_base", "write_onnx", "write_peft", "write_state_dict", "write_torch_export"]

MIXED = "mixed"

# --- ONNX ----------------------------------------------------------------------------------------


def write_onnx(net: Modes, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ONNX files for inputs that are prepared, into a folder whose files are replaced.

    ``mixed.onnx`` takes inputs ``(batch, *input_shape)`` and task IDs ``(batch,)`` int64; where a batch can only have
    one task, there is ``<name>.onnx`` of inputs for each task. Where tasks have biases alone, ``base.onnx`` takes inputs, and a task's ``<name>.onnx_adapter`` as an adapter of ONNX Runtime; without
    one it answers as the first task. The head of all tasks is in both networks.

    Args:
        net: a bundle that was loaded.
        folder: such as ``onnx`` in the bundle's folder.

    Returns:
        The files.

    Raises:
        ConfigurationError: a package is not installed.
        ResultsError: it cannot be written.
    """
    onnx = import_extra("onnx", "onnx", "ONNX files")
    import_extra("onnxscript", "onnx", "ONNX files")
    now = net.now
    with _replaced(Path(folder)) as place:
        for name, network, given in _graphs(now):
            _to_onnx(network, given, ["inputs", "tasks"][: len(given)], place / f"{name}.onnx")
        attached = now.structure.attached
        if attached and all(one.part == "bias_units" for one in attached):
            _write_adapters(onnx, now, _inputs(now), place)
    return sorted(Path(folder).iterdir())


def _graphs(now: Snapshot) -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    """Name, module and example inputs of ``mixed``, or of each task where a batch can only have one."""
    inputs = _inputs(now)
    if now.apart or now.has_own_weights:
        for place, name in enumerate(now.names):
            yield name, now.folded(place).cpu(), (inputs,)
    else:
        yield MIXED, MixedGraph(now), (inputs, torch.tensor(now.ids[:1] * 2))


def _inputs(now: Snapshot) -> Tensor:
    return dry_inputs(_sized(now), 2, torch.device("cpu"))


def _dynamic(given: tuple[Tensor, ...], batched: int) -> Any:
    batch = {0: torch.export.Dim.DYNAMIC}
    return tuple(batch if n < batched else {} for n in range(len(given)))


def _sized(now: Snapshot) -> Any:
    front = now.network.front
    if front is None:
        return now.structure
    sized = copy.copy(now.structure)
    sized.input_shape, sized.input_dtype = tuple(front.input_shape or ()), torch.float32
    return sized


def _to_onnx(
    network: nn.Module,
    given: tuple[Tensor, ...],
    names: list[str],
    path: Path,
    dynamic: Any = None,
) -> None:
    dynamic = dynamic or _dynamic(given, len(given))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes .* were assigned during export")
        torch.onnx.export(
            network.eval(), given, path, dynamo=True, dynamic_shapes=dynamic, input_names=names,
            output_names=["logits"], verbose=False, external_data=False,
        )  # fmt: skip


def _write_adapters(onnx: Any, now: Snapshot, inputs: Tensor, place: Path) -> None:
    """``base.onnx``, whose biases are inputs with the first task's as their default, and adapters."""
    ort = import_extra("onnxruntime", "onnx", "adapters of ONNX Runtime")
    tables = tables_of(now)
    first = {name: table[:1].contiguous() for name, table in tables.items()}
    path = place / "base.onnx"
    given = (inputs, *first.values())
    one = _dynamic(given, 1)
    _to_onnx(BaseGraph(now), given, ["inputs", *first], path, (*one[:2], one[2:]))
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


# --- torch ---------------------------------------------------------------------------------------


def write_torch_export(net: Modes, folder: str | os.PathLike[str]) -> list[Path]:
    """Write programs of ``torch.export`` for inputs that are prepared, into a folder whose files are replaced.

    ``mixed.pt2`` takes inputs ``(batch, *input_shape)`` and task IDs ``(batch,)`` int64, and gives logits ``(batch,
    num_classes)``; where a batch can only have one task, there is ``<name>.pt2`` of inputs for each task.
    ``torch.export.load`` reads them.

    Returns:
        The files.

    Raises:
        ResultsError: it cannot be written.
    """
    now = net.now
    with _replaced(Path(folder)) as place, torch.no_grad():
        for name, network, given in _graphs(now):
            dynamic = _dynamic(given, len(given))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The tensor attributes .* were assigned during")
                program = torch.export.export(network.eval(), given, dynamic_shapes=dynamic)
            with open(place / f"{name}.pt2", "xb") as file:
                torch.export.save(program, file)
    return sorted(Path(folder).iterdir())


def write_state_dict(net: Modes, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the weights of each task's folded network, into a folder whose files are replaced.

    ``<name>.safetensors`` is what ``load_state_dict`` of ``nn.Sequential(OrderedDict(backbone=..., head=nn.Linear(...)))``
    takes, with the run's backbone; a front's weights begin with ``front.``. The head has all columns; ``columns`` in
    ``tasks.json`` says which are a task's.

    Returns:
        The files of the tasks.

    Raises:
        ConfigurationError: a layer does not fold into one of torch's.
        ResultsError: it cannot be written.
    """
    now = net.now
    with _replaced(Path(folder)) as place:
        for number, name in enumerate(now.names):
            network = now.folded(number).cpu()
            left = [n for n, part in network.named_modules() if isinstance(part, TaskModule)]
            if left:
                raise ConfigurationError(
                    f"Expected layers whose modes fold into torch's own where a state_dict is written, but {left[0]} "
                    "of this network does not. Load the bundle by bpn_lightning.modes.load, or export it to ONNX or "
                    "with torch.export."
                )
            state = {n: v for n, v in network.state_dict().items() if n != "outside"}
            save_file({n: v.contiguous() for n, v in state.items()}, place / f"{name}.safetensors")
        _write_columns(now, place)
    return [Path(folder) / f"{name}.safetensors" for name in now.names]


def _write_columns(now: Snapshot, place: Path) -> None:
    columns = {n: list(t.columns) for n, t in zip(now.names, now.structure.tasks, strict=True)}
    (place / "tasks.json").write_text(json.dumps({"columns": columns}), encoding="utf-8")


# --- peft ----------------------------------------------------------------------------------------


def peft_base(net: Modes) -> nn.Module:
    """The network that peft puts a task's biases into: prepared inputs to logits of all columns.

    Its parts are ``backbone`` and ``head``, its layers torch's own, its biases those that tasks share.

    Raises:
        ConfigurationError: tasks have more than biases of linear layers.
    """
    now = net.now
    _check_peft(now)
    network = copied(now)
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
        _write_columns(now, place)
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
WRITERS: dict[str, Callable[[Modes, Path], list[Path]]] = {
    "onnx": write_onnx,
    "peft": write_peft,
    "state_dict": write_state_dict,
    "torch_export": write_torch_export,
}
