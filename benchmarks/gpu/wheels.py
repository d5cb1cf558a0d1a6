"""Collects the wheels that a GPU machine without a package registry lacks.

    python -m benchmarks.gpu.wheels wheels --has installed.txt

Run it where this package is installed: what it and TerraTorch need, in the versions that are installed there, is downloaded
for the other machine's Python, without PyTorch, torchvision and Lightning and what these need, which it has to have.
``--has`` is what ``python -m pip list --format=freeze`` prints there, to leave that out as well. There:

    python -m pip install --no-index --no-deps --target site wheels/*.whl
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

WANTED = "terratorch-simpler[test,peft]"
THERE = ("torch", "torchvision", "lightning")
NOT_USED = {"terratorch-simpler", "pyogrio"}
"""The working tree itself; and what geopandas reads vector files with, which is large and nothing here does."""
GLIBC = ("2_34", "2_31", "2_28", "2_27", "2_24", "2_17")
"""Of the platforms whose wheels are taken; manylinux2014 and manylinux1 are other names for old ones."""


def needed(names: Iterable[str], python: str) -> dict[str, str]:
    """What packages need, with themselves, in the versions that are installed here.

    Args:
        names: Requirements, possibly with extras.
        python: Version of the other machine, such as 3.12.
    """
    found: dict[str, str] = {}
    waiting, seen = [Requirement(name) for name in names], set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            package = distribution(name)
            found[name] = package.version
            environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": extra}
            below = [Requirement(line) for line in package.requires or []]
            waiting += [one for one in below if one.marker is None or one.marker.evaluate(environment)]
    return found


def installed(file: Path | None) -> set[str]:
    """Names in a list of ``pip list --format=freeze``."""
    lines = file.read_text().split() if file else []
    return {canonicalize_name(line.partition("==")[0]) for line in lines}


def download(packages: Iterable[str], python: str, folder: Path) -> None:
    """Get wheels; of what has none, one is made if it runs anywhere."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    platforms = [f"manylinux_{version}_x86_64" for version in GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    target = ["--python-version", python, "--implementation", "cp"]
    target += [word for platform in platforms for word in ("--platform", platform)]
    subprocess.run([*pip, "download", "--no-deps", *target, "--dest", str(folder), *packages], check=True)
    for source in folder.glob("*.tar.gz"):
        before = set(folder.iterdir())
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)], check=True)
        source.unlink()
        for made in set(folder.iterdir()) - before:
            if not made.name.endswith("-none-any.whl"):
                made.unlink()
                raise SystemExit(
                    f"There is no wheel of {source.name}, expected one for Python {python}: take another version."
                )


def main(arguments: list[str] | None = None) -> None:
    """Collect them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the other machine")
    parser.add_argument("--has", type=Path, help="packages that it has")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    there = needed(THERE, args.python).keys() | installed(args.has) | NOT_USED
    lacking = [f"{name}=={version}" for name, version in sorted(needed([WANTED], args.python).items()) if name not in there]
    download(lacking, args.python, args.folder)
    wheels = list(args.folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 2**20:.0f} MiB, in {args.folder}")


if __name__ == "__main__":
    main()
