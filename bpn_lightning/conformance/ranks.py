"""One of two processes that learn the same small streams together; ``pair`` starts them.

Run as ``python -m bpn_lightning.conformance.ranks <rank>``, with what to do on standard input.
"""

import json
import sys
import traceback
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from bpn_lightning.conformance.cases import read_cases
from bpn_lightning.conformance.pair import PATIENCE
from bpn_lightning.conformance.runs import PLAIN, Setting, fit

__all__ = ["setting", "work"]


def setting(**trainer: Any) -> Setting:
    """287 samples in batches of 33: shares of 17 and 16, and a last batch of 23."""
    stream = {"num_tasks": 2, "batch_size": 33, "eval_batch_size": 101, "augment": True}
    return Setting(PLAIN.backbone, PLAIN.optimizer, stream, trainer=trainer)


def work(rank: int, folder: Path, task: Mapping[str, Any]) -> None:
    """Fit every case beside the other process, and write what was learned.

    Args:
        rank: of this process.
        folder: to write to: ``<number>_<rank>.pt``, or ``.txt`` with a traceback.
        task: the names of ``cases`` by their number, ``arguments`` of strategies, and the ``path``
            to import them from.
    """
    sys.path += [place for place in task["path"] if place not in sys.path]
    for index, name in task["cases"].items():
        try:
            named = {part: task["arguments"].get(part, {}) for part in name.split("+")}
            (case,) = read_cases([name], named)
            together = DDPStrategy(
                process_group_backend="gloo", timeout=timedelta(seconds=PATIENCE)
            )
            run = fit(case.make(), setting(devices=2, strategy=together))
            torch.save(run.learned() | run.answers(), folder / f"{index}_{rank}.part")
            (folder / f"{index}_{rank}.part").rename(folder / f"{index}_{rank}.pt")
        except BaseException:
            (folder / f"{index}_{rank}.txt").write_text(traceback.format_exc())
            raise


if __name__ == "__main__":
    work(int(sys.argv[1]), Path.cwd(), json.load(sys.stdin))
