"""The container recipes, which cannot be built here: files, versions, variables and sections are as they should be."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "containers"
SECTIONS = ["labels", "help", "files", "post", "environment", "runscript", "test"]
ARGUMENTS = {"HF_HOME", "OMP_NUM_THREADS", "GDAL_CACHEMAX", "GDAL_DISABLE_READDIR_ON_OPEN"}


@pytest.fixture(scope="module")
def docker():
    """Instructions of the Dockerfile, in order, each with what follows it."""
    lines = [line for line in (FOLDER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


@pytest.fixture(scope="module")
def apptainer():
    """Header and sections of the definition."""
    parts = re.split(r"^%(\w+)\n", (FOLDER / "apptainer.def").read_text(), flags=re.MULTILINE)
    assert parts[1::2] == SECTIONS
    return {"header": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def pairs(text, separator="="):
    return dict(re.findall(rf"(\w+){separator}\"?([^\s\"]+)", text))


def copied(docker):
    return [file for name, rest in docker if name == "COPY" for file in rest.split()[:-1]]


def test_instructions_are_those_of_docker(docker):
    known = {"FROM", "LABEL", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}
    assert {name for name, _ in docker} == known
    assert docker[0][0] == "FROM"


def test_what_is_copied_exists_and_is_sent(docker, apptainer):
    sent = {line.removeprefix("!") for line in (FOLDER / "Dockerfile.dockerignore").read_text().split() if line[0] == "!"}
    files = copied(docker)
    assert all((ROOT / file).exists() and file.split("/")[0] in sent for file in files)
    assert sent == {file.split("/")[0] for file in files}
    assert [line.split()[0] for line in apptainer["files"].splitlines() if line] == files


def test_the_package_can_be_built_from_what_is_copied(docker, tmp_path):
    for file in copied(docker):
        copy = shutil.copytree if (ROOT / file).is_dir() else shutil.copy
        copy(ROOT / file, tmp_path / Path(file).name)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=tmp_path, check=True)
    assert len(list(tmp_path.glob("dist/*.whl"))) == 1


def test_versions_are_those_of_the_constraints(docker, apptainer):
    (path,) = (file for file in copied(docker) if "constraints" in file)
    versions = dict(line.split("==") for line in (ROOT / path).read_text().splitlines() if "==" in line)
    labels = next(pairs(rest) for name, rest in docker if name == "LABEL")
    for package in ("terratorch", "torch"):
        assert labels[package] == pairs(apptainer["labels"], " ")[package] == versions[package]
    image = docker[0][1]
    assert re.search(r"^From: (.*)$", apptainer["header"], re.MULTILINE)[1] == image
    python = tuple(map(int, re.fullmatch(r"python:(\d+)\.(\d+)-slim", image).groups()))
    assert (3, 12) <= python < (3, 14)  # what constraints/python3.12+.txt is for


def test_both_install_the_same_from_no_address_of_their_own(docker, apptainer):
    (install,) = (rest for name, rest in docker if name == "RUN" and "pip" in rest)
    assert install in apptainer["post"]
    for path in (FOLDER / "Dockerfile", FOLDER / "apptainer.def"):
        assert not re.search(r"index-url|find-links|://", path.read_text())


def test_variables_are_those_of_the_batch_scripts(docker, apptainer):
    script = pairs((ROOT / "configs" / "slurm" / "environment.sh").read_text())
    environment = next(pairs(rest) for name, rest in docker if name == "ENV")
    inside = pairs(apptainer["environment"])
    for name in ARGUMENTS:
        assert environment[name] == inside[name]
        assert name == "HF_HOME" or environment[name] == script[name]
    assert f"{environment['HF_HOME']} " in next(rest for name, rest in docker if "useradd" in rest)


def test_it_runs_as_a_user(docker):
    names = [name for name, _ in docker]
    assert "RUN" not in names[names.index("USER") :]
    assert docker[names.index("USER")][1] != "root"


@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_sections_are_scripts(apptainer, section):
    subprocess.run(["bash", "-n"], input=apptainer[section], text=True, check=True)
