"""Hooks of mkdocs: pages and files of the repository that lie outside of docs/.

    python docs/hooks.py   writes the pages that are made from the code

The site is the repository's tree with docs/ at its root. So links between files of the repository, as GitHub shows them,
lead to the same files in the site: ``../configs/README.md`` to its page, YAML, Python or shell to a page with the text.

Notebooks are stored without outputs. With ``EXECUTE_NOTEBOOKS=1``, as in ``make docs``, they are run and shown with them.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import posixpath
import re
import tempfile
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docstring_parser import DocstringStyle, parse

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/reproduction/README.md",
    "configs/README.md",
    "configs/slurm/README.md",
    "notebooks/README.md",
)
"""Pages of the site that lie elsewhere in the repository."""
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
SECTION = re.compile(r"\[README: (.+?)\]\(\.\./README\.md#\S+?\)")
"""Stands for the section of the README with that heading; in the repository it is a link to it."""


# --- pages and links


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages that lie elsewhere, notebooks, and the files that are linked to."""
    from mkdocs.structure.files import File

    added = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    notebooks = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("notebooks/*.ipynb"))
    pictures: dict[str, bytes] = {}
    for path in notebooks:
        added[f"{path}.md"], drawn = notebook_page(ROOT / path, execute=os.environ.get("EXECUTE_NOTEBOOKS") == "1")
        pictures |= {f"{posixpath.dirname(path)}/{name}": content for name, content in drawn.items()}
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()} | added
    for uri, text in texts.items():
        for match in LINK.finditer(text):
            target = _repository(uri, match[1])
            if not target.startswith(DOCS) and not target.endswith((".md", ".ipynb")) and (ROOT / target).is_file():
                added[f"{target}.md"] = _file_page(target)
    for uri, content in (added | pictures).items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Fill in sections of the README, and lead links to where their files are in the site."""
    markdown = SECTION.sub(lambda match: readme_section(match[1]), markdown)
    uri = page.file.src_uri

    def in_site(match: re.Match[str]) -> str:
        target = _repository(uri, match[1])
        if not (ROOT / target).is_file():
            return match[0]
        if target.startswith(DOCS):
            target = target.removeprefix(DOCS)
        elif not target.endswith(".md"):
            target += ".md"
        return posixpath.relpath(target, posixpath.dirname(uri) or ".") + (match[2] or "")

    return LINK.sub(in_site, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Roles of docstrings, which mkdocstrings leaves as they are."""
    return re.sub(r":(?:func|class|meth|mod|attr|data|exc):<code>~?", "<code>", html)


def _file_page(path: str) -> str:
    """A file of the repository as a page."""
    source = (ROOT / path).read_text(encoding="utf-8")
    return f"# {posixpath.basename(path)}\n\n```{_language(path)}\n{source}```\n"


def notebook_page(path: Path, execute: bool) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page.

    Args:
        path: The notebook.
        execute: Whether to run it first, in an empty folder, so that the page has its outputs.

    Returns:
        The page, and the pictures that it shows, by name.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    import nbformat
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import ExecutePreprocessor
    from traitlets.config import Config

    notebook = nbformat.read(path, as_version=4)
    if execute:
        with tempfile.TemporaryDirectory() as folder:
            run = ExecutePreprocessor(timeout=1800, kernel_name="python3")
            run.preprocess(notebook, {"metadata": {"path": folder}})
    # Tables and pictures are kept; what is printed on stderr is progress and warnings of libraries.
    for cell in notebook["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [one for one in cell["outputs"] if one.get("name") != "stderr"]
    names = "{unique_key}_{cell_index}_{index}{extension}"
    exporter = MarkdownExporter(config=Config(ExtractOutputPreprocessor={"output_filename_template": names}))
    text, resources = exporter.from_notebook_node(notebook, {"unique_key": path.stem})
    return text, resources["outputs"]


def _repository(uri: str, link: str) -> str:
    """Path in the repository of what a page of the site links to."""
    known = (path for path in (uri, uri.removesuffix(".md")) if (ROOT / path).is_file())
    page = next(known, DOCS + uri)
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _language(path: str) -> str:
    return {".py": "python", ".sh": "bash"}.get(posixpath.splitext(path)[1], "yaml")


def readme_section(heading: str) -> str:
    """Text below a heading of the README, up to the next one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    if found is None:
        msg = f"Found no section '{heading}' in README.md, expected one: change the page that asks for it."
        raise ValueError(msg)
    return LINK.sub(r"../\g<0>", found[1].strip())


# --- what the code says of itself


def _words(kind: Any) -> str:
    """A type in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, inner))
    if inner:  # lists and sequences of any kind
        return f"list[{_words(inner[0])}]"
    return {type(None): "null", Path: "path"}.get(kind, kind.__name__)


