"""Files are whole or not there, whatever ends the process that writes them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from terratorch_simpler import files
from terratorch_simpler.files import atomic_folder, atomic_write


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    with atomic_write(tmp_path / "deep" / "a.txt") as part:
        part.write_text("one")
        assert not (tmp_path / "deep" / "a.txt").exists()
    assert (tmp_path / "deep" / "a.txt").read_text() == "one"
    assert len(list((tmp_path / "deep").iterdir())) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)])
def test_an_error_leaves_the_file_before(tmp_path, error):
    (tmp_path / "a.txt").write_text("before")

    def write():
        with atomic_write(tmp_path / "a.txt") as part:
            part.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert (tmp_path / "a.txt").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_files_come_into_a_folder_together(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    (tmp_path / "other.txt").write_text("stays")

    def write(error=None):
        with atomic_folder(tmp_path) as folder:
            (folder / "a.txt").write_text("one")
            if error:
                raise error
            with atomic_write(folder / "b.txt") as part:
                part.write_text("two")

    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "before", "other.txt": "stays"}
    write()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a.txt": "one", "b.txt": "two", "other.txt": "stays"}


def killed_while_writing(folder):
    code = (
        "import os, sys; from terratorch_simpler.files import atomic_write\n"
        f"with atomic_write({str(folder / 'a.txt')!r}) as part:\n"
        "    part.write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    # Without the package's own imports, which take long.
    stub = "import types, sys, pathlib; m = types.ModuleType('terratorch_simpler'); "
    stub += f"m.__path__ = [{str(os.path.dirname(files.__file__))!r}]; sys.modules['terratorch_simpler'] = m\n"
    assert subprocess.run([sys.executable, "-c", stub + code], check=False).returncode == -signal.SIGKILL


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    killed_while_writing(tmp_path)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".part-")
    with atomic_write(tmp_path / "b.txt") as part:
        part.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


def test_what_others_are_writing_is_left_alone(tmp_path):
    with atomic_write(tmp_path / "a.txt") as first:
        first.write_text("one")
        with atomic_write(tmp_path / "b.txt") as second:
            second.write_text("two")
        assert first.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.txt"}


@pytest.mark.parametrize(("age", "stays"), [(3600, True), (90_000, False)])
def test_what_another_machine_left_goes_after_a_day(tmp_path, age, stays):
    foreign = tmp_path / ".part-some-other-host-12-abc"
    foreign.mkdir()
    os.utime(foreign, (time.time() - age,) * 2)
    with atomic_write(tmp_path / "a.txt") as part:
        part.write_text("x")
    assert foreign.exists() == stays


@pytest.mark.parametrize(("age", "stays"), [(3600, True), (90_000, False)])
def test_what_another_container_on_this_machine_is_writing_goes_after_a_day(tmp_path, monkeypatch, age, stays):
    """Its process numbers mean nothing here: there may be no process of that number, or another one."""
    readlink = os.readlink
    with monkeypatch.context() as there:
        there.setattr(os, "readlink", lambda path, **kwargs: "pid:[42]" if "ns/pid" in path else readlink(path, **kwargs))
        there.setattr(os, "getpid", lambda: 2**22 + 1)  # no such process
        with atomic_write(tmp_path / "live.txt") as part:
            part.write_text("half")
            os.utime(part.parent, (time.time() - age,) * 2)
            there.undo()
            with atomic_write(tmp_path / "a.txt") as other:
                other.write_text("x")
            assert part.exists() == stays
            if not stays:
                part.parent.mkdir()
                part.write_text("half")


@pytest.mark.parametrize("name", [".part-", ".part-x", ".part-a-b-c"])
def test_other_names_do_no_harm(tmp_path, name):
    (tmp_path / name).mkdir()
    with atomic_write(tmp_path / "a.txt") as part:
        part.write_text("x")
    assert (tmp_path / name).exists()
