"""What the settings of the criterion ``probe`` change: its rule, and whether places or files are its groups.

    python -m benchmarks.pretrained_vit.probe_settings DATA --weights dinov2_vits14.pt

The protocol is that of ``python -m benchmarks.pretrained_vit``, whose results say which cases count: those where pretraining
matters and depths differ. Training and validation images share no place, so files as groups do not leak between fitting and
judging; they make intervals smaller, since tiles of one place count as independent.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.pretrained_vit import statistics
from benchmarks.pretrained_vit.data import SCENES, Task, read_task
from benchmarks.pretrained_vit.encoder import add_arguments, digest, load, read_weights
from benchmarks.pretrained_vit.frozen import Features, extract, level, mean_regrets, probe_choice, run_case
from terratorch_simpler.criteria.probe import Rule

RULES: tuple[Rule, ...] = ("one_standard_error", "best")
GROUPS = {"place": r"(.+)\|", "file": None}
"""Regular expressions of the groups that a name of an image is in."""


def counted(results: Path) -> dict[str, list[int]]:
    """Tasks that count in the results of the frozen probes, with their numbers of labelled images."""
    found: dict[str, list[int]] = {}
    for row in json.loads((results / "pretrained_vit-cpu.json").read_text())["tests"]:
        if row["counts"] == "yes" and row["p"] <= statistics.LEVEL:
            found.setdefault(row["task"], []).append(row["labelled"])
    return found


def run(task: Task, features: Features, labels: int, seeds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for every setting; and the mean regret over seeds and its bootstrap samples, by setting."""
    blocks = len(features["train"])
    case = run_case(task, features, labels, seeds)
    counts = statistics.with_reference(case.test, blocks, task.scenes)
    scores, bootstrap = statistics.score(counts.sum(2), task.scenes), statistics.Bootstrap(counts, task.scenes)
    rows, regrets = [], {}
    for groups, rule in product(GROUPS, RULES):
        choices = [probe_choice(task, features, blocks, labels, seed, GROUPS[groups], rule) for seed in range(seeds)]
        chosen = np.array([len(choice.kept_blocks) - 1 for choice in choices])
        value = statistics.regrets(scores, chosen).mean()
        samples = bootstrap.mean(statistics.regrets(bootstrap.scores, chosen))
        rows.append(
            {
                "task": task.name,
                "labelled": labels,
                "groups": groups,
                "rule": rule,
                "kept": ", ".join(str(column + 1) for column in chosen),
                "verdict": ", ".join(level(choice.verdict) for choice in choices),
                "regret": statistics.interval(value, samples),
            }
        )
        regrets[f"{rule}, groups by {groups}"] = (value, samples)
    return rows, regrets


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose with every setting, compare, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--size", type=int, default=126)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train-scenes", type=int, default=280, help="number of training scenes that are read")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder with the frozen probes' results")
    record.add_arguments(parser)
    args = parser.parse_args(arguments)
    state, rows, tasks = read_weights(args.weights), [], {}
    encoder = load(args.model, state, args.size)
    features: dict[bool, Features] = {}  # cover and water are of the same images
    for name, numbers in counted(args.results).items():
        start = time.perf_counter()
        task = read_task(args.data, name, args.size, encoder.patch_embed.patch_size[0], args.train_scenes)
        if (name == SCENES) not in features:
            features[name == SCENES] = extract(encoder, task)
        regrets = {}
        for labels in numbers:
            more, regrets[labels] = run(task, features[name == SCENES], labels, args.seeds)
            rows += more
        tasks[name] = {"regrets": regrets}
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    means = mean_regrets(tasks)
    record.show("Settings", rows)
    record.show("Regret", means)
    record.save(
        "pretrained_vit_probe",
        args,
        rows,
        arguments,
        module="pretrained_vit.probe_settings",
        regrets=means,
        weights=digest(state),
    )


if __name__ == "__main__":
    main()
