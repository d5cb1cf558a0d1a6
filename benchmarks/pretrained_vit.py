"""Frozen probes of every depth of a real pretrained ViT, and what each criterion would have kept.

    python -m benchmarks.pretrained_vit DATA --weights dinov2_vits14.pt

DATA holds ``hls_water`` and ``rsscn7``; the weights are a state dict with the keys of timm's ``vit_small_patch14_dinov2``.
Three kinds of labels: land cover and water of 14 px patches of HLS tiles (red, green, blue), and scenes of RSSCN7. Features
are the outputs of every block under LayerNorm: patch tokens, or their mean for scenes. A ridge regression to one-hot is
fitted on some labelled training images, its strength chosen by cross-validation over places; its scores are mean IoU over
patches, and accuracy over scenes.

What is chosen never sees a test image: ``probe`` chooses on the validation split, the other criteria without labels. The
test split then says what each choice costs (*regret*): the best depth is that of the *other* seeds, so that it is not picked
by the scores it is compared with. Intervals are 95 % of a bootstrap over seeds (which images are labelled) and places of the
test split at once; places are sites for HLS, and images for RSSCN7, where it is not known which scenes are neighbours.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import Resampling
from scipy import stats
from torch import Tensor, nn

from benchmarks import record
from benchmarks.study.data import COVER, IGNORED, read_split
from terratorch_simpler import SlimmingPlan, prune, select_depth
from terratorch_simpler.criteria import Angular, BlockInfluence, CkaIntervals, Knee, Simpler
from terratorch_simpler.errors import DepthError
from terratorch_simpler.extraction.labelled import majority
from terratorch_simpler.functional.hsic import layer_normed
from terratorch_simpler.metrics import MIN_GROUP_TILES

MODEL = "vit_small_patch14_dinov2"
PATCH = 14
BATCH = 32
RGB = [3, 2, 1]
STRENGTHS = 10.0 ** np.arange(-4, 4)
"""Ridge strengths, relative to the mean of the features' variances."""
FOLDS = 5
RESAMPLES = 2000
TASKS = ["cover", "water", "scenes"]
GATE = 0.02
"""By how much pretrained weights must beat random ones for a task to count."""
PIXELS = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
"""Mean and standard deviation of the pixels the encoder was pretrained with, for JPEG scenes; HLS has its own."""


class Task(NamedTuple):
    """Images and labels of one data set.

    Attributes:
        name: Its name.
        classes: Number of classes.
        images: Normalized images of each split, (N, 3, size, size).
        masks: Class of every pixel (N, size, size), or of every image (N,).
        labels: Class of every patch (N, P), or of every image (N, 1), with ``IGNORED`` where there is none.
        places: What is resampled: the place of every image, (N,).
        labelled: How many training images are labelled, one case each.
    """

    name: str
    classes: int
    images: dict[str, Tensor]
    masks: dict[str, NDArray[np.int64]]
    labels: dict[str, NDArray[np.int64]]
    places: dict[str, NDArray[np.str_]]
    labelled: tuple[int, ...]


def hls(data: Path, target: str, size: int) -> Task:
    """Land cover ("cover") or water of HLS tiles, by the majority of each patch."""
    folder = {"cover": "landcover/{}_landcover.tif", "water": "water_mask/{}_mask.tif"}[target]
    with (data / "tiles.csv").open() as file:
        site = {row["tile"]: row["site_group"] for row in csv.DictReader(file)}
    pixels, all_masks, labels, places = {}, {}, {}, {}
    for split in ("train", "val", "test"):
        names = read_split(data, split)
        pixels[split] = np.stack(
            [_read(data / f"images/{name}_image.tif", size, RGB, Resampling.bilinear) for name in names]
        )
        masks = np.stack([_read(data / folder.format(name), size, [1], Resampling.nearest)[0] for name in names])
        codes = list(COVER) if target == "cover" else [0, 1]
        classes = np.select([masks == code for code in codes], range(len(codes)), IGNORED)
        all_masks[split] = classes
        labels[split] = majority(torch.from_numpy(classes), (PATCH, PATCH)).flatten(1).numpy()
        places[split] = np.array([site[name] for name in names])
    mean, std = pixels["train"].mean((0, 2, 3)), pixels["train"].std((0, 2, 3))
    images = {split: _normalize(values, mean, std) for split, values in pixels.items()}
    return Task(target, len(COVER) if target == "cover" else 2, images, all_masks, labels, places, (16, 68))


