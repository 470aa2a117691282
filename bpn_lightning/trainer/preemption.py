"""Signals that request a stop: recorded on arrival, handled at the next safe point.

Lightning saves a checkpoint as soon as SLURM's signal arrives, even within an update, and its handler of
SIGTERM communicates with other processes immediately, which may be waiting in another collective. Here
the handler only records the signal.
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
    """Records SIGTERM and, under SLURM with ``auto_requeue``, the signal before a time limit.

    Attributes:
        asked: whether a stop was requested from this process.
        requeue: whether the job should be requeued.
    """

    def __init__(self) -> None:
        self.asked = False
        self.requeue = False

    def listen(self, trainer: Trainer) -> None:
        """Replace Lightning's handlers until it restores those from before the fit."""
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
        """Whether a stop was requested from any process; called on all of them at the same update."""
        if trainer.world_size == 1:
            return self.asked
        decide = trainer.strategy.reduce_boolean_decision
        self.asked = bool(decide(self.asked, all=False))
        if self.asked:
            self.requeue = bool(decide(self.requeue, all=False))
        return self.asked

    def answer(self, trainer: Trainer) -> None:
        """Requeue the job if SLURM's signal requested it; called when a checkpoint is on disk."""
        if not (self.requeue and trainer.is_global_zero):
            return
        job = os.environ.get("SLURM_JOB_ID", "")
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        try:
            subprocess.run(["scontrol", "requeue", job], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"bpn-fit: SLURM did not requeue job {job}: {error}.", file=sys.stderr)
