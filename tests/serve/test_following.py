"""A bundle's folder that changes is read again, whole; what cannot be read changes nothing."""

import shutil
from pathlib import Path

import pytest
import torch

from bpn_lightning.modes import load
from bpn_lightning.serve.following import Follower, fingerprint, task_table

IMAGES = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)


def followed(folder: Path) -> tuple[Follower, list[bool]]:
    reads: list[bool] = []
    made = Follower(load(folder), 1.0, reads.append)
    made.seen = fingerprint(folder)
    return made, reads


def test_tasks_come_and_go(bundle: Path, tmp_path: Path) -> None:
    follower, reads = followed(bundle)
    before = follower.net(IMAGES, task="low")
    follower.look()
    assert reads == []  # nothing has changed
    shutil.move(bundle / "tasks" / "middle", tmp_path / "middle")
    follower.look()
    assert follower.net.tasks == ["low", "high"]
    shutil.move(tmp_path / "middle", bundle / "tasks" / "again")
    follower.look()
    follower.look()
    assert follower.net.tasks == ["low", "again", "high"]
    assert reads == [True, True]
    assert follower.net(IMAGES, task="low").equal(before)


def test_a_folder_in_the_middle_of_a_copy_is_read_when_it_is_whole(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.move(bundle / "tasks" / "middle", tmp_path / "middle"))
    follower, reads = followed(bundle)
    folder = bundle / "tasks" / "middle"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        content = (source / name).read_bytes()
        for part in (content[:40], content):
            (folder / name).write_bytes(part)
            follower.look()
            follower.look()  # a folder that cannot be read is read once
    assert reads == [False, False, False, True]
    assert follower.net.tasks == ["low", "middle", "high"]
    assert "what was read before goes on answering" in capsys.readouterr().err


def test_the_table_is_that_of_the_bundle(bundle: Path) -> None:
    net = load(bundle)
    table = task_table(bundle)
    assert {one["name"]: one["id"] for one in table["tasks"]} == net.task_ids
    assert [name for one in table["tasks"] for name in one["classes"]] == net.classes
    assert table["gate"] is False
    (bundle / "tasks" / "low" / "adapter_config.json").write_text("{")
    (bundle / "tasks" / ".hidden").mkdir()
    assert [one["name"] for one in task_table(bundle)["tasks"]] == ["middle", "high"]


def test_the_thread_ends(bundle: Path) -> None:
    follower, _ = followed(bundle)
    follower.start()
    follower.stop()
    follower.join()
    assert not follower.is_alive()
