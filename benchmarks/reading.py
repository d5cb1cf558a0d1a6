"""How fast tiles are read, beside what else would read them, in turn in one run.

    python benchmarks/reading.py --chips /data/hls_water --json reading.json

(a) windows of 512 px from generated scenes of six bands, tiled with deflate, zstd, lzw or nothing, and deflate in strips;
(b) the 128 px chips of a folder (``images/*_image.tif``, ``water_mask/*_mask.tif``), copied often enough to last;
(c) many small files of one window each: found, opened and read, for which nothing but the first pass counts.

Contenders, each in a process of its own that stays, with the same number of threads or worker processes:

    raw         rasterio alone: files kept open, windows in file order, pixels thrown away: the limit of decoding
    raw float32 the same, pixels kept as float32 until their batch is complete, as every model needs them
    ours        GeoTiffTiles: random order, float32, nodata mask, batches
    dataset     the same tiles and masks by a map-style Dataset in a DataLoader, files kept open in its worker processes
    torchgeo    RasterDataset with GridGeoSampler, and RandomGeoSampler, in a DataLoader
    terratorch  TerraTorch's generic segmentation dataset, masks included, in a DataLoader
    before      GeoTiffTiles of another checkout of this repository, with --before

GDAL's block cache is kept so small that nothing read once is there when it is read again. Memory is the peak of the process
and its workers above what it took before its first run. The last lines read few and many tiles.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.windows import Window
from rich.console import Console
from rich.table import Table

LAYOUTS = {
    "deflate": {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"},
    "zstd": {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "zstd"},
    "lzw": {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "lzw"},
    "uncompressed": {"tiled": True, "blockxsize": 512, "blockysize": 512},
    "deflate strips": {"compress": "deflate"},
}
MEMORY_LAYOUT = "zstd"
BATCH = 16
CACHE_MB = 16
FORK: Any = {"multiprocessing_context": "fork"}  # as on Linux; a spawned process would spawn its workers, which is slow


def draw_scene(side: int) -> NDArray[np.int16]:
    """Six correlated bands with noise: about as hard to compress as reflectance."""
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.normal(1500, 600, (side // 64, side // 64)), np.ones((64, 64))).astype(np.float32)
    scene = np.empty((6, side, side), np.int16)
    for band in range(6):
        scene[band] = smooth + 40 * rng.standard_normal((side, side), dtype=np.float32) + 100 * band
    return scene


def write_scenes(folder: Path, layout: dict[str, Any], pixels: NDArray[np.int16], scenes: int) -> None:
    """The same pixels in several files side by side."""
    folder.mkdir(parents=True)
    count, height, width = pixels.shape
    for number in range(scenes):
        place = rasterio.Affine(30, 0, 500_000, 0, -30, 5_000_000 - number * height * 30)
        profile = {
            "driver": "GTiff",
            "width": width,
            "height": height,
            "count": count,
            "dtype": "int16",
            "crs": "EPSG:32632",
        }
        with rasterio.open(folder / f"{number}.tif", "w", **profile, transform=place, NUM_THREADS="2", **layout) as target:
            target.write(pixels)


def copy_chips(source: Path, folder: Path, times: int) -> None:
    """Copy every chip and mask several times: links to one file would be one file."""
    for name in ("images", "water_mask"):
        (folder / name).mkdir(parents=True)
        for copy in range(times):
            for file in sorted((source / name).glob("*.tif")):
                shutil.copyfile(file, folder / name / f"{copy:03}_{file.name}")


def write_small_files(folder: Path, files: int, side: int = 64) -> None:
    """One window a file, in folders of a thousand."""
    pixels = draw_scene(side)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 6, "dtype": "int16", "crs": "EPSG:32632"}
    for number in range(files):
        place = folder / f"{number // 1000:03}"
        place.mkdir(parents=True, exist_ok=True)
        where = rasterio.Affine(10, 0, 500_000 + 640 * number, 0, -10, 5_000_000)
        with rasterio.open(place / f"{number:06}.tif", "w", **profile, transform=where, compress="deflate") as target:
            target.write(pixels)


def read_small_files(task: dict[str, Any]) -> int:
    """Open, read and close in threads: the limit for files of one window."""
    paths = sorted(glob.glob(f"{task['folder']}/*/*.tif"))

    def read(share: list[str]) -> None:
        batch: list[NDArray[np.float32]] = []
        for path in share:
            with rasterio.open(path) as src:
                batch = [*batch[-BATCH + 1 :], src.read().astype(np.float32)]

    with (
        rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="TRUE"),  # else each file's folder is listed
        ThreadPoolExecutor(task["threads"]) as pool,
    ):
        list(pool.map(read, (paths[start :: task["threads"]] for start in range(task["threads"]))))
    return len(paths)


def read_raw(task: dict[str, Any]) -> int:
    """Windows in file order, in threads."""
    if task.get("small_files"):
        return read_small_files(task)
    size, threads = task["size"], task["threads"]
    work = []
    for path in sorted(glob.glob(f"{task['folder']}/*.tif")):
        with rasterio.open(path) as src:
            starts = [(x, y) for y in range(0, src.height, size) for x in range(0, src.width, size)]
            work += [(path, x, y) for x, y in starts if x + size <= src.width and y + size <= src.height]
    work = work[: task["tiles"]]

    def read(share: list[tuple[str, int, int]]) -> None:
        src, opened, batch = None, None, []
        for path, x, y in share:
            if path != opened:
                src, opened = rasterio.open(path), path
            pixels = src.read(window=Window(x, y, size, size))
            if task.get("convert"):
                batch = [*batch[-BATCH + 1 :], pixels.astype(np.float32)]

    share = -(-len(work) // threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, (work[start : start + share] for start in range(0, len(work), share))))
    return len(work)


def read_ours(task: dict[str, Any]) -> int:
    """GeoTiffTiles, as the callback uses it."""
    from terratorch_simpler.data import GeoTiffTiles

    seen = 0
    tiles = GeoTiffTiles(
        task["folder"], task["size"], task.get("stride"), batch_size=BATCH, num_workers=task["threads"], max_bad_fraction=0
    )
    for batch in tiles:
        seen += len(batch["index"])
        if seen >= task["tiles"]:
            break
    return seen


opened = lru_cache(maxsize=64)(rasterio.open)


class Windows:
    """Map-style dataset of windows: one item is one window as float32 with its mask."""

    def __init__(self, folder: str, size: int, tiles: int) -> None:
        self._size = size
        self._windows = []
        for path in sorted(glob.glob(f"{folder}/**/*.tif", recursive=True)):
            with rasterio.open(path) as src:
                starts = [(x, y) for y in range(0, src.height, size) for x in range(0, src.width, size)]
                self._windows += [(path, x, y) for x, y in starts if x + size <= src.width and y + size <= src.height]
        self._windows = self._windows[:tiles]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, item: int) -> dict[str, NDArray[Any]]:
        path, x, y = self._windows[item]
        src, window = opened(path), Window(x, y, self._size, self._size)
        return {"image": src.read(window=window).astype(np.float32), "valid": src.dataset_mask(window=window) > 0}


def read_dataset(task: dict[str, Any]) -> int:
    """A map-style dataset in a DataLoader, in random order."""
    from torch.utils.data import DataLoader

    os.environ["GDAL_DISABLE_READDIR_ON_OPEN"] = "TRUE"  # else each file's folder is listed
    dataset: Any = Windows(task["folder"], task["size"], task["tiles"])
    loader = DataLoader(dataset, BATCH, num_workers=task["threads"], shuffle=True, worker_init_fn=hush, **FORK)
    return sum(len(batch["image"]) for batch in loader)


def hush(_: int) -> None:
    """Workers tell of every chip that it has no georeference."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def read_torchgeo(task: dict[str, Any]) -> int:
    """RasterDataset with one of torchgeo's samplers."""
    from torch.utils.data import DataLoader
    from torchgeo.datasets import RasterDataset, stack_samples
    from torchgeo.samplers import GridGeoSampler, RandomGeoSampler, Units

    dataset = RasterDataset(task["folder"])
    if task["sampler"] == "grid":
        sampler = GridGeoSampler(dataset, task["size"], task["size"], units=Units.PIXELS)
    else:
        sampler = RandomGeoSampler(dataset, task["size"], task["tiles"], units=Units.PIXELS)
    seen = 0
    some = list(itertools.islice(sampler, task["tiles"]))
    for batch in DataLoader(dataset, BATCH, sampler=some, num_workers=task["threads"], collate_fn=stack_samples, **FORK):
        seen += len(batch["image"])
    return seen


