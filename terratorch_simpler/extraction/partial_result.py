"""The partial result of an interrupted pass, from which the next one resumes after its last group."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terratorch_simpler.errors import SimplerWarning
from terratorch_simpler.files import atomic_write, load_tensors

FORMAT = "terratorch-simpler/unfinished"
VERSION = 3
"""Since 2 with the similarity by three conventions and the tiles of every file, since 3 with sums over the pixels; a file of
another version is ignored."""
SECONDS_BETWEEN = 60.0
"""How often a running pass is saved."""


class PartialResult:
    """A file with the sums of a pass over tiles, and its position in the stream.

    Args:
        path: The file; its name should identify encoder, tiles and settings, since the sums do not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: dict[str, Any] | None = None
        self._saved_at = time.monotonic()

    def load(self, like: Mapping[str, Any]) -> dict[str, Any] | None:
        """Read the file; None if there is none, or with a warning if it is damaged.

        Args:
            like: A state of the same types, keys and shapes.
        """
        if not self.path.exists():
            return None
        try:
            content = load_tensors(self.path)
            if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION) or not _same_structure(content, like):
                raise ValueError("other content")
        except Exception as err:  # a damaged file raises anything
            self.warn_corrupt(type(err).__name__)
            return None
        return content  # type: ignore[no-any-return]

    def warn_corrupt(self, what: str) -> None:
        """Warn that the file cannot be resumed from."""
        msg = f"The partial result {self.path} is damaged ({what}) and is ignored; the pass over the tiles starts again."
        warnings.warn(msg, SimplerWarning, stacklevel=2)

    def update(self, state: dict[str, Any]) -> None:
        """Set the state, and write it if that was not done for a minute."""
        self._state = state
        if time.monotonic() - self._saved_at >= SECONDS_BETWEEN:
            self.save()

    def save(self) -> None:
        """Write the latest state."""
        if self._state is not None:
            with atomic_write(self.path) as part:
                torch.save({"format": FORMAT, "version": VERSION, **self._state}, part)
            self._saved_at = time.monotonic()

    def remove(self) -> None:
        """Delete the file: the pass is complete."""
        self._state = None
        with suppress(OSError):
            self.path.unlink()


def _same_structure(value: object, like: object) -> bool:
    """Whether types, keys and shapes agree; what is empty or None in ``like`` may be anything plain."""
    if isinstance(like, Tensor):
        return isinstance(value, Tensor) and (value.shape, value.dtype) == (like.shape, like.dtype)
    if isinstance(like, Mapping) and like:
        if not isinstance(value, Mapping) or value.keys() != like.keys():
            return False
        return all(_same_structure(value[key], like[key]) for key in like)
    return like is None or type(value) is type(like)
