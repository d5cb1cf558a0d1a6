"""Which raster files are meant by a file, folder, glob, list or GDAL path, and what beside them is left out."""

from __future__ import annotations

import csv
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torchgeo.datasets.utils import path_is_vsi

from terratorch_simpler.errors import TilesError
from terratorch_simpler.tiles.source import Unusable, error_reason

GEOTIFF_ENDINGS = (".tif", ".tiff", ".gtif", ".gtiff", ".geotiff", ".btf")
RASTER_ENDINGS = (*GEOTIFF_ENDINGS, ".jp2", ".j2k", ".vrt", ".img", ".nc", ".h5", ".hdf5")
"""What is read in a folder."""
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")
"""Read by name or glob only: in folders of scenes they are previews."""
ARCHIVE_ENDINGS = (".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".7z", ".rar")
LIST_ENDINGS = (".txt", ".lst", ".csv")

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
    several = isinstance(paths, Iterable) and not isinstance(paths, str | bytes | os.PathLike)
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
        matches = sorted({*self._matching(start, [part for part in pattern.split(os.path.sep) if part])})
        any_file = any(os.path.isfile(path) for path in matches)
        found = False
        for path in matches:
            if os.path.isdir(path):
                found |= not any_file and self._add_folder(path)  # beside files, folders are what ** comes by
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
        if this in self._lists:
            raise TilesError(f"Found {path}, which lists itself, expected one path a line: take it out of the list.")
        self._lists.append(this)
        any_found = False
        for line in _lines(path):
            if self.add(line):
                any_found = True
            else:
                self._leave_out(line, "vanished", bad=True)
        self._lists.pop()
        return any_found

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
    lines = re.split(r"\r\n|\r|\n", text)  # not splitlines: a name may hold other characters that end lines
    if path.lower().endswith(".csv"):
        rows = [row for row in csv.reader(lines) if any(field.strip() for field in row)]
        if any(len(row) > 1 for row in rows):
            raise TilesError(f"Found several columns in {path}, expected one path a line: keep the column of the paths.")
        lines = [row[0] for row in rows]
    folder = os.path.dirname(path)
    stripped = (line.strip(" \t") for line in lines)
    return [_existing(folder, line) for line in stripped if line and not line.startswith("#")]


def _existing(folder: str, line: str) -> str:
    if "\0" in line or is_remote(line):
        return _name(line)
    spellings = [line, line.replace("\\", "/")]  # the second as Windows writes it
    with_bytes = os.fsencode(line) if any("\udc80" <= character <= "\udcff" for character in line) else b""
    if with_bytes:
        spellings.append(with_bytes.decode("cp1252", errors="replace"))
    there = (os.path.join(folder, spelling) for spelling in spellings)
    return next((path for path in there if os.path.lexists(path)), os.path.join(folder, line))
