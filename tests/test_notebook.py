"""examples/quickstart.ipynb runs as it stands, in a kernel, to the outputs that are committed.

``make notebook`` calls this file: it runs the notebook and writes the outputs into it.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"
MOST_BYTES = 300_000  # everybody who clones it has them


def execute(folder: Path) -> nbformat.NotebookNode:
    """Run it in an empty folder; an error of a cell is raised."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    metadata = nbformat.from_dict(dict(notebook.metadata))
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, record_timing=False, resources=resources, timeout=None).execute()
    notebook.metadata = metadata  # the kernel adds its version
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


# Not ours: the kernel's client on its way through zmq and asyncio.
@pytest.mark.filterwarnings("default")
def test_it_runs_to_what_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are the same, numbers within what another machine may give, pictures as many."""
    monkeypatch.delenv("MPLBACKEND")  # the notebook chooses its own
    committed, run = nbformat.read(NOTEBOOK, as_version=4), execute(tmp_path)
    number = re.compile(r"\d+\.\d+")
    assert number.sub("#", printed(run)) == number.sub("#", printed(committed))
    found, expected = (list(map(float, number.findall(printed(n)))) for n in (run, committed))
    assert found == pytest.approx(expected, abs=0.1)
    assert pictures(run) == pictures(committed) == 6


def test_its_story_is_true_and_its_size_is_small() -> None:
    """The conclusions of the text agree with the printed numbers."""
    text = printed(nbformat.read(NOTEBOOK, as_version=4))
    ends = [float(end) for end in re.findall(r"final mean accuracy over the tasks: (\S+)", text)]
    finetuned, ewc, bd_ewc, control = ends
    assert max(finetuned, ewc) < 0.3
    assert min(bd_ewc, control) > 0.95
    (not_given,) = re.findall(r"task ID not given: +(\S+)", text)
    assert float(not_given) < bd_ewc - 0.2
    assert "stderr" not in {
        output.get("name")
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells
        for output in cell.get("outputs", [])
    }
    assert NOTEBOOK.stat().st_size < MOST_BYTES


if __name__ == "__main__":
    nbformat.write(execute(Path.cwd()), NOTEBOOK)
    print(f"{NOTEBOOK}: {NOTEBOOK.stat().st_size:,} bytes")
