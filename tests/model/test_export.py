"""What is written is numbers and words, and answers as the module that it was written from."""

import errno
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from bpn_lightning import ContinualModule, export
from bpn_lightning.cli import export as export_command
from bpn_lightning.cli import main as cli
from bpn_lightning.errors import CheckpointError, ConfigurationError, ResultsError
from bpn_lightning.export import export_module, load_exported
from bpn_lightning.nn import MLP, Pretrained
from bpn_lightning.nn.structure import SCHEMA
from bpn_lightning.strategies import (
    EWC,
    IA3,
    BeneficialPerturbation,
    BitFit,
    IncrementalMomentMatching,
    IndependentNetworks,
    LoRA,
    ParameterSuperposition,
)

Fit = Callable[..., Any]


def answers(module: ContinualModule) -> list[Tensor]:
    """Of every task's mode, of the mode that holds, and of samples that have tasks of their own."""
    inputs = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        by_task = [module(inputs, task=task) for task in range(len(module.tasks))]
        return [*by_task, module(inputs), module(inputs, task=torch.tensor([0, 1, 1, 0, 1, 0]))]


@pytest.mark.parametrize(
    ("strategies", "mask"),
    [
        ([BeneficialPerturbation(rank=4), EWC()], "all"),
        ([BeneficialPerturbation(rank=4), ParameterSuperposition()], "seen"),
        ([ParameterSuperposition(keys="complex")], "all"),
        ([BitFit(), IA3(), LoRA(2, alpha=3.0)], "all"),
        ([IndependentNetworks()], "all"),
        ([IncrementalMomentMatching()], "task"),
        ([], "task"),
    ],
    ids=["bd+ewc", "bd+psp", "complex psp", "bitfit+ia3+lora", "stl", "imm", "finetune"],
)
def test_it_answers_bit_for_bit_in_every_mode(
    strategies: list[Any], mask: str, fit: Fit, tmp_path: Path
) -> None:
    module, _ = fit(strategies, mask=mask)
    module.eval()
    folder = export_module(module, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    torch.manual_seed(5)
    again = load_exported(folder, MLP([16, 16]))
    assert not again.training
    assert (again.network.mask, list(again.tasks)) == (mask, list(module.tasks))
    assert again.accuracy_matrix.summary() == module.accuracy_matrix.summary()
    for one, other in zip(answers(module), answers(again), strict=True):
        assert torch.equal(one, other)
    modes = answers(again)
    if strategies and mask == "all" and not isinstance(strategies[-1], EWC):
        assert not torch.equal(modes[0], modes[1])
    second = export_module(again, tmp_path / "again")  # nothing is lost on the way
    for name in ("model.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (second / name).read_bytes()


@pytest.fixture
def exported(fit: Fit, tmp_path: Path) -> Path:
    module, _ = fit([BeneficialPerturbation(rank=4)])
    return export_module(module, tmp_path / "out")


def test_the_files_say_what_is_in_them(exported: Path) -> None:
    record = json.loads((exported / "model.json").read_text())
    assert record["schema"] == SCHEMA
    structure = record["structure"]
    assert structure["tasks"][1] == {
        "id": 1,
        "columns": [2, 4],
        "class_names": ["2", "3"],
        "epochs": 2,
    }
    assert structure["attached"][0] == {"part": "bias_units", "layer": "backbone.1", "rank": 4}
    with safe_open(exported / "model.safetensors", "pt") as tensors:
        assert tensors.get_tensor("backbone.1.bias_units.bank").shape == (2, 16)


ADVICE = " Export the module again, or pass its original backbone."


def refused(folder: Path, backbone: nn.Module | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_exported(folder, backbone or MLP([16, 16]))
    said = str(caught.value)
    head = (
        f"Expected {folder} to hold model.safetensors and model.json of a module with this "
        "backbone, but got "
    )
    assert said.startswith(head)
    assert said.endswith(ADVICE)
    return said.removeprefix(head).removesuffix(ADVICE)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_what_is_in_the_files_is_never_run(exported: Path, tmp_path: Path) -> None:
    (exported / "model.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    assert refused(exported).startswith("SafetensorError: ")
    torch.save(Payload(tmp_path / "owned"), exported / "model.safetensors")
    assert refused(exported).startswith("SafetensorError: ")
    assert not (tmp_path / "owned").exists()


UNKNOWN_PART = (
    "Expected an attachment to be one of bias_units, scales, low_rank, prompts, keys, weight_bank with its arguments, but got {}. "
    "The file is damaged or made up."
)


def change_record(folder: Path, change: dict[str, Any]) -> None:
    """Change fields of model.json, wherever in it they are."""
    path = folder / "model.json"
    record = json.loads(path.read_text())
    for key, value in change.items():
        (record["structure"] if key in record["structure"] else record)[key] = value
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "ValueError: format 'other'."),
        (
            {"schema": SCHEMA + 1, "bpn_lightning": "9.9"},
            (
                f"Expected an exported module of schema {SCHEMA}, but got schema {SCHEMA + 1}, written by "
                "bpn_lightning 9.9. Use bpn_lightning 9.9 for it, or a newer one."
            ),
        ),
        ({"attached": [{"part": "strategy"}]}, UNKNOWN_PART.format({"part": "strategy"})),
        (
            {"attached": [{"part": "bias_units", "layer": "head", "rank": 10**9}]},
            UNKNOWN_PART.format({"part": "bias_units", "layer": "head", "rank": 10**9}),
        ),
        (
            {"input_shape": [0]},
            "Expected a number of classes and an input of at most 16,777,216 numbers, but got 4 and (0,). "
            + "The file is damaged or made up.",
        ),
        ({"opened": 7}, "ValueError: opened 7 and closed 1."),
        (
            {"mask": "tusk"},
            "Expected mask to be one of all, seen, task, shared, but got 'tusk'.",
        ),
    ],
)
def test_a_record_that_is_wrong(change: dict[str, Any], said: str, exported: Path) -> None:
    change_record(exported, change)
    assert refused(exported) == said


def bias_units(layer: str, rank: int) -> dict[str, Any]:
    return {"part": "bias_units", "layer": layer, "rank": rank}


TASK = {"id": 0, "columns": [0, 2], "class_names": ["0", "1"], "epochs": 2}
PREPARED = {"tasks": 40, "dtype": "uint8", "shape": [1, 8, 8], "steps": [], "code": ""}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_classes": 2**20}, "Expected a head to be within"),
        ({"num_classes": 10**12}, "Expected a head to be within"),
        ({"input_shape": [2**12, 2**12, 2**12]}, "an input of at most 16,777,216 numbers"),
        (
            {"input_shape": [1, 2**11, 2**11]},
            "backbone to accept inputs of shape (batch, 1, 2048, 2048)",
        ),
        (
            {"tasks": [TASK] * 40, "preparations": [PREPARED]},
            "Expected an accuracy matrix to be within",
        ),
        ({"attached": [bias_units("head", 2**11)]}, "Expected bias_units of ['head', 2048]"),
        ({"attached": [bias_units("backbone.1", 2**19)]}, "Expected bias_units of"),
    ],
)
def test_nothing_larger_than_the_tensors_is_made(
    change: dict[str, Any], said: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that are small one by one, and large together."""
    change_record(exported, change)
    held = (exported / "model.safetensors").stat().st_size
    for name in ("zeros", "empty", "ones"):
        make = getattr(torch, name)

        def counted(*size: Any, make: Any = make, **options: Any) -> Tensor:
            assert make(*size, **(options | {"device": "meta"})).nbytes <= max(4 * 2**24, held)
            return cast(Tensor, make(*size, **options))

        monkeypatch.setattr(torch, name, counted)
    assert said in refused(exported)


def test_a_tensor_stands_in_one_place(exported: Path) -> None:
    path = exported / "model.json"
    record = json.loads(path.read_text())
    record["state"]["items"].append(["again", {"tensor": "head.weight"}])
    path.write_text(json.dumps(record))
    assert refused(exported) == "KeyError: 'head.weight'."


def test_a_checkpoint_makes_nothing_larger_than_its_tensors(fit: Fit, tmp_path: Path) -> None:
    _, trainer = fit([BeneficialPerturbation(rank=4)])
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    structure = saved["continual"]["structure"]
    for key, value in (("num_classes", 2**20), ("attached", [bias_units("head", 2**19)])):
        saved["continual"]["structure"] = {**structure, key: value}
        torch.save(saved, tmp_path / "y.ckpt")
        with pytest.raises(CheckpointError, match="bytes of all tensors in the file"):
            ContinualModule.load_from_checkpoint(tmp_path / "y.ckpt", backbone=MLP([16, 16]))


def test_what_does_not_belong_together(exported: Path, tmp_path: Path) -> None:
    assert "size mismatch for backbone.3.weight" in refused(exported, MLP([16, 8]))
    assert refused(tmp_path / "nowhere").startswith("FileNotFoundError: ")
    tensors = exported / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    assert refused(exported).startswith("SafetensorError: ")


def test_an_earlier_folder_stays(exported: Path, fit: Fit) -> None:
    before = (exported / "model.json").read_bytes()
    module = load_exported(exported, MLP([16, 16]))
    with pytest.raises(ConfigurationError, match="to be a new folder, but it exists"):
        export_module(module, exported)
    assert (exported / "model.json").read_bytes() == before
    with pytest.raises(ConfigurationError, match="but it has no head yet"):
        export_module(ContinualModule(MLP([4])), exported / "out")


def test_a_full_disk_leaves_nothing(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    module = load_exported(exported, MLP([16, 16]))
    monkeypatch.setattr(export, "write_atomically", full)
    with pytest.raises(ResultsError) as caught:
        export_module(module, tmp_path / "full")
    assert str(caught.value) == (
        f"Expected to write {tmp_path / 'full'}, but got: [Errno 28] No space left on device. Free some space or grant write access."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- bpn-export ----------------------------------------------------------------------------------

RUN = "--config digits_inc.yaml --method bd --trainer.accelerator cpu --data.num_tasks 2"
RUN += " --data.epochs_per_task 1 --model.backbone.hidden [8]"
Said = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    assert cli.main(RUN.split()) == 0
    return Path("runs/digits_inc/bd/seed_0")


@pytest.mark.slow
def test_a_run_is_exported(run: Path, capsys: Said) -> None:
    capsys.readouterr()
    assert export_command.main([str(run), "out"]) == 0
    assert capsys.readouterr() == ("out\n", "")
    again = load_exported("out", MLP([8]))
    saved = ContinualModule.load_from_checkpoint(
        run / "checkpoints" / "last.ckpt", backbone=MLP([8])
    )
    for one, other in zip(answers(saved.eval()), answers(again), strict=True):
        assert torch.equal(one, other)

    assert export_command.main([str(run), "out"]) == 2
    assert capsys.readouterr().err == (
        "bpn-export: error: Expected out to be a new folder, but it exists. Name another one, or remove it.\n"
    )


@pytest.mark.slow
def test_a_run_is_exported_without_a_task(run: Path, capsys: Said) -> None:
    capsys.readouterr()
    assert export_command.main([str(run), "out", "--forget", "2"]) == 0
    said = capsys.readouterr()
    assert said.out == "out\n"
    assert said.err.splitlines()[0] == (
        "bpn-export: task 2 is forgotten, but for the shared weights and running statistics, where they "
        "were trained on it"
    )
    again = load_exported("out", MLP([8]))
    assert again.network.structure.forgotten == [1]
    assert again.network.head is not None
    assert again.network.head.weight[2:4].eq(0).all()
    assert export_command.main([str(run), "other", "--forget", "0"]) == 2
    assert "Expected --forget to be numbers of tasks" in capsys.readouterr().err
    assert export_command.main([str(run), "other", "--forget", "1", "1"]) == 2
    assert "each once, but got 1." in capsys.readouterr().err
    assert export_command.main(["nowhere", "other"]) == 2
    assert "Expected RUN to be the folder of a run of bpn-fit" in capsys.readouterr().err


def test_a_run_of_somebody_else(run: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run / "config.yaml"
    for backbone, said in {
        "evil.Net": "Expected model.backbone in config.yaml to be a name that needs no trust",
        "os.system": "The standard library and installers cannot be used",
        "torch.optim.SGD": "path torch.optim.SGD does not correspond to a subclass of Module",
    }.items():
        Path("evil.py").write_text("open('owned', 'w')")
        monkeypatch.syspath_prepend(str(Path.cwd()))
        config.write_text(f"model: {{backbone: {backbone}, mask: all}}")
        capsys.readouterr()
        assert export_command.main([str(run), "out"]) == 2
        assert said in capsys.readouterr().err
    config.write_text("trainer: {}")
    assert export_command.main([str(run), "out"]) == 2
    assert capsys.readouterr().err == (
        f"bpn-export: error: Expected {config} to be the config.yaml of a run, with model.backbone "
        "and model.mask, but got None. Name the folder of a run.\n"
    )
    assert not Path("owned").exists()
    assert not Path("out").exists()


def fit_in_two(folder: str) -> int:
    """The exit code of the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = "--trainer.devices 2 --trainer.strategy ddp"
        return cli.main([*RUN.split(), *flags.split()])


def test_a_run_of_two_processes_is_exported_without_a_task(run: Path, ranks: Any) -> None:
    Path("two").mkdir()
    assert ranks(fit_in_two, str(Path("two").resolve())) == [0, 0]  # ranks stand elsewhere
    for name, source in {"one_out": run, "two_out": Path("two") / run}.items():
        assert export_command.main([str(source), name, "--forget", "2"]) == 0
    one, two = (load_exported(name, MLP([8])) for name in ("one_out", "two_out"))
    assert two.network.structure.forgotten == [1]
    torch.testing.assert_close(
        dict(two.network.state_dict()),
        dict(one.network.state_dict()),
        rtol=1e-4,
        atol=1e-5,
        equal_nan=True,
    )


# --- pretrained weights without a license --------------------------------------------------------


def borrowed(seed: int = 0) -> Pretrained:
    """A network whose weights may not be handed on."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
    return Pretrained(network).set_origin("torch", "net", "some-weights", shippable=False)


def test_weights_without_a_license_are_named_instead_of_copied(fit: Fit, tmp_path: Path) -> None:
    backbone = borrowed()
    module, _ = fit([BeneficialPerturbation(rank=4)], backbone=backbone, train="modes")
    folder = export_module(module.eval(), tmp_path / "out")
    (record,) = json.loads((folder / "model.json").read_text())["pretrained"]
    assert backbone.origin is not None
    assert (record["part"], record["weights"]) == ("backbone", "some-weights")
    assert record["sha256"] == backbone.origin.sha256
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "backbone.network.1.weight" not in names
    assert any("bias_units" in name for name in names)
    for one, other in zip(answers(module), answers(load_exported(folder, borrowed())), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(CheckpointError, match=r"some-weights and the hash .* but got some-weights"):
        load_exported(folder, borrowed(seed=1))
    whole = export_module(module, tmp_path / "whole", include_pretrained=True)
    again = load_exported(whole, borrowed(seed=1))
    for one, other in zip(answers(module), answers(again), strict=True):
        assert torch.equal(one, other)


def test_weights_without_a_license_that_were_trained_are_not_left_out(
    fit: Fit, tmp_path: Path
) -> None:
    module, _ = fit([], backbone=borrowed())
    with pytest.raises(ConfigurationError, match="but they were trained"):
        export_module(module, tmp_path / "out")
    assert not (tmp_path / "out").exists()
