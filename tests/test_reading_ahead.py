"""Threads that read ahead: order, errors, reads that never end, interrupts, memory."""

import contextlib
import http.server
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from terratorch_simpler.data import GeoTiffTiles
from terratorch_simpler.data.prefetch import ReaderPool
from terratorch_simpler.data.rasters import Raster
from terratorch_simpler.errors import TilesError
from tests.rasters import draw, one_by_one, write, write_many

# ReaderPool

TIMED_OUT = "timed out"


def reader_pool(read, num_threads, timeout=60.0, context=nullcontext):
    return ReaderPool(read, num_threads, timeout, context, on_timeout=lambda _: TIMED_OUT)


def read_all(runs, read, num_threads, timeout=60.0):
    with reader_pool(read, num_threads, timeout) as readers:
        submitted = [readers.submit(run) for run in runs]
        return [readers.results(run) for run in submitted]


@pytest.mark.parametrize("num_threads", [0, 1, 5])
def test_results_come_in_order(num_threads):
    def read(item):
        time.sleep(0.001 * (item % 3))
        return item * item

    runs = [list(range(start, start + 1 + start % 4)) for start in range(0, 80, 4)]
    assert read_all(runs, read, num_threads) == [[item * item for item in run] for run in runs]


@pytest.mark.parametrize("num_threads", [0, 3])
def test_error_reaches_who_waits_for_it(num_threads):
    with reader_pool(lambda item: 1 // item, num_threads) as readers:
        runs = [readers.submit([1]), readers.submit([2, 0, 3]), readers.submit([1, 1])]
        assert readers.results(runs[0]) == [1]
        with pytest.raises(ZeroDivisionError):
            readers.results(runs[1])
        assert readers.results(runs[2]) == [1, 1]


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_error_on_entering_the_context_reaches_who_waits(num_threads):
    @contextmanager
    def context():
        raise OverflowError("cannot convert float infinity to integer")
        yield

    with reader_pool(lambda item: item, num_threads, context=context) as readers:
        run = readers.submit([1])
        with pytest.raises(OverflowError, match="infinity"):
            readers.results(run)


@pytest.fixture
def hang():
    """A read that hangs on None until the test is over."""
    over = threading.Event()

    def read(item):
        if item is None:
            over.wait(60)
        return item

    yield read
    over.set()


def test_read_that_hangs_is_abandoned_and_the_rest_continues(hang):
    runs = [[1, 2], [3, None, 4, None, 5], [6], [7, 8]]
    assert read_all(runs, hang, 2, timeout=0.2) == [[1, 2], [3, TIMED_OUT, 4, TIMED_OUT, 5], [6], [7, 8]]


def test_late_result_of_a_read_given_up_is_forgotten():
    def read(item):
        time.sleep(0.6 if item == "late" else 0)
        return item

    with reader_pool(read, 1, 0.2) as readers:
        run = readers.submit(["a", "late", "b"])
        assert readers.results(run) == ["a", TIMED_OUT, "b"]
        time.sleep(0.6)
        assert run.results == ["a", TIMED_OUT, "b"]


def test_storage_that_is_gone_is_an_error(hang):
    with pytest.raises(TilesError, match=r"8 reads did not finish within 0\.1 s each, the last of None: check the storage"):
        read_all([[None] * 20], hang, 2, timeout=0.1)


def test_closing_does_not_wait_for_a_read_that_hangs(hang):
    started = time.perf_counter()
    with reader_pool(hang, 2) as readers:
        readers.submit([None])
        readers.submit([None])
        time.sleep(0.1)
    assert time.perf_counter() - started < 5


# Files that hang or are far away


@pytest.fixture
def pipe(tmp_path):
    """A named pipe: opening it waits until somebody writes."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    yield path
    let_go(path)


def reading_threads(seconds=2.5):
    """Threads that still read, when they had time to end."""
    for _ in range(int(seconds / 0.05)):
        left = [thread for thread in threading.enumerate() if thread.name == "tiles"]
        if not left:
            return []
        time.sleep(0.05)
    return left


def let_go(path):
    """Be the writer that a pipe's readers wait for, as often as they open it."""
    for _ in range(100):
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        if not reading_threads(0.05):
            return


def test_file_that_hangs_is_skipped_and_counted(tmp_path, pipe):
    scenes = tmp_path / "scenes"
    write_many(scenes, count=20)
    tiles = GeoTiffTiles([str(scenes), f"/vsisubfile/0_5000,{pipe}"], tile_size=40, timeout=0.5)
    assert len(one_by_one(tiles)) == 20
    assert tiles.skipped == {"timed out": 1}
    assert "pipe (timed out)" in str(tiles.skips)


def test_file_that_hangs_after_it_was_indexed_is_given_up_whole(tmp_path):
    scenes = tmp_path / "scenes"
    write_many(scenes, count=6, height=64, width=64)
    tiles = GeoTiffTiles(str(scenes), tile_size=16, timeout=0.5, max_bad_fraction=0.5, num_workers=2, batch_size=3)
    assert len(tiles) == 6 * 16
    (scenes / "3.tif").unlink()
    os.mkfifo(scenes / "3.tif")
    started = time.perf_counter()
    found = one_by_one(tiles)
    assert len(found) == 5 * 16
    assert tiles.skipped == {"timed out": 16}
    assert time.perf_counter() - started < 60  # not half a second for each of its windows and threads
    expected = {f"{n}.tif": draw(2, 64, 64, seed=n) for n in range(6)}
    for _, path, (x, y, _, _), image, _ in found:
        assert np.array_equal(image, expected[Path(path).name][:, y : y + 16, x : x + 16])
    let_go(scenes / "3.tif")
    assert not reading_threads()


def test_read_that_comes_back_after_it_was_given_up_writes_to_no_batch(tmp_path, monkeypatch):
    write_many(tmp_path, count=8, height=16, width=16)
    over, real = threading.Event(), Raster.read

    def read(raster, indexes, window, nodata, out):
        if raster.path.endswith("3.tif"):
            over.wait(60)
            out[...] = -7.0
            return None
        return real(raster, indexes, window, nodata, out)

    monkeypatch.setattr(Raster, "read", read)
    tiles = GeoTiffTiles(str(tmp_path), tile_size=16, batch_size=4, num_workers=2, timeout=0.3, max_bad_fraction=0.5)
    batches = list(tiles)
    assert tiles.skipped == {"timed out": 1}
    assert sorted(len(batch["index"]) for batch in batches) == [3, 4]
    over.set()
    assert not reading_threads()
    for batch in batches:
        for path, image in zip(batch["path"], batch["image"], strict=True):
            assert np.array_equal(image, draw(2, 16, 16, seed=int(Path(path).stem)))


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with byte ranges, and never answers for what is called slow."""

    daemon_threads = True

    def __init__(self, folder):
        self.folder, self.over = folder, threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        if "slow" in self.path:
            self.server.over.wait(60)
            return
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        first, last = 0, len(data) - 1
        wanted = self.headers.get("Range")
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(last, int(end) if end else last)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(data[first : last + 1])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"/vsicurl/http://127.0.0.1:{server.server_port}"
    server.over.set()
    server.shutdown()
    server.server_close()


def test_remote_files_stream(tmp_path, server):
    write_many(tmp_path / "scenes", count=12)
    (tmp_path / "list.txt").write_text("\n".join(f"{server}/scenes/{n}.tif" for n in range(12)))
    found = one_by_one(GeoTiffTiles(str(tmp_path / "list.txt"), tile_size=16))
    local = one_by_one(GeoTiffTiles(str(tmp_path / "scenes" / "*.tif"), tile_size=16))
    assert len(found) == len(local) == 72
    pixels = {(Path(path).name, tuple(window)): image for _, path, window, image, _ in local}
    assert all(np.array_equal(image, pixels[Path(path).name, tuple(window)]) for _, path, window, image, _ in found)


def test_server_that_does_not_answer_is_skipped(tmp_path, server):
    write_many(tmp_path / "scenes", count=18)
    paths = [f"{server}/scenes/{n}.tif" for n in range(18)]
    tiles = GeoTiffTiles([*paths, f"{server}/slow.tif", f"{server}/missing.tif"], tile_size=40, timeout=1)
    assert len(one_by_one(tiles)) == 18
    assert tiles.skipped == {"timed out": 1, "unreadable": 1}


def test_files_in_an_archive_stream(tmp_path):
    import zipfile

    path = write(tmp_path / "a.tif", draw(2, 16, 16))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "inside/a.tif")
    ((_, _, _, image, _),) = one_by_one(GeoTiffTiles(f"/vsizip/{tmp_path}/a.zip/inside/a.tif", tile_size=16))
    assert np.array_equal(image, draw(2, 16, 16))


# Interrupts


ENDLESS = """
    import os, signal, sys, threading, time
    from pathlib import Path
    from terratorch_simpler.data import GeoTiffTiles

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background

    def handles():
        found = []
        for handle in Path("/proc/self/fd").iterdir():
            try:
                found.append(str(handle.readlink()))
            except OSError:
                pass
        return [target for target in found if target.endswith(".tif")]

    tiles = GeoTiffTiles(sys.argv[1], tile_size=64, stride=1, batch_size=4, index_cache=sys.argv[2])
    try:
        for batch in tiles:
            if not os.path.exists(sys.argv[3]):
                print("streaming", len(handles()), flush=True)
                open(sys.argv[3], "w").close()
    except KeyboardInterrupt:
        threads = [thread.name for thread in threading.enumerate() if thread.name == "tiles"]
        print("interrupted", threads, handles(), flush=True)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_soon_and_leaves_nothing(tmp_path, signum):
    write_many(tmp_path / "scenes", count=3, height=1500, width=1500, compress="deflate")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ENDLESS), tmp_path / "scenes", out / "tiles.json", tmp_path / "started"],
        stdout=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line.startswith("streaming")
    assert int(line.split()[1]) > 0
    process.send_signal(signum)
    try:
        rest, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    status = process.returncode
    if signum == signal.SIGINT:
        assert rest == "interrupted [] []\n"
        assert status == 0
    else:
        assert status == -signal.SIGTERM
    assert [path.name for path in out.iterdir()] == ["tiles.json"]
    assert len(json.loads((out / "tiles.json").read_text())["files"]) == 3


