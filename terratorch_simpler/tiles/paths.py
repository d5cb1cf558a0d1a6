"""Which files are meant by a file, folder, glob, list or GDAL path."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchgeo.datasets.utils import path_is_vsi

from terratorch_simpler.errors import TilesError

EXTENSIONS = (".tif", ".tiff")


def find_files(paths: Any) -> list[str]:
    """Files named by a path, folder, glob, .txt list, /vsi path, or a list of these, each once, in order.

    Raises:
        TilesError: If one of them names no file, or is no path.
    """
    return _find(paths, lists=())


def is_remote(path: str) -> bool:
    """Whether GDAL, not the operating system, has to find the file: /vsi paths and URLs."""
    return bool(path_is_vsi(path)) and not os.path.lexists(path)


def _find(paths: Any, lists: tuple[str, ...]) -> list[str]:
    several = isinstance(paths, Iterable) and not isinstance(paths, str | bytes | os.PathLike)
    names = [_name(path) for path in (paths if several else [paths])]
    found = {name: _files_at(name, lists) for name in names}
    missing = [name for name, files in found.items() if not files]
    if missing or not found:
        where = ", ".join(missing) or "paths []"
        msg = f"Found no GeoTIFF file at {where}, expected a file, folder, glob, .txt list or /vsi path: check paths."
        raise TilesError(msg)
    once: dict[str, str] = {}
    for file in (file for files in found.values() for file in files):
        once.setdefault(file if is_remote(file) else os.path.abspath(file), file)
    return list(once.values())


def _name(path: Any) -> str:
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(name, str) or not name or "\0" in name:
        msg = f"Found {path!r} in paths, expected a file, folder, glob, .txt list or /vsi path as text: check paths."
        raise TilesError(msg)
    return str(name)


def _files_at(path: str, lists: tuple[str, ...]) -> list[str]:
    if is_remote(path):
        return [path]
    if os.path.isdir(path):
        return [
            str(file) for file in sorted(Path(path).rglob("*")) if file.name.lower().endswith(EXTENSIONS) and file.is_file()
        ]
    if not os.path.isfile(path):
        return sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if not path.endswith(".txt"):
        return [path]
    if path in lists:
        msg = f"Found {path}, which lists itself, expected one path a line: take it out of the list."
        raise TilesError(msg)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        msg = f"Found {path} ({err}), expected a list of paths, one a line, as UTF-8 text: check paths."
        raise TilesError(msg) from err
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _find(lines, (*lists, path)) if lines else []
