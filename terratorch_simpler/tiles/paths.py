"""Which files are meant by a file, folder, glob, list or GDAL path."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from torchgeo.datasets.utils import path_is_vsi

from terratorch_simpler.errors import TilesError

EXTENSIONS = (".tif", ".tiff")


def find_files(paths: str | list[str]) -> list[str]:
    """Files named by a path, folder, glob, .txt list, /vsi path, or a list of these, each once, in order.

    Raises:
        TilesError: If one of them names no file.
    """
    found = {path: _files_at(os.fspath(path)) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)}
    missing = [str(path) for path, files in found.items() if not files]
    if missing or not found:
        where = ", ".join(missing) or paths
        msg = f"Found no GeoTIFF file at {where}, expected a file, folder, glob, .txt list or /vsi path: check paths."
        raise TilesError(msg)
    return list(dict.fromkeys(file for files in found.values() for file in files))


def is_remote(path: str) -> bool:
    """Whether GDAL, not the operating system, has to find the file: /vsi paths and URLs."""
    return bool(path_is_vsi(path))


def _files_at(path: str) -> list[str]:
    if is_remote(path):
        return [path]
    if Path(path).is_dir():
        return [str(file) for file in sorted(Path(path).rglob("*")) if file.suffix.lower() in EXTENSIONS and file.is_file()]
    if not Path(path).is_file():
        return sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
    if not path.endswith(".txt"):
        return [path]
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return find_files(lines) if lines else []
