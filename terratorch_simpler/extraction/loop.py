"""One pass over the tiles, by one process or several: pools what blocks answer, votes, stops when a depth has won."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from terratorch_simpler.criteria import Bounds, Criterion, Statistics
from terratorch_simpler.data import Batch, Skipped, TileSource
from terratorch_simpler.distributed import Processes
from terratorch_simpler.encoders import InputShape
from terratorch_simpler.errors import TilesError
from terratorch_simpler.extraction.accumulator import CONVERGED_SHARE
from terratorch_simpler.extraction.auto_batch import comparing_device
from terratorch_simpler.extraction.collector import DistributedCollector
from terratorch_simpler.extraction.evaluating import as_pretrained, evaluating
from terratorch_simpler.extraction.hooks import FeatureExtractor
from terratorch_simpler.extraction.partial_result import PartialResult
from terratorch_simpler.extraction.recovery_sums import RecoverySums
from terratorch_simpler.extraction.token_sampling import Tokens
from terratorch_simpler.indices import Span
from terratorch_simpler.models.backbone import SimplerBackbone

FEWEST_TILES = 32
"""Below this there is not even one small group."""


@dataclass(frozen=True)
class Measurement:
    """What a pass over the tiles found.

    Attributes:
        statistics: What rules choose by, on the CPU.
        votes: Share of bootstrap resamples won by each depth, or None with too few groups.
        tiles_seen: Tiles measured.
        rows_seen: Rows of tokens drawn from them.
        settled: Whether the stream was stopped early because one depth had won.
        skips: Count of what could not be used up to the last tile measured.
        input_shape: Shape of one input of the encoder as it was seen, without the batch; of each modality by name.
        seconds: How long the pass took.
        data_wait: How many of them the model of this process waited for tiles.
        batch_limit: Most tiles that fitted into memory at once, if it ran out with more.
        repairs: Sums for maps in the place of dropped blocks; None unless asked for.
        peak_bytes: Most memory that tensors took on the device of this process, the encoder included; None on a CPU.
    """

    statistics: Statistics
    votes: Mapping[int, float] | None
    tiles_seen: int
    rows_seen: int
    converged: bool
    skips: Skipped
    input_shape: InputShape
    seconds: float
    data_wait: float
    batch_limit: int | None
    repairs: RecoverySums | None
    peak_bytes: int | None

    @property
    def similarity(self) -> Tensor:
        """Similarity S of the blocks, (L, L), float64, on the CPU."""
        return self.statistics.similarity


def measure(
    forward: Callable[[Batch], object],
    backbone: SimplerBackbone,
    source: TileSource,
    criterion: Criterion,
    bounds: Bounds,
    *,
    tokens: Tokens = "patch",
    min_tiles: int = 256,
    max_tiles: int = 4096,
    seed: int = 0,
    stop_after: nn.Module | None = None,
    progress: Callable[[int], None] | None = None,
    processes: Processes | None = None,
    partial_result: PartialResult | None = None,
    spans: Sequence[Span] = (),
) -> Measurement:
    """Stream tiles through the encoder and compare the outputs of its blocks.

    Rows are drawn per tile from a seed of its own and pooled into fixed groups of tiles, so the result does not depend
    on the batch size in flight, nor on the number of workers or processes.

    Args:
        forward: Sends one batch of the source through the model, on the model's device.
        backbone: The intact encoder, somewhere inside the model.
        source: The tiles, all of them in every process: each takes its share.
        criterion: Rule whose bootstrap votes decide when to stop.
        bounds: Bounds on the kept depth.
        tokens: Which rows are compared: patch tokens, the class token, the mean of the patch tokens, or all tokens.
        min_tiles: Tiles before the stream may stop early.
        max_tiles: Tiles after which it ends.
        seed: Seed of the rows and of the bootstrap.
        stop_after: Module after which the rest of the model need not run; by default the backbone.
        progress: Told the number of tiles measured so far.
        processes: Those that measure together; by default only this one.
        partial_result: Where to keep the pass if it is ended, and to go on from; used by the first process.
        spans: Ranges of blocks that may be dropped and repaired; not together with ``partial_result``, which keeps no sums
            for them, and only for patch tokens.

    Returns:
        Statistics and votes, the same in every process.

    Raises:
        TilesError: If fewer than 32 tiles could be measured, or they do not fit the encoder.
        DegenerateFeaturesError: If a block's output is constant or not finite.
        OutOfMemoryError: If memory runs out with a single tile.
        ProcessError: If another process failed or does not answer.
    """
    stop_after = backbone if stop_after is None else stop_after
    processes = processes or Processes()
    device = next(backbone.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started, waiting = time.perf_counter(), _DataWait(device)
    converged = False
    with (
        torch.compiler.set_stance("force_eager"),  # a graph of the uncut model, with hooks in it, would be for nothing
        evaluating(stop_after, seed),
        as_pretrained(stop_after, backbone),
        FeatureExtractor(backbone, stop_after, tokens, seed, with_special=bool(spans)) as extractor,
    ):
        collector = DistributedCollector(
            source,
            extractor,
            forward,
            backbone.num_blocks,
            max_tiles,
            processes,
            partial_result,
            comparing_device(device),
            progress or (lambda _: None),
            spans,
        )
        similarities = collector.similarities
        count = max(0, collector.compared - 1)  # of a pass that goes on, the last group may have settled it

        def judge() -> None:
            """Group by group, so that the end does not depend on how many came at once."""
            nonlocal count, converged
            while count < collector.compared and not converged:
                count += 1
                collector.judge(count)
                similarities.check(count)
                votes = (
                    similarities.votes(count, criterion, bounds, seed) if similarities.tiles(count) >= min_tiles else None
                )
                converged = votes is not None and max(votes.values()) >= CONVERGED_SHARE
            collector.keep(count)
            if similarities.repairs is not None:
                similarities.repairs.accept(count)

        with _saved_if_ended(collector), _stream(collector.source) as stream:
            batches = waiting.between(stream)
            while not converged and (collector.compared > count or not collector.over):
                if collector.compared > count:
                    with similarities:
                        judge()
                else:
                    collector.step(batches)
            if not converged:
                collector.judge(count)
        if not converged and collector.taken < FEWEST_TILES:
            skipped = f" ({collector.skips})" if collector.skips.counts else ""
            msg = (
                f"Found {collector.taken} usable tiles{skipped}, expected at least {FEWEST_TILES} to compare blocks: give "
                "the callback more unlabeled images with tiles, or a plan, or set backbone_keep to the number of blocks to "
                "keep."
            )
            raise TilesError(msg)
        if similarities.repairs is not None:
            similarities.repairs.merge(collector.width)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # for the times below; a process that compared no group has not waited yet
        with similarities:
            found = Measurement(
                statistics=similarities.statistics(count),
                votes=similarities.votes(count, criterion, bounds, seed),
                tiles_seen=similarities.tiles(count),
                rows_seen=similarities.rows(count),
                converged=converged,
                skips=collector.skips,
                input_shape=collector.input_shape,
                seconds=time.perf_counter() - started,
                data_wait=waiting.seconds(),
                batch_limit=collector.batch_limit,
                repairs=similarities.repairs,
                peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            )
    if partial_result is not None and processes.first:
        partial_result.remove()
    return found


@contextmanager
def _saved_if_ended(collector: DistributedCollector) -> Iterator[None]:
    try:
        yield
    except BaseException:
        collector.save()
        raise


@contextmanager
def _stream(source: TileSource) -> Iterator[Iterator[Batch]]:
    """Iterate a source, and stop its reading ahead whatever happens."""
    batches = iter(source)
    try:
        yield batches
    finally:
        if isinstance(batches, Generator):
            batches.close()


class _DataWait:
    """Adds up how long the model waits for tiles, without waiting for the device itself.

    On a GPU this is the time that passes in its own queue while the next batch is asked for: as long as it computes, none
    does, however long the processor waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def between(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches."""
        while True:
            start = self._now()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._add(start, self._now())
            yield batch

    def seconds(self) -> float:
        """Time so far; the device must have caught up."""
        return self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _add(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> None:
        if isinstance(start, float) and isinstance(end, float):
            self._seconds += end - start
        elif isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._events.append((start, end))