def rsscn7(data: Path, size: int) -> Task:
    """Scenes of RSSCN7."""
    images, labels, places = {}, {}, {}
    for split in ("train", "val", "test"):
        names = (data / f"splits/{split}.txt").read_text().split()
        kinds = sorted({name.partition("/")[0] for name in names})
        loaded = [
            Image.open(data / f"{name}.jpg").convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for name in names
        ]
        pixels = np.stack([np.asarray(image, np.float32) for image in loaded]).transpose(0, 3, 1, 2) / 255
        images[split] = _normalize(pixels, *PIXELS)
        labels[split] = np.array([[kinds.index(name.partition("/")[0])] for name in names])
        places[split] = np.array(names)
    masks = {split: label[:, 0] for split, label in labels.items()}
    return Task("scenes", len(kinds), images, masks, labels, places, (14, 70, 700))


def features(model: nn.Module, images: Tensor, mean: bool) -> NDArray[np.float32]:
    """LayerNormed output of every block: patch tokens, or their mean, as (L, N, tokens, D)."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            outputs = model.forward_intermediates(images[start : start + BATCH], output_fmt="NLC", intermediates_only=True)
            tokens = layer_normed(torch.stack(outputs))
            found.append(tokens.mean(2, keepdim=True) if mean else tokens)
    values: NDArray[np.float32] = torch.cat(found, 1).numpy()
    return values


def ridge(
    x: NDArray[np.float32], y: NDArray[np.int64], groups: NDArray[np.int64], classes: int
) -> tuple[NDArray[np.float64], ...]:
    """Ridge regression to one-hot, its strength by cross-validation over groups.

    Args:
        x: Features (N, D).
        y: Classes (N,).
        groups: Number of the place of every row; a place is in one fold.
        classes: Number of classes.

    Returns:
        Weights (D, classes), and offsets (classes,).
    """
    x64, one_hot = x.astype(np.float64), np.eye(classes)[y]
    fold = np.unique(groups, return_inverse=True)[1] % FOLDS
    parts = [_sums(x64[fold == number], one_hot[fold == number]) for number in range(FOLDS) if np.any(fold == number)]
    whole = [sum(part) for part in zip(*parts, strict=True)]
    hits = np.zeros(len(STRENGTHS))
    if len(parts) > 1:
        for number, part in zip(np.unique(fold), parts, strict=True):
            fits = _solve([all_ - one for all_, one in zip(whole, part, strict=True)])
            test = fold == number
            hits += [np.sum((x64[test] @ weights + offset).argmax(1) == y[test]) for weights, offset in fits]
    return _solve(whole)[int(hits.argmax())]


def _sums(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[Any]:
    return [len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y]


def _solve(sums: Sequence[Any]) -> list[tuple[NDArray[np.float64], ...]]:
    """Weights and offsets for all strengths from one eigendecomposition."""
    count, x, y, xx, xy = sums
    values, vectors = np.linalg.eigh(xx - np.outer(x, x) / count)
    right = vectors.T @ (xy - np.outer(x, y) / count)
    scale = values.mean()
    fits = []
    for strength in STRENGTHS:
        weights = vectors @ (right / (values + strength * scale)[:, None])
        fits.append((weights, (y - x @ weights) / count))
    return fits


def confusion(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], place: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Confusion matrix of every place, (places, classes, classes)."""
    counts = np.zeros((place.max() + 1, classes, classes), np.int64)
    np.add.at(counts, (place, truth, predicted), 1)
    return counts