def stream_for(seconds, folder, timer):
    timer.start()
    started = time.monotonic()
    while time.monotonic() < started + seconds:
        for _ in GeoTiffTiles(folder, tile_size=64, stride=8, batch_size=2):
            if time.monotonic() > started + seconds:
                break


def interrupt_again(dropped):
    """Python drops an interrupt that falls into a callback of weak references or of the garbage collector.

    Its own library and Hypothesis have some; this package must have none.
    """
    module = getattr(dropped.object, "__module__", None) or ""
    if dropped.exc_type is KeyboardInterrupt and not module.startswith("terratorch_simpler"):
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()  # not here: it would be dropped again
    else:
        sys.__unraisablehook__(dropped)


def test_interrupt_at_any_moment_arrives_and_leaves_no_thread(tmp_path, monkeypatch):
    assert not reading_threads(20)  # of the tests before
    monkeypatch.setattr(sys, "unraisablehook", interrupt_again)
    folder = write_many(tmp_path, count=30, height=400, width=400)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
    try:
        for trial in range(60):
            timer = threading.Timer(0.0007 * trial, os.kill, (os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                stream_for(10, folder, timer)
            timer.join()
            assert not reading_threads(), trial
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", range(4))
def test_interrupt_while_python_waits_is_an_interrupt(tmp_path, monkeypatch, number):
    folder, restore, calls = write_many(tmp_path, count=30, height=400, width=400), threading.Condition._acquire_restore, []

    def interrupted(self, state):
        if threading.current_thread() is threading.main_thread():
            calls.append(self)
            if len(calls) == number + 1:
                raise KeyboardInterrupt  # before the lock is taken again, which leaving the Condition then releases
        restore(self, state)

    monkeypatch.setattr(threading.Condition, "_acquire_restore", interrupted)
    with contextlib.suppress(KeyboardInterrupt):  # or it does not wait so often: nothing else is raised
        list(itertools.islice(GeoTiffTiles(folder, tile_size=64, stride=8, batch_size=2, num_workers=2), 4))
    monkeypatch.undo()
    assert not reading_threads()


# Memory

STREAM = """
    import resource, sys
    from terratorch_simpler.data import GeoTiffTiles

    wanted, peaks, seen = [int(text) for text in sys.argv[2:]], [], 0
    for batch in GeoTiffTiles(sys.argv[1], tile_size=64, stride=8, batch_size=16):
        seen += len(batch["index"])
        if wanted and seen >= wanted[0]:
            wanted.pop(0)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
            if not wanted:
                break
    print(*peaks)
"""


def test_memory_does_not_grow_with_the_number_of_tiles(tmp_path):
    write_many(tmp_path, count=4, height=400, width=400, bands=6)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STREAM), tmp_path, "100", "1000", "5000"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "GDAL_CACHEMAX": "8"},
    )
    first, second, last = map(int, result.stdout.split())
    assert second - first < 120  # what may wait in memory, touched for the first time
    assert last - second < 20
