"""`benchmarks/bundle_sizes.py`: bytes are those of the weights, and little more."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "bundle_sizes.py"


@pytest.mark.slow
def test_bytes_are_those_of_the_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(BENCHMARK))["main"]
    monkeypatch.setitem(sys.modules, "onnx", None)
    main(["--rows", "mnist_inc"])
    row = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    shared, task, whole = (int(cell.replace(",", "")) for cell in row[2:5])
    # 5 x 300 units; rows of the head are the tasks' own, 2 of them each.
    assert shared == pytest.approx(4 * (784 * 300 + 4 * 300 * 300 + 5 * 300), rel=0.01)
    biases, head = 5 * 300 + 10, 2 * 300 + 2
    assert 4 * (biases + head - 10) <= task <= 1.1 * 4 * (biases + head)
    assert whole == pytest.approx(shared + 5 * task, abs=5)
    assert 4.8 < float(row[-1]) < 5
