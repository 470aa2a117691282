"""The model card: accuracies as they were measured, with intervals for the choice of test samples."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.modes import load
from bpn_lightning.modes.bundle import ACCURACY, read_bundle
from bpn_lightning.modes.card import write_card
from bpn_lightning.nn import MLP
from bpn_lightning.strategies import SLDA, BeneficialPerturbation, NearestClassMean

Fit = Callable[..., Any]


def lines_of(folder: Path) -> dict[str, list[str]]:
    """Cells of the table by the task's name."""
    rows = (folder / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row[:1] == "|"]
    return {row[0]: row[1:] for row in cells}


def exported(tmp_path: Path, accuracy: dict[str, list[Any]]) -> Path:
    """A bundle of two tasks whose matrix is this one."""
    folder = tmp_path / "out"
    bundle = read_bundle(folder)
    tensors = {n: torch.tensor(v, dtype=torch.float64) for n, v in accuracy.items()}
    bundle.files[ACCURACY] = {f"accuracy_matrix.{name}": value for name, value in tensors.items()}
    write_card(folder, bundle)
    return folder


@pytest.fixture
def made(fit: Fit, tmp_path: Path) -> tuple[Any, Path]:
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=64, seed=0)
    module, _ = fit([BeneficialPerturbation(rank=4)], stream=stream, mask="all")
    return module, export_module(module.eval(), tmp_path / "out", names=["a", "b"])


NAN = float("nan")


def test_intervals_by_hand(made: Any, tmp_path: Path) -> None:
    """0.8 of 10 and 0.5 of 100, and 58 of 110 together: Wilson's intervals of a table."""
    folder = exported(
        tmp_path,
        {
            "accuracy": [[NAN, NAN], [0.9, NAN], [0.8, 0.5]],
            "samples": [10, 100],
            "task_agnostic": [0.5, NAN],
            "task_agnostic_samples": [NAN, NAN],
        },
    )
    rows, card = lines_of(folder), (folder / "README.md").read_text()
    assert rows["a"][2:4] == ["80.0% (49.0 to 94.3)", "50.0%"]
    assert rows["b"][2:4] == ["50.0% (40.4 to 59.6)", ""]
    assert (
        "- Average accuracy over 2 learned tasks, task ID given: 65.0%; on their 110 test samples together 52.7% "
        "(43.5 to 61.8).\n- Average accuracy over 1 learned task, task ID not given: 50.0%; not measured on b.\n"
        in card
    )
    assert "This is one run, of seed 0; how much runs of other seeds differ is not in them." in card


def test_without_numbers_of_samples_there_are_no_intervals(made: Any, tmp_path: Path) -> None:
    card = (exported(tmp_path, {"accuracy": [[0, 0], [1, 0], [1, 0.5]]}) / "README.md").read_text()
    assert "task ID given: 75.0%.\n" in card
    assert "Wilson" not in card


@pytest.mark.parametrize("lie", [[float("inf"), 0], [0, 0], [-5, NAN]])
def test_what_a_stranger_says_of_samples_breaks_nothing(
    made: Any, tmp_path: Path, lie: list[float]
) -> None:
    matrix = {"accuracy": [[0, 0], [1, 0], [7, float("inf")]], "samples": lie}
    assert "task ID given: inf%" in (exported(tmp_path, matrix) / "README.md").read_text()


def test_they_are_of_the_samples_that_were_tested(made: Any) -> None:
    module, folder = made
    sizes = [sum(len(b.targets) for b in module.host.batches(t, "test")) for t in (0, 1)]
    assert module.accuracy_matrix.samples.tolist() == sizes
    assert module.accuracy_matrix.task_agnostic_samples.tolist() == sizes
    accuracies, card = module.accuracy_matrix.accuracy[2], (folder / "README.md").read_text()
    for name, accuracy in zip(("a", "b"), accuracies.tolist(), strict=True):
        assert lines_of(folder)[name][2].startswith(f"{accuracy:.1%} (")
    together = re.findall(r"task ID given: .* on their (\d+) test samples together ([\d.]+)%", card)
    right = float(accuracies @ torch.tensor(sizes, dtype=torch.float64))
    assert together == [(str(sum(sizes)), f"{100 * right / sum(sizes):.1f}")]


def test_where_a_gate_answers_its_accuracy_is_given(fit: Fit, tmp_path: Path) -> None:
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=64, seed=0)
    gates = [NearestClassMean(), SLDA()]
    module, _ = fit([BeneficialPerturbation(4), *gates], stream=stream, mask="all")
    folder = export_module(module.eval(), tmp_path / "out", names=["a", "b"])
    scores = next(one for one in reversed(module.gate_scores) if one["gate"] == "ncm")
    assert scores["mixture"] != module.accuracy_matrix.task_agnostic.tolist()
    rows, net, right = lines_of(folder), load(folder), 0
    assert rows["task"][3] == "accuracy, task ID not given, by the gate ncm"
    for name, task in (("a", 0), ("b", 1)):
        for batch in stream.loader(task, "test"):
            classes = [one.column for one in net.predict(batch.inputs)]
            right += (torch.tensor(classes) == batch.targets).sum().item()
        assert rows[name][3].startswith(f"{scores['mixture'][task]:.1%} (")
    card = (folder / "README.md").read_text()
    assert f"by the gate ncm: {sum(scores['mixture']) / 2:.1%}; on their 144 test samples" in card
    assert f"together {right / 144:.1%} (" in card


def test_a_module_that_goes_on_keeps_them(made: Any, tmp_path: Path) -> None:
    module, folder = made
    again = load_exported(folder, MLP([16, 16]))
    assert torch.equal(again.accuracy_matrix.samples, module.accuracy_matrix.samples)
