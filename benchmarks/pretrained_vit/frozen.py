"""Frozen probes of every depth, and what each criterion would have kept."""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.pretrained_vit import statistics
from benchmarks.pretrained_vit.data import SPLITS, Task, draw
from benchmarks.pretrained_vit.encoder import load
from benchmarks.pretrained_vit.statistics import Bootstrap
from benchmarks.study.data import IGNORED
from terratorch_simpler import prune, select_depth
from terratorch_simpler.criteria import (
    Angular,
    BlockInfluence,
    Bounds,
    CkaIntervals,
    Knee,
    LabelledFeatures,
    Probe,
    Simpler,
    Statistics,
)
from terratorch_simpler.criteria.base import Choice
from terratorch_simpler.criteria.probe import STRENGTHS, Rule
from terratorch_simpler.errors import DepthError
from terratorch_simpler.extraction import rows_per_image
from terratorch_simpler.functional.hsic import layer_normed
from terratorch_simpler.functional.ridge import Ridge
from terratorch_simpler.plan import Verdict
from terratorch_simpler.pruning.width import Narrowing

BATCH = 32
FOLDS = 5
WIDTHS = (0.5, 0.25)
UNSETTLED = "unsettled"
COMPARED = ("half", "probe", "probe, rule best")
"""What every choice is compared with in the same seeds and places."""
RULES: dict[str, Rule] = {"probe": "one_standard_error", "probe, rule best": "best"}
"""What the tables call the criterion ``probe`` with each rule; the first is the default of the package."""
HALF_IF_UNSETTLED = "simpler, half where unsettled"

Features = dict[str, NDArray[np.float32]]
"""LayerNormed outputs of every block for each split: patch tokens, or their mean, as (L, N, tokens, D)."""


class Case(NamedTuple):
    """Confusion matrices of one task with so many labels: (seeds, columns, places, classes, classes)."""

    validation: NDArray[np.int64]
    test: NDArray[np.int64]


class Encoded(NamedTuple):
    """Features of the images of a task, and what is compared, by name.

    Attributes:
        blocks: Number of blocks.
        features: The depths first, then other columns.
        random: Features of the depths of random weights.
        columns: Column of everything that is chosen without labels.
        kept: What each keeps, in words.
        verdicts: Verdict of criteria, or that there is no answer.
    """

    blocks: int
    features: Features
    random: Features
    columns: dict[str, int]
    kept: dict[str, str]
    verdicts: dict[str, str]


def extract(model: nn.Module, task: Task) -> Features:
    """Features of all images."""
    return {split: _extract(model, images, task.scenes) for split, images in task.images.items()}


def _extract(model: nn.Module, images: Tensor, mean: bool) -> NDArray[np.float32]:
    found = []
    with torch.inference_mode():
        for batch in images.split(BATCH):
            outputs = model.forward_intermediates(batch, output_fmt="NLC", intermediates_only=True)
            tokens = layer_normed(torch.stack(outputs))
            found.append(tokens.mean(2, keepdim=True) if mean else tokens)
    values: NDArray[np.float32] = torch.cat(found, 1).numpy()
    return values


def fit(
    x: NDArray[np.float32], y: NDArray[np.int64], places: NDArray[np.int64], task: Task
) -> Callable[[NDArray[np.float32]], NDArray[np.int64]]:
    """Ridge regression to one-hot, whose strength has the best score in cross-validation over places.

    The score is that of the task: by accuracy, predicting the most frequent class everywhere would win where one class
    prevails.

    Args:
        x: Features (N, D).
        y: Classes (N,).
        places: Number of the place of every row; a place is in one of ``FOLDS`` folds.
        task: The task.

    Returns:
        A function that predicts the classes of features.
    """
    features, targets = torch.from_numpy(x), nn.functional.one_hot(torch.from_numpy(y), task.classes)
    folds = torch.from_numpy(np.unique(places, return_inverse=True)[1] % FOLDS)
    ridge = Ridge.fit(features, targets)
    crossed = ridge.leave_group_out(features, targets, folds, STRENGTHS).argmax(-1).numpy()
    one_place = np.zeros_like(y)
    counts = np.stack([statistics.confusion(y, one, one_place, 1, task.classes)[0] for one in crossed])
    scores = statistics.score(counts, task.scenes)
    strength = STRENGTHS[int(np.flatnonzero(scores == scores.max()).max())]  # of equals the strongest
    return lambda other: ridge.predict(torch.from_numpy(other), strength).argmax(1).numpy()