def score(counts: NDArray[Any], scenes: bool) -> NDArray[np.float64]:
    """Mean IoU over the classes that occur, or accuracy, of confusion matrices (..., classes, classes)."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    if scenes:
        accuracy: NDArray[np.float64] = hits.sum(-1) / counts.sum((-2, -1))
        return accuracy
    truth, union = counts.sum(-1), counts.sum(-1) + counts.sum(-2) - hits
    with np.errstate(invalid="ignore"):
        return np.nanmean(np.where(truth > 0, hits / union, np.nan), -1)


class Case(NamedTuple):
    """Confusion matrices of one task with so many labels: (seeds, depths, places, classes, classes)."""

    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def run_case(task: Task, embedded: dict[str, NDArray[np.float32]], labels: int, seeds: int) -> Case:
    """Fit every depth for every seed, and count on validation and test."""
    result: dict[str, list[Any]] = {"val": [], "test": []}
    for seed in range(seeds):
        chosen = np.sort(draw(task, labels, seed))
        rows = {
            "train": _rows(task, embedded, "train", chosen),
            "val": _rows(task, embedded, "val"),
            "test": _rows(task, embedded, "test"),
        }
        per_depth: dict[str, list[Any]] = {"val": [], "test": []}
        for depth in range(len(embedded["train"])):
            x, y, place = rows["train"]
            weights, offset = ridge(x[depth], y, place, task.classes)
            for split, counts in per_depth.items():
                x, y, place = rows[split]
                counts.append(confusion(y, (x[depth] @ weights + offset).argmax(1), place, task.classes))
        for split, counts in per_depth.items():
            result[split].append(counts)
    return Case(np.array(result["val"]), np.array(result["test"]))


def draw(task: Task, labels: int, seed: int) -> NDArray[np.int64]:
    """Training images that have labels: as many of each class for scenes, any tiles otherwise."""
    rng = np.random.default_rng(seed)
    classes = task.labels["train"][:, 0]
    if task.labels["train"].shape[1] > 1:
        return rng.permutation(len(classes))[:labels]
    each = labels // task.classes
    return np.concatenate([rng.permutation(np.flatnonzero(classes == number))[:each] for number in range(task.classes)])


def _rows(
    task: Task, embedded: dict[str, NDArray[np.float32]], split: str, chosen: NDArray[np.int64] | None = None
) -> tuple[Any, ...]:
    labels, x = task.labels[split], embedded[split]
    _, places = np.unique(task.places[split], return_inverse=True)
    if chosen is not None:
        labels, x, places = labels[chosen], x[:, chosen], places[chosen]
    known = labels != IGNORED
    return x[:, known], labels[known], np.broadcast_to(places[:, None], labels.shape)[known]


def resample(case: Case, scenes: bool, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Test scores of bootstrap samples over seeds and places: (samples, seeds, columns), and the seeds that were drawn."""
    rng = np.random.default_rng(seed)
    seeds, columns, places, classes, _ = case.test.shape
    weights = rng.multinomial(places, np.full(places, 1 / places), size=RESAMPLES)
    counts = np.moveaxis(case.test, 2, 0).reshape(places, -1)
    scores = score((weights @ counts).reshape(RESAMPLES, seeds, columns, classes, classes), scenes)
    drawn = rng.integers(seeds, size=(RESAMPLES, seeds))
    return np.take_along_axis(scores, drawn[:, :, None], 1), drawn


def f_test(scores: NDArray[np.float64]) -> tuple[float, float]:
    """F and p of the hypothesis that all depths are equal, with seeds as blocks: scores (seeds, depths)."""
    seeds, depths = scores.shape
    total = scores.mean()
    by_depth, by_seed = scores.mean(0), scores.mean(1)
    between = seeds * np.sum((by_depth - total) ** 2) / (depths - 1)
    rest = np.sum((scores - by_depth - by_seed[:, None] + total) ** 2) / ((depths - 1) * (seeds - 1))
    f = float(between / rest)
    return f, float(stats.f.sf(f, depths - 1, (depths - 1) * (seeds - 1)))


def regrets(scores: NDArray[np.float64], chosen: NDArray[np.int64], depths: int) -> NDArray[np.float64]:
    """What each seed's choice loses against the depth that is best for the other seeds.

    Args:
        scores: Test scores (seeds, columns); the first columns are the depths, and others follow.
        chosen: Column that is chosen in each seed, (seeds,).
        depths: Number of depths.

    Returns:
        (seeds,); negative where the choice is better on this seed than the best depth of the others.
    """
    seeds = np.arange(len(scores))
    best = np.array([np.delete(scores, seed, 0)[:, :depths].mean(0).argmax() for seed in seeds])
    lost: NDArray[np.float64] = scores[seeds, best] - scores[seeds, chosen]
    return lost


