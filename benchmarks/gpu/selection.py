"""Checks of the selection: precision, batch size, host waits, random state, and memory that runs out."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

import terratorch_simpler
from benchmarks.gpu.check import Finding, Settings, judged, skipped
from benchmarks.gpu.models import large_task, plan_of, tiles, trained_task
from terratorch_simpler.criteria import Bounds, Simpler
from terratorch_simpler.data import Batch
from terratorch_simpler.extraction import ExtractionConfig, Measurement, measure, on_device
from terratorch_simpler.models.backbone import SimplerBackbone, find_backbone
from terratorch_simpler.plan import SlimmingPlan
from tests.in_memory_tiles import Tiles, land

TILE = 64
"""Pixels: what the demo's encoder was pretrained on, and four to a scene in a full run."""
TOLERANCES = {"32-true": 1e-4, "bf16-mixed": 5e-3, "16-mixed": 5e-3}
"""How far the similarity of blocks may be from that in float32 on the CPU."""
ROUNDING = {"32-true": 1e-5, "bf16-mixed": 1e-3}
"""How far it may move with the batch size: other kernels add in another order."""
MOST_TILES = 5
"""Tiles that fit into the memory that a CPU pretends to have."""
WAIT = "synchronizing CUDA operation"
PACKAGE = Path(terratorch_simpler.__file__).parent


def count_of(settings: Settings) -> int:
    """Tiles of a pass."""
    return 40 if settings.small else 192


