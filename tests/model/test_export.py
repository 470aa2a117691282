"""What is written is numbers and words, and answers as the module that it was written from."""

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bpn_lightning import ContinualModule
from bpn_lightning.cli import export as export_command
from bpn_lightning.cli import main as cli
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError, ConfigurationError, ResultsError
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.modes import bundle as files
from bpn_lightning.modes.bundle import Bundle
from bpn_lightning.modes.exporters import WRITERS
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


SHARED = ["README.md", "accuracy.safetensors", "config.json", "model.safetensors"]


def task_files(number: int) -> list[str]:
    return [f"tasks/task_{number}/adapter_{name}" for name in ("config.json", "model.safetensors")]


def relative(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]


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
    assert sorted(map(str, relative(folder))) == sorted([*SHARED, *task_files(1), *task_files(2)])
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
    for name in relative(folder):
        assert (folder / name).read_bytes() == (second / name).read_bytes()


@pytest.fixture
def exported(fit: Fit, tmp_path: Path) -> Path:
    module, _ = fit([BeneficialPerturbation(rank=4)])
    return export_module(module, tmp_path / "out")


def test_the_files_say_what_is_in_them(exported: Path) -> None:
    record = json.loads((exported / "config.json").read_text())
    assert record["schema"] == SCHEMA
    assert record["network"] == {
        "class_path": "bpn_lightning.nn.MLP",
        "init_args": {"hidden": [16, 16]},
    }
    assert record["layout"] == [
        ["backbone.1.bias_units.bank", [16]],
        ["backbone.3.bias_units.bank", [16]],
    ]
    attached = record["structure"]["attached"]
    assert attached[0] == {"part": "bias_units", "layer": "backbone.1", "rank": 4}
    folder = exported / "tasks" / "task_2"
    task = json.loads((folder / "adapter_config.json").read_text())["task"]
    assert task == {"id": 1, "columns": [2, 4], "class_names": ["2", "3"], "epochs": 2}
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        assert tensors.get_tensor("rows").shape == (32,)
        assert tensors.get_tensor("head.weight").shape == (2, 16)
    with safe_open(exported / "model.safetensors", "pt") as tensors:
        assert sorted(tensors.keys()) == [
            *("backbone.1.bias", "backbone.1.weight", "backbone.3.bias", "backbone.3.weight")
        ]
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: bpn_lightning\n")
    assert "| task_2 | 1 | 2, 3 | " in card


def test_a_task_takes_little_more_than_its_numbers(fit: Fit, tmp_path: Path) -> None:
    """With five hidden layers, and a head that tasks share: 10 % at most."""
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=256, domain_incremental=True)
    network = MLP([300] * 5)
    module, _ = fit(
        [BeneficialPerturbation(rank=1)], stream=stream, mask="shared", backbone=network
    )
    folder = export_module(module, tmp_path / "out") / "tasks" / "task_2"
    payload = 4 * (5 * 300 + module.network.structure.num_classes)
    assert payload <= sum(path.stat().st_size for path in folder.iterdir()) <= 1.1 * payload


def test_a_head_that_grew_keeps_what_a_task_had(fit: Fit, tmp_path: Path) -> None:
    """A bias row holds the columns that existed when it was frozen, and is 0 beyond."""
    module, _ = fit([BeneficialPerturbation(rank=4, layers=["head"])], mask="seen")
    folder = export_module(module.eval(), tmp_path / "out", names=["first", "second"])
    sizes = []
    for name in ("first", "second"):
        with safe_open(folder / "tasks" / name / "adapter_model.safetensors", "pt") as tensors:
            sizes.append(tensors.get_tensor("head.bias_units.bank").shape[0])
    assert sizes == [2, 4]
    again = load_exported(folder, MLP([16, 16]))
    for one, other in zip(answers(module), answers(again), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "names", [["one"], ["one", "ONE"], ["one", "../two"], ["one", ".two"], ["one", "a/b"]]
)
def test_names_of_tasks_are_names_of_folders(names: list[str], fit: Fit, tmp_path: Path) -> None:
    module, _ = fit([])
    with pytest.raises(ConfigurationError, match=r"Expected (names|the name of a task)"):
        export_module(module, tmp_path / "out", names=names)
    assert not (tmp_path / "out").exists()


ADVICE = " Export it again, or pass its original backbone."