def read_terratorch(task: dict[str, Any]) -> int:
    """TerraTorch's generic dataset, masks included."""
    from terratorch.datasets import GenericNonGeoSegmentationDataset
    from torch.utils.data import DataLoader

    folder = Path(task["folder"]).parent
    dataset = GenericNonGeoSegmentationDataset(
        folder / "images", num_classes=2, label_data_root=folder / "water_mask", image_grep="*_image.tif",
        label_grep="*_mask.tif", no_data_replace=0,
    )  # fmt: skip
    seen = 0
    for batch in DataLoader(dataset, BATCH, num_workers=task["threads"], shuffle=True, worker_init_fn=hush, **FORK):
        seen += len(batch["image"])
    return seen


CONTENDERS: dict[str, Callable[[dict[str, Any]], int]] = {
    "raw": read_raw,
    "ours": read_ours,
    "before": read_ours,
    "dataset": read_dataset,
    "torchgeo": read_torchgeo,
    "terratorch": read_terratorch,
}


def serve(name: str, pipe: Any, checkout: Path | None) -> None:
    """Run tasks as they come, in a process that has imported everything."""
    if checkout is not None:
        sys.path.insert(0, str(checkout.resolve()))
    if name != "raw":
        import terratorch_simpler.data  # noqa: F401  TerraTorch, torchgeo and ours
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        start = time.perf_counter()
        tiles = CONTENDERS[name](task)
        pipe.send((tiles, time.perf_counter() - start))


