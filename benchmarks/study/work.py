"""Runs of a study, one at a time or several in processes of their own; each that is done is a file."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.study.data import COVER
from benchmarks.study.runs import Run
from benchmarks.study.tables import write_results
from terratorch_simpler.files import atomic_write


class Work:
    """Does runs that are not done yet, and keeps what they found.

    Args:
        study: The study's settings.
        data: Folder ``hls_water``.
        folder: Where results are kept.
        jobs: Runs at a time.
    """

    def __init__(self, study: dict[str, Any], data: Path, folder: Path, jobs: int) -> None:
        """Start nothing yet."""
        self._study, self._data, self._folder, self._jobs = study, data, folder, jobs
        self._commit = record.commit()  # of the code that runs: the working tree may change on the way

    def results(self) -> dict[Run, dict[str, Any]]:
        """What is done, as the study is set now."""
        return {Run(**row["run"]): row["found"] for row in self._files()}

    def _files(self) -> list[dict[str, Any]]:
        files = sorted((self._folder / "runs").glob("*.json"))
        read = [json.loads(file.read_text()) for file in files]
        return [row for row in read if row["settings"] == settings(Run(**row["run"]), self._study)]

    def do(self, runs: Iterable[Run]) -> None:
        """Do the runs that are missing, each once."""
        done = self.results()
        missing = [run for run in dict.fromkeys(runs) if run not in done]
        for count, (run, found) in enumerate(self._found(missing), 1):
            score, seconds = found["test_miou"], found["seconds"]
            print(f"{count}/{len(missing)} {run.key}: {score:.3f}, {seconds:.0f} s", flush=True)
            write_results(self._folder, self._study, self.results(), self._place())

    def _place(self) -> str:
        """Command, commits and machines of all runs."""
        words = ["python", "-m", "benchmarks.study", "DATA", "-o", "OUT"]
        return record.place(shlex.join(words), [row["made"] for row in self._files()])

    def _found(self, runs: list[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
        given = (self._study, self._data, self._folder, self._commit)
        if self._jobs == 1:
            yield from ((run, do_one(run, *given)) for run in runs)
            return
        threads = max(1, torch.get_num_threads() // self._jobs)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._jobs, context, initializer=_begin, initargs=(threads,)) as pool:
            futures = {pool.submit(do_one, run, *given): run for run in runs}
            yield from ((futures[future], future.result()) for future in as_completed(futures))


def settings(run: Run, study: dict[str, Any]) -> dict[str, Any]:
    """What a run depends on, itself aside: where that changed, its result counts no more."""
    shared = {key: study[key] for key in ("backbone", "means", "stds", "batch_size", "slimmable")}
    if run.variant == "lora":
        shared["lora_lr"] = study["lora_lr"]
    named = {"setup": study["setups"].get(run.setup), "encoder": study["encoders"].get(run.encoder)}
    return {**shared, **named, "classes": list(COVER)}


def do_one(run: Run, study: dict[str, Any], data: Path, folder: Path, commit: str) -> dict[str, Any]:
    """One run, kept as a file once it is done."""
    from benchmarks.study.finetune import finetune  # TerraTorch takes its time to import

    found = finetune(run, study, data, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = {"commit": commit, "machine": record.machine(device)}
    row = {"run": run._asdict(), "settings": settings(run, study), "found": found, "made": made}
    with atomic_write(folder / "runs" / f"{run.key}.json") as part:
        part.write_text(json.dumps(row))
    return found


def _begin(threads: int) -> None:
    """Set up a process that does runs: it ends with the one that started it, even if that was killed."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
