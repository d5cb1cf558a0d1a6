"""SIGTERM and the queue's signal before training, with Lightning's own SLURM environment."""

import json
import os
import signal
import stat
import time

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment

from terratorch_simpler import SlimmingPlan
from terratorch_simpler.lightning.signals import Stopped, StoppedForRequeue, StopSignals, requeue_job
from tests.cli_runner import Command, config, free_port

SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "SLURM_NTASKS_PER_NODE": "1"}  # fmt: skip


def slow_down(rank):
    """Every batch of the selection takes a while, and a pass is kept after every group."""
    from terratorch_simpler.extraction import partial_result
    from terratorch_simpler.extraction.hooks import FeatureExtractor

    partial_result.SECONDS_BETWEEN = 0.0
    run = FeatureExtractor.run

    def slow(self, forward, batch):
        print("batch", flush=True)
        time.sleep(0.3)
        return run(self, forward, batch)

    FeatureExtractor.run = slow


def slow_training(rank):
    from terratorch.tasks import SemanticSegmentationTask

    step = SemanticSegmentationTask.training_step

    def slow(self, *args, **kwargs):
        print("step", flush=True)
        time.sleep(0.3)
        return step(self, *args, **kwargs)

    SemanticSegmentationTask.training_step = slow


def reached(command, what, times=1, rank=0, seconds=60):
    deadline = time.monotonic() + seconds
    while command.output(rank).count(what) < times:
        assert time.monotonic() < deadline, command.output(rank)
        time.sleep(0.05)


