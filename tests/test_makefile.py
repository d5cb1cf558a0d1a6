"""Which interpreter gets which versions, and what is said where none runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture
def interpreter(tmp_path):
    """Pretend to be a Python of some version, or a shim of pyenv that does not run."""

    def make(name, version=None, folder="bin"):
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = None if version is None else tuple(map(int, version.split(".")))
        lines = ["#!/bin/sh", "exit 127"]
        if numbers:
            code = f"import sys; sys.version_info = {numbers!r}; exec(sys.argv[2])"
            lines = ["#!/bin/sh", f'exec {sys.executable} -S -c "{code}" "$@"']
        path.write_text("\n".join([*lines, ""]))
        path.chmod(0o755)
        return path

    return make


def make(tmp_path, *arguments):
    """Run make with nothing in PATH but the interpreters that a test has made and the tools that the Makefile calls."""
    tools = tmp_path / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    for tool in ("ls", "sort", "test"):
        (tools / tool).symlink_to(shutil.which(tool))
    command = [shutil.which("make"), "--no-print-directory", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": str(tools)})


@pytest.mark.parametrize(
    ("version", "expected"), [("3.11.0", "python3.11"), ("3.12.9", "python3.12+"), ("3.13.0", "python3.12+")]
)
def test_the_interpreter_says_which_versions_are_installed(tmp_path, interpreter, version, expected):
    python = interpreter("chosen", version)
    done = make(tmp_path, "-n", "-B", "demo", "test", "check", "test-plain", f"PYTHON={python}")
    assert done.returncode == 0, done.stderr
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert [line.partition("/")[0] for line in installs] == [".venv", ".venv-plain"]
    assert all(f"--constraint constraints/{expected}.txt" in line for line in installs)


@pytest.mark.parametrize(
    ("in_path", "in_pyenv", "expected"),
    [
        ({"python3.13": "3.13.0", "python3.12": "3.12.1"}, [], "bin/python3.13"),
        ({"python3.13": None, "python3.12": "3.12.1"}, [], "bin/python3.12"),
        ({"python3.13": None, "python3.12": "3.12.1"}, ["3.13.9", "3.13.10"], "pyenv/versions/3.13.10/bin/python3.13"),
        ({"python3.13": None, "python3.12": None}, ["3.12.1"], "pyenv/versions/3.12.1/bin/python3.12"),
    ],
)
def test_the_newest_interpreter_that_runs(tmp_path, interpreter, in_path, in_pyenv, expected):
    for name, version in in_path.items():
        interpreter(name, version)
    interpreter("pyenv").write_text(f"#!/bin/sh\necho {tmp_path / 'pyenv'}\n")
    for version in in_pyenv:
        interpreter(f"python{version.rpartition('.')[0]}", version, f"pyenv/versions/{version}/bin")
    done = make(tmp_path, "-n", "-B", "test-newest", f"PYTHON={sys.executable}")
    assert done.returncode == 0, done.stderr
    assert f'"{tmp_path / expected}" -m venv --clear .venv-newest' in done.stdout
    assert "--constraint constraints/python3.12+.txt" in done.stdout


@pytest.mark.parametrize("given", [None, "3.11.7", "3.14.0", "does not run"])
def test_no_interpreter_for_the_newest_is_an_error_in_one_sentence(tmp_path, interpreter, given):
    interpreter("python3.13")  # a shim without a Python behind it
    arguments = ["-B", "test-newest", f"PYTHON={sys.executable}"]
    if given is not None:
        arguments.append(f"PYTHON_NEWEST={interpreter('given', None if given == 'does not run' else given)}")
    done = make(tmp_path, *arguments)
    assert done.returncode != 0
    said = next(line for line in done.stderr.splitlines() if line.startswith("Found"))
    found = "none in PATH or pyenv" if given is None else str(tmp_path / "bin" / "given")
    assert said == (
        f"Found no Python 3.13 or 3.12 that runs ({found}), expected one for the tests with the newest TerraTorch: "
        "install it, or give its path as PYTHON_NEWEST=..."
    )


def test_all_targets_that_test_run_the_same(tmp_path):
    """One selection of tests, whatever the environment."""
    commands = set()
    for target in ("test", "test-newest", "test-minimum", "test-plain"):
        done = make(tmp_path / target, "-n", target, f"PYTHON={sys.executable}", f"PYTHON_NEWEST={sys.executable}")
        assert done.returncode == 0, done.stderr
        commands.add(next(line for line in done.stdout.splitlines() if " -m pytest " in line).partition(" ")[2])
    assert len(commands) == 1


def test_the_workflow_runs_what_has_to_pass():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    targets = {row["target"] for row in workflow["jobs"]["make"]["strategy"]["matrix"]["include"]}
    here = set(re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.M))
    assert {"check", "test", "test-newest", "test-all"} <= here <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
