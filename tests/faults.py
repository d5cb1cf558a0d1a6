"""Injects faults into real ``terratorch fit`` runs, runs them again, and tells whether anything was lost.

    python -m tests.faults          # writes the table in docs/faults.md; takes half an hour on two cores
    python -m tests.faults --tries 1

A fault counts as survived if the same command, run again with ``--ckpt_path last``, ends with the plan of a run without
faults and the state of training that belongs to it, if every file left behind is whole or gone, and if no process outlives
its command. A damaged checkpoint has to be refused with an error that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from terratorch_simpler import SlimmingPlan
from terratorch_simpler.demo.scenes import write_scenes
from tests.cli_runner import Command, config

ROOT = Path(__file__).parents[1]
START, END = "<!-- table -->", "<!-- end of table -->"
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "SLURM_NTASKS_PER_NODE": "1"}  # fmt: skip
TRAIN_IMAGES = 200


class Lost(AssertionError):
    """A fault was not survived."""


def keep_often(rank):
    """A pass over tiles is kept after every group, not once a minute, so that there is something to be cut off."""
    from terratorch_simpler.extraction import partial_result

    partial_result.SECONDS_BETWEEN = 0.0


class FullDisk:
    """Fails the n-th file that is written whole."""

    def __init__(self, number: int):
        self.number = number

    def fail(self):
        raise OSError(28, "No space left on device")

    def __call__(self, rank):
        import contextlib

        from terratorch_simpler import cache, export, files, plan, report
        from terratorch_simpler.extraction import partial_result

        keep_often(rank)
        original, calls = files.atomic_write, []

        @contextlib.contextmanager
        def atomic_write(path):
            calls.append(path)
            with original(path) as part:
                yield part
                if len(calls) == self.number:
                    self.fail()

        modules = [files, plan, partial_result, report.charts, cache, export]
        for module in modules:
            if hasattr(module, "atomic_write"):
                module.atomic_write = atomic_write


class KilledWriting(FullDisk):
    """Is killed when the n-th file that is written whole is there, without its name yet."""

    def fail(self):
        os.kill(os.getpid(), signal.SIGKILL)


class NoMemory:
    """Runs out of memory in the n-th call of a stage, with more than a few tiles."""

    def __init__(self, stage: str, number: int):
        self.stage, self.number = stage, number

    def __call__(self, rank):
        from terratorch_simpler import metrics
        from terratorch_simpler.extraction.hooks import FeatureExtractor

        owner, name = {
            "batch": (FeatureExtractor, "run"),
            "block": (FeatureExtractor, "collect"),
            "group": (metrics, "hsic_matrix"),
        }[self.stage]
        original, calls = getattr(owner, name), []

        def out_of_memory(*args):
            calls.append(1)
            if len(calls) == self.number:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(*args)

        setattr(owner, name, out_of_memory)


@dataclass
class Laboratory:
    """Scenes, and what a run without faults comes to."""

    folder: Path
    scenes: Path = field(init=False)
    plan: SlimmingPlan = field(init=False)
    trained: dict = field(init=False)
    seconds: float = field(init=False)

    def __post_init__(self):
        self.scenes = self.folder / "scenes"
        write_scenes(self.scenes, {"train": TRAIN_IMAGES, "val": 4, "test": 4}, size=64)
        place = self.folder / "reference"
        self.start(place).wait()
        shutil.rmtree(place)
        started = time.monotonic()
        command = self.start(place)
        if command.wait() != [0]:
            raise Lost(command.output())
        self.seconds = time.monotonic() - started
        self.plan, self.trained = self.outcome(place)

    def start(self, place: Path, *args: str, ranks=1, environment=None, before=keep_often, cache=None) -> Command:
        settings = config(self.scenes, place, plan_cache=str(cache or place / "cache"))
        settings["trainer"]["max_epochs"] = 3
        settings["trainer"]["limit_train_batches"] = 6
        return Command(place, settings, "--ckpt_path", "last", *args, ranks=ranks, environment=environment, before=before)

    def outcome(self, place: Path, rank: int = 0):
        plan = SlimmingPlan.load(place / "simpler" / "plan.json")
        return plan, json.loads((place / f"trained.{rank}.json").read_text())

    def check_files(self, place: Path, finished: bool) -> None:
        """Whatever has its final name is whole; nothing else is left once a run has finished."""
        for path in place.rglob("*"):
            if finished and (path.name.startswith(".part-") or path.suffix == ".lock" or ".unfinished" in path.name):
                raise Lost(f"left behind: {path}")
            if any(part.startswith(".part-") for part in path.parts) or not path.is_file():
                continue
            if path.suffix in (".ckpt", ".pt"):
                torch.load(path, map_location="cpu", weights_only=True)
            if path.suffix == ".json" and path.parent.name in ("simpler", "cache"):
                SlimmingPlan.load(path)
            if path.suffix == ".png" and path.read_bytes()[-8:-4] != b"IEND":
                raise Lost(f"cut off: {path}")

    def check_again(self, place: Path, fresh: bool | None, ranks=1, environment=None, cache=None, tries=1) -> None:
        """The same command again ends as if nothing had happened."""
        command = self.start(place, ranks=ranks, environment=environment, cache=cache)
        status = command.wait()
        if status != [0] * ranks:
            raise Lost(f"run again: status {status}\n{command.output()[-3000:]}")
        self.check_result(place, fresh, ranks)
        if found := command.left_behind():
            raise Lost(f"processes {found} outlive the command")

    def check_result(self, place: Path, fresh: bool | None, ranks=1) -> None:
        self.check_files(place, finished=True)
        for rank in range(ranks):
            plan, trained = self.outcome(place, rank)
            if plan.kept_blocks != self.plan.kept_blocks or trained["kept"] != self.trained["kept"]:
                raise Lost(f"another plan: {plan.kept_blocks}")
            if not np.allclose(plan.similarity, self.plan.similarity, rtol=0, atol=1e-6) or plan.votes != self.plan.votes:
                raise Lost("another similarity")
            if trained["epoch"] != self.trained["epoch"] or trained["held"] != self.trained["held"]:
                raise Lost(f"another state of training: epoch {trained['epoch']}, {trained['held']} parameters")
            if ranks == 1 and trained["step"] != self.trained["step"]:
                raise Lost(f"another number of steps: {trained['step']}")
            if fresh and ranks == 1 and trained["weights"] != self.trained["weights"]:
                raise Lost("other weights, though training had started anew")
        if ranks > 1:
            weights = [self.outcome(place, rank)[1]["weights"] for rank in range(ranks)]
            if any(other != weights[0] for other in weights):
                raise Lost("unequal weights")


def has_checkpoint(place: Path) -> bool:
    return any(place.rglob("*.ckpt"))


def ended_by(number: signal.Signals):
    """A signal at a random moment."""

    def fault(lab: Laboratory, place: Path, chance: random.Random) -> str:
        command = lab.start(place)
        time.sleep(chance.uniform(0.05, 1.05) * lab.seconds)
        command.kill(number)
        (status,) = command.wait()
        if status is None:
            raise Lost("did not end")
        if left := command.left_behind():
            raise Lost(f"processes {left} outlive the command")
        lab.check_files(place, finished=False)
        moment = when(place)
        lab.check_again(place, fresh=not has_checkpoint(place))
        return moment

    return fault


def when(place: Path, cache: Path | None = None) -> str:
    cache = cache or place / "cache"
    if (place / "trained.0.json").exists():
        return "after training"
    if has_checkpoint(place):
        return "in training, with a checkpoint"
    if (place / "simpler" / "plan.json").exists():
        return "in training, without a checkpoint"
    if any(cache.glob("*.json")):
        return "with the plan made, not reported"
    return "in the selection" if cache.exists() else "before the selection"


def ended_by_the_queue(lab: Laboratory, place: Path, chance: random.Random) -> str:
    place.mkdir(parents=True)
    asked = place / "asked.txt"
    tool = place / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    environment = {**SLURM, "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    command = lab.start(place, environment=environment)
    time.sleep(chance.uniform(0.25, 1.0) * lab.seconds)
    command.kill(signal.SIGUSR1)
    time.sleep(chance.uniform(0.0, 2.0))
    command.kill(signal.SIGKILL)  # what the queue does after a while
    command.wait()
    lab.check_files(place, finished=False)
    moment = when(place)
    lab.check_again(place, fresh=not has_checkpoint(place), environment=environment)
    return moment


def one_of_two_killed(lab: Laboratory, place: Path, chance: random.Random) -> str:
    command = lab.start(place, ranks=2)
    time.sleep(chance.uniform(0.2, 1.0) * 1.5 * lab.seconds)
    command.kill(signal.SIGKILL, rank=chance.randrange(2))
    if None in command.wait(60):
        raise Lost("the other process did not end")
    lab.check_files(place, finished=False)
    moment = when(place)
    lab.check_again(place, fresh=None, ranks=2)
    return moment


def both_of_two_told_to_end(lab: Laboratory, place: Path, chance: random.Random) -> str:
    command = lab.start(place, ranks=2)
    time.sleep(chance.uniform(0.2, 1.0) * 1.5 * lab.seconds)
    for rank in range(2):
        command.kill(signal.SIGTERM, rank=rank)
    hung = None in command.wait(30)  # then killed, as a queue does
    moment = when(place)
    if hung and "in training" not in moment:
        raise Lost("did not end")
    lab.check_files(place, finished=False)
    lab.check_again(place, fresh=None, ranks=2)
    return f"{moment}{', killed after 30 s' if hung else ''}"


def one_of_three_that_share_killed(lab: Laboratory, place: Path, chance: random.Random) -> str:
    cache = place / "cache"
    places = [place / str(number) for number in range(3)]
    commands = [lab.start(one, cache=cache) for one in places]
    victim = chance.randrange(3)
    time.sleep(chance.uniform(0.1, 1.0) * 1.5 * lab.seconds)
    commands[victim].kill(signal.SIGKILL)
    moment = when(places[victim], cache)
    status = [command.wait() for command in commands]
    for number, one in enumerate(places):
        if number != victim:
            if status[number] != [0]:
                raise Lost(f"another run ended with {status[number]}: {commands[number].output()[-2000:]}")
            lab.check_result(one, fresh=True)
    lab.check_again(places[victim], fresh=not has_checkpoint(places[victim]), cache=cache)
    lab.check_files(place, finished=True)
    return moment


def cut_off(pattern: str):
    """A file that is cut off at a random byte: by a full disk, or a copy that was ended."""

    def fault(lab: Laboratory, place: Path, chance: random.Random) -> str:
        command = lab.start(place, "--trainer.max_epochs", "1")
        if pattern == "cache/*.unfinished.pt":
            time.sleep(chance.uniform(0.3, 0.8) * lab.seconds)
            command.kill(signal.SIGTERM)
        command.wait()
        for path in place.glob(pattern):
            whole = path.read_bytes()
            path.write_bytes(whole[: chance.randrange(len(whole))])
            if path.suffix == ".json":  # else the plan would not be looked up again
                shutil.rmtree(place / "checkpoints", ignore_errors=True)
        if pattern != "checkpoints/last.ckpt":
            lab.check_again(place, fresh=not has_checkpoint(place))
            return "made again"
        again = lab.start(place)
        if again.wait() == [0]:
            raise Lost("a damaged checkpoint was taken")
        if "There is no readable checkpoint at" not in again.output():
            raise Lost(f"not clear: {again.output()[-2000:]}")
        (place / "checkpoints" / "last.ckpt").unlink()
        lab.check_again(place, fresh=None)
        return "refused"

    return fault


def full_disk(lab: Laboratory, place: Path, chance: random.Random) -> str:
    command = lab.start(place, before=FullDisk(chance.randint(1, 7)))
    (status,) = command.wait()
    if status is None:
        raise Lost("did not end")
    if status and "No space left on device" not in command.output():
        raise Lost(command.output()[-2000:])
    lab.check_files(place, finished=False)
    lab.check_again(place, fresh=None)
    return "went on" if status == 0 else "ended with the reason"


def killed_writing(lab: Laboratory, place: Path, chance: random.Random) -> str:
    command = lab.start(place, before=KilledWriting(chance.randint(1, 6)))
    command.wait()
    lab.check_files(place, finished=False)
    left = any(place.rglob(".part-*"))
    lab.check_again(place, fresh=not has_checkpoint(place))
    return "with a part left behind, then removed" if left else "after the last file"


def out_of_memory(lab: Laboratory, place: Path, chance: random.Random) -> str:
    stage = chance.choice(["batch", "block", "group"])
    number = chance.randint(1, {"batch": 20, "block": 240, "group": 6}[stage])
    command = lab.start(place, before=NoMemory(stage, number))
    if command.wait() != [0]:
        raise Lost(command.output()[-2000:])
    lab.check_result(place, fresh=True)
    return f"went on ({stage})"


FAULTS = {
    "`kill -9` at a random moment": (ended_by(signal.SIGKILL), 60),
    "SIGTERM at a random moment": (ended_by(signal.SIGTERM), 60),
    "SIGUSR1 of SLURM, then `kill -9`": (ended_by_the_queue, 24),
    "`kill -9` of one of two processes": (one_of_two_killed, 16),
    "SIGTERM to both of two processes": (both_of_two_told_to_end, 10),
    "`kill -9` of one of three runs that share a `plan_cache`": (one_of_three_that_share_killed, 10),
    "plan in `plan_cache` truncated": (cut_off("cache/*.json"), 8),
    "partial result in `plan_cache` truncated": (cut_off("cache/*.unfinished.pt"), 8),
    "checkpoint truncated": (cut_off("checkpoints/last.ckpt"), 8),
    "no space left on the disk": (full_disk, 8),
    "`kill -9` while a file is written": (killed_writing, 12),
    "out of memory in a batch, a block or a group": (out_of_memory, 12),
}


def main() -> int:
    """Inject all faults and write the table; the exit status is 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tries", type=int, help="how often each; by default as in the table, which is not written otherwise"
    )
    parser.add_argument("--only", help="part of the name of the faults to inject; only their rows are written then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    chosen = {name: fault for name, fault in FAULTS.items() if not args.only or args.only in name}
    with tempfile.TemporaryDirectory() as folder:
        lab = Laboratory(Path(folder))
        print(f"a run without faults takes {lab.seconds:.1f} s and keeps {len(lab.plan.kept_blocks)} blocks", flush=True)
        found = inject(lab, chosen, args.tries, args.seed, args.jobs)
    lost = sum(bool(reason) for one in found.values() for _, reason in one)
    rows = {name: row(outcomes) for name, outcomes in found.items()}
    if not args.tries:
        page = ROOT / "docs" / "faults.md"
        head, rest = page.read_text().split(START)
        before, tail = rest.split(END)
        page.write_text(f"{head}{START}\n{table({**rows_of(before), **rows})}{END}{tail}")
    print(table(rows))
    return 1 if lost else 0


def inject(lab: Laboratory, faults: dict, tries: int | None, seed: int, jobs: int) -> dict[str, list[tuple[str, str]]]:
    """Moment or outcome of every try, and why it was lost if it was."""
    tasks = [(name, number) for name, (_, times) in faults.items() for number in range(tries or times)]

    def one(task: tuple[str, int]) -> tuple[str, str]:
        name, number = task
        place = lab.folder / f"{list(FAULTS).index(name)}-{number}"
        try:
            outcome, reason = faults[name][0](lab, place, random.Random(f"{seed} {name} {number}")), ""
        except Exception as err:
            outcome, reason = "lost", f"{type(err).__name__}: {err}"
            print(f"LOST {name} {number}: {reason[:3000]}", flush=True)
        print(f"{name} {number}: {outcome}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        return outcome, reason

    with ThreadPoolExecutor(jobs) as similarities:
        outcomes = list(similarities.map(one, tasks))
    return {name: [outcome for (other, _), outcome in zip(tasks, outcomes, strict=True) if other == name] for name in faults}


Row = tuple[int, int, str]
"""How often, how often survived, and when or how."""


def row(outcomes: list[tuple[str, str]]) -> Row:
    """What came of one fault."""
    counts = Counter(what for what, _ in outcomes).most_common()
    moments = "; ".join(f"{count} {what}" for what, count in counts)
    return len(outcomes), sum(not reason for _, reason in outcomes), moments


def rows_of(text: str) -> dict[str, Row]:
    """The rows of a table that was written before."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:-1]]
    return {name: (int(times), int(survived), moments) for name, times, survived, moments in cells}


def table(rows: dict[str, Row]) -> str:
    """The table of the page."""
    lines = ["| fault | times | survived | when, or how it ended |", "|---|---:|---:|---|"]
    lines += [f"| {name} | {times} | {survived} | {moments} |" for name, (times, survived, moments) in rows.items()]
    times, survived = (sum(one[column] for one in rows.values()) for column in (0, 1))
    return "\n".join([*lines, f"| **all** | **{times}** | **{survived}** | |"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