@pytest.fixture
def queue(tmp_path):
    """A scontrol that writes down what it was asked for."""
    asked = tmp_path / "asked.txt"
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    environment = {**SLURM, "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    return environment, lambda: asked.read_text().split("\n")[:-1] if asked.exists() else []


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    from terratorch_simpler.demo.scenes import write_scenes

    folder = tmp_path_factory.mktemp("many")
    write_scenes(folder, {"train": 200, "val": 4, "test": 4}, size=64)
    return folder


def start(folder, scenes, *args, before=None, environment=None, ranks=1):
    settings = config(scenes, folder, plan_cache=str(folder / "cache"))
    return Command(folder, settings, *args, before=before, environment=environment, ranks=ranks)


def test_sigterm_during_the_selection_keeps_what_was_measured(many, tmp_path):
    reference = start(tmp_path / "reference", many, "--trainer.max_epochs", "1")
    assert reference.wait() == [0], reference.output()
    folder = tmp_path / "stopped"
    command = start(folder, many, "--trainer.max_epochs", "1", before=slow_down)
    reached(command, "batch", times=18)  # 144 tiles: the first group is complete
    command.kill(signal.SIGTERM)
    assert command.wait() == [143]
    assert [path.suffixes for path in (folder / "cache").iterdir()] == [[".unfinished", ".pt"]]
    assert not list((folder / "simpler").iterdir())  # made and tried before the tiles were streamed
    assert not command.left_behind()
    again = start(folder, many, "--trainer.max_epochs", "1", before=slow_down)
    assert again.wait() == [0], again.output()
    assert 10 <= again.output().count("batch") <= 20  # of 25: not from the start
    assert [path.suffix for path in (folder / "cache").iterdir()] == [".json"]
    plans = [SlimmingPlan.load(place / "simpler" / "plan.json") for place in (tmp_path / "reference", folder)]
    assert plans[0].kept_blocks == plans[1].kept_blocks
    torch.testing.assert_close(torch.tensor(plans[0].similarity), torch.tensor(plans[1].similarity), rtol=0, atol=1e-6)
    trained = [json.loads((place / "trained.0.json").read_text()) for place in (tmp_path / "reference", folder)]
    assert trained[0] == trained[1]  # nothing of the interruption is left in the training


def test_the_queues_signal_during_the_selection_queues_the_job_again_without_a_checkpoint(many, tmp_path, queue):
    environment, asked = queue
    command = start(tmp_path / "job", many, before=slow_down, environment=environment)
    reached(command, "batch", times=18)
    command.kill(signal.SIGUSR1)
    assert command.wait() == [128 + signal.SIGUSR1]
    assert asked() == ["requeue 4711"]
    assert not list((tmp_path / "job").glob("*.ckpt"))
    again = start(tmp_path / "job", many, "--trainer.max_epochs", "1", environment=environment)
    assert again.wait() == [0], again.output()
    assert SlimmingPlan.load(tmp_path / "job" / "simpler" / "plan.json").tiles_seen == 200
    assert len(asked()) == 1


def test_the_queues_signal_during_training_is_lightnings(many, tmp_path, queue):
    """A checkpoint is saved, the job queued, and the next run resumes with the shape of the checkpoint."""
    environment, asked = queue
    folder = tmp_path / "job"
    command = start(folder, many, before=slow_training, environment=environment)
    reached(command, "step", times=3)
    command.kill(signal.SIGUSR1)
    reached(command, "step", times=7)
    assert asked() == ["requeue 4711"]
    command.kill(signal.SIGKILL)
    command.wait()
    (saved,) = folder.glob("hpc_ckpt_*.ckpt")
    again = start(folder, many, environment=environment)
    assert again.wait() == [0], again.output()
    assert f"as in {saved}" in again.output()
    assert "Compared the blocks" not in again.output()
    trained = json.loads((folder / "trained.0.json").read_text())
    assert trained["epoch"] == 2
    assert trained["kept"] == list(SlimmingPlan.load(folder / "simpler" / "plan.json").kept_blocks)


def test_one_of_two_processes_told_to_stop_ends_both(many, tmp_path, queue):
    environment, asked = queue
    port = str(free_port())
    several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    commands = [
        Command(
            tmp_path / f"job{rank}", config(many, tmp_path / "job", plan_cache=str(tmp_path / "cache")),
            "--trainer.devices", "2", "--trainer.strategy", "ddp_find_unused_parameters_true",
            environment={**environment, **several, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}, before=slow_down,
        )
        for rank in range(2)
    ]  # fmt: skip
    reached(commands[1], "batch", times=5)
    commands[1].kill(signal.SIGUSR1)
    assert [command.wait() for command in commands] == [[128 + signal.SIGUSR1]] * 2
    assert asked() == ["requeue 4711"]  # once, by the first process


def test_signals_are_given_back_when_training_begins(trainer, task, datamodule, tmp_path):
    from lightning.pytorch import Callback

    from terratorch_simpler import SimplerCallback

    seen = []

    class Look(Callback):
        def setup(self, trainer, pl_module, stage):
            seen.append(signal.getsignal(signal.SIGTERM))

        def on_train_start(self, trainer, pl_module):
            seen.append(signal.getsignal(signal.SIGTERM))

    trainer(SimplerCallback(criterion="fixed", drop_blocks=3), Look()).fit(task(), datamodule=datamodule())
    assert seen[0].__func__ is StopSignals._stop
    assert not isinstance(getattr(seen[1], "__self__", None), StopSignals)
    assert "StopSignals" not in str(getattr(seen[1], "signal_handlers", ""))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_handlers_of_the_user_are_left_alone(monkeypatch):
    def own(*_):
        return None

    before = signal.signal(signal.SIGTERM, own)
    try:
        signals = StopSignals(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
        signals.catch()
        assert signal.getsignal(signal.SIGTERM) is own
        signals.release()
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("auto", "expected"), [(True, StoppedForRequeue), (False, None)])
def test_only_automatic_requeueing_takes_the_queues_signal(monkeypatch, auto, expected):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    cluster = SLURMEnvironment(auto_requeue=auto, requeue_signal=signal.SIGUSR2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, plugins=[cluster])
    wanted = StopSignals(trainer)._exceptions
    assert wanted.get(signal.SIGUSR2) is expected
    assert wanted[signal.SIGTERM] is Stopped


def test_a_second_signal_does_not_disturb_the_end():
    signals = StopSignals(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
    signals.catch()
    try:
        with pytest.raises(Stopped) as stop:
            signal.raise_signal(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert stop.value.code == 143
    finally:
        signals.release()


def test_jobs_of_an_array_are_queued_by_their_number(queue, monkeypatch):
    environment, asked = queue
    for name, value in {**environment, "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    requeue_job()
    assert asked() == ["requeue 12_3"]


def test_a_queue_that_does_not_answer_is_said(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    requeue_job()
    assert "Could not call scontrol" in caplog.text
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "scontrol").chmod(0o755)
    requeue_job()
    assert "Found status 3 from scontrol requeue 7" in caplog.text
