"""Finds the raster files that a file, folder, glob, list or GDAL path names, and counts what is skipped beside them."""

from __future__ import annotations

import csv
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Set
from typing import Any

from torchgeo.datasets.utils import path_is_vsi

from terratorch_simpler.data.source import Skip
from terratorch_simpler.errors import TilesError

GEOTIFF_ENDINGS = (".tif", ".tiff", ".gtif", ".gtiff", ".geotiff", ".btf")
RASTER_ENDINGS = (*GEOTIFF_ENDINGS, ".jp2", ".j2k", ".vrt", ".img", ".nc", ".h5", ".hdf5")
"""What is read in a folder."""
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")
"""Read by name or glob only: in folders of scenes they are previews."""
ARCHIVE_ENDINGS = (".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".7z", ".rar")
LIST_ENDINGS = (".txt", ".lst", ".csv")

MAX_DEPTH = 200
"""Folders in a glob, and lists that name each other."""

_SUBDATASET = re.compile(r"(netcdf|hdf5|hdf4_\w+|sentinel2_\w+|gtiff_dir|nitf_im):.", re.IGNORECASE)
_EXPECTED = "a file, folder, glob, list (.txt, .lst, .csv) or /vsi path"


def find_files(paths: Any) -> tuple[list[str], list[Skip]]:
    """Find the files named by a path, folder, glob, list, /vsi path, or a sequence of these.

    Folders are searched with their subfolders. Links are followed; a folder or file that is reached twice, whatever its
    name, is taken once (identified by device and inode).

    Returns:
        Files to read, each once, in order; and what is skipped in the folders, globs and lists that name them.

    Raises:
        TilesError: If one of them names no raster file, or is no path.
    """
    # No sets: the order of the stream would change from one process to the next.
    several = isinstance(paths, Iterable) and not isinstance(paths, str | bytes | os.PathLike | Set)
    names = [_checked(path) for path in (paths if several else [paths])]
    search = _FileSearch()
    missing = [name for name in names if not search.add(name)]
    if missing or not names:
        beside = "; ".join(f"{skip.name} ({skip.reason})" for skip in search.skips[:5])
        only = f", only {beside}" if beside else ""
        pictures = any(skip.reason == "picture" for skip in search.skips)
        remedy = "name pictures by a glob such as /data/**/*.jpg" if pictures else "check paths"
        msg = f"No raster file at {', '.join(missing) or 'paths []'}{only}, expected {_EXPECTED}: {remedy}."
        raise TilesError(msg)
    return list(search.files), search.skips


def is_remote(path: str) -> bool:
    """Whether GDAL, not the operating system, has to find the file: /vsi paths, URLs and names of subdatasets."""
    return bool(path_is_vsi(path) or _SUBDATASET.match(path)) and not os.path.lexists(path)


def os_error_reason(error: OSError) -> str:
    """The reason that counts an error of the operating system."""
    if isinstance(error, FileNotFoundError):
        return "vanished"
    return "permission denied" if isinstance(error, PermissionError) else "unreadable"


def _checked(path: Any) -> str:
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(name, str) or not name or "\0" in name:
        raise TilesError(f"paths contains {path!r}, expected {_EXPECTED} as text: check paths.")
    return str(name)  # a plain str, also of NumPy's


def _file_id(found: os.stat_result, path: str) -> object:
    return (found.st_dev, found.st_ino) if found.st_ino else path  # some file systems have no inodes and give 0


class _FileSearch:
    """Collects files and skips, each once."""

    def __init__(self) -> None:
        self.files: dict[str, None] = {}
        self.skips: list[Skip] = []
        self._seen_skips: set[Skip] = set()
        self._path_by_id: dict[object, str] = {}
        self._open_lists: list[object] = []
        self._read_lists: dict[object, bool] = {}

    def add(self, path: str) -> bool:
        """Add the files that a path names; True if there is any, whether new or known."""
        if is_remote(path):
            self.files[path] = None
            return True
        if os.path.isdir(path):
            return self._add_folder(path)
        if not os.path.isfile(path):
            return self._add_glob(path)
        ending = path.lower()
        if ending.endswith(LIST_ENDINGS):
            return self._add_list(path)
        if ending.endswith(ARCHIVE_ENDINGS):
            prefix = "/vsitar/" if ending.endswith((".tar", ".tgz", ".tar.gz")) else "/vsizip/"
            inside = f"/vsigzip/{path}" if prefix == "/vsizip/" and ending.endswith(".gz") else f"{prefix}{path}/name.tif"
            raise TilesError(f"{path} is an archive, expected a raster file: name the file inside of it, as {inside}.")
        return self._add_file(path)

    def _add_file(self, path: str) -> bool:
        try:
            found = os.stat(path)
        except OSError as error:
            self._skip(path, os_error_reason(error), bad=True)
            return False
        known = self._path_by_id.setdefault(_file_id(found, os.path.abspath(path)), path)
        if known is path:
            self.files[path] = None
        elif os.path.abspath(known) != os.path.abspath(path):
            self._skip(path, "same file")
        return True

    def _add_folder(self, folder: str) -> bool:
        any_file = False
        for path in self._walk(folder):
            ending = path.lower()
            if ending.endswith(RASTER_ENDINGS):
                any_file |= self._add_file(path)
            elif ending.endswith(PICTURE_ENDINGS):
                self._skip(path, "picture")
            else:
                self._skip(path, "archive" if ending.endswith(ARCHIVE_ENDINGS) else "no raster")
        return any_file

    def _add_glob(self, pattern: str) -> bool:
        start = os.path.sep if pattern.startswith(os.path.sep) else ""
        parts = [part for part in pattern.split(os.path.sep) if part not in ("", ".")]
        parts = [part for part, before in zip(parts, ["", *parts[:-1]], strict=True) if (part, before) != ("**", "**")]
        if not 0 < len(parts) <= MAX_DEPTH:
            return False
        matches = sorted({*self._match(start, parts)})
        rasters = any(os.path.isfile(path) and path.lower().endswith(RASTER_ENDINGS + PICTURE_ENDINGS) for path in matches)
        any_file = False
        for path in matches:
            if os.path.isdir(path):
                if not rasters:
                    any_file |= self._add_folder(path)
                elif "**" not in parts:  # which goes through folders itself
                    self._skip(path, "folder beside files")
            elif not os.path.isfile(path):
                try:
                    os.stat(path)
                    self._skip(path, "no raster")
                except OSError as error:
                    self._skip_unreachable(path, error)
            elif path.lower().endswith(ARCHIVE_ENDINGS):
                self._skip(path, "archive")
            else:
                any_file |= self._add_file(path)
        return any_file

    def _match(self, folder: str, parts: list[str]) -> Iterator[str]:
        """Files and folders below a folder that match a glob. Unlike glob.glob, ends where links lead back."""
        part, rest = parts[0], parts[1:]
        if part == "**":
            if not rest:
                yield from self._walk(folder)
            else:
                for below in self._walk(folder, folders=True):
                    yield from self._match(below, rest)
            return
        # A folder that is really named [a] takes precedence.
        if not glob.has_magic(part) or os.path.lexists(os.path.join(folder, part)):
            names = [part]
        else:
            hidden = part.startswith(".")
            names = [name for name in self._list(folder) if hidden or not name.startswith(".")]
            names = [name for name in names if fnmatch.fnmatchcase(name, part)]
        for name in names:
            path = os.path.join(folder, name)
            if not rest:
                if os.path.lexists(path):
                    yield path
            elif os.path.isdir(path):
                yield from self._match(path, rest)

    def _walk(self, folder: str, folders: bool = False) -> Iterator[str]:
        """All files below a folder by name, or the folder and all folders below it. Unlike os.walk, stops at link cycles."""
        path_by_id: dict[object, str] = {}
        stack = [folder]
        while stack:
            path = stack.pop()
            try:
                found = os.stat(path or os.curdir)
            except OSError as error:
                self._skip_unreachable(path, error)
                continue
            if not stat.S_ISDIR(found.st_mode):
                if folders:
                    continue
                if stat.S_ISREG(found.st_mode):
                    yield path
                else:  # a pipe, a socket, a device
                    self._skip(path, "no raster")
                continue
            if path_by_id.setdefault(_file_id(found, os.path.realpath(path)), path) is not path:
                self._skip(path, "same folder")
                continue
            if folders:
                yield path
            for name in reversed(self._list(path)):
                if name.startswith("."):
                    self._skip(os.path.join(path, name), "hidden")
                else:
                    stack.append(os.path.join(path, name))

    def _list(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(folder or os.curdir))
        except OSError as error:
            self._skip(folder, os_error_reason(error), bad=True)
            return []

    def _add_list(self, path: str) -> bool:
        this = _file_id(os.stat(path), path)
        if this in self._open_lists or len(self._open_lists) > MAX_DEPTH:
            raise TilesError(f"{path} is a list that names itself, expected one path per line: remove it from the list.")
        if this not in self._read_lists:
            self._open_lists.append(this)
            any_file = False
            for line in _read_lines(path):
                if self.add(line):
                    any_file = True
                else:
                    self._skip(line, "vanished", bad=True)
            self._open_lists.pop()
            self._read_lists[this] = any_file
        return self._read_lists[this]

    def _skip_unreachable(self, path: str, error: OSError) -> None:
        reason = os_error_reason(error)
        if reason != "permission denied" and os.path.islink(path):
            reason = "broken link"
        self._skip(path, reason, bad=reason == "permission denied" or path.lower().endswith(RASTER_ENDINGS))

    def _skip(self, path: str, reason: str, bad: bool = False) -> None:
        skip = Skip(-1, reason, path, bad)
        if skip not in self._seen_skips:  # a glob with several ** reaches a path more than once
            self._seen_skips.add(skip)
            self.skips.append(skip)


def _read_lines(path: str) -> list[str]:
    """Paths in a list; relative ones are relative to the folder of the list."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        # Names in the encoding of an older Windows, or bytes as they are on the disk: whichever exists.
        text = os.fsdecode(content)
    except OSError as error:
        raise TilesError(f"Could not read {path} ({error}), expected a list of paths, one per line: check paths.") from error
    if "\0" in text:
        raise TilesError(f"{path} contains NUL characters, expected a list of paths as UTF-8 text: save it as that.")
    lines = re.split(r"\r\n|\r|\n", text.rstrip("\x1a"))  # not splitlines: names may hold other characters that end lines
    lines = [line.strip(" \t") for line in lines]
    lines = [line for line in lines if line and not line.startswith("#")]
    folder = os.path.dirname(path)
    if path.lower().endswith(".csv"):
        lines = _only_column(path, folder, lines)
    else:
        lines = [line[1:-1] if len(line) > 2 and line[0] == line[-1] == '"' else line for line in lines]
    return [_existing(folder, line) for line in lines]


def _only_column(path: str, folder: str, lines: list[str]) -> list[str]:
    try:
        rows = [row for row in csv.reader(lines) if any(field.strip() for field in row)]
    except csv.Error as error:
        raise TilesError(f"{path} is no CSV file ({error}), expected one path per line: check its quotes.") from error
    fields = [row[0].strip() for row in rows]
    semicolons = any(";" in field and not os.path.lexists(_existing(folder, field)) for field in fields)
    if semicolons or any(len(row) > 1 for row in rows):
        raise TilesError(f"{path} has several columns, expected one path per line: keep the column of the paths.")
    # A word without a dot or slash that names no file is the header.
    header = fields[:1] and not re.search(r"[./\\*]", fields[0]) and not os.path.lexists(_existing(folder, fields[0]))
    return fields[1:] if header else fields


def _existing(folder: str, line: str) -> str:
    """The path of a line, in the spelling that exists."""
    if is_remote(line):
        return line
    spellings = [line]
    if any("\udc80" <= character <= "\udcff" for character in line):
        spellings.append(os.fsencode(line).decode("cp1252", errors="replace"))
    spellings += [spelling.replace("\\", "/") for spelling in spellings if "\\" in spelling]  # as Windows writes it
    paths = [os.path.join(folder, spelling) for spelling in spellings]
    for path in paths:
        if os.path.lexists(path):
            return path
    if glob.has_magic(line):  # the spelling whose folder exists
        for path in reversed(paths):
            if os.path.lexists(os.path.dirname(re.split(r"[*?[]", path, maxsplit=1)[0]) or "."):
                return path
    return paths[0]
