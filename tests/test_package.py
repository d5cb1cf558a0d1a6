"""The shape of the package itself: which way imports point, what importing costs, what must not be in it."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "terratorch_simpler"

# From the bottom up: a module may import from its own layer and those below.
LAYERS = [
    {"errors", "files", "logger"},
    {"indices", "functional", "distributed"},
    {"pruning"},
    {"plan"},
    {"criteria"},
    {"encoders", "data", "metrics"},
    {"models"},
    {"report", "cache"},
    {"extraction", "export"},
    {"alternatives", "distillation"},
    {"selection_config"},
    {"planning"},
    {"api"},
    {"lightning", "terratorch", "sweep"},
    {"commands", "demo"},
    {"cli"},
]
PURE = ("errors", "files", "indices", "functional", "metrics", "plan", "criteria")
PURE_FILES = ("pruning/recovery.py", "models/state.py", "lightning/optimizers.py")
HEAVY = {"lightning", "terratorch", "rasterio", "torchgeo", "pytorch_lightning"}


def modules():
    return [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_every_room_has_a_layer():
    assert {room(path) for path in modules()} == set().union(*LAYERS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    layer = next(number for number, rooms in enumerate(LAYERS) if room(path) in rooms)
    allowed = set().union(*LAYERS[: layer + 1])
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("terratorch_simpler.")}
    assert ours <= allowed
    if room(path) in PURE or str(path.relative_to(PACKAGE)) in PURE_FILES:
        assert not {name.split(".")[0] for name in imports(path)} & HEAVY


EXAMPLES = [path for path in modules() if ">>>" in path.read_text()]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_of_docstrings_are_right(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_importing_us_is_cheap_beside_importing_terratorch():
    # Ours alone: what TerraTorch has imported already is not counted. Best of three, since the machine may be busy.
    code = (
        "import terratorch, time, sys\n"
        "times = []\n"
        "for _ in range(3):\n"
        "    for name in [n for n in sys.modules if n.startswith('terratorch_simpler')]: del sys.modules[name]\n"
        "    start = time.process_time(); import terratorch_simpler; times.append(time.process_time() - start)\n"
        "print(times[0], min(times))\n"
        "print(*[n for n in ('matplotlib.pyplot', 'hypothesis', 'peft') if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, best = map(float, done.stdout.splitlines()[0].split())
    assert best < 0.3
    assert first < 1.0


def test_nothing_is_left_undone():
    words = ("NotImplemented" + "Error", "TO" + "DO", "FIX" + "ME")
    files = [
        path
        for folder in ("terratorch_simpler", "tests", "scripts", "configs", "docs")
        for path in (ROOT / folder).rglob("*")
    ]
    for path in [*files, ROOT / "README.md", ROOT / "Makefile"]:
        if path.suffix in (".py", ".md", ".yaml") or path.name == "Makefile":
            text = path.read_text()
            assert not [word for word in words if word in text], path


def test_the_encoder_that_ships_is_small():
    assert (PACKAGE / "demo" / "encoder.pt").stat().st_size < 12_000_000