def run_case(task: Task, features: Features, labels: int, seeds: int) -> Case:
    """Fit every column of features for every seed, and count on validation and test."""
    judged = {split: _rows(task, features, split, slice(None)) for split in ("val", "test")}
    counts: dict[str, list[Any]] = {split: [] for split in judged}
    for seed in range(seeds):
        x, y, places = _rows(task, features, "train", draw(task, labels, seed))
        fits = [fit(column, y, places, task) for column in x]
        for split, (columns, truth, place) in judged.items():
            number = len(np.unique(task.places[split]))
            counts[split].append(
                [
                    statistics.confusion(truth, predict(column), place, number, task.classes)
                    for predict, column in zip(fits, columns, strict=True)
                ]
            )
    return Case(np.array(counts["val"]), np.array(counts["test"]))


def _rows(task: Task, features: Features, split: str, chosen: Any) -> tuple[Any, ...]:
    """Features (L, rows, D), classes and places of what has a label."""
    labels = task.labels[split][chosen]
    places = np.unique(task.places[split], return_inverse=True)[1][chosen]
    known = labels != IGNORED
    return features[split][:, chosen][:, known], labels[known], np.broadcast_to(places[:, None], labels.shape)[known]


def choose_without_labels(model: nn.Module, task: Task) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Blocks that criteria without labels keep, from the training images, beside fixed shares; and verdicts.

    The images are shuffled, as in a selection: those of a class, which stand together, would be compared among themselves.
    """
    images, blocks = task.images["train"], len(model.blocks)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split(BATCH)
    batches = [{"image": images[part], "path": list(task.places["train"][part.numpy()])} for part in order]
    half = blocks // 2
    kept = {"all blocks": list(range(blocks)), "half": list(range(half)), "a third": list(range(blocks // 3))}
    verdicts = {}
    for criterion in (Simpler(), Knee(), Angular(half), BlockInfluence(half), CkaIntervals(half)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the verdict is in the table
            try:
                plan = select_depth(model, batches, criterion=criterion, min_tiles=len(images), progress=False)
            except DepthError:  # knee has no answer
                verdicts[criterion.name] = "no answer"
                continue
        kept[criterion.name], verdicts[criterion.name] = list(plan.kept_blocks), level(plan.verdict)
    verdicts[HALF_IF_UNSETTLED] = verdicts["simpler"]
    kept[HALF_IF_UNSETTLED] = kept["half" if verdicts["simpler"] == UNSETTLED else "simpler"]
    return kept, verdicts


def level(verdict: Verdict | None) -> str:
    """A verdict in one word."""
    return "-" if verdict is None else verdict.level


def probe_choice(
    task: Task,
    features: Features,
    blocks: int,
    labels: int,
    seed: int,
    rule: Rule = "one_standard_error",
) -> Choice:
    """What the criterion ``probe`` keeps, with the labelled training images and the validation split; groups are places."""
    train = _labelled(task, features, blocks, "train", draw(task, labels, seed), seed)
    every = np.arange(len(task.places["val"]))
    both = dataclasses.replace(train, validation=_labelled(task, features, blocks, "val", every, seed))
    unseen = torch.eye(blocks + 1)  # probe looks at labels, not at the similarity of blocks
    return Probe(r"(.+)\|", rule).choose(Statistics(unseen, unseen, unseen, both), blocks, Bounds())


def _labelled(
    task: Task, features: Features, blocks: int, split: str, chosen: NDArray[np.int64], seed: int
) -> LabelledFeatures:
    """Labelled patches of some images, as many of each as in a selection, or the images themselves."""
    rng = np.random.default_rng(seed)
    patches, most = task.labels[split].shape[1], rows_per_image(len(chosen))
    rows = [(n, patch) for n in chosen for patch in rng.permutation(patches)[:most]]
    image, patch = np.array([row for row in rows if task.labels[split][row] != IGNORED]).T
    return LabelledFeatures(
        torch.from_numpy(features[split][:blocks, image, patch]),
        torch.from_numpy(task.labels[split][image, patch]),
        torch.from_numpy(np.searchsorted(chosen, image)),
        tuple(f"{task.places[split][n]}|{split} {n}" for n in chosen),
        "classification" if task.scenes else "segmentation",
    )


def kept_name(kept: list[int]) -> str:
    """Kept blocks in words: their number, or ranges of block numbers where there are gaps."""
    if kept == list(range(len(kept))):
        return str(len(kept))
    starts = [block for block in kept if block - 1 not in kept]
    ends = [block for block in kept if block + 1 not in kept]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def encode(args: argparse.Namespace, state: dict[str, Tensor], task: Task) -> Encoded:
    """Features of every depth, and of everything else that is chosen without labels."""
    model = load(args.model, state, args.size)
    blocks = len(model.blocks)
    kept, verdicts = choose_without_labels(model, task)
    found = [extract(model, task)]
    columns: dict[str, int] = {}
    for key, one in kept.items():
        if one == list(range(len(one))):
            columns[key] = len(one) - 1
        elif (same := next((other for other in columns if kept[other] == one), None)) is not None:
            columns[key] = columns[same]
        else:
            gapped = load(args.model, state, args.size)
            prune(gapped, one)
            columns[key] = _append(found, gapped, task)
    names = {key: kept_name(one) for key, one in kept.items()}
    for width in WIDTHS:
        narrow = load(args.model, state, args.size)
        Narrowing(narrow.blocks, width).apply()
        key = f"all blocks, width {width}"
        columns[key], names[key] = _append(found, narrow, task), str(blocks)
    features = {split: np.concatenate([one[split] for one in found]) for split in SPLITS}
    return Encoded(blocks, features, extract(load(args.model, None, args.size), task), columns, names, verdicts)


def _append(found: list[Features], model: nn.Module, task: Task) -> int:
    """Add the last output of an encoder as a column, and return its number."""
    column = sum(len(one["train"]) for one in found)
    found.append({split: values[-1:] for split, values in extract(model, task).items()})
    return column


def run_task(args: argparse.Namespace, task: Task, encoded: Encoded) -> dict[str, Any]:
    """All tables of one task, and what is averaged over tasks.

    Returns:
        ``depths``, ``choices`` and ``tests``: rows; ``regrets``: by number of labels, of those where pretraining matters
        and depths differ, and by name the mean over seeds and its bootstrap samples.
    """
    blocks = encoded.blocks
    result: dict[str, Any] = {"depths": [], "choices": [], "tests": [], "regrets": {}}
    for labels in [number for number in task.labelled if number in (args.labels or task.labelled)]:
        start = time.perf_counter()
        row = {"task": task.name, "labelled": labels}
        case, untrained = (run_case(task, one, labels, args.seeds) for one in (encoded.features, encoded.random))
        probes = {
            key: [probe_choice(task, encoded.features, blocks, labels, seed, rule) for seed in range(args.seeds)]
            for key, rule in RULES.items()
        }
        chosen = {key: np.array([len(probe.kept_blocks) - 1 for probe in found]) for key, found in probes.items()}
        chosen |= {key: np.full(args.seeds, column) for key, column in encoded.columns.items()}
        verdicts = {key: ", ".join(level(probe.verdict) for probe in found) for key, found in probes.items()}
        names = {key: ", ".join(str(len(probe.kept_blocks)) for probe in found) for key, found in probes.items()}
        verdicts, names = verdicts | encoded.verdicts, names | encoded.kept
        bootstrap = Bootstrap(case.test, task.scenes, blocks)
        test = test_row(case, untrained, task.scenes, blocks)
        counts = test["counts"] == "yes" and test["p"] <= statistics.LEVEL
        result["tests"].append(row | test)
        result["depths"] += [row | one for one in depth_rows(task, case, untrained, bootstrap, blocks)]
        for key in [*chosen, *(key for key in verdicts if key not in chosen)]:
            told = {"criterion": key, "kept": names.get(key), "verdict": verdicts.get(key)}
            figures = choice_figures(bootstrap, chosen[key], blocks) if key in chosen else {}
            result["choices"].append(row | told | figures)
        if counts:
            result["regrets"][labels] = {
                key: (
                    statistics.regrets(bootstrap.measured, column).mean(),
                    bootstrap.mean(statistics.regrets(bootstrap.scores, column)),
                )
                for key, column in chosen.items()
            }
        print(f"{task.name}, {labels} labelled: {time.perf_counter() - start:.0f} s", flush=True)
    return result


def choice_figures(bootstrap: Bootstrap, chosen: NDArray[np.int64], depths: int) -> dict[str, Any]:
    """Test score of a choice, its regret and its gain on all blocks, with 95 % intervals."""
    lost = statistics.regrets(bootstrap.measured, chosen).mean()
    return {
        "score": float(np.take_along_axis(bootstrap.measured, chosen[:, None], 1).mean()),
        "regret": statistics.interval(lost, bootstrap.mean(statistics.regrets(bootstrap.scores, chosen))),
        "gain_on_all_blocks": bootstrap.difference(chosen, np.full_like(chosen, depths - 1)),
    }


def depth_rows(task: Task, case: Case, random: Case, bootstrap: Bootstrap, blocks: int) -> list[dict[str, Any]]:
    """Test scores of every depth: with standard errors over seeds and places, of random weights, and without features."""
    scores, base = (statistics.score(one.test.sum(2), task.scenes).mean(0) for one in (case, random))
    errors = bootstrap.mean(bootstrap.scores).std(0)
    train, test = (labels[labels != IGNORED] for labels in (task.labels["train"], task.labels["test"]))
    frequent = np.full(len(test), np.bincount(train).argmax())
    lowest = float(
        statistics.score(statistics.confusion(test, frequent, np.zeros_like(test), 1, task.classes)[0], task.scenes)
    )
    return [
        {"weights": "pretrained"} | {str(d + 1): [float(scores[d]), float(errors[d])] for d in range(blocks)},
        {"weights": "random"} | {str(d + 1): float(base[d]) for d in range(blocks)},
        {"weights": "none (most frequent class)"} | {str(d + 1): lowest for d in range(blocks)},
    ]


def test_row(case: Case, random: Case, accuracy: bool, blocks: int) -> dict[str, Any]:
    """The gate, on the validation split, and the F test over depths, on the test split."""
    gain, counts = statistics.gate(case.validation[:, :blocks], random.validation[:, :blocks], accuracy)
    f, p = statistics.f_test(case.test[:, :blocks], accuracy)
    return {"pretrained_minus_random": gain, "counts": "yes" if counts else "no", "F_over_depths": f, "p": p}


def mean_regrets(tasks: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Regret of everything that has an answer in all tasks, as the mean over tasks of the mean over their label counts.

    Returns:
        Regrets, in order; and how much higher each is than those of ``COMPARED``, in the same samples: what the regrets are
        against cancels out.
    """
    found = {name: result["regrets"] for name, result in tasks.items() if result["regrets"]}
    if not found:
        return [], []
    first, *others = ({key for case in cases.values() for key in case} for cases in found.values())
    figures: dict[str, tuple[float, NDArray[np.float64]]] = {}
    rows = []
    for key in first.intersection(*others):
        values, samples = {}, {}
        for name, cases in found.items():
            values[name] = float(np.mean([case[key][0] for case in cases.values()]))
            samples[name] = np.mean([case[key][1] for case in cases.values()], 0)
        figures[key] = float(np.mean(list(values.values()))), np.mean(list(samples.values()), 0)
        each = {name: statistics.interval(values[name], samples[name]) for name in found}
        rows.append({"criterion": key, "mean_regret": statistics.interval(*figures[key])} | each)
    rows.sort(key=lambda row: row["mean_regret"][0])
    differences = [
        {"criterion": row["criterion"]}
        | {
            f"minus_{other}".replace(" ", "_"): _less(figures[row["criterion"]], figures[other])
            for other in COMPARED
            if other in figures
        }
        for row in rows
    ]
    return rows, differences


def _less(one: tuple[float, NDArray[np.float64]], other: tuple[float, NDArray[np.float64]]) -> list[float] | None:
    return None if one is other else statistics.interval(one[0] - other[0], one[1] - other[1])
