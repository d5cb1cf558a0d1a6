"""Distillation without labels: before fit, the pruned encoder learns an output of the intact one on unlabeled tiles.

The target is the output of one block of the intact encoder, whose tokens are LayerNormed, and the loss is smooth L1, as in
TinyMIM (arXiv 2301.01296), which takes an intermediate block as well.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from terratorch_simpler.data import Batch, TileSource
from terratorch_simpler.distributed import Processes
from terratorch_simpler.errors import OutOfMemoryError, RecoveryError
from terratorch_simpler.extraction import as_pretrained, evaluating
from terratorch_simpler.extraction.auto_batch import is_out_of_memory, slice_tiles
from terratorch_simpler.extraction.hooks import EncoderDone
from terratorch_simpler.extraction.loop import open_stream
from terratorch_simpler.extraction.token_sampling import token_masks
from terratorch_simpler.functional.hsic import layer_normed
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.models.peft import PROMPTS, adapter_names

STEP_TILES = 32
"""Tiles of a step, whatever the batch size of the source."""
HELD_OUT = 8
"""Every eighth file, or tile where there are fewer files, is left out of the training and used to evaluate it."""
MOST_HELD_OUT = 64
"""Tiles that are held out; they stay in memory."""
LEARNING_RATE = 3e-4
ADAPTER_LEARNING_RATE = 1e-3
WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""
LARGEST_GRADIENT = 1.0
"""Norm at which gradients are clipped."""


class Distilled(NamedTuple):
    """What a distillation has trained, and how well the student's output is the target's on tiles it was not trained on.

    Attributes:
        weights: Trained parameters by their name in the pruned encoder, float32, on the CPU.
        tiles: Tiles trained on.
        held_out: Tiles evaluated on.
        explained_before: Share of the variance of the target that the output of the pruned encoder explains.
        explained_after: The same after training.
        seconds: Duration.
        peak_bytes: Most memory that tensors took on the device of this rank; None on a CPU.
    """

    weights: dict[str, Tensor]
    tiles: int
    held_out: int
    explained_before: float
    explained_after: float
    seconds: float
    peak_bytes: int | None


def distill(
    forward: Callable[[Batch], object],
    backbone: SimplerBackbone,
    student: SimplerBackbone,
    source: TileSource,
    *,
    target: int,
    steps: int,
    max_tiles: int,
    seed: int,
    stop_after: nn.Module | None = None,
    processes: Processes | None = None,
    progress: Callable[[int], None] | None = None,
    num_files: int = 0,
    scale_gradients: bool = False,
) -> Distilled:
    """Train a pruned encoder to give the output of a block of the intact one, on the same tiles for both.

    A step takes 32 tiles, in the order of the source, over and over. AdamW trains all parameters of the student, or only the
    adapters if it has some (LoRA), in eval mode: dropout and stochastic depth are off. Every rank computes a share of each
    step, and gradients are summed, so results depend on the number of ranks, and on batches, by rounding only.

    Args:
        forward: Sends one batch of the source through the model, on the model's device.
        backbone: The intact encoder, somewhere inside the model; it is not changed.
        student: A pruned copy of it, on the CPU; it is trained in place.
        source: The tiles, all of them on every rank.
        target: Number of blocks of the intact encoder whose output is learned.
        steps: Training steps.
        max_tiles: Tiles of the source that are used.
        seed: Seed of encoders that draw random numbers.
        stop_after: Module that holds the adapters of the backbone, if there are any; by default the backbone.
        processes: Ranks that train together; by default only this one.
        progress: Called with the number of steps so far.
        num_files: Files that the tiles are from, as far as they are known.
        scale_gradients: Whether the model runs in float16, in which small gradients vanish unless the loss is scaled.

    Raises:
        OutOfMemoryError: If intact and pruned encoder do not fit into memory together.
        RecoveryError: If there are too few tiles, held-out ones are nodata, or values are not finite.
    """
    processes = processes or Processes()
    device = next(backbone.parameters()).device
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    outer = backbone if stop_after is None else stop_after
    with (
        torch.compiler.set_stance("force_eager"),
        evaluating(outer, seed),
        as_pretrained(outer, backbone),
        _trainable(student) as parameters,
    ):
        processes.run_all(lambda: _check_memory(student, parameters, device))
        student.to(device).eval()
        pair = _Pair(forward, backbone, student, target)
        tiles = _Tiles(source, max_tiles, by_file=num_files >= HELD_OUT)
        held_out = processes.run_all(tiles.held_out)
        before = pair.explained(held_out)
        scaler = torch.amp.GradScaler(device.type, enabled=scale_gradients)
        used = _train(pair, parameters, tiles, steps, processes, progress or (lambda _: None), scaler)
        after = pair.explained(held_out)
        if not math.isfinite(after):
            raise RecoveryError("Distillation gave values that are not finite: use another precision, or recovery: linear.")
        trained = {name: value for name, value in parameters.items() if value.grad is not None}
        weights = {name: value.detach().float().cpu().clone() for name, value in trained.items()}
    weights = processes.broadcast_from_zero(lambda: weights)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    held = sum(len(part["index"]) for part in held_out)
    return Distilled(weights, used, held, before, after, time.perf_counter() - started, peak)


def pruned_copy(backbone: SimplerBackbone, kept: Sequence[int], width: float) -> SimplerBackbone:
    """A pruned copy of an intact encoder, on the CPU: what a distillation trains.

    Args:
        backbone: The intact encoder.
        kept: Blocks to keep.
        width: Share of the units of every attention head and MLP to keep.
    """
    student = copy.deepcopy(backbone).cpu()
    student.prune_depth(kept)
    student.set_width(width)
    return student


@contextmanager
def _trainable(student: SimplerBackbone) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters that are trained, by name: adapters if there are some, else all; prompts that will be tuned are off."""
    with student.without_prompts():
        named = dict(student.encoder.named_parameters())
        adapters = adapter_names(student)
        wanted = {name: one for name, one in named.items() if not adapters.isdisjoint(name.split("."))}
        if not wanted:
            wanted = {name: one for name, one in named.items() if PROMPTS not in name.split(".")}
        for name, parameter in named.items():
            parameter.requires_grad_(name in wanted)
        yield wanted


