"""One pass over the tiles, by one rank or several: compare the outputs of the blocks until the bootstrap agrees."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from terratorch_simpler.criteria import Evidence, Statistics
from terratorch_simpler.data import Batch, SkipCounter, TileSource
from terratorch_simpler.distributed import Processes
from terratorch_simpler.encoders import InputShape
from terratorch_simpler.errors import TooFewTilesError
from terratorch_simpler.extraction.collector import DistributedCollector, ExtractionConfig
from terratorch_simpler.extraction.evaluating import as_pretrained, evaluating
from terratorch_simpler.extraction.hooks import FeatureExtractor
from terratorch_simpler.extraction.input_statistics import InputStatistics
from terratorch_simpler.extraction.partial_result import PartialResult
from terratorch_simpler.extraction.recovery_statistics import RecoveryStatistics
from terratorch_simpler.extraction.token_sampling import TokenSampler
from terratorch_simpler.models.plain import Encoder
from terratorch_simpler.plan import MIN_GROUP_TILES


@dataclass(frozen=True)
class Measurement:
    """Result of a pass over the tiles.

    Attributes:
        statistics: What criteria choose by, on the CPU.
        votes: Share of bootstrap resamples that choose each depth, or None with too few groups.
        evidence: What a verdict on the choice is judged from.
        tiles_seen: Tiles measured.
        rows_seen: Rows of tokens sampled from them.
        converged: Whether the pass stopped early because the bootstrap agreed on a depth.
        skips: Count of tiles that could not be used, up to the last tile measured.
        input_shape: Shape of one input of the encoder, without the batch; of each modality by name.
        seconds: Duration of the pass.
        data_wait: Seconds of it in which the model of this rank waited for tiles.
        batch_limit: Most tiles that fitted into memory at once, if it ran out with more.
        recovery: Normal equations for maps in the place of dropped blocks; None unless asked for.
        peak_bytes: Most memory that tensors took on the device of this rank, the encoder included; None on a CPU.
        implausible: Which bands have values that no normalized image has, in a sentence; None if there are none.
    """

    statistics: Statistics
    votes: Mapping[int, float] | None
    evidence: Evidence
    tiles_seen: int
    rows_seen: int
    converged: bool
    skips: SkipCounter
    input_shape: InputShape
    seconds: float
    data_wait: float
    batch_limit: int | None
    recovery: RecoveryStatistics | None
    peak_bytes: int | None
    implausible: str | None

    @property
    def similarity(self) -> Tensor:
        """Similarity S of the blocks, (L, L), float64, on the CPU."""
        return self.statistics.similarity


def measure(
    forward: Callable[[Batch], object],
    backbone: Encoder,
    source: TileSource,
    config: ExtractionConfig,
    *,
    stop_after: nn.Module | None = None,
    progress: Callable[[int], None] | None = None,
    processes: Processes | None = None,
    partial_result: PartialResult | None = None,
) -> Measurement:
    """Stream tiles through the encoder and compare the outputs of its blocks.

    Rows are sampled per tile from a seed of its own and compared in fixed groups of tiles, so the result depends neither on
    the batch size nor on the number of workers or ranks.

    Args:
        forward: Sends one batch of the source through the model, on the model's device.
        backbone: The intact encoder, somewhere inside the model.
        source: The tiles, all of them on every rank: each reads its share.
        config: What to compute, and when to stop.
        stop_after: Module after which the rest of the model need not run; by default the backbone.
        progress: Called with the number of tiles measured so far.
        processes: Ranks that measure together; by default only this one.
        partial_result: Where rank 0 saves an interrupted pass, and resumes it from.

    Returns:
        Statistics and bootstrap shares, the same on every rank.

    Warns:
        ImplausibleInputWarning: If a band is far from zero mean and unit variance after normalization.

    Raises:
        TooFewTilesError: If fewer than 32 tiles could be measured.
        TilesError: If they do not fit the encoder.
        DegenerateFeaturesError: If a block's output is constant or not finite.
        OutOfMemoryError: If memory runs out with a single tile.
        ProcessError: If another rank failed or does not answer.
    """
    stop_after = backbone if stop_after is None else stop_after
    processes = processes or Processes()
    device = next(backbone.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started, waiting = time.perf_counter(), _DataWait(device)
    input_statistics = InputStatistics(getattr(source, "band_names", ()))
    sampler = TokenSampler(config.tokens, config.seed, with_special=bool(config.spans))
    with (
        torch.compiler.set_stance("force_eager"),  # compiling the intact model with hooks would be for this pass only
        evaluating(stop_after, config.seed),
        as_pretrained(stop_after, backbone),
        FeatureExtractor(backbone, stop_after, sampler, input_statistics=input_statistics) as extractor,
    ):
        collector = DistributedCollector(
            extractor, forward, source, config, input_statistics, processes, partial_result, progress or (lambda _: None)
        )
        with _saved_on_error(collector), open_stream(collector.shard) as stream:
            batches = waiting.timed(stream)
            collector.accept_groups()  # those of a resumed pass
            while not collector.done:
                collector.read_round(batches)
                collector.accept_groups()
            if not collector.converged:
                collector.count_skips()
        if not collector.converged and collector.num_tiles < MIN_GROUP_TILES:
            skipped = f" ({collector.skips})" if collector.skips.counts else ""
            msg = (
                f"Only {collector.num_tiles} usable tiles{skipped}; comparing blocks needs at least {MIN_GROUP_TILES}: give "
                "the callback more unlabeled images with tiles, or a plan, or set backbone_keep to the number of blocks to "
                "keep."
            )
            raise TooFewTilesError(msg, collector.num_tiles, collector.input_shape, collector.skips.counts)
        if collector.recovery is not None:
            collector.recovery.all_reduce(collector.width)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # for the times below; a rank that compared no group has not waited yet
        implausible = input_statistics.warn_implausible(processes)
        count, similarity = collector.accepted, collector.similarity
        with similarity.summed_over_ranks():
            result = Measurement(
                statistics=similarity.statistics(count),
                votes=similarity.bootstrap(count, config.criterion, config.bounds, config.seed),
                evidence=similarity.evidence(count, tuple(collector.tiles_of_file.values())),
                tiles_seen=similarity.tiles(count),
                rows_seen=similarity.rows(count),
                converged=collector.converged,
                skips=collector.skips,
                input_shape=collector.input_shape,
                seconds=time.perf_counter() - started,
                data_wait=waiting.seconds(),
                batch_limit=collector.batch_limit,
                recovery=collector.recovery,
                peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
                implausible=implausible,
            )
    if partial_result is not None and processes.first:
        partial_result.remove()
    return result


@contextmanager
def _saved_on_error(collector: DistributedCollector) -> Iterator[None]:
    try:
        yield
    except BaseException:
        collector.save()
        raise


@contextmanager
def open_stream(source: TileSource) -> Iterator[Iterator[Batch]]:
    """Iterate a source, and stop its prefetching whatever happens."""
    batches = iter(source)
    try:
        yield batches
    finally:
        if isinstance(batches, Generator):
            batches.close()


class _DataWait:
    """How long the model waits for tiles, measured without synchronising the device.

    On a GPU events are recorded around each request for a batch: while the GPU still computes, no time passes between them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
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
        """Time so far; the device must be synchronised."""
        return self._seconds + float(sum(start.elapsed_time(end) for start, end in self._events)) / 1000

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
