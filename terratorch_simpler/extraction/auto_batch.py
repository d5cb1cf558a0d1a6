"""When the memory of the device runs out: continue with fewer tiles at once, or on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor

from terratorch_simpler.data import Batch
from terratorch_simpler.errors import OutOfMemoryError
from terratorch_simpler.extraction.token_sampling import Sample

Sampled = TypeVar("Sampled", bound=Sample)
SampledByIt = TypeVar("SampledByIt", bound=Sample, covariant=True)


class Extractor(Protocol[SampledByIt]):
    """Anything like :class:`~terratorch_simpler.extraction.FeatureExtractor`."""

    def run(self, forward: Callable[[Batch], object], batch: Batch) -> tuple[Tensor, SampledByIt]:
        """Send a batch through the model."""


class AutoBatch(Generic[Sampled]):
    """Sends batches through the model, in smaller parts once one did not fit; features do not depend on the parts.

    Args:
        extractor: Extracts features.
        forward: Sends one batch through the model.

    Attributes:
        limit: Most tiles that are sent at once, since memory ran out with more; None if it never did.
    """

    def __init__(self, extractor: Extractor[Sampled], forward: Callable[[Batch], object]) -> None:
        self.limit: int | None = None
        self._extractor = extractor
        self._forward = forward

    def parts(self, batch: Batch) -> Iterator[tuple[Tensor, Sampled]]:
        """Yield the features of each part of a batch, in order.

        Raises:
            OutOfMemoryError: If memory runs out with a single tile.
        """
        size, start = len(batch["index"]), 0
        while start < size:
            end = min(size, start + (self.limit or size))
            features = self._try(batch if end - start == size else slice_tiles(batch, range(start, end)))
            if features is not None:
                yield features
                start = end
            elif end - start == 1:
                msg = (
                    "Not enough memory for the intact encoder and a single tile: use a smaller tile_size, a lower "
                    "precision, or a device with more memory."
                )
                raise OutOfMemoryError(msg)
            else:
                self.limit = (end - start) // 2

    def _try(self, part: Batch) -> tuple[Tensor, Sampled] | None:
        try:
            return self._extractor.run(self._forward, part)
        except RuntimeError as err:
            if not is_out_of_memory(err):
                raise
        # Only here is the traceback gone, which holds what was allocated until then.
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return None


def float64_device(device: torch.device) -> torch.device:
    """Where the rows of a model on ``device`` are compared: sums are float64, which Apple's GPUs do not support."""
    return torch.device("cpu") if device.type == "mps" else device


def with_cpu_fallback(compute: Callable[[torch.device], None], device: torch.device) -> None:
    """Compute on a device, or again on the CPU if the device has no memory left."""
    try:
        return compute(device)
    except RuntimeError as err:
        if not is_out_of_memory(err):
            raise
    return compute(torch.device("cpu"))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the memory of a device is full."""
    return isinstance(error, torch.OutOfMemoryError) or is_oom_error(error)  # the latter knows messages of CUDA only


def slice_tiles(batch: Batch, numbers: Sequence[int]) -> Batch:
    """Some tiles of a batch.

    Args:
        batch: The batch; what has another length than its tiles is kept whole.
        numbers: Numbers of the tiles in the batch, ascending.
    """
    size = len(batch["index"])
    if len(numbers) == size:
        return batch
    consecutive = slice(numbers[0], numbers[-1] + 1) if numbers[-1] - numbers[0] + 1 == len(numbers) else None

    def one(value: Any) -> Any:
        if isinstance(value, dict):  # modalities
            return {key: one(part) for key, part in value.items()}
        sized = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)
        if not sized or len(value) != size:
            return value
        if consecutive is not None:
            return value[consecutive]  # of a tensor without a copy
        return value[list(numbers)] if isinstance(value, Tensor) else [value[number] for number in numbers]

    return {key: one(value) for key, value in batch.items()}