def _check_memory(student: SimplerBackbone, parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
    """Raise if weights, gradients and moments of the student do not fit beside the intact encoder; activations come on top.

    Raises:
        OutOfMemoryError: If they do not.
    """
    if device.type != "cuda":  # of other devices the free memory is not known
        return
    needed = sum(one.nbytes for one in student.parameters()) + 3 * sum(one.nbytes for one in parameters.values())
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free:
        raise _no_memory(f"{needed / 2**30:.1f} GiB for weights, gradients and moments, and {free / 2**30:.1f} GiB are free")


def _no_memory(what: str) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"Not enough memory to train the pruned encoder beside the intact one ({what}): use recovery: linear or none, fewer "
        "blocks, or a device with more memory. Nothing was changed."
    )


class _Pair:
    """Intact and pruned encoder on the same inputs.

    Args:
        forward: Sends one batch through the model.
        backbone: The intact encoder.
        student: The pruned one.
        target: Number of blocks of the intact encoder whose output is learned.
    """

    def __init__(
        self, forward: Callable[[Batch], object], backbone: SimplerBackbone, student: SimplerBackbone, target: int
    ) -> None:
        self._forward = forward
        self._backbone = backbone
        self.student = student
        self._target = target

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """LayerNormed tokens of target and student, and the weight of each token, which add up to 1 for every tile.

        Returns:
            Shapes (B, N, D), (B, N, D) and (B, N); tiles without a valid pixel have weights 0.
        """
        with torch.no_grad():
            call, target = _tokens_after(self._backbone, self._target, lambda: self._forward(batch))
        with torch.autocast(target.device.type, dtype=call.autocast, enabled=call.autocast is not None):
            run = partial(self.student, *call.args, **call.kwargs)
            _, output = _tokens_after(self.student, self.student.num_blocks, run)
        inputs = call.args[0] if call.args else next(iter(call.kwargs.values()))
        layout = self._backbone.layout(inputs, target.shape[-2])
        shown, special = token_masks(batch["valid"], target.shape[0], layout)
        usable = shown.any(dim=(1, 2), keepdim=True)
        weights = ((shown | (special & usable)).flatten(1)).float()
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        tiles, width = len(weights), target.shape[-1]
        as_tiles = [layer_normed(one).reshape(tiles, -1, width) for one in (target, output)]
        return as_tiles[0], as_tiles[1], weights.to(target.device)

    def loss(self, batch: Batch) -> Tensor:
        """Smooth L1, summed over the tiles."""
        target, output, weights = self.outputs(batch)
        per_token = nn.functional.smooth_l1_loss(output, target, reduction="none").mean(dim=2)
        return (per_token * weights).sum()

    @torch.no_grad()
    def explained(self, batches: Sequence[Batch]) -> float:
        """1 - |Y - Z|^2 / |Y - mean(Y)|^2 of target Y and student's output Z, LayerNormed, over tokens of all tiles."""
        residual = square = count = 0.0
        total: Tensor | float = 0.0
        for batch in batches:
            for start in range(len(batch["index"])):  # a tile at a time, which fits wherever training does
                target, output, weights = self.outputs(slice_tiles(batch, [start]))
                rows = weights > 0
                y, z = target[rows].double().cpu(), output[rows].double().cpu()
                residual += float((y - z).square().sum())
                square += float(y.square().sum())
                total = total + y.sum(dim=0)
                count += len(y)
        if not count:
            msg = "Found only nodata in the held-out tiles, expected pixels: give more tiles, or set recovery: none."
            raise RecoveryError(msg)
        assert isinstance(total, Tensor)
        return 1 - residual / (square - float(total.square().sum()) / count)


