"""Signals before training: Lightning handles them only from the start of fit, after the selection."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

log = logging.getLogger(__name__)


class Stopped(SIGTERMException):
    """The run was asked to end (SIGTERM)."""


class StoppedForRequeue(Stopped):
    """The queue announced the end of the job's time: it is to be queued again."""


class StopSignals:
    """Turns signals into exceptions, so that what was begun is kept or cleaned up, until Lightning takes over.

    SIGTERM ends the run. Under SLURM with Lightning's automatic requeueing, its signal (SIGUSR1 by default) ends the run as
    well, and the job is queued again without a checkpoint: nothing is trained yet. Handlers of the user are left alone.

    Args:
        trainer: Tells the cluster it runs on.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Nothing is handled yet."""
        self._before: dict[signal.Signals, Any] = {}
        self._stopping = False
        wanted: dict[signal.Signals, type[Stopped]] = {signal.SIGTERM: Stopped}
        cluster = getattr(getattr(trainer, "_accelerator_connector", None), "cluster_environment", None)
        if isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue:
            wanted[signal.Signals(cluster.requeue_signal or signal.SIGUSR1)] = StoppedForRequeue
        self._wanted = wanted

    def catch(self) -> None:
        """Begin."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows it nowhere else
        for number in self._wanted:
            if signal.getsignal(number) == signal.SIG_DFL:
                self._before[number] = signal.signal(number, self._stop)

    def release(self) -> None:
        """Give the signals back to whom they belonged."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if not self._stopping:  # a second one, while what was begun is kept, changes nothing
            self._stopping = True
            raise self._wanted[signal.Signals(number)](128 + number)


def requeue_job() -> None:
    """Ask SLURM to queue this job again, as Lightning does after it has saved a checkpoint."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        status = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except OSError as err:
        log.warning(f"Found no way to call scontrol ({err}), expected it to queue job {job} again: submit it by hand.")
        return
    if status:
        log.warning(f"Found status {status} from scontrol requeue {job}, expected 0: submit the job by hand.")
