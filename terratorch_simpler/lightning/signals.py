"""Signals before training: Lightning handles them only from the start of fit, after the selection."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from terratorch_simpler.lightning.internals import cluster_environment
from terratorch_simpler.logger import log


class Stopped(SIGTERMException):
    """The run was asked to end (SIGTERM)."""


class StoppedForRequeue(Stopped):
    """The queue announced the end of the job's time: it is to be queued again."""


class StopSignals:
    """Turns signals into exceptions until Lightning takes over, so that partial results are saved and files cleaned up.

    SIGTERM ends the run. Under SLURM with Lightning's automatic requeueing, its signal (SIGUSR1 by default) ends the run as
    well, and the job is requeued without a checkpoint, since nothing is trained yet. Handlers of the user are left alone.

    Args:
        trainer: Knows the cluster it runs on.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Choose the signals; none is handled yet."""
        self._handlers_before: dict[signal.Signals, Any] = {}
        self._stopping = False
        exceptions: dict[signal.Signals, type[Stopped]] = {signal.SIGTERM: Stopped}
        cluster = cluster_environment(trainer)
        if isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue:
            exceptions[signal.Signals(cluster.requeue_signal or signal.SIGUSR1)] = StoppedForRequeue
        self._exceptions = exceptions

    def catch(self) -> None:
        """Install the handlers, in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python installs handlers nowhere else
        for number in self._exceptions:
            if signal.getsignal(number) == signal.SIG_DFL:
                self._handlers_before[number] = signal.signal(number, self._stop)

    def release(self) -> None:
        """Restore the handlers from before."""
        while self._handlers_before:
            signal.signal(*self._handlers_before.popitem())

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if not self._stopping:  # a second signal must not interrupt the saving
            self._stopping = True
            raise self._exceptions[signal.Signals(number)](128 + number)


def requeue_job() -> None:
    """Ask SLURM to queue this job again, as Lightning does after it has saved a checkpoint."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        status = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except OSError as err:
        log.warning(f"Could not call scontrol ({err}), which would queue job {job} again: submit it by hand.")
        return
    if status:
        log.warning(f"Found status {status} from scontrol requeue {job}, expected 0: submit the job by hand.")