def load(weights: Path | None, size: int) -> nn.Module:
    """The encoder, with random weights if there is no file."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(MODEL, img_size=size, num_classes=0)
    if weights is not None:
        timm.models.load_checkpoint(model, str(weights), filter_fn=timm.models.vision_transformer.checkpoint_filter_fn)
    return model.eval()


def choices_without_labels(model: nn.Module, images: Tensor) -> tuple[dict[str, list[int]], dict[str, str]]:
    """What criteria without labels keep, from the training images, and their verdicts."""
    batches, blocks = list(images.split(BATCH)), len(model.blocks)
    kept = {"all blocks": list(range(blocks)), "half": list(range(blocks // 2)), "a third": list(range(blocks // 3))}
    verdicts = {}
    half = blocks // 2
    for criterion in (Simpler(), Knee(), Angular(half), BlockInfluence(half), CkaIntervals(half)):
        try:
            plan = select_depth(model, batches, criterion=criterion, min_tiles=len(images), progress=False)
        except DepthError as error:  # knee has no answer
            verdicts[criterion.name] = str(error)
            continue
        kept[criterion.name], verdicts[criterion.name] = list(plan.kept_blocks), str(plan.verdict or "-").partition(":")[0]
    return kept, verdicts


def gapped_features(weights: Path, images: dict[str, Tensor], kept: list[int], mean: bool) -> dict[str, NDArray[np.float32]]:
    """Features of the last block of an encoder that keeps some blocks only, (1, N, tokens, D) for every split."""
    model = load(weights, images["train"].shape[-1])
    prune(model, kept)
    return {split: features(model, values, mean)[-1:] for split, values in images.items()}


def probe_choices(model: nn.Module, task: Task, labels: int, seeds: int) -> list[SlimmingPlan]:
    """What the criterion ``probe`` keeps in every seed, with the labelled training images and the validation split."""
    batches = {split: _batches(task, split, np.arange(len(task.places[split]))) for split in ("train", "val")}
    plans = []
    for seed in range(seeds):
        train = _batches(task, "train", np.sort(draw(task, labels, seed)))
        if labels < MIN_GROUP_TILES:  # more images are needed to compare blocks, whose labels are not known
            train += [{**batch, "mask": torch.full_like(batch["mask"], IGNORED)} for batch in batches["train"][:2]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few tiles
            plans.append(select_depth(model, train, criterion="probe", validation=batches["val"], progress=False, seed=seed))
    return plans


def _batches(task: Task, split: str, chosen: NDArray[np.int64]) -> list[dict[str, Any]]:
    images, masks, places = (
        task.images[split][chosen],
        torch.from_numpy(task.masks[split][chosen]),
        task.places[split][chosen],
    )
    parts = zip(
        images.split(BATCH), masks.split(BATCH), np.array_split(places, range(BATCH, len(places), BATCH)), strict=True
    )
    return [{"image": image, "mask": mask, "filename": list(place)} for image, mask, place in parts]


def compare(case: Case, scenes: bool, chosen: dict[str, NDArray[np.int64]], depths: int) -> list[dict[str, Any]]:
    """A row for every criterion: its score, its regret, and its gain on all blocks, with 95 % intervals.

    Args:
        case: Confusion matrices, the depths first.
        scenes: Whether the score is accuracy.
        chosen: Column that each criterion chooses in each seed.
        depths: Number of depths.
    """
    scores = score(case.test.sum(2), scenes)
    samples, drawn = resample(case, scenes)
    rows = []
    for name, columns in chosen.items():
        lost = regrets(scores, columns, depths).mean()
        spread = [regrets(one, columns[seeds], depths).mean() for one, seeds in zip(samples, drawn, strict=True)]
        gain = np.take_along_axis(scores, columns[:, None], 1)[:, 0] - scores[:, depths - 1]
        gains = [
            (one[np.arange(len(one)), columns[seeds]] - one[:, depths - 1]).mean()
            for one, seeds in zip(samples, drawn, strict=True)
        ]
        rows.append(
            {
                "criterion": name,
                "score": f"{np.take_along_axis(scores, columns[:, None], 1).mean():.3f}",
                "regret": _interval(lost, spread),
                "gain_on_all_blocks": _interval(gain.mean(), gains),
            }
        )
    return rows


def _interval(value: float, samples: Sequence[float]) -> str:
    low, high = np.quantile(samples, (0.025, 0.975))
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def main() -> None:
    """Embed, probe, choose, compare, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    record.add_arguments(parser)
    args = parser.parse_args()
    depths, choices, tests = [], [], []
    for name in args.tasks:
        start = time.perf_counter()
        scenes = name == "scenes"
        task = rsscn7(args.data / "rsscn7", args.size) if scenes else hls(args.data / "hls_water", name, args.size)
        model = load(args.weights, args.size)
        blocks = len(model.blocks)
        embedded = {split: features(model, images, scenes) for split, images in task.images.items()}
        untrained = {split: features(load(None, args.size), images, scenes) for split, images in task.images.items()}
        kept, verdicts = choices_without_labels(model, task.images["train"])
        columns = [list(range(depth + 1)) for depth in range(blocks)]
        for one in kept.values():
            if one not in columns:
                columns.append(one)
                found = gapped_features(args.weights, task.images, one, scenes)
                embedded = {split: np.concatenate([embedded[split], found[split]]) for split in embedded}
        for labels in task.labelled:
            row = {"task": name, "labelled": labels}
            case, random = (run_case(task, values, labels, args.seeds) for values in (embedded, untrained))
            plans = probe_choices(model, task, labels, args.seeds)
            chosen = {"probe": np.array([plan.depth - 1 for plan in plans])}
            chosen |= {key: np.full(args.seeds, columns.index(one)) for key, one in kept.items()}
            verdicts["probe"] = ", ".join(sorted({str(plan.verdict).partition(":")[0] for plan in plans}))
            names = {key: kept_name(one) for key, one in kept.items()}
            names["probe"] = ", ".join(str(plan.depth) for plan in plans)
            for line in compare(case, scenes, chosen, blocks):
                key = line["criterion"]
                choices.append(row | {"criterion": key, "kept": names[key], "verdict": verdicts.get(key)} | line)
            depths += depth_rows(row, task, case, random, blocks)
            tests.append(row | test_row(task, case, random, blocks))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    for title, table in (("Test scores by kept blocks", depths), ("Choices", choices), ("Tests", tests)):
        record.show(title, table)
    digest = hashlib.sha256(args.weights.read_bytes()).hexdigest()
    record.save("pretrained_vit", args, choices, depths=depths, tests=tests, weights=digest)


