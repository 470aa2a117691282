"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

from bpn_lightning.command import CONFIGS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_and_forgets_little(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code += "\nassert model.accuracy_matrix.summary()['forgetting'] < 0.1\n"
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "example.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "'average': 0.9" in run.stdout


def test_every_config_that_is_named_is_packaged() -> None:
    named = set(re.findall(r"(\w+_inc\.yaml)", README))
    assert {"digits_inc.yaml", "cifar100_inc.yaml", "mnist_inc.yaml"} <= named
    assert all((CONFIGS / name).is_file() for name in named)


def test_every_picture_and_page_that_is_linked_is_there() -> None:
    links = re.findall(r"\]\(([^)h][^)]*)\)", README)
    assert len(links) >= 3
    assert all((Path(__file__).parent.parent / link).is_file() for link in links)
