"""Which raster files are meant by a file, folder, glob, list or GDAL path, and what beside them is left out."""

from __future__ import annotations

import csv
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Set
from typing import Any, NamedTuple

from torchgeo.datasets.utils import path_is_vsi

from terratorch_simpler.data.source import Unusable, error_reason
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


class Found(NamedTuple):
    """Files to read, each once, in order; and what was left out in the folders, globs and lists that name them."""

    files: list[str]
    left_out: list[Unusable]


def find_files(paths: Any) -> Found:
    """Find the files named by a path, folder, glob, list, /vsi path, or a sequence of these.

    Folders are searched with their subfolders. Links are followed; a folder or file that is reached twice, whatever its
    name, is taken once (known by device and inode).

    Raises:
        TilesError: If one of them names no raster file, or is no path.
    """
    # No sets: the order of the stream would change from one process to the next.
    several = isinstance(paths, Iterable) and not isinstance(paths, str | bytes | os.PathLike | Set)
    names = [_name(path) for path in (paths if several else [paths])]
    search = _Search()
    missing = [name for name in names if not search.add(name)]
    if missing or not names:
        where = ", ".join(missing) or "paths []"
        beside = "; ".join(f"{unusable.path} ({unusable.reason})" for unusable in search.left_out[:5])
        found = f"Found no raster file at {where}" + (f", only {beside}" if beside else "")
        pictures = any(unusable.reason == "picture" for unusable in search.left_out)
        remedy = "name pictures by a glob such as /data/**/*.jpg" if pictures else "check paths"
        raise TilesError(f"{found}, expected {_EXPECTED}: {remedy}.")
    return Found(list(search.files), search.left_out)


def is_remote(path: str) -> bool:
    """Whether GDAL, not the operating system, has to find the file: /vsi paths, URLs and names of subdatasets."""
    return bool(path_is_vsi(path) or _SUBDATASET.match(path)) and not os.path.lexists(path)


class _Search:
    """Collects files, each once.

    Attributes:
        files: Those to read, in order.
        left_out: What was found beside them, with the reason why it is not read.
    """

    def __init__(self) -> None:
        self.files: dict[str, None] = {}
        self.left_out: list[Unusable] = []
        self._once: dict[object, str] = {}
        self._lists: list[object] = []
        self._lists_read: dict[object, bool] = {}

    def add(self, path: str) -> bool:
        """Add what a path names; tell whether that is any raster file, known before or not."""
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
            raise TilesError(f"Found {path}, an archive, expected a raster file: name the file inside of it, as {inside}.")
        return self._add_file(path)

    def _add_file(self, path: str) -> bool:
        try:
            found = os.stat(path)
        except OSError as error:
            self._leave_out(path, error_reason(error), bad=True)
            return False
        # Some file systems know no inodes and give 0.
        known = self._once.setdefault((found.st_dev, found.st_ino) if found.st_ino else os.path.abspath(path), path)
        if known is path:
            self.files[path] = None
        elif os.path.abspath(known) != os.path.abspath(path):
            self._leave_out(path, "same file")
        return True

    def _add_folder(self, folder: str) -> bool:
        found = False
        for path in self._below(folder):
            ending = path.lower()
            if ending.endswith(RASTER_ENDINGS):
                found |= self._add_file(path)
            elif ending.endswith(PICTURE_ENDINGS):
                self._leave_out(path, "picture")
            else:
                self._leave_out(path, "archive" if ending.endswith(ARCHIVE_ENDINGS) else "no raster")
        return found

    def _add_glob(self, pattern: str) -> bool:
        start = os.path.sep if pattern.startswith(os.path.sep) else ""
        parts = [part for part in pattern.split(os.path.sep) if part not in ("", ".")]
        parts = [part for part, before in zip(parts, ["", *parts[:-1]], strict=True) if (part, before) != ("**", "**")]
        if not 0 < len(parts) <= MAX_DEPTH:
            return False
        matches = sorted({*self._matching(start, parts)})
        any_file = any(os.path.isfile(path) and path.lower().endswith(RASTER_ENDINGS + PICTURE_ENDINGS) for path in matches)
        found = False
        for path in matches:
            if os.path.isdir(path):
                if not any_file:
                    found |= self._add_folder(path)
                elif "**" not in parts:  # which goes through folders itself
                    self._leave_out(path, "folder beside files")
            elif not os.path.isfile(path):
                try:
                    os.stat(path)
                    self._leave_out(path, "no raster")
                except OSError as error:
                    self._leave_out_unreachable(path, error)
            elif path.lower().endswith(ARCHIVE_ENDINGS):
                self._leave_out(path, "archive")
            else:
                found |= self._add_file(path)
        return found

    def _matching(self, folder: str, parts: list[str]) -> Iterator[str]:
        """Files and folders below a folder that match a glob. Unlike glob.glob, not lost in links that lead back."""
        part, rest = parts[0], parts[1:]
        if part == "**":
            if not rest:
                yield from self._below(folder)
            else:
                for below in self._below(folder, folders=True):
                    yield from self._matching(below, rest)
            return
        literal = os.path.join(folder, part)
        # A folder named [a] is meant, if there is one.
        if not glob.has_magic(part) or os.path.lexists(literal):
            names = [part]
        else:
            hidden = part.startswith(".")
            names = [name for name in self._listing(folder) if hidden or not name.startswith(".")]
            names = [name for name in names if fnmatch.fnmatchcase(name, part)]
        for name in names:
            path = os.path.join(folder, name)
            if not rest:
                if os.path.lexists(path):
                    yield path
            elif os.path.isdir(path):
                yield from self._matching(path, rest)

    def _below(self, folder: str, folders: bool = False) -> Iterator[str]:
        """All files below a folder, in order of their names, or the folder and all folders below it."""
        seen: dict[object, str] = {}
        ahead = [folder]
        while ahead:
            path = ahead.pop()
            try:
                found = os.stat(path or os.curdir)
            except OSError as error:
                self._leave_out_unreachable(path, error)
                continue
            if not stat.S_ISDIR(found.st_mode):
                if folders:
                    continue
                if stat.S_ISREG(found.st_mode):
                    yield path
                else:  # a pipe, a socket, a device
                    self._leave_out(path, "no raster")
                continue
            known = seen.setdefault((found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path), path)
            if known is not path:
                self._leave_out(path, "same folder")
                continue
            if folders:
                yield path
            for name in reversed(self._listing(path)):
                if name.startswith("."):
                    self._leave_out(os.path.join(path, name), "hidden")
                else:
                    ahead.append(os.path.join(path, name))

    def _listing(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(folder or os.curdir))
        except OSError as error:
            self._leave_out(folder, error_reason(error), bad=True)
            return []

    def _add_list(self, path: str) -> bool:
        found = os.stat(path)
        this = (found.st_dev, found.st_ino)
        if this in self._lists or len(self._lists) > MAX_DEPTH:
            raise TilesError(f"Found {path}, which lists itself, expected one path a line: take it out of the list.")
        if this not in self._lists_read:
            self._lists.append(this)
            any_found = False
            for line in _lines(path):
                if self.add(line):
                    any_found = True
                else:
                    self._leave_out(line, "vanished", bad=True)
            self._lists.pop()
            self._lists_read[this] = any_found
        return self._lists_read[this]

    def _leave_out_unreachable(self, path: str, error: OSError) -> None:
        reason = error_reason(error)
        if reason != "permission denied" and os.path.islink(path):
            reason = "broken link"
        self._leave_out(path, reason, bad=reason == "permission denied" or path.lower().endswith(RASTER_ENDINGS))

    def _leave_out(self, path: str, reason: str, bad: bool = False) -> None:
        unusable = Unusable(path, reason, bad)
        if unusable not in self._once:  # globs with several ** come by more than once
            self._once[unusable] = path
            self.left_out.append(unusable)