def depth_rows(row: dict[str, Any], task: Task, case: Case, random: Case, blocks: int) -> list[dict[str, Any]]:
    """Test scores of every depth: with standard errors over seeds and places, of random weights, and without features."""
    scenes = task.name == "scenes"
    scores, base = (score(one.test.sum(2), scenes).mean(0) for one in (case, random))
    errors = resample(case, scenes)[0].mean(1).std(0)
    frequent = np.bincount(task.labels["train"][task.labels["train"] != IGNORED]).argmax()
    counts = np.zeros((task.classes, task.classes), np.int64)
    labels = task.labels["test"][task.labels["test"] != IGNORED]
    counts[:, frequent] = np.bincount(labels, minlength=task.classes)
    lowest = float(score(counts, scenes))
    return [
        row | {"weights": "pretrained"} | {str(d + 1): f"{scores[d]:.3f} ± {errors[d]:.3f}" for d in range(blocks)},
        row | {"weights": "random"} | {str(d + 1): f"{base[d]:.3f}" for d in range(blocks)},
        row | {"weights": "none (most frequent class)"} | {str(d + 1): f"{lowest:.3f}" for d in range(blocks)},
    ]


def test_row(task: Task, case: Case, random: Case, blocks: int) -> dict[str, Any]:
    """The gate, on the validation split: the best depth against the best of random weights; and the F test over depths."""
    scenes = task.name == "scenes"
    trained, untrained = (score(one.validation.sum(2), scenes)[:, :blocks] for one in (case, random))
    gain = trained[:, trained.mean(0).argmax()] - untrained[:, untrained.mean(0).argmax()]
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    f, p = f_test(score(case.test.sum(2), scenes)[:, :blocks])
    return {
        "best_of_pretrained_minus_random": f"{gain.mean():+.3f} ± {error:.3f}",
        "counts": "yes" if gain.mean() > max(GATE, 2 * error) else "no",
        "F_over_depths": f"{f:.1f}",
        "p": f"{p:.1g}",
    }


def kept_name(kept: list[int]) -> str:
    """Kept blocks in words: their number, or ranges of block numbers where there are gaps."""
    if kept == list(range(len(kept))):
        return str(len(kept))
    starts = [block for block in kept if block - 1 not in kept]
    ends = [block for block in kept if block + 1 not in kept]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _read(path: Path, size: int, bands: list[int], how: Resampling) -> NDArray[np.float32]:
    with rasterio.open(path) as source:
        pixels: NDArray[np.float32] = source.read(bands, out_shape=(len(bands), size, size), resampling=how).astype(
            np.float32
        )
        return pixels


def _normalize(pixels: NDArray[np.float32], mean: NDArray[Any], std: NDArray[Any]) -> Tensor:
    return torch.from_numpy(((pixels - mean[:, None, None]) / std[:, None, None]).astype(np.float32))


if __name__ == "__main__":
    main()
