"""What encoders cost on the device at hand, measured side by side: none is first when the machine is cool."""

from __future__ import annotations

import itertools
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from terratorch_simpler.encoders import InputShape
from terratorch_simpler.extraction import count_macs
from terratorch_simpler.models.backbone import SimplerBackbone

WARM_UPS = 3
"""Passes before any is timed: kernels are chosen and memory is set aside in the first ones."""
LEAST_GROWTH = 1.05
"""A batch twice as large has to raise the throughput by so much to go on (ours)."""
LARGEST_BATCH = 1024
PASSES = 3
"""Timed passes of a batch."""
LONG_PASS = 0.5
"""Seconds after which one timed pass is enough: what disturbs it is short beside it."""

Precision = Callable[[], AbstractContextManager[object]]


class Cost(NamedTuple):
    """What one encoder costs.

    Attributes:
        parameters: Parameters.
        macs: Multiply-accumulate operations for one tile.
        latency_ms: Median time of one tile, in milliseconds.
        throughput: Tiles per second at the best batch size.
        batch_size: That batch size.
        peak_memory_mib: Weights, input and most memory of one tile's pass, in MiB.
    """

    parameters: int
    macs: int
    latency_ms: float
    throughput: float
    batch_size: int
    peak_memory_mib: float


def measure_costs(
    encoders: Sequence[SimplerBackbone],
    input_shape: InputShape,
    repeats: int,
    precision: Precision,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Cost]:
    """Measure encoders side by side, in a new random order each time, so that drift of the machine favours none.

    Args:
        encoders: The encoders, in evaluation mode, all on one device.
        input_shape: Shape of one input, (C, H, W) or (C, T, H, W), or of each modality by name.
        repeats: Timed passes of a single tile.
        precision: The precision they run in.
        seed: Seed of the order and of the input.
        progress: Called with how many of the :func:`num_steps` are done.
    """
    passes = [_Pass(encoder, input_shape, precision, seed) for encoder in encoders]
    random = np.random.default_rng(seed)
    done = itertools.count(1)

    def seconds(one: _Pass, images: Any) -> float:
        taken = one.seconds(images)
        progress(next(done))
        return taken

    macs = [count_macs(encoder, input_shape) for encoder in encoders]
    with torch.no_grad():
        latency = medians_in_turn([partial(seconds, one, one.images(1)) for one in passes], repeats, random)
        memory = [one.peak_memory() for one in passes]
        throughput = _throughput(passes, random, lambda: progress(next(done)))
    return [
        Cost(encoder.num_parameters(), macs[i], 1000 * latency[i], *throughput[i], memory[i] / 2**20)
        for i, encoder in enumerate(encoders)
    ]


def num_steps(encoders: int, repeats: int) -> int:
    """Steps that :func:`measure_costs` reports: every timed pass of a tile, and the throughput of every encoder.

    Args:
        encoders: Number of encoders.
        repeats: Timed passes of a single tile.
    """
    return encoders * (WARM_UPS + repeats + 1)


class _Pass:
    """One encoder and what it is fed."""

    def __init__(self, encoder: SimplerBackbone, input_shape: InputShape, precision: Precision, seed: int) -> None:
        self._encoder = encoder
        self._input_shape = input_shape
        self._precision = precision
        self._seed = seed
        self._device = next(encoder.parameters()).device

    def seconds(self, images: Any) -> float:
        """Time of one pass; on a GPU that of the device itself."""
        return timed_run(partial(self._run, images), self._device)

    def images(self, batch: int) -> Any:
        """Seeded noise."""
        generator = torch.Generator().manual_seed(self._seed)

        def noise(shape: Sequence[int]) -> Tensor:
            return torch.randn(batch, *shape, generator=generator).to(self._device)

        shape = self._input_shape
        return {name: noise(part) for name, part in shape.items()} if isinstance(shape, Mapping) else noise(shape)

    def peak_memory(self) -> int:
        """Bytes of weights and input, and the most that one pass adds to them."""
        images = self.images(1)
        held = [*self._encoder.parameters(), *self._encoder.buffers(), *tree_leaves(images)]
        return sum(int(tensor.nbytes) for tensor in held) + added_memory(lambda: self._run(images), held, self._device)

    def _run(self, images: Any) -> None:
        with self._precision():
            self._encoder(images)


def added_memory(run: Callable[[], object], held: Sequence[Tensor], device: torch.device) -> int:
    """Most bytes that a call adds to what is there before.

    On a GPU what its allocator has handed out; on a CPU the tensors that operators hand out, without what they use inside.

    Args:
        run: The call.
        held: Tensors that are there before.
        device: What it runs on.
    """
    if device.type != "cuda":
        with TensorBytes(held) as tensors:
            run()
        return int(tensors.peak)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def medians_in_turn(timed: Sequence[Callable[[], float]], repeats: int, random: np.random.Generator) -> list[float]:
    """Median of what each call returns; every turn calls all of them once, in a new order.

    Args:
        timed: Each runs what it times once and returns seconds.
        repeats: Turns that count, after those to warm up.
        random: Draws the orders.
    """
    times: list[list[float]] = [[] for _ in timed]
    for turn in range(WARM_UPS + repeats):
        for i in random.permutation(len(timed)):
            seconds = timed[i]()
            if turn >= WARM_UPS:
                times[i].append(seconds)
    return [statistics.median(found) for found in times]


def timed_run(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU those of the device itself.

    Args:
        run: The call.
        device: What it runs on.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def _throughput(
    passes: Sequence[_Pass], random: np.random.Generator, step: Callable[[], None] = lambda: None
) -> list[tuple[float, int]]:
    """Tiles per second and batch size: powers of two, until a larger batch gains nothing or memory runs out."""
    best = [(0.0, 1)] * len(passes)
    growing, batch = list(range(len(passes))), 1
    while growing and batch <= LARGEST_BATCH:
        still: list[int] = []
        for i in random.permutation(growing):
            with suppress(torch.OutOfMemoryError):
                images = passes[i].images(batch)
                first = passes[i].seconds(images)  # a new shape has to warm up
                repeats = PASSES if first < LONG_PASS else 1
                rate = batch / statistics.median(passes[i].seconds(images) for _ in range(repeats))
                if rate > best[i][0] * LEAST_GROWTH:
                    still.append(int(i))
                if rate > best[i][0]:
                    best[i] = (rate, batch)
        for _ in range(len(growing) - len(still) if 2 * batch <= LARGEST_BATCH else len(growing)):
            step()
        growing, batch = still, 2 * batch
    return best


class TensorBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that operators hand out, as long as they are alive.

    Args:
        known: Tensors that do not count.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._now = 0
        self._alive = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self._now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)