def _name(path: Any) -> str:
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(name, str) or not name or "\0" in name:
        msg = f"Found {path!r} in paths, expected {_EXPECTED} as text: check paths."
        raise TilesError(msg)
    return str(name)


def _lines(path: str) -> list[str]:
    """Paths in a list, those that are relative made so to the folder of the list."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        # Names in the encoding of an older Windows, or bytes as they are on the disk: whichever is there.
        text = os.fsdecode(content)
    except OSError as error:
        raise TilesError(f"Found {path} ({error}), expected a list of paths, one a line: check paths.") from error
    if "\0" in text:
        raise TilesError(f"Found NUL characters in {path}, expected a list of paths as UTF-8 text: save it as that.")
    lines = re.split(r"\r\n|\r|\n", text.rstrip("\x1a"))  # not splitlines: a name may hold other characters that end lines
    lines = [line.strip(" \t") for line in lines]
    lines = [line for line in lines if line and not line.startswith("#")]
    folder = os.path.dirname(path)
    if path.lower().endswith(".csv"):
        lines = _only_column(path, folder, lines)
    else:
        lines = [line[1:-1] if len(line) > 2 and line[0] == line[-1] == '"' else line for line in lines]
    return [_existing(folder, line) for line in lines]


def _only_column(path: str, folder: str, lines: list[str]) -> list[str]:
    msg = f"Found several columns in {path}, expected one path a line: keep the column of the paths."
    try:
        rows = [row for row in csv.reader(lines) if any(field.strip() for field in row)]
    except csv.Error as error:
        raise TilesError(f"Found {path} ({error}), expected one path a line: check its quotes.") from error
    if any(len(row) > 1 for row in rows):
        raise TilesError(msg)
    fields = [row[0].strip() for row in rows]
    if any(";" in field and not os.path.lexists(_existing(folder, field)) for field in fields):
        raise TilesError(msg)
    # A word without a dot or slash that names nothing is the heading of the column.
    heading = fields[:1] and not re.search(r"[./\\*]", fields[0]) and not os.path.lexists(_existing(folder, fields[0]))
    return fields[1:] if heading else fields


def _existing(folder: str, line: str) -> str:
    """The path of a line, in the spelling that is there."""
    if is_remote(line):
        return line
    spellings = [line]
    if any("\udc80" <= character <= "\udcff" for character in line):
        spellings.append(os.fsencode(line).decode("cp1252", errors="replace"))
    spellings += [spelling.replace("\\", "/") for spelling in spellings if "\\" in spelling]  # as Windows writes it
    there = [os.path.join(folder, spelling) for spelling in spellings]
    for path in there:
        if os.path.lexists(path):
            return path
    if glob.has_magic(line):  # the spelling whose folder is there
        starts = (os.path.dirname(re.split(r"[*?[]", path, maxsplit=1)[0]) for path in reversed(there))
        return next(
            (path for path, start in zip(reversed(there), starts, strict=True) if os.path.lexists(start or ".")), there[0]
        )
    return there[0]
