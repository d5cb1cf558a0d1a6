"""Runs of a study, one at a time or several in processes of their own; each that is done is a file."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.runs import Run
from benchmarks.study.tables import write_results
from terratorch_simpler.files import whole_file


class Work:
    """Does runs that are not done yet, and keeps what they found.

    Args:
        study: The study's settings.
        data: Folder ``hls_water``.
        folder: Where results are kept.
        jobs: Runs at a time.
    """

    def __init__(self, study: dict[str, Any], data: Path, folder: Path, jobs: int) -> None:
        """Nothing is started."""
        self._study, self._data, self._folder, self._jobs = study, data, folder, jobs

    def results(self) -> dict[Run, dict[str, Any]]:
        """What is done."""
        files = sorted((self._folder / "runs").glob("*.json"))
        read = [json.loads(file.read_text()) for file in files]
        return {Run(**row["run"]): row["found"] for row in read}

    def do(self, runs: Iterable[Run]) -> None:
        """Do the runs that are missing, each once."""
        done = self.results()
        missing = [run for run in dict.fromkeys(runs) if run not in done]
        for count, (run, found) in enumerate(self._found(missing), 1):
            score, seconds = found["test_miou"], found["seconds"]
            print(f"{count}/{len(missing)} {run.key}: {score:.3f}, {seconds:.0f} s", flush=True)
            write_results(self._folder, self._study, self.results())

    def _found(self, runs: list[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
        given = (self._study, self._data, self._folder)
        if self._jobs == 1:
            yield from ((run, do_one(run, *given)) for run in runs)
            return
        threads = max(1, torch.get_num_threads() // self._jobs)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            futures = {pool.submit(do_one, run, *given): run for run in runs}
            yield from ((futures[future], future.result()) for future in as_completed(futures))


def do_one(run: Run, study: dict[str, Any], data: Path, folder: Path) -> dict[str, Any]:
    """One run, kept as a file once it is done."""
    from benchmarks.study.finetune import finetune  # TerraTorch takes its time to import

    found = finetune(run, study, data, folder)
    with whole_file(folder / "runs" / f"{run.key}.json") as part:
        part.write_text(json.dumps({"run": run._asdict(), "found": found}))
    return found