def _value(value: object) -> str:
    """A default as one would write it in YAML."""
    return "required" if value is inspect.Parameter.empty else f"`{json.dumps(value)}`"


def _markdown(text: str | None) -> str:
    """Text of a docstring in Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text or "")
    return text.replace("``", "`")


def _cell(text: str | None) -> str:
    return " ".join(_markdown(text).split()).replace("|", "\\|")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _described(of: Any) -> dict[str, str]:
    """What docstrings say of arguments and attributes; a class inherits what its bases say."""
    owners = reversed(of.__mro__) if isinstance(of, type) else [of]
    texts = [owner.__doc__ for owner in owners if owner.__doc__ and owner.__module__ != "builtins"]
    found = [part for text in texts for part in parse(text, DocstringStyle.GOOGLE).params]
    return {part.arg_name: part.description or "" for part in found}


def arguments(of: Any, skip: Iterable[str] = (), prefix: str = "") -> str:
    """Table of the arguments of a class or function.

    Raises:
        ValueError: If the docstring leaves one out.
    """
    kinds = typing.get_type_hints(of.__init__ if isinstance(of, type) else of)
    described = _described(of)
    rows = []
    for name, parameter in inspect.signature(of).parameters.items():
        if name in (*skip, "self") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name not in described:
            msg = f"Found argument {name} of {of.__qualname__} without a description, expected one in its docstring."
            raise ValueError(msg)
        rows.append([f"`{prefix}{name}`", _words(kinds[name]), _value(parameter.default), _cell(described[name])])
    return _table(("name", "type", "default", "meaning"), rows) if rows else "No settings.\n"


def _about(of: Any) -> str:
    """Description in a docstring, without its sections."""
    found = parse(of.__doc__ or "", DocstringStyle.GOOGLE)
    return _markdown("\n\n".join(filter(None, (found.short_description, found.long_description))))


def yaml_page() -> str:
    """Every setting that a user can write: callbacks, tiles, criteria, backbone, commands, and the keys of plan.json."""
    from terratorch_simpler import GeoTiffTiles, SimplerCallback, SlimmableTraining, SlimmingPlan
    from terratorch_simpler.criteria import known_criteria
    from terratorch_simpler.terratorch.source import SimplerSource

    parts = [
        "# YAML reference",
        "Generated from the code by `python docs/hooks.py`. Arguments go below `init_args` of their class; the keys of the "
        "backbone go into `model_args`.",
    ]
    for callback in (SimplerCallback, SlimmableTraining):
        name = callback.__name__
        parts += [f"## {name}", f"`class_path: terratorch_simpler.{name}`, below `callbacks`."]
        parts += [_about(callback), arguments(callback)]
    parts += [
        "## GeoTiffTiles",
        "`class_path: terratorch_simpler.GeoTiffTiles`, as `tiles` of SimplerCallback. [Tiles](tiles.md) has the details.",
        _about(GeoTiffTiles),
        arguments(GeoTiffTiles),
        "## Criteria",
        "Passed by name, or by class to change default settings. [Choosing a criterion](criteria.md) compares them.",
    ]
    for name, criterion in known_criteria().items():
        path = f"terratorch_simpler.criteria.{criterion.__name__}"
        parts += [f"### {name}", f"`criterion: {name}`, or `class_path: {path}`.", _about(criterion), arguments(criterion)]
    parts += [
        "## Backbone",
        "`backbone: simpler_<name>` is TerraTorch's encoder of that name. All other keys `backbone_*` are passed to it "
        "unchanged. On the command line, numbers and lists may be given as text.",
        arguments(SimplerSource.build, ("name",), "backbone_"),
        "## Command line",
        "`terratorch-simpler COMMAND`. `plan`, `sweep` and `export` read configs with the parser of `terratorch fit` and "
        "take the same settings, such as `--data.init_args.batch_size 4`. Exit status: 0, 1 if the run failed, 2 for bad "
        "arguments or config.",
        *_commands(),
        "## plan.json",
        "The keys `format` and `version` identify the file as well.",
        _attributes(SlimmingPlan, ("maps",)),
    ]
    return "\n\n".join(parts)


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command."""
    from terratorch_simpler.cli import build_parser

    found = next(action for action in build_parser()._actions if isinstance(action.choices, dict))
    return dict(found.choices)