class _Call(NamedTuple):
    """Arguments of an encoder, and the type of the autocast it was called in; None outside of one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None


def _tokens_after(encoder: SimplerBackbone, blocks: int, run: Callable[[], object]) -> tuple[_Call, Tensor]:
    """How the encoder was called, and the raw output of its first blocks, (B, N, D); what comes after does not run."""
    calls: list[_Call] = []
    outputs: list[Tensor] = []

    def note(_encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        device = next(encoder.parameters()).device.type
        calls.append(_Call(args, kwargs, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None))

    def observe(tokens: Tensor) -> None:
        outputs.append(tokens)
        if len(outputs) > blocks:  # the first is the input of the first block
            raise EncoderDone
        outputs[0] = tokens[:0]  # not needed any more

    with ExitStack() as hooks:
        for handle in (encoder.register_forward_pre_hook(note, with_kwargs=True), *encoder.register_block_hooks(observe)):
            hooks.callback(handle.remove)
        with suppress(EncoderDone):
            run()
    return calls[0], outputs[blocks]


@dataclass
class _Tiles:
    """Splits the tiles of a source into those to train on and those held out.

    Attributes:
        source: The tiles.
        max_tiles: How many of them are used.
        by_file: Whether files are held out; else tiles.
    """

    source: TileSource
    max_tiles: int
    by_file: bool
    _files: dict[str, int] = field(default_factory=dict)  # numbers in the order of the source, the same in every pass

    def held_out(self) -> list[Batch]:
        """The first tiles that are held out.

        Raises:
            RecoveryError: If there are none.
        """
        found: list[Batch] = []
        missing = MOST_HELD_OUT
        for part in self._split(held_out=True):
            found.append(slice_tiles(part, range(min(missing, len(part["index"])))))
            missing -= len(found[-1]["index"])
            if not missing:
                break
        if not found:
            msg = f"There are too few tiles to hold some out, expected at least {HELD_OUT}: give more, or recovery: linear."
            raise RecoveryError(msg)
        return found

    def steps(self) -> Iterator[list[Batch]]:
        """Parts of batches that make up 32 tiles, over and over.

        Raises:
            RecoveryError: If there are no tiles to train on.
        """
        step: list[Batch] = []
        missing = STEP_TILES
        while True:
            found = False
            for part in self._split(held_out=False):
                found, start, size = True, 0, len(part["index"])
                while start < size:
                    end = min(size, start + missing)
                    step.append(slice_tiles(part, range(start, end)))
                    missing, start = missing - (end - start), end
                    if not missing:
                        yield step
                        step, missing = [], STEP_TILES
            if not found:
                msg = "There are no tiles to train on, expected some beside those held out: give more, or recovery: linear."
                raise RecoveryError(msg)

    def _split(self, held_out: bool) -> Iterator[Batch]:
        with open_stream(self.source) as batches:
            for batch in batches:
                paths = batch.get("path")
                keys = batch["position"]
                if self.by_file and paths:
                    keys = [self._files.setdefault(path, len(self._files)) for path in paths]
                inside = [position < self.max_tiles for position in batch["position"]]
                wanted = [(key % HELD_OUT == HELD_OUT - 1) == held_out for key in keys]
                if numbers := [number for number, both in enumerate(zip(inside, wanted, strict=True)) if all(both)]:
                    yield slice_tiles(batch, numbers)
                if not all(inside):
                    break


def _train(
    pair: _Pair,
    parameters: Mapping[str, nn.Parameter],
    tiles: _Tiles,
    steps: int,
    processes: Processes,
    progress: Callable[[int], None],
    scaler: torch.amp.GradScaler,
) -> int:
    """Train, and return the number of tiles seen."""
    values = list(parameters.values())
    rate = ADAPTER_LEARNING_RATE if adapter_names(pair.student) else LEARNING_RATE
    optimizer = torch.optim.AdamW(values, rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_learning_rate, steps=steps))
    seen: set[int] = set()
    limit = STEP_TILES

    def add_gradients(parts: Sequence[Batch]) -> bool:
        """Gradients of this rank's share; False if memory ran out."""
        optimizer.zero_grad()
        try:
            for part in parts:
                size = len(part["index"])
                for start in range(0, size, limit):
                    with torch.enable_grad():
                        loss = pair.loss(slice_tiles(part, range(start, min(size, start + limit)))) / STEP_TILES
                        scaler.scale(loss).backward()
            return True
        except RuntimeError as err:
            if not is_out_of_memory(err):
                raise
        return False

    def compute(parts: Sequence[Batch]) -> None:
        nonlocal limit
        while not add_gradients(parts):
            limit //= 2
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            if not limit:
                raise _no_memory("it ran out with a single tile")

    stream = tiles.steps()
    for step in range(steps):
        parts = processes.run_all(lambda: next(stream))
        for part in parts:
            seen.update(part["position"])
        share = _share(parts, processes)
        processes.run_all(lambda share=share: compute(share))  # type: ignore[misc]
        _sum_over_ranks(values, processes)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(values, LARGEST_GRADIENT)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        progress(step + 1)
    return len(seen)


def _share(parts: Sequence[Batch], processes: Processes) -> list[Batch]:
    """Every n-th tile of a step, for n ranks."""
    first, share = 0, []
    for part in parts:
        size = len(part["index"])
        if numbers := [number for number in range(size) if (first + number) % processes.count == processes.rank]:
            share.append(slice_tiles(part, numbers))
        first += size
    return share


def _sum_over_ranks(parameters: Sequence[nn.Parameter], processes: Processes) -> None:
    if processes.count == 1:
        return
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    flat = torch.cat([one.flatten().float().cpu() for one in gradients])
    processes.all_reduce(flat)
    for parameter, total in zip(parameters, flat.split([one.numel() for one in parameters]), strict=True):
        parameter.grad = total.reshape(parameter.shape).to(parameter)


def _learning_rate(step: int, steps: int) -> float:
    """Share of the learning rate: a linear warm-up, then half a cosine."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
