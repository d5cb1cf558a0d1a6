"""Runs an intact encoder over tiles and gathers the statistics of its blocks. No mathematics, no files."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from terratorch_simpler.backbone import SimplerBackbone
from terratorch_simpler.criteria import Bounds, Criterion, vote
from terratorch_simpler.encoders import InputShape, Layout, PatchGrid
from terratorch_simpler.errors import SimplerWarning, TilesError
from terratorch_simpler.similarity import GroupedCKA, TileGroups
from terratorch_simpler.tiles import Batch, TileSource

Tokens = Literal["patch", "cls", "mean", "all"]

ROWS_PER_TILE = 16
TILES_PER_GROUP = 64
TILES_PER_SMALL_GROUP = 32
GROUPS_TO_TRUST = 8
"""With fewer groups of 64 tiles than this, groups of 32 are used."""
GROUPS_TO_VOTE = 4
"""With fewer groups than this, a bootstrap over groups says nothing."""
SETTLED_SHARE = 0.95
"""Streaming stops once one depth has won this share of resamples."""
FEWEST_TILES = 32
"""Below this there is not even one small group."""


@dataclass(frozen=True)
class Measurement:
    """What a pass over the tiles found.

    Attributes:
        similarity: Similarity S of the blocks, (L, L), float64, on the CPU.
        votes: Share of bootstrap resamples won by each depth, or None with too few groups.
        tiles_seen: Tiles measured.
        rows_seen: Rows of tokens drawn from them.
        settled: Whether the stream was stopped early because one depth had won.
        input_shape: Shape of one input of the encoder as it was seen, without the batch; of each modality by name.
        seconds: How long the pass took.
        data_wait: How many of them the model waited for tiles.
    """

    similarity: Tensor
    votes: Mapping[int, float] | None
    tiles_seen: int
    rows_seen: int
    settled: bool
    input_shape: InputShape
    seconds: float
    data_wait: float


class _Grouping:
    """One way to pool the tiles, and the statistics of its groups."""

    def __init__(self, tiles_per_group: int, num_blocks: int, max_groups: int, device: torch.device) -> None:
        self._groups = TileGroups(tiles_per_group)
        self.metric = GroupedCKA(num_blocks, max_groups, sync_on_compute=False).to(device)
        self.count = 0
        self.tiles = 0

    def add(self, tile: Tensor) -> bool:
        """Take a tile; tell whether it completed a group."""
        return self._update(self._groups.add(tile))

    def finish(self) -> None:
        """Close the last group."""
        self._update(self._groups.finish())

    def _update(self, group: tuple[Tensor, int] | None) -> bool:
        if group is None:
            return False
        features, tiles = group
        self.metric.update(features, tiles, self.count)
        self.metric.check()  # the one wait for the device: once a group, not once a batch
        self.count += 1
        self.tiles += tiles
        return True


class _Pool:
    """Pools tiles in large groups, and in small ones until there are enough large ones."""

    def __init__(self, num_blocks: int, max_tiles: int, device: torch.device) -> None:
        self._large = _Grouping(TILES_PER_GROUP, num_blocks, max_tiles // TILES_PER_GROUP + 1, device)
        self._small = _Grouping(TILES_PER_SMALL_GROUP, num_blocks, 2 * (GROUPS_TO_TRUST + 1), device)

    @property
    def best(self) -> _Grouping:
        """The grouping to believe for the tiles so far."""
        return self._large if self._large.count >= GROUPS_TO_TRUST else self._small

    def add(self, tile: Tensor) -> bool:
        """Take a tile; tell whether the statistics to believe have changed."""
        grown = self._large.add(tile)
        return self._small.add(tile) if self.best is self._small else grown

    def finish(self) -> None:
        """Close the last groups."""
        self._large.finish()
        if self.best is self._small:
            self._small.finish()

    def votes(self, criterion: Criterion, bounds: Bounds, seed: int) -> Mapping[int, float] | None:
        """Bootstrap votes, or None with too few groups."""
        if self.best.count < GROUPS_TO_VOTE:
            return None
        return vote(criterion, self.best.metric.filled(), bounds, seed)


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
) -> Measurement:
    """Stream tiles through the encoder and compare the outputs of its blocks.

    Rows are drawn per tile from a seed of its own and pooled into fixed groups of tiles, so the result does not depend
    on the batch size in flight or the number of workers.

    Args:
        forward: Sends one batch of the source through the model, on the model's device.
        backbone: The intact encoder, somewhere inside the model.
        source: The tiles.
        criterion: Rule whose bootstrap votes decide when to stop.
        bounds: Bounds on the kept depth.
        tokens: Which rows are compared: patch tokens, the class token, the mean of the patch tokens, or all tokens.
        min_tiles: Tiles before the stream may stop early.
        max_tiles: Tiles after which it ends.
        seed: Seed of the rows and of the bootstrap.
        stop_after: Module after which the rest of the model need not run; by default the backbone.
        progress: Told the number of tiles measured so far.

    Returns:
        Similarity and votes.

    Raises:
        TilesError: If fewer than 32 tiles could be measured, or they do not fit the encoder.
        DegenerateFeaturesError: If a block's output is constant or not finite.
    """
    stop_after = backbone if stop_after is None else stop_after
    device = next(backbone.parameters()).device
    pool = _Pool(backbone.num_blocks, max_tiles, device)

    def settled() -> bool:
        votes = pool.votes(criterion, bounds, seed) if pool.best.tiles >= min_tiles else None
        return votes is not None and max(votes.values()) >= SETTLED_SHARE

    seen, early = 0, False
    started, waiting = time.perf_counter(), _DataWait(device)
    with (
        borrowed(stop_after, seed),
        _as_pretrained(stop_after, backbone),
        _Tap(backbone, stop_after, tokens, seed) as tap,
        _stream(source) as batches,
    ):
        # Tile by tile, so that neither max_tiles nor the early stop depends on the batch size in flight.
        for tile in _tiles(waiting.between(batches), tap, forward, source):
            seen += 1
            if progress is not None:
                progress(seen)
            early = pool.add(tile) and settled()
            if early or seen == max_tiles:
                break
    if seen < FEWEST_TILES:
        skips = f" ({source.skips})" if source.skips.counts else ""
        msg = f"Found {seen} usable tiles{skips}, expected at least {FEWEST_TILES} to compare blocks: give more tiles."
        raise TilesError(msg)
    if not early:
        pool.finish()
    metric = pool.best.metric
    similarity = metric.similarity().cpu()  # waits for the device, so that the time below is that of the whole pass
    return Measurement(
        similarity=similarity,
        votes=pool.votes(criterion, bounds, seed),
        tiles_seen=pool.best.tiles,
        rows_seen=int(metric.rows.sum()),
        settled=early,
        input_shape=tap.input_shape,
        seconds=time.perf_counter() - started,
        data_wait=waiting.seconds(),
    )


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


def _tiles(batches: Iterator[Batch], tap: _Tap, forward: Callable[[Batch], object], source: TileSource) -> Iterator[Tensor]:
    """Rows (L, rows, D) of one tile after the other."""
    for batch in batches:
        features, rows_per_tile = tap.run(forward, batch)
        for tile, number in zip(features.split(rows_per_tile, dim=1), batch["index"], strict=True):
            if tile.shape[1]:
                yield tile
            else:
                source.skips.add("nodata", f"tile {number}")


def zeros_like_input(backbone: SimplerBackbone, input_shape: InputShape) -> Tensor | dict[str, Tensor]:
    """A batch of one empty tile.

    Args:
        backbone: Where it will go.
        input_shape: Shape of one input, or of each modality by name.
    """
    parameter = next(backbone.parameters())
    if isinstance(input_shape, Mapping):
        return {
            name: torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
            for name, shape in input_shape.items()
        }
    return torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)


def count_macs(backbone: SimplerBackbone, input_shape: InputShape) -> int:
    """Multiply-accumulate operations of the encoder for one tile, counted by PyTorch's own FLOP counter.

    Args:
        backbone: The encoder as it stands now.
        input_shape: Shape of one input, (C, H, W) or (C, T, H, W), or of each modality by name.
    """
    # Fused attention kernels are not counted on every device; the plain one is made of products that are.
    with (
        borrowed(backbone),
        _frozen(backbone),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        backbone(zeros_like_input(backbone, input_shape))
    return int(counter.get_total_flops()) // 2  # a multiply and an add are one MAC


@contextmanager
def borrowed(module: nn.Module, seed: int = 0) -> Iterator[None]:
    """Borrow a module: evaluation mode without gradients; modes and random state come back, whatever happens.

    Some encoders draw random numbers even then (TerraMind's Thinking-in-Modalities samples tokens): from ``seed``.
    """
    modes = [(part, part.training) for part in module.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]), torch.no_grad():
            module.eval()
            random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        for part, training in modes:
            part.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _as_pretrained(encoder: nn.Module, backbone: SimplerBackbone) -> Iterator[None]:
    """Without the adapters (LoRA) and prompts that will be tuned: what they start from need not be neutral."""
    with ExitStack() as off:
        for part in encoder.modules():
            if hasattr(part, "disable_adapter"):
                off.enter_context(part.disable_adapter())
                break  # PEFT's outermost module answers for all
        off.enter_context(backbone.without_prompts())
        yield


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """The FLOP counter hooks the gradients of whatever has one, and stumbles over prompts where there are none."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


class _EncoderDone(Exception):
    """Ends a forward pass once the encoder has answered: the decoder is of no interest."""


class _Tap:
    """Draws rows from the raw output of every block while a batch passes.

    Hooks fire before any final norm, for whatever wraps the encoder (TemporalWrapper, PEFT, the task's padding).
    """

    def __init__(self, backbone: SimplerBackbone, stop_after: nn.Module, tokens: Tokens, seed: int) -> None:
        self.input_shape: InputShape = ()
        self._backbone = backbone
        self._stop_after = stop_after
        self._tokens = tokens
        self._seed = seed
        self._hooks = ExitStack()
        self._rows: list[Tensor] = []
        self._inputs: Tensor | Mapping[str, Any] = {}
        self._drawn: _Draw | None = None
        self._batch: Batch = {}

    def __enter__(self) -> _Tap:
        handles = [self._backbone.register_forward_pre_hook(self._before, with_kwargs=True)]
        handles += self._backbone.watch(self._after_block)
        handles += [self._stop_after.register_forward_hook(self._after_encoder)]
        for handle in handles:
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()

    def run(self, forward: Callable[[Batch], object], batch: Batch) -> tuple[Tensor, list[int]]:
        """Send a batch through the model.

        Returns:
            Rows after every block, (L, R, D), and how many of the R rows came from each tile.

        Raises:
            TilesError: If the tiles have not the modalities or bands of the encoder.
        """
        check_input(self._backbone, batch["image"])  # before the datamodule's means meet another number of bands
        self._batch, self._rows, self._drawn = batch, [], None
        with suppress(_EncoderDone):
            forward(batch)
        assert self._drawn is not None
        return torch.stack(self._rows), self._drawn.counts

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        self._inputs = inputs
        if isinstance(inputs, Mapping):
            images = {name: part for name, part in inputs.items() if isinstance(part, Tensor) and part.ndim >= 4}
            self.input_shape = {name: tuple(part.shape[1:]) for name, part in images.items()}
        else:
            self.input_shape = tuple(inputs.shape[1:])

    def _after_block(self, output: Tensor) -> None:
        if self._drawn is None:  # only an output tells how many tokens there are
            layout = self._backbone.layout(self._inputs, output.shape[-2])
            valid, special = _token_masks(self._batch["valid"], output.shape[0], layout)
            self._drawn = _draw(valid, special, self._batch["index"], self._tokens, self._seed, output.device)
        self._rows.append(self._drawn.take(output))

    def _after_encoder(self, _module: nn.Module, _args: object, _output: object) -> None:
        raise _EncoderDone


def check_input(backbone: SimplerBackbone, image: Tensor | Mapping[str, Any]) -> None:
    """Refuse tiles whose modalities or bands are not those of the encoder.

    Args:
        backbone: The encoder.
        image: A batch of tiles, (B, C, ...), or of each modality by name.

    Raises:
        TilesError: If they are not.
    """
    expected = backbone.input_shape
    if expected is None:
        return
    if isinstance(image, Mapping):
        if not isinstance(expected, Mapping):
            msg = (
                f"Found tiles with the modalities {', '.join(image)}, expected one image for '{backbone.name}': choose an "
                "encoder of several modalities, or set concat_bands in the datamodule."
            )
            raise TilesError(msg)
        _check_modalities(backbone.name, image, expected)
    elif isinstance(expected, Mapping):
        if len(expected) > 1:
            msg = (
                f"Found tiles of one image, expected the modalities {', '.join(expected)} of '{backbone.name}': stream the "
                "datamodule's images instead of tiles, or name one modality in backbone_modalities."
            )
            raise TilesError(msg)
        _check_bands(backbone.name, image, next(iter(expected.values()))[0])
    else:
        _check_bands(backbone.name, image, expected[0])


def _check_modalities(backbone: str, image: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in image]
    if len(missing) == len(expected):
        msg = (
            f"Found tiles with the modalities {', '.join(image)}, expected {', '.join(expected)} of '{backbone}': give "
            "datamodule and backbone_modalities the same names."
        )
        raise TilesError(msg)
    if missing:
        warnings.warn(
            f"Found tiles without {', '.join(missing)}, expected all modalities of '{backbone}': the depth is chosen from "
            "what is there; remove them from backbone_modalities if they are never there.",
            SimplerWarning,
            stacklevel=2,
        )
    for name, shape in expected.items():
        if name in image:
            _check_bands(f"{backbone}' for modality '{name}", image[name], shape[0])


def _check_bands(backbone: str, image: Tensor, expected: int) -> None:
    found = image.shape[1]
    if found != expected:
        msg = (
            f"Found tiles with {found} bands, expected the {expected} bands of '{backbone}': choose bands "
            "with output_bands in the datamodule or bands in GeoTiffTiles, or set backbone_bands."
        )
        raise TilesError(msg)


class _Draw(NamedTuple):
    """Which rows of a block's output are compared, for the tiles of a batch."""

    index: Tensor  # (R,) into the tokens of all tiles, laid out one tile after the other
    weights: Tensor | None  # (B, tokens) for the mean over patch tokens
    counts: list[int]  # rows of each tile

    def take(self, output: Tensor) -> Tensor:
        """Rows (R, D) of a block's output (B * T, N, D), where T > 1 if frames pass as separate images."""
        tiles, width = len(self.counts), output.shape[-1]
        if self.weights is None:
            return output.reshape(-1, width).index_select(0, self.index)
        per_tile = output.reshape(tiles, -1, width)
        means = torch.einsum("bn,bnd->bd", self.weights, per_tile.to(self.weights.dtype))
        return means.index_select(0, self.index)


def _token_masks(valid: Tensor, images: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Which tokens show at least one valid pixel, and which show none by their nature.

    Args:
        valid: Valid pixels of the tiles, (B, H, W) or (B, T, H, W).
        images: Images that the encoder sees at once: B, or B * T if frames have become images.
        layout: What the tokens of an image stand for.

    Returns:
        Bools of shape (B, images of a tile, N) and (N,).
    """
    per_tile = images // valid.shape[0]
    shown: list[Tensor] = []
    special: list[Tensor] = []
    for part in layout:
        if isinstance(part, PatchGrid):
            shown.append(_valid_patches(valid, per_tile, part))
            special.append(torch.zeros(part.tokens, dtype=torch.bool))
        else:
            shown.append(torch.zeros(valid.shape[0], per_tile, part, dtype=torch.bool))
            special.append(torch.ones(part, dtype=torch.bool))
    return torch.cat(shown, dim=2), torch.cat(special)


def _valid_patches(valid: Tensor, images: int, grid: PatchGrid) -> Tensor:
    """Which patches show at least one valid pixel.

    Args:
        valid: Valid pixels of the tiles, (B, H, W) or (B, T, H, W).
        images: Images of a tile.
        grid: Patches of one image. The model may have padded the images evenly on both sides: what is padded mirrors
            pixels that count already.

    Returns:
        Bool of shape (B, images of a tile, patches of an image).
    """
    tiles = valid.shape[0]
    frames_of_image, height, width = grid.size
    frames = frames_of_image * images
    pixels = valid if valid.ndim == 4 else valid[:, None].expand(-1, frames, -1, -1)
    if pixels.shape[1] != frames:
        pixels = pixels.all(dim=1, keepdim=True).expand(-1, frames, -1, -1)
    if pixels.shape[2:] == (1, 1):  # modalities on different grids have no common mask
        pixels = pixels.expand(-1, -1, height, width)
    extra_rows, extra_columns = height - pixels.shape[2], width - pixels.shape[3]
    if min(extra_rows, extra_columns) < 0:  # the model resized the images
        pixels = nn.functional.interpolate(pixels.float(), size=(height, width)) > 0
        extra_rows = extra_columns = 0
    top, left = extra_rows // 2, extra_columns // 2
    pixels = nn.functional.pad(pixels.float(), (left, extra_columns - left, top, extra_rows - top))
    per_image = pixels.reshape(tiles * images, 1, frames_of_image, height, width)
    return nn.functional.max_pool3d(per_image, grid.patch).gt(0).reshape(tiles, images, -1)


def _draw(valid: Tensor, special: Tensor, numbers: list[int], tokens: Tokens, seed: int, device: torch.device) -> _Draw:
    """Draw rows for every tile from a seed of its own.

    Args:
        valid: Valid patch tokens, (B, images of a tile, N).
        special: Tokens that show no patch, (N,); the first is the class token.
        numbers: Each tile's own number.
        tokens: Which rows to draw.
        seed: Seed of the pass.
        device: Where the rows will be taken.
    """
    if tokens == "cls" and not special[0]:
        msg = "Found tokens 'cls' for an encoder without a class token, expected 'patch', 'mean' or 'all': change tokens."
        raise TilesError(msg)
    usable = valid.any(dim=(1, 2))
    if tokens == "mean":
        weights = valid.flatten(1).float()
        weights = (weights / weights.sum(dim=1, keepdim=True).clamp(min=1)).to(device, non_blocking=True)
        index = usable.nonzero().flatten()
        return _Draw(index.to(device, non_blocking=True), weights, usable.int().tolist())
    if tokens == "patch":
        candidates = valid
    else:
        only_class = torch.arange(len(special)) == 0
        candidates = usable[:, None, None] & (only_class if tokens == "cls" else special)
        candidates = candidates.expand_as(valid) | (valid & (tokens == "all"))
    per_tile = candidates.flatten(1).numpy()
    chosen = []
    for tile, (number, row) in enumerate(zip(numbers, per_tile, strict=True)):
        allowed = np.flatnonzero(row)
        picked = np.random.default_rng([seed, number]).permutation(allowed)[:ROWS_PER_TILE]
        chosen.append(np.sort(picked) + tile * per_tile.shape[1])
    index = torch.from_numpy(np.concatenate(chosen))
    return _Draw(index.to(device, non_blocking=True), None, [len(rows) for rows in chosen])
