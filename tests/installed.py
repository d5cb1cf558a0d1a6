"""What the installed TerraTorch ships, for the tables that have a row for each class of it."""

import ast
import importlib
import pkgutil
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

TERRATORCH = Version(version("terratorch"))


def since(release, rows):
    """Rows of a table for what a release of TerraTorch brought; none where the installed one is older."""
    return rows if Version(release) <= TERRATORCH else {}


def shipped_classes(package, base, suffix):
    """Names of the classes that a package and its modules define, and of those in modules that cannot be imported here.

    Args:
        package: The package.
        base: What the classes derive from.
        suffix: How their names end, for modules that can only be read.
    """
    found, missing = set(), set()
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            members = vars(importlib.import_module(module.name)).items()
        except ImportError:
            tree = ast.parse(Path(module.module_finder.path, f"{module.name.rpartition('.')[2]}.py").read_text())
            missing |= {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name.endswith(suffix)}
            continue
        found |= {
            name
            for name, member in members
            if isinstance(member, type) and issubclass(member, base) and member.__module__ == module.name
        }
    return found, missing
