"""Going on when the memory of the device runs out: with fewer tiles at once, or on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from terratorch_simpler.data import Batch
from terratorch_simpler.errors import OutOfMemoryError

Rows = TypeVar("Rows", covariant=True)


class Runs(Protocol[Rows]):
    """Draws rows of a batch while it passes through the model."""

    def run(self, forward: Callable[[Batch], object], batch: Batch) -> Rows:
        """Send a batch through the model."""


class AutoBatch(Generic[Rows]):
    """Sends batches through the model, in parts once they were too large; rows do not depend on the parts.

    Args:
        extractor: Draws the rows.
        forward: Sends one batch through the model.

    Attributes:
        limit: Most tiles that are sent at once, since memory ran out with more; None if it never did.
    """

    def __init__(self, extractor: Runs[Rows], forward: Callable[[Batch], object]) -> None:
        """Nothing is limited yet."""
        self.limit: int | None = None
        self._extractor = extractor
        self._forward = forward

    def parts(self, batch: Batch) -> Iterator[Rows]:
        """Send a batch.

        Yields:
            What was drawn from each part of it, in order.

        Raises:
            OutOfMemoryError: If memory runs out with a single tile.
        """
        size, start = len(batch["index"]), 0
        while start < size:
            end = min(size, start + (self.limit or size))
            drawn = self._try(batch if end - start == size else _part(batch, start, end, size))
            if drawn is not None:
                yield drawn
                start = end
            elif end - start == 1:
                msg = (
                    "Found too little memory for a single tile, expected room for the intact encoder and one tile: use a "
                    "smaller tile_size, a lower precision, or a device with more memory."
                )
                raise OutOfMemoryError(msg)
            else:
                self.limit = (end - start) // 2

    def _try(self, part: Batch) -> Rows | None:
        try:
            return self._extractor.run(self._forward, part)
        except torch.OutOfMemoryError:
            pass  # the traceback holds what was allocated until here
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return None


def comparing_device(device: torch.device) -> torch.device:
    """Where rows of a model on a device are compared: the sums are float64, which Apple's GPUs have not."""
    return torch.device("cpu") if device.type == "mps" else device


def on_spare_memory(compute: Callable[[torch.device], None], device: torch.device) -> None:
    """Compute on a device, or on the CPU if the device has no memory left.

    Args:
        compute: Told where; may be called twice.
        device: Where to try first.
    """
    try:
        return compute(device)
    except torch.OutOfMemoryError:
        pass
    return compute(torch.device("cpu"))


def _part(values: dict[str, Any], start: int, end: int, size: int) -> dict[str, Any]:
    def cut(value: Any) -> Any:
        if isinstance(value, dict):  # modalities
            return _part(value, start, end, size)
        sized = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)
        return value[start:end] if sized and len(value) == size else value

    return {key: cut(value) for key, value in values.items()}
