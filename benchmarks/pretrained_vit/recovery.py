"""What recovery without labels gives a pruned ViT: frozen probes after no recovery, a linear map, and distillation.

    python -m benchmarks.pretrained_vit.recovery DATA --weights dinov2_vits14.pt

The encoder keeps its first blocks. Recovery aims at the output of the last block, or at that of the block where the probe
is best on the validation split, the mean over seeds. It sees the training images without labels, and the probe is
fitted to some labelled ones, as in ``python -m benchmarks.pretrained_vit``. Gains are on no recovery, with 95 % intervals of
a bootstrap over seeds and places of the test split.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from terratorch.registry import BACKBONE_REGISTRY
from torch import Tensor

import terratorch_simpler  # noqa: F401  makes simpler_ known
from benchmarks import record
from benchmarks.pretrained_vit import statistics
from benchmarks.pretrained_vit.data import SCENES, TASKS, Task, read_task
from benchmarks.pretrained_vit.encoder import add_arguments, digest, load, read_weights
from benchmarks.pretrained_vit.frozen import BATCH, Features, extract, run_case
from terratorch_simpler.criteria import Fixed
from terratorch_simpler.data import BatchTiles
from terratorch_simpler.distillation import distill, pruned_copy
from terratorch_simpler.extraction import ExtractionConfig, measure
from terratorch_simpler.functional.hsic import layer_normed
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.plan import MIN_GROUP_TILES, SlimmingPlan

LABELLED = {"cover": 68, "water": 68, SCENES: 70}
"""Labelled training images of each task."""


class Recovered(NamedTuple):
    """A pruned encoder after recovery; shares of the variance of the target that it explains, and seconds."""

    encoder: SimplerBackbone
    explained: list[float]
    seconds: float


def recover(encoder: SimplerBackbone, task: Task, kind: str, depth: int, target: int, steps: int) -> Recovered:
    """Prune a copy of an encoder and let it recover on the training images of a task, without labels.

    Args:
        encoder: The intact encoder.
        task: The task.
        kind: "none", "linear" or "distill".
        depth: First blocks that are kept.
        target: Number of first blocks whose output is aimed at.
        steps: Training steps of a distillation.
    """
    student, start = pruned_copy(encoder, range(depth), 1.0).eval(), time.perf_counter()
    if kind == "none":
        return Recovered(student, [], 0.0)
    tiles = _tiles(task)

    def forward(batch: dict[str, Any]) -> object:
        return encoder(batch["image"])

    if kind == "linear":
        span = (depth, target)
        config = ExtractionConfig(Fixed(drop_blocks=encoder.full_num_blocks - depth), spans=[span], max_tiles=len(tiles))
        found = measure(forward, encoder, tiles, config).recovery
        assert found is not None
        fixed = {"name": "fixed", "args": {}}
        plan = SlimmingPlan(
            encoder.name, encoder.full_num_blocks, student.kept, fixed, recovery="linear", maps=found.solve([span])
        )
        student.slim(plan)
        return Recovered(student, [found.patch.explained(span)], time.perf_counter() - start)
    places = len(np.unique(task.places["train"]))
    result = distill(
        forward, encoder, student, tiles, target=target, steps=steps, max_tiles=len(tiles), seed=0, num_files=places
    )
    return Recovered(student, [result.explained_before, result.explained_after], result.seconds)


def _tiles(task: Task) -> BatchTiles:
    images, places = task.images["train"], task.places["train"]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    batches = [{"image": images[part], "path": list(places[part.numpy()])} for part in order.split(BATCH)]
    return BatchTiles(batches, len(images), MIN_GROUP_TILES)


def last_features(encoder: SimplerBackbone, task: Task) -> Features:
    """LayerNormed output of the last block, of a recovery map if there is one, as (1, N, tokens, D) for every split."""
    seen: list[Tensor] = []
    handles = encoder.register_block_hooks(lambda tokens: seen.__setitem__(slice(None), [tokens]))
    found = {}
    with torch.inference_mode():
        for split, images in task.images.items():
            parts = []
            for batch in images.split(BATCH):
                encoder(batch)
                tokens = layer_normed(seen[0])[:, encoder.prefix_tokens :]
                parts.append(tokens.mean(1, keepdim=True) if task.scenes else tokens)
            found[split] = torch.cat(parts)[None].numpy()
    for handle in handles:
        handle.remove()
    return found


def run(args: argparse.Namespace, task: Task, state: dict[str, Tensor], labels: int) -> list[dict[str, Any]]:
    """A row for every recovery and target."""
    model = load(args.model, state, args.size)
    intact = run_case(task, extract(model, task), labels, args.seeds)
    blocks = len(model.blocks)  # type: ignore[arg-type]
    best = int(statistics.score(intact.validation.sum(2), task.scenes).mean(0)[:blocks].argmax()) + 1
    name = f"simpler_{args.model}"
    encoder = BACKBONE_REGISTRY.build(name, img_size=args.size, ckpt_path=str(args.weights)).eval()
    targets = sorted({max(best, args.depth), blocks} - {args.depth})
    wanted = [("none", args.depth), *((kind, target) for kind in ("linear", "distill") for target in targets)]
    recovered = [recover(encoder, task, kind, args.depth, target, args.steps) for kind, target in wanted]
    cases = [run_case(task, last_features(one.encoder, task), labels, args.seeds) for one in recovered]
    counts = np.concatenate([intact.test, *(case.test for case in cases)], axis=1)
    bootstrap = statistics.Bootstrap(counts, task.scenes)
    scores = bootstrap.measured
    rows = []
    for column, ((kind, target), one) in enumerate(zip(wanted, recovered, strict=True), start=blocks):
        gain = (scores[:, column] - scores[:, blocks]).mean()
        samples = bootstrap.mean(bootstrap.scores[..., column] - bootstrap.scores[..., blocks])
        score = statistics.interval(scores[:, column].mean(), bootstrap.mean(bootstrap.scores[..., column]))
        rows.append(
            {
                "task": task.name,
                "labelled": labels,
                "kept": args.depth,
                "recovery": kind,
                "target": "-" if kind == "none" else f"block {target}" + (" (last)" if target == blocks else " (best)"),
                "explained": " to ".join(f"{value:.2f}" for value in one.explained) or "-",
                "seconds": f"{one.seconds:.0f}",
                "score": score,
                "gain": "-" if kind == "none" else statistics.interval(gain, samples),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Recover, probe and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--size", type=int, default=126)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=3, help="blocks that are kept")
    parser.add_argument("--steps", type=int, default=200, help="of a distillation, of 32 images each")
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--labels", type=int, help="labelled images; by default 68, or 70 scenes")
    parser.add_argument("--train-scenes", type=int, default=700, help="number of training scenes that are read")
    record.add_arguments(parser)
    args = parser.parse_args(arguments)
    state, rows = read_weights(args.weights), []
    patch = load(args.model, None, args.size).patch_embed.patch_size[0]
    for name in args.tasks:
        start = time.perf_counter()
        task = read_task(args.data, name, args.size, patch, args.train_scenes)
        rows += run(args, task, state, args.labels or LABELLED[name])
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    record.show("Recovery", rows)
    record.save("pretrained_vit_recovery", args, rows, arguments, module="pretrained_vit.recovery", weights=digest(state))


if __name__ == "__main__":
    main()
