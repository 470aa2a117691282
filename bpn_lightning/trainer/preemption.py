"""Signals that ask a run to stop: noted when they come, answered where it can stop.

Lightning saves in the middle of whatever it is doing when SLURM's signal arrives, an update
included, and its handler of SIGTERM talks to the other processes there and then, which may be waiting
for something else. Here a handler notes the signal and does no more.
"""

import os
import signal
import subprocess
import sys
import threading

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer

from bpn_lightning.trainer.lightning import cluster_environment

__all__ = ["StopRequests"]


class StopRequests:
    """Notes SIGTERM and, under SLURM with ``auto_requeue``, the signal before a time limit.

    Attributes:
        asked: whether this process was asked to stop.
        requeue: whether to be started again.
    """

    def __init__(self) -> None:
        self.asked = False
        self.requeue = False

    def listen(self, trainer: Trainer) -> None:
        """Take the place of Lightning's handlers until it restores those from before the fit."""
        self.asked = self.requeue = False
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._note)
        environment = cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            signal.signal(environment.requeue_signal or signal.SIGUSR1, self._note)

    def _note(self, number: int, _: object) -> None:
        self.asked = True
        self.requeue = self.requeue or number != signal.SIGTERM

    def agreed(self, trainer: Trainer) -> bool:
        """Whether any process was asked; called on all of them at the same update."""
        if trainer.world_size == 1:
            return self.asked
        decide = trainer.strategy.reduce_boolean_decision
        self.asked = bool(decide(self.asked, all=False))
        if self.asked:
            self.requeue = bool(decide(self.requeue, all=False))
        return self.asked

    def answer(self, trainer: Trainer) -> None:
        """Once a checkpoint is on disk: have the job queued again, if SLURM's signal asked for it."""
        if not (self.requeue and trainer.is_global_zero):
            return
        job = os.environ.get("SLURM_JOB_ID", "")
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        try:
            subprocess.run(["scontrol", "requeue", job], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"bpn-fit: SLURM did not queue job {job} again: {error}.", file=sys.stderr)
