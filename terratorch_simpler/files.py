"""Files that are written whole or not at all, and tensors that are read as they were written."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

PREFIX = ".part-"
OLD_SECONDS = 24 * 3600.0
"""What a process of another machine or container has left behind is removed after a day: nothing takes so long to write."""

CHUNK = 1 << 20
"""Bytes of a file whose sum is taken at once."""


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """Read what ``torch.save`` has written, on the CPU: tensors and plain values, nothing in it is executed.

    PyTorch writes a checksum beside every tensor but compares none: a flipped bit would be another block or weight.

    Args:
        path: A local file.

    Raises:
        Exception: Of any kind, if the file is damaged or holds anything else.
    """
    if zipfile.is_zipfile(path):  # what PyTorch before 1.6 wrote holds no sums
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.CRC:  # zeros where torch.serialization.set_crc32_options(False) has left them out
                    with archive.open(entry) as record:
                        while record.read(CHUNK):
                            pass
    return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a place to write to; the file gets its name only if the block ends without an error.

    What a process that was killed has left behind is removed by the next one that writes there.

    Args:
        path: File to write; missing folders are made.

    Yields:
        A file of the same name in a temporary folder beside it, so that the final rename is atomic.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in path.parent.glob(f"{PREFIX}*"):
        if _left_behind(folder):
            shutil.rmtree(folder, ignore_errors=True)
    own = f"{PREFIX}{_machine()}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=own) as name:
        part = Path(name) / path.name
        yield part
        part.replace(path)


def _machine() -> str:
    """Where a process number means something: a container may share the name of its host and count for itself."""
    namespace = ""
    with suppress(OSError):  # only Linux has them
        namespace = "." + "".join(filter(str.isdigit, os.readlink("/proc/self/ns/pid")))
    return socket.gethostname() + namespace


def _left_behind(folder: Path) -> bool:
    machine, _, rest = folder.name.removeprefix(PREFIX).rpartition("-")[0].rpartition("-")
    with suppress(OSError, ValueError):
        if machine == _machine():
            os.kill(int(rest), 0)  # raises if there is no such process
            return False
        return time.time() - folder.stat().st_mtime > OLD_SECONDS
    return machine == _machine()