class Contender:
    """One contender's process."""

    def __init__(self, name: str, checkout: Path | None = None) -> None:
        """Start it, and wait until it has imported what it needs."""
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(name, other, checkout))
        self._process.start()
        self._pipe.recv()
        self._before = memory(self._process.pid)

    def run(self, task: dict[str, Any]) -> tuple[float, float]:
        """Tiles a second, and peak memory in MB."""
        peak, running = 0.0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not running.wait(0.5):
                peak = max(peak, memory(self._process.pid) - self._before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        self._pipe.send(task)
        tiles, seconds = self._pipe.recv()
        running.set()
        watcher.join()
        return tiles / seconds, peak

    def stop(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def memory(pid: int | None) -> float:
    """Memory of a process and its children in MB, each page shared between them counted once, files left out."""
    total = 0.0
    for process in [str(pid), *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # a worker that has just ended
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")) / 1024
    return total


def compare(contenders: dict[str, Contender], tasks: dict[str, dict[str, Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Medians over rounds in which all take turns, after one that is not counted."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            result = contenders[name.split()[0]].run(task)
            if turn:
                results[name].append(result)
    rates = {name: [rate for rate, _ in runs] for name, runs in results.items()}
    return {
        name: {
            "tiles_per_second": statistics.median(rates[name]),
            "ours_to_it": statistics.median(ours / other for ours, other in zip(rates["ours"], rates[name], strict=True)),
            "peak_mb": max(peak for _, peak in runs),
            "rounds": rates[name],
        }
        for name, runs in results.items()
    }


def show(title: str, figures: dict[str, dict[str, Any]]) -> None:
    """A table of one comparison."""
    table = Table(title=title, title_justify="left")
    for column in ("", "tiles/s", "ours to it", "peak memory, MB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in figures.items():
        table.add_row(name, f"{row['tiles_per_second']:.0f}", f"{row['ours_to_it']:.2f}", f"{row['peak_mb']:.0f}")
    Console().print(table)


def main() -> None:
    """Write the files, run everything, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=Path, help="folder with images/ and water_mask/; without it (b) is left out")
    parser.add_argument("--folder", type=Path, help="where scenes are written; a temporary folder by default")
    parser.add_argument("--scenes", type=int, default=2)
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--torchgeo_tiles", type=int, default=128, help="windows a round of torchgeo, which is slow")
    parser.add_argument(
        "--strip_tiles", type=int, default=24, help="windows a round of strips, each decoded over its whole width"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=10_000, help="tiles of the longest stream in the memory table")
    parser.add_argument("--small_files", type=int, default=20_000)
    parser.add_argument("--before", type=Path, help="another checkout of this repository, to compare with")
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.update(GDAL_CACHEMAX=str(CACHE_MB), OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        absent = [name for name, given in (("terratorch", args.chips), ("before", args.before)) if not given]
        contenders = {
            name: Contender(name, args.before if name == "before" else None) for name in CONTENDERS if name not in absent
        }
        before = ["before"] if args.before else []
        pixels = draw_scene(args.side)
        for name in args.layouts:
            layout = LAYOUTS[name]
            write_scenes(folder / name, layout, pixels, args.scenes)
            few, every = (args.strip_tiles,) * 2 if "strips" in name else (args.torchgeo_tiles, 10**9)
            task = {"folder": str(folder / name), "size": 512, "tiles": every, "threads": args.threads}
            tasks = {"raw": task, "raw float32": {**task, "convert": True}, "ours": task, "dataset": task}
            tasks |= dict.fromkeys(before, task) | {
                f"torchgeo {sampler}": {**task, "tiles": few, "sampler": sampler} for sampler in ("grid", "random")
            }
            results[name] = compare(contenders, tasks, args.rounds)
            show(f"512 px windows, {name}", results[name])
            if name != MEMORY_LAYOUT:
                shutil.rmtree(folder / name)
        if args.chips:
            copy_chips(args.chips, folder / "chips", times=4)
            task = {"folder": str(folder / "chips" / "images"), "size": 128, "tiles": 10**9, "threads": args.threads}
            results["chips"] = compare(
                contenders,
                {"raw": task, "raw float32": {**task, "convert": True}, "ours": task, "dataset": task}
                | {"terratorch": task}
                | dict.fromkeys(before, task),
                args.rounds,
            )
            show("128 px chips", results["chips"])
        if args.small_files:
            write_small_files(folder / "small", args.small_files)
            task = {
                "folder": str(folder / "small"),
                "size": 64,
                "tiles": 10**9,
                "threads": args.threads,
                "small_files": True,
            }
            results["small files"] = compare(
                contenders, {"raw": task, "ours": task, "dataset": task} | dict.fromkeys(before, task), args.rounds
            )
            show(f"{args.small_files} files of 64 px", results["small files"])
        for contender in contenders.values():
            contender.stop()
        results["memory"] = {}
        for tiles in () if MEMORY_LAYOUT not in args.layouts else (100, args.most // 10, args.most):
            fresh = Contender("ours")
            task = {
                "folder": str(folder / MEMORY_LAYOUT),
                "size": 224,
                "stride": 64,
                "tiles": tiles,
                "threads": args.threads,
            }
            results["memory"][tiles] = dict(zip(("tiles_per_second", "peak_mb"), fresh.run(task), strict=True))
            fresh.stop()
            print(f"{tiles} tiles of 224 px: peak {results['memory'][tiles]['peak_mb']:.0f} MB")
    if args.json:
        args.json.write_text(json.dumps({**vars(args), "results": results}, indent=1, default=str))


if __name__ == "__main__":
    main()
