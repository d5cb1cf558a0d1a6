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

import fsspec
from fsspec.implementations.local import LocalFileSystem

from terratorch_simpler.errors import ConfigurationError

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
    import torch  # what is written here need not be tensors

    return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a place to write to; the file gets its name only if the block ends without an error.

    What a process that was killed has left behind is removed by the next one that writes there.

    Args:
        path: File to write; missing folders are made.

    Yields:
        A file of the same name in a temporary folder beside it, so that the final rename is atomic.
    """
    path = Path(path)
    with _folder_beside(path.parent) as folder:
        part = folder / path.name
        yield part
        part.replace(path)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for several files: they come into a folder together, when all are whole, or not at all.

    Args:
        path: The folder, which is made if it is missing; other files in it stay.

    Yields:
        A temporary folder inside, whose files are moved.
    """
    with _folder_beside(Path(path)) as folder:
        yield folder
        for part in sorted(folder.iterdir()):
            part.replace(Path(path) / part.name)


@contextmanager
def _folder_beside(parent: Path) -> Iterator[Path]:
    parent.mkdir(parents=True, exist_ok=True)
    for folder in parent.glob(f"{PREFIX}*"):
        if _left_behind(folder):
            shutil.rmtree(folder, ignore_errors=True)
    own = f"{PREFIX}{_machine()}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(dir=parent, prefix=own) as name:
        yield Path(name)


def folder_of(path: str | os.PathLike[str]) -> str | Path:
    """A folder as a path, or as the URL it is (``s3://...``, ``memory://...``), which Lightning's loggers take as well."""
    text = os.fspath(path)
    filesystem, inside = _file_system(text)
    return Path(inside if "://" in text else text) if isinstance(filesystem, LocalFileSystem) else text.rstrip("/")


def below(folder: str | Path, name: str) -> str | Path:
    """A file or folder inside of a folder."""
    return folder / name if isinstance(folder, Path) else f"{folder}/{name}"


def read_text(path: str | Path) -> str | None:
    """The text of a file, or of the one at a URL; None if there is none."""
    filesystem, inside = _file_system(str(path))
    return filesystem.cat_file(inside).decode("utf-8", "replace") if filesystem.isfile(inside) else None


@contextmanager
def written_to(folder: str | Path) -> Iterator[Path]:
    """Give a folder to write files to; those for a remote folder are copied there if the block ends without an error.

    Args:
        folder: Of :func:`folder_of`.

    Yields:
        The folder itself, or a temporary one for a remote folder.
    """
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        filesystem, inside = _file_system(folder)
        for path in sorted(Path(name).rglob("*")):
            if path.is_file():
                target = f"{inside}/{path.relative_to(name).as_posix()}"
                filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
                filesystem.put_file(str(path), target)


def check_folder(option: str, path: str | os.PathLike[str], *, local: bool = False) -> None:
    """Make a folder and write to it, before hours are spent on what belongs there.

    Args:
        option: What the user calls it.
        path: The folder, or its URL.
        local: Refuse a remote one.

    Raises:
        ConfigurationError: If that fails.
    """
    try:
        folder = folder_of(path)
        if local and not isinstance(folder, Path):
            msg = f"Found {option} {folder}, expected a folder of this machine, since it cannot be remote: change {option}."
            raise ConfigurationError(msg)
        filesystem, inside = _file_system(str(folder))
        probe = f"{inside.rstrip('/')}/{PREFIX}{socket.gethostname()}-{os.getpid()}-probe"
        filesystem.makedirs(inside, exist_ok=True)
        filesystem.pipe_file(probe, b"")
        filesystem.rm_file(probe)
    except ConfigurationError:
        raise
    except Exception as err:  # OSError, or whatever a remote file system raises: no such protocol, no credentials
        reason = " ".join(str(err).split()) or type(err).__name__
        msg = f"Could not write to {option} {path} ({reason}), expected a folder to write to: change {option}."
        raise ConfigurationError(msg) from err


def _file_system(path: str) -> tuple[Any, str]:
    return fsspec.core.url_to_fs(path)  # type: ignore[no-any-return]


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
