"""The circumstances of a run: software, commit, machine, wall time."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from bpn_lightning.run.schema import Continues, PretrainedRecord, Provenance

__all__ = ["collect_provenance"]

_PACKAGES = ("torch", "lightning", "torchvision", "torchmetrics", "bpn_lightning")


def collect_provenance(
    seconds: float,
    continues: Continues | None = None,
    pretrained: Sequence[PretrainedRecord] = (),
) -> Provenance:
    """What this process knows of the circumstances of its run.

    Args:
        seconds: wall time of the run.
        continues: the run that it continued from.
        pretrained: where the weights of its networks come from.
    """
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    provenance: Provenance = {
        "seconds": round(seconds, 3),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "commit": _commit(Path(__file__).resolve()),
        "host": {
            "name": platform.node(),
            "platform": platform.platform(),
            "cpu": _cpu(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
        },
    }
    if continues is not None:
        provenance["continues"] = continues
    if pretrained:
        provenance["pretrained"] = list(pretrained)
    return provenance


def _commit(source: Path) -> str | None:
    """The commit of the checkout that tracks a file, or None; never an error."""
    # Inside a git hook these variables point at another repository.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=source.parent,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout.strip()

    try:
        # A wheel may lie inside somebody else's checkout, whose commit says nothing about it.
        git("ls-files", "--error-unmatch", source.name)
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
