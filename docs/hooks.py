"""Hooks of mkdocs: pages and files of the repository that lie outside of docs/.

The site is the repository's tree with docs/ at its root. So links between files of the repository, as GitHub shows them,
lead to the same files in the site: ``../configs/README.md`` to its page, YAML, Python or shell to a page with the text.

Notebooks are stored without outputs. With ``EXECUTE_NOTEBOOKS=1``, as in ``make docs``, they are run and shown with them.
"""

from __future__ import annotations

import os
import posixpath
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

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
        msg = f"There is no section '{heading}' in README.md, expected one: change the page that asks for it."
        raise ValueError(msg)
    return LINK.sub(r"../\g<0>", found[1].strip())
