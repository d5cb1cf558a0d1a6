"""What is kept of a pass that was ended, so that the next one goes on where its last group ended."""

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
VERSION = 1
SECONDS_BETWEEN = 60.0
"""How often a pass is kept while it runs."""


class PartialResult:
    """A file that holds the sums of a pass over tiles, and where in the stream it was.

    Args:
        path: The file; its name should say of what encoder, tiles and settings it is, since the sums do not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: dict[str, Any] | None = None
        self._kept_at = time.monotonic()

    def load(self, like: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was kept, or None; a damaged file is as good as none.

        Args:
            like: What such a state looks like.
        """
        if not self.path.exists():
            return None
        try:
            content = load_tensors(self.path)
            if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION) or not _alike(content, like):
                raise ValueError("other content")
        except Exception as err:  # a damaged file raises anything
            self.warn_corrupt(type(err).__name__)
            return None
        return content  # type: ignore[no-any-return]

    def warn_corrupt(self, what: str) -> None:
        """Say that the file is of no use."""
        msg = f"Found {self.path} damaged ({what}), expected an unfinished pass over tiles to go on with: it starts anew."
        warnings.warn(msg, SimplerWarning, stacklevel=2)

    def update(self, state: dict[str, Any]) -> None:
        """Remember the pass as it stands, and write it if that was not done for a while."""
        self._state = state
        if time.monotonic() - self._kept_at >= SECONDS_BETWEEN:
            self.save()

    def save(self) -> None:
        """Write what was remembered."""
        if self._state is not None:
            with atomic_write(self.path) as part:
                torch.save({"format": FORMAT, "version": VERSION, **self._state}, part)
            self._kept_at = time.monotonic()

    def remove(self) -> None:
        """Forget the pass: it is finished."""
        self._state = None
        with suppress(OSError):
            self.path.unlink()


def _alike(found: object, like: object) -> bool:
    """Whether types, keys and shapes agree; what is empty or None in ``like`` may be anything plain."""
    if isinstance(like, Tensor):
        return isinstance(found, Tensor) and (found.shape, found.dtype) == (like.shape, like.dtype)
    if isinstance(like, Mapping) and like:
        return isinstance(found, Mapping) and found.keys() == like.keys() and all(_alike(found[k], like[k]) for k in like)
    return like is None or type(found) is type(like)