def _commands() -> list[str]:
    parts = []
    for name, parser in commands().items():
        rows = []
        for action in parser._actions:
            if action.dest == "help":
                continue
            flags = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.dest.upper()}`"
            kind = "flag" if action.nargs == 0 else _words(getattr(action, "_typehint", None) or action.type or str)
            if action.choices:
                kind = " or ".join(f"`{choice}`" for choice in action.choices)
            several = ", several" if action.nargs == "+" else ""
            required = action.required or action.dest in getattr(parser, "required_args", ())  # older jsonargparse
            default = "required" if required else _value(action.default)
            rows.append([flags, kind + several, default, _cell(action.help)])
        parts += [f"### {name}", parser.description or "", _table(("option", "type", "default", "meaning"), rows)]
    return parts


def _attributes(of: type, skip: Iterable[str] = ()) -> str:
    described = _described(of)
    rows = [[f"`{name}`", _cell(text)] for name, text in described.items() if name not in skip]
    return _table(("key", "meaning"), rows)


def interfaces_page() -> str:
    """Base classes and methods of criteria and encoder specs."""
    from terratorch_simpler.criteria import Criterion, Statistics
    from terratorch_simpler.encoders import EncoderSpec

    parts = [
        "# Base classes",
        "Generated from the code by `python docs/hooks.py`. [Extend](extend.md) explains how to use them.",
    ]
    for base, path in ((Criterion, "criteria"), (EncoderSpec, "encoders")):
        parts += [f"## {base.__name__}", f"`terratorch_simpler.{path}.{base.__name__}`", _about(base)]
        parts += [_attributes(base), _methods(base)]
    parts += ["## Statistics", "`terratorch_simpler.criteria.Statistics`", _about(Statistics), _attributes(Statistics)]
    parts += [_methods(Statistics)]
    return "\n\n".join(parts)


def _methods(of: type) -> str:
    def rows() -> Iterable[list[str]]:
        for name, member in vars(of).items():
            held: Callable[..., Any] | None = getattr(member, "fget", None) or getattr(member, "func", None)
            call = member if inspect.isfunction(member) else None
            if name.startswith("_") or (held is None and call is None):
                continue
            needed = "yes" if getattr(member, "__isabstractmethod__", False) else ""
            taken = "" if call is None else "(" + ", ".join(list(inspect.signature(call).parameters)[1:]) + ")"
            parts = parse((held or call).__doc__ or "", DocstringStyle.GOOGLE)
            words = " ".join(filter(None, (parts.short_description, parts.long_description)))
            yield [f"`{name}{taken}`", needed, _cell(words)]

    return _table(("method or property", "required", "meaning"), rows())


MADE = {"yaml.md": yaml_page, "interfaces.md": interfaces_page}
"""Pages of docs/ that are made from docstrings, and kept in the repository for those who read them there."""

if __name__ == "__main__":
    for name, make in MADE.items():
        (Path(__file__).parent / name).write_text(make(), encoding="utf-8")