def waits(settings: Settings) -> Iterator[Finding]:
    """The host waits for the GPU once a group of tiles, and never for a batch: twice the batches, as many waits."""
    if not settings.cuda:
        yield skipped("needs CUDA, which tells where the host waits for it")
        return
    plan_of(trained_task(), tiles(settings, TILE, 16), count_of(settings), settings.device)  # kernels are loaded once
    counts = {}
    for batch in (16, 8):
        with waits_counted() as counts[batch]:
            plan_of(trained_task(), tiles(settings, TILE, batch), count_of(settings), settings.device)
    yield per_batch(counts[16], counts[8], count_of(settings) // 16)


def per_batch(few: Mapping[str, int], many: Mapping[str, int], batches: int) -> Finding:
    """Judge the waits of two passes over the same tiles.

    Args:
        few: Waits by line.
        many: Those with twice the batches.
        batches: How many more there are.
    """
    more = {line: (many[line] - few.get(line, 0)) / batches for line in many if many[line] > few.get(line, 0)}
    each = "; ".join(f"{count:.2g} at {line}" for line, count in more.items()) or "none"
    whole = "; ".join(f"{count} at {line}" for line, count in sorted(few.items())) or "none"
    return judged(
        not more, f"waits for every batch: {each} (expected none); of a whole pass: {whole}", each=more, few=dict(few)
    )


@contextmanager
def waits_counted() -> Iterator[Counter[str]]:
    """Count the waits of a block by line of the package, with the place below it that waits if that is not its own."""
    found: Counter[str] = Counter()

    def note(message: Warning | str, _category: type[Warning], filename: str, number: int, *_: Any) -> None:
        if WAIT in str(message):
            found[_line(sys._getframe(1), f"{filename}:{number}")] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else None
        try:
            if before is not None:
                torch.cuda.set_sync_debug_mode("warn")
            yield found
        finally:
            if before is not None:
                torch.cuda.set_sync_debug_mode(before)


def _line(frame: FrameType | None, place: str) -> str:
    """The innermost line of the package on the stack."""
    while frame is not None and not frame.f_code.co_filename.startswith(str(PACKAGE)):
        frame = frame.f_back
    if frame is None:
        return place
    ours = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return _short(ours) if ours == place else f"{_short(ours)} ({_short(place)})"


def _short(place: str) -> str:
    return place.removeprefix(f"{PACKAGE.parent}/").rpartition("site-packages/")[2]


def precisions(settings: Settings) -> Iterator[Finding]:
    """The choice of a pretrained encoder, and the similarity of blocks in a large one, are those of the CPU in float32."""
    for encoder, task in (("demo's encoder", trained_task()), ("large encoder", large_task(settings))):
        source = tiles(settings, TILE, 16)
        expected = plan_of(copy.deepcopy(task), source, count_of(settings), "cpu")
        for precision, tolerance in TOLERANCES.items():
            if precision == "16-mixed" and not settings.cuda:
                yield skipped(f"{encoder}, {precision}: autocast to float16 needs CUDA")
                continue
            found = plan_of(copy.deepcopy(task), source, count_of(settings), settings.device, precision)
            # Random weights have no depth to choose.
            yield compared(f"{encoder}, {precision}", expected, found, tolerance, choice=encoder == "demo's encoder")


def compared(what: str, expected: SlimmingPlan, found: SlimmingPlan, tolerance: float, choice: bool = True) -> Finding:
    """Two plans of one encoder.

    Args:
        what: What makes them differ.
        expected: One.
        found: The other.
        tolerance: How far similarity and score may be apart.
        choice: Whether the kept blocks have to be the same.
    """
    similarity = float(np.abs(np.subtract(expected.similarity, found.similarity)).max())
    before, after = expected.scores or {}, found.scores or {}
    scores = max(abs(before[depth] - after[depth]) for depth in before) if before.keys() == after.keys() else float("inf")
    kept = (len(expected.kept_blocks), len(found.kept_blocks))
    same = expected.kept_blocks == found.kept_blocks
    chosen = f"; keeps {kept[1]} blocks, expected {kept[0]}" if choice else ""
    return judged(
        max(similarity, scores) <= tolerance and (same or not choice),
        f"{what}: similarity within {similarity:.1e}, scores within {scores:.1e} (at most {tolerance:.0e}){chosen}",
        similarity=similarity, scores=scores, tolerance=tolerance, kept=list(found.kept_blocks),
        expected=list(expected.kept_blocks),
    )  # fmt: skip


def batches(settings: Settings) -> Iterator[Finding]:
    """Batches of 1, 8 and 32 tiles give one plan."""
    for precision, tolerance in ROUNDING.items():
        one, *others = (
            (size, plan_of(trained_task(), tiles(settings, TILE, size), count_of(settings), settings.device, precision))
            for size in (8, 1, 32)
        )
        for size, plan in others:
            yield compared(f"{precision}, batches of {size} and {one[0]}", one[1], plan, tolerance)


def random_state(settings: Settings) -> Iterator[Finding]:
    """A selection whose encoder draws from every generator leaves them all as they were.

    First in a process that has not used the GPU yet: its generators start from the seed when they are first used.
    """
    gpus = list(range(torch.cuda.device_count())) if settings.cuda else []
    generators = ("Python", "NumPy", "CPU", *(f"cuda:{gpu}" for gpu in gpus))
    drawn = []

    def draw() -> list[float]:
        numbers = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return numbers + [float(torch.rand((), device=f"cuda:{gpu}")) for gpu in gpus]

    for when in ("at first use", "later"):
        task = trained_task()
        find_backbone(task).register_forward_pre_hook(lambda *_: drawn.append(draw()))
        after = []
        for selects in (True, False):
            random.seed(5)
            np.random.seed(5)
            torch.manual_seed(5)
            if when == "later":
                draw()
            if selects:
                plan_of(task, tiles(settings, TILE, 16), count_of(settings), settings.device)
            after.append(draw())
        moved = [name for name, one, two in zip(generators, *after, strict=True) if one != two]
        yield judged(
            not moved and bool(drawn),
            f"{when}: {', '.join(moved) or 'none'} of {', '.join(generators)} moved by a selection that drew "
            f"{len(drawn)} times from each (expected none)",
            moved=moved, generators=list(generators),
        )  # fmt: skip
    if not gpus:
        yield skipped("generators of GPUs need CUDA")


def memory(settings: Settings) -> Iterator[Finding]:
    """With half of the memory that a batch needs, the pass goes on with fewer tiles at once and finds the same plan."""
    task = trained_task()
    backbone = find_backbone(task)
    size = 32 if settings.small else 96
    images = land(40) if settings.small else land(192, size=224)  # large beside the blocks that PyTorch's allocator asks for
    source, device = Tiles(images, batch_size=size), torch.device(settings.device)
    with on_device(backbone, device):
        roomy = pass_over(backbone, source, device)
        if settings.cuda:
            torch.cuda.empty_cache()
            assert roomy.peak_bytes is not None
            room = (roomy.peak_bytes - torch.cuda.memory_allocated(device)) // 2
            limit = torch.cuda.memory_reserved(device) + room
            torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory, device)
        else:
            backbone.blocks[6].register_forward_pre_hook(_runs_out)
        tight = pass_over(backbone, source, device)
    how = "of the GPU" if settings.cuda else "that a CPU pretends to have"
    yield judged(
        roomy.batch_limit is None and tight.batch_limit is not None,
        f"memory {how}: batches of {size} go on as {tight.batch_limit} (expected fewer)",
        batch=size, limit=tight.batch_limit, peak_bytes=roomy.peak_bytes, tight_peak_bytes=tight.peak_bytes,
    )  # fmt: skip
    blocks = backbone.full_num_blocks
    kept = [Simpler().choose(found.statistics, blocks, Bounds()).kept_blocks for found in (roomy, tight)]
    difference = float((roomy.similarity - tight.similarity).abs().max())
    seen = [(found.tiles_seen, found.rows_seen) for found in (roomy, tight)]
    yield judged(
        kept[0] == kept[1] and seen[0] == seen[1] and difference <= ROUNDING["32-true"],
        f"the plan: keeps {len(kept[1])} blocks, expected {len(kept[0])}; similarity within {difference:.1e} (at most "
        f"{ROUNDING['32-true']:.0e}); {seen[1][0]} tiles and {seen[1][1]} rows, expected {seen[0][0]} and {seen[0][1]}",
        difference=difference, kept=[list(blocks) for blocks in kept], seen=seen,
    )  # fmt: skip
    if not settings.cuda:
        yield skipped("an allocator that is full needs CUDA")


def pass_over(backbone: SimplerBackbone, source: Tiles, device: torch.device) -> Measurement:
    """A pass over all tiles."""

    def forward(batch: Batch) -> object:
        return backbone(batch["image"].to(device))

    return measure(forward, backbone, source, ExtractionConfig(Simpler(), min_tiles=len(source), max_tiles=len(source)))


def _runs_out(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
    if len(inputs[0]) > MOST_TILES:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