def refused(folder: Path, backbone: nn.Module | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_exported(folder, backbone or MLP([16, 16]))
    said = str(caught.value)
    head = f"Expected {folder} to be a bundle of bpn-export for this network, but got "
    assert said.startswith(head)
    assert said.endswith(ADVICE)
    return said.removeprefix(head).removesuffix(ADVICE)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


TENSORS = [
    "model.safetensors",
    "accuracy.safetensors",
    "tasks/task_1/adapter_model.safetensors",
]
CONFIGS = ["config.json", "tasks/task_2/adapter_config.json"]


def record_of(path: Path) -> Path:
    return path.parent / ("adapter_config.json" if "tasks" in path.parts else "config.json")


def rehash(path: Path) -> None:
    """Let the record say what is in a file by now, as a liar would."""
    record = json.loads(record_of(path).read_text())
    content = path.read_bytes()
    record["files"][path.name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    record_of(path).write_text(json.dumps(record))


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_in_the_files_is_never_run(name: str, exported: Path, tmp_path: Path) -> None:
    path = exported / name
    path.write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    assert "that is not the file of" in refused(exported)
    rehash(path)
    assert refused(exported).startswith("SafetensorError: ")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(
    "change",
    [lambda one: one[:-10], lambda one: one + b"x", lambda one: one[:-1] + bytes([one[-1] ^ 1])],
    ids=["truncated", "longer", "one bit"],
)
def test_a_file_that_is_not_the_one_that_was_written(
    name: str, change: Callable[[bytes], bytes], exported: Path
) -> None:
    path = exported / name
    path.write_bytes(change(path.read_bytes()))
    assert f"{path.name} of {path.parent.name} that is not the file of" in refused(exported)


@pytest.mark.parametrize("name", [*TENSORS, *CONFIGS])
def test_a_file_that_is_gone_or_leads_elsewhere(name: str, exported: Path, tmp_path: Path) -> None:
    path = exported / name
    path.rename(tmp_path / "elsewhere")
    assert refused(exported).startswith("FileNotFoundError: ")
    path.symlink_to(tmp_path / "elsewhere")
    assert "leads out of" in refused(exported)


def test_a_size_that_no_file_has(exported: Path) -> None:
    path = exported / "config.json"
    record = json.loads(path.read_text())
    record["files"]["model.safetensors"]["bytes"] = 2**60
    path.write_text(json.dumps(record))
    assert "not the file of 1152921504606846976 bytes that was written" in refused(exported)


def test_a_task_of_another_base(exported: Path, fit: Fit, tmp_path: Path) -> None:
    other, _ = fit([BeneficialPerturbation(rank=4)], seed=1)
    stranger = export_module(other, tmp_path / "other")
    shutil.rmtree(exported / "tasks" / "task_2")
    shutil.copytree(stranger / "tasks" / "task_2", exported / "tasks" / "task_2")
    assert "Expected task 'task_2' to belong to the bundle's shared weights" in refused(exported)


def test_a_table_with_a_hole_or_a_number_twice(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "tasks" / "task_1", exported / "tasks" / "again")
    assert "tasks 'again' and 'task_1', which are both number 0" in refused(exported)
    shutil.rmtree(exported / "tasks" / "again")
    (exported / "tasks" / "task_1").rename(tmp_path / "task_1")
    assert "there is none of number 0" in refused(exported)
    (exported / "tasks" / "task_1").symlink_to(tmp_path / "task_1")
    assert "leads out of" in refused(exported)


UNKNOWN_PART = (
    "Expected an attachment to be one of bias_units, scales, low_rank, prompts, keys, weight_bank with its arguments, but got {}. "
    "The file is damaged or made up."
)


def change_record(folder: Path, change: dict[str, Any]) -> None:
    """Change fields of config.json, wherever in it they are."""
    path = folder / "config.json"
    record = json.loads(path.read_text())
    for key, value in change.items():
        (record["structure"] if key in record["structure"] else record)[key] = value
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "ValueError: config.json of format 'other'."),
        (
            {"schema": SCHEMA + 1, "bpn_lightning": "9.9"},
            (
                f"Expected a bundle of schema {SCHEMA}, but got schema {SCHEMA + 1}, written by "
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
        (
            {"mask": "tusk"},
            "Expected mask to be one of all, seen, task, shared, but got 'tusk'.",
        ),
    ],
)
def test_a_record_that_is_wrong(change: dict[str, Any], said: str, exported: Path) -> None:
    change_record(exported, change)
    rebase(exported)
    assert refused(exported) == said


def rebase(folder: Path) -> None:
    """Let every task say that it belongs to the shared part as it is by now."""
    record = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    base = Bundle(record, {"model.safetensors": tensors}).base
    for path in folder.glob("tasks/*/adapter_config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "base": base}))


def bias_units(layer: str, rank: int) -> dict[str, Any]:
    return {"part": "bias_units", "layer": layer, "rank": rank}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"num_classes": 2**20},
            "head.weight of shape (1048576, 16), which is larger than the files",
        ),
        ({"num_classes": 10**12}, "which is larger than the files"),
        ({"input_shape": [2**12, 2**12, 2**12]}, "an input of at most 16,777,216 numbers"),
        (
            {"input_shape": [1, 2**11, 2**11]},
            "backbone to accept inputs of shape (batch, 1, 2048, 2048)",
        ),
        ({"attached": [bias_units("backbone.1", 2**19)]}, "Expected bias_units of"),
    ],
)
def test_nothing_larger_than_the_tensors_is_made(
    change: dict[str, Any], said: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that are small one by one, and large together."""
    change_record(exported, change)
    rebase(exported)
    held = (exported / "model.safetensors").stat().st_size
    for name in ("zeros", "empty", "ones"):
        make = getattr(torch, name)

        def counted(*size: Any, make: Any = make, **options: Any) -> Tensor:
            assert make(*size, **(options | {"device": "meta"})).nbytes <= max(4 * 2**24, held)
            return cast(Tensor, make(*size, **options))

        monkeypatch.setattr(torch, name, counted)
    assert said in refused(exported)


def test_rows_of_other_shapes_are_no_larger_than_their_files(exported: Path) -> None:
    """A wide row and a long table are small alone: their product is what is made."""
    path = exported / "tasks" / "task_1" / "adapter_model.safetensors"
    tensors = load_file(path)
    for value, said in (
        (torch.zeros(4, 16), "other shapes or types"),
        (torch.zeros(16).double(), "other shapes or types"),
        (torch.tensor(0.0), "other shapes or types"),
        (torch.zeros(17), "size mismatch"),
    ):
        save_file({**tensors, "backbone.1.bias_units.bank": value}, path)
        rehash(path)
        assert said in refused(exported)
    for rows in (tensors["rows"][:-1], tensors["rows"].repeat(2)):
        save_file({**tensors, "rows": rows}, path)
        rehash(path)
        assert f"{len(rows)} numbers of a task where the layout has 32" in refused(exported)
    del tensors["rows"]
    save_file(tensors, path)
    rehash(path)
    assert "'rows'" in refused(exported)


@pytest.mark.parametrize("shape", [[-16], [2**40], [2**40, 0], ["16"], None])
def test_a_layout_that_is_none(shape: Any, exported: Path) -> None:
    path = exported / "config.json"
    record = json.loads(path.read_text())
    record["layout"][0][1] = shape
    path.write_text(json.dumps(record))
    refused(exported)


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
    assert "size mismatch for backbone.3." in refused(exported, MLP([16, 8]))
    assert refused(tmp_path / "nowhere").startswith("FileNotFoundError: ")


def test_an_earlier_folder_stays(exported: Path, fit: Fit) -> None:
    before = (exported / "config.json").read_bytes()
    module = load_exported(exported, MLP([16, 16]))
    with pytest.raises(ConfigurationError, match="to be a new folder, but it exists"):
        export_module(module, exported)
    assert (exported / "config.json").read_bytes() == before
    with pytest.raises(ConfigurationError, match="but it has no head yet"):
        export_module(ContinualModule(MLP([4])), exported / "out")


def test_a_full_disk_leaves_nothing(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    module = load_exported(exported, MLP([16, 16]))
    monkeypatch.setattr(files, "write_atomically", full)
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, no_pictures: None) -> Path:
    """Where RUN has run."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        assert cli.main(RUN.split()) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its folder, in the current one."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("runs/digits_inc/bd/seed_0")


@pytest.mark.slow
def test_a_run_is_exported(run: Path, capsys: Said) -> None:
    capsys.readouterr()
    assert export_command.main([str(run), "--to", "out"]) == 0
    assert capsys.readouterr() == ("out\n", "")
    again = load_exported("out", MLP([8]))
    saved = ContinualModule.load_from_checkpoint(
        run / "checkpoints" / "last.ckpt", backbone=MLP([8])
    )
    for one, other in zip(answers(saved.eval()), answers(again), strict=True):
        assert torch.equal(one, other)

    assert export_command.main([str(run), "--to", "out"]) == 2
    assert capsys.readouterr().err == (
        "bpn-export: error: Expected out to be a new folder, but it exists. Name another one, or remove it.\n"
    )


@pytest.mark.slow
def test_formats_that_cannot_be_written_leave_nothing(
    run: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> list[Path]:
        raise ConfigurationError("Expected biases alone.")

    monkeypatch.setitem(WRITERS, "peft", refuse)
    capsys.readouterr()
    assert export_command.main([str(run), "--to", "out", "--peft"]) == 2
    assert capsys.readouterr().err == "bpn-export: error: Expected biases alone.\n"
    assert not Path("out").exists()


@pytest.mark.slow
def test_a_run_is_exported_without_a_task(run: Path, capsys: Said) -> None:
    capsys.readouterr()
    assert export_command.main([str(run), "--to", "out", "--forget", "2"]) == 0
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
    assert export_command.main([str(run), "--to", "other", "--forget", "0"]) == 2
    assert "Expected --forget to be numbers of tasks" in capsys.readouterr().err
    assert export_command.main([str(run), "--to", "other", "--forget", "1", "1"]) == 2
    assert "each once, but got 1." in capsys.readouterr().err
    assert export_command.main(["nowhere", "--to", "other"]) == 2
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
        assert export_command.main([str(run), "--to", "out"]) == 2
        assert said in capsys.readouterr().err
    config.write_text("trainer: {}")
    assert export_command.main([str(run), "--to", "out"]) == 2
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
        assert export_command.main([str(source), "--to", name, "--forget", "2"]) == 0
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
    (record,) = json.loads((folder / "config.json").read_text())["pretrained"]
    assert backbone.origin is not None
    assert (record["part"], record["weights"]) == ("backbone", "some-weights")
    assert record["sha256"] == backbone.origin.sha256
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "backbone.network.1.weight" not in names
    assert not any(name.startswith("backbone.network") for name in names)
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
