"""What users install: the files of the distributions, and the demo from the built wheel in an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

import terratorch_simpler
from terratorch_simpler.demo.scenes import LAND_COVER, write_scenes

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "terratorch_simpler"
BESIDE_THE_PACKAGE = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"}
MADE_BY_HATCH = {"PKG-INFO", ".gitignore"}


def run(*command, cwd, **kwargs):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution, and the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    sdist = next(folder.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=folder / sdist.name[: -len(".tar.gz")])
    return sdist, next(folder.glob("*.whl"))


def package_files():
    return {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


def test_distributions_hold_the_package_and_what_describes_it(distributions):
    sdist, wheel = distributions
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert inside == package_files() | BESIDE_THE_PACKAGE | MADE_BY_HATCH
    with ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    about = {name for name in inside if ".dist-info/" in name}
    assert inside - about == package_files()
    assert "terratorch_simpler/py.typed" in inside
    assert {name.partition(".dist-info/")[2] for name in about} == {
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE",
    }  # fmt: skip


def test_metadata_says_who_what_and_for_which_python(distributions):
    with ZipFile(distributions[1]) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == terratorch_simpler.__version__
    assert metadata["Author"] == "The terratorch-simpler developers"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any("arxiv.org/abs/2603.19873" in url for url in metadata.get_all("Project-URL"))
    supported = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)}
    found = {text for text in metadata.get_all("Classifier") if text.startswith("Programming Language :: Python :: 3.")}
    assert found == supported
    assert metadata["Requires-Python"] == "<3.14,>=3.11"


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_in_a_clean_environment(distributions, tmp_path):
    """The dependencies are those of this environment; the package comes from the wheel only."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    # Files *.pth of that folder are not read from here, so an editable install of the package is not seen.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    outside = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--ignore-installed"),
        distributions[1],
        cwd=tmp_path,
        env=outside,
    )
    where = run(python, "-c", "import terratorch_simpler; print(terratorch_simpler.__file__)", cwd=tmp_path, env=outside)
    assert Path(where.strip()).is_relative_to(site)
    out = tmp_path / "demo"
    splits = {"train": 40, "val": 8, "test": 8}
    write_scenes(out / "scenes", splits, size=64, merged=LAND_COVER)  # fewer than the demo would make
    said = run(folder / "bin" / "terratorch-simpler", "demo", "--output_dir", out, cwd=tmp_path, env=outside)
    assert "test mIoU" in said
    assert "Without (SIMPLER)" in said
    assert len(list((out / "predictions").glob("*.tif"))) == sum(splits.values())
    plan = terratorch_simpler.SlimmingPlan.load(next(out.glob("lightning_logs/*/simpler/plan.json")))
    assert plan.tiles_seen == splits["train"]
    assert len(plan.kept_blocks) < plan.full_num_blocks
    assert not list(out.rglob(".part-*"))
