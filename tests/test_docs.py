"""The documentation: generated reference, examples that run, links that resolve, a site that builds strictly."""

import dataclasses
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from terratorch.registry import BACKBONE_REGISTRY, TERRATORCH_BACKBONE_REGISTRY

import terratorch_simpler
from terratorch_simpler import GeoTiffTiles, SimplerCallback, SlimmableTraining, SlimmingPlan
from terratorch_simpler.criteria import Bounds, Simpler, bootstrap, known_criteria
from terratorch_simpler.encoders import base

ROOT = Path(__file__).parents[1]
MADE = {"yaml.md", "interfaces.md"}


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return load("hooks")


@pytest.fixture(scope="module")
def reference():
    return load("reference")


@pytest.fixture(scope="module")
def sections(reference):
    """Text of the YAML reference by heading."""
    parts = re.split(r"^###? (.+)\n", reference.yaml_page(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def named(section):
    """First cells of a table."""
    return set(re.findall(r"^\| `([^`]+)`", section, re.MULTILINE))


@pytest.mark.parametrize("public", [SimplerCallback, SlimmableTraining, GeoTiffTiles])
def test_reference_names_every_argument_of_public_classes(sections, public):
    assert named(sections[public.__name__]) == set(inspect.signature(public).parameters)


@pytest.mark.parametrize("name", known_criteria())
def test_reference_names_every_argument_of_every_criterion(sections, name):
    assert named(sections[name]) == set(inspect.signature(known_criteria()[name]).parameters)
    assert f"`{name}`" in (ROOT / "docs" / "criteria.md").read_text()


def test_reference_names_keys_of_backbone_and_plan(sections):
    keys = {"plan", "keep", "width", "block_path", "out_indices"}
    assert named(sections["Backbone"]) == {f"backbone_{key}" for key in keys}
    assert named(sections["plan.json"]) == {field.name for field in dataclasses.fields(SlimmingPlan)} - {"maps"}


def test_reference_tells_type_default_and_meaning(sections):
    assert "| `min_tiles` | int | `256` | Tiles before the stream may stop early" in sections["SimplerCallback"]
    assert "| `export` | bool | `false` |" in sections["SimplerCallback"]
    assert "| `bands` | list[int or str] or null | `null` |" in sections["GeoTiffTiles"]
    assert "| `num_frames` | int | `1` |" in sections["GeoTiffTiles"]
    assert "| `drop_blocks` | int | required | Number of blocks to drop. |" in sections["angular"]  # said by its base class
    assert (
        "| `-c`, `--config` | str | required | a config that terratorch fit takes; may be repeated, later ones override |"
        in sections["export"]
    )
    assert "| `--widths` | float, several | `[1.0]` |" in sections["sweep"]
    assert "| `--debug` | flag | `false` |" in sections["show"]
    assert "| `PLAN` | str | required |" in sections["show"]


@pytest.mark.parametrize("name", ["yaml.md", "interfaces.md"])
def test_pages_made_from_the_code_are_up_to_date(reference, name):
    assert (ROOT / "docs" / name).read_text() == reference.MADE[name](), "run python docs/reference.py"


def test_an_argument_without_description_is_refused(reference):
    class Silent:
        """Says nothing of its argument."""

        def __init__(self, depth: int = 0) -> None:
            pass

    with pytest.raises(ValueError, match=r"Found argument depth of .*Silent without a description"):
        reference.arguments(Silent)


def test_pictures_are_up_to_date_and_show_what_the_page_says():
    pictures = load("pictures")
    drawn = pictures.pictures()
    assert drawn.keys() == {path.name for path in pictures.FOLDER.iterdir()}
    for name, text in drawn.items():
        assert (pictures.FOLDER / name).read_text(encoding="utf-8") == text, f"run python docs/pictures.py: {name}"
    criterion, bounds = Simpler(), Bounds()

    def choose(steps):
        groups = pictures.planted(steps)
        choice = criterion.choose(groups.total(), pictures.BLOCKS, bounds)
        scores = choice.scores.values()
        return choice, bootstrap(criterion, groups, bounds, seed=0), max(scores) - min(scores)

    converged, votes, height = choose(pictures.SETTLES)
    assert len(converged.kept_blocks) == 5
    assert votes[5] > 0.95
    _, split, flat = choose(pictures.DRIFTS)
    assert max(split.values()) < 0.5
    assert flat < height / 5


def code_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_encoder_spec_of_the_page_prunes_its_encoder(monkeypatch):
    monkeypatch.setattr(base, "_SPECS", list(base._SPECS))
    registered = set(TERRATORCH_BACKBONE_REGISTRY._registry)
    (code,) = code_of("extend.md")
    try:
        exec(compile(code, "extend.md", "exec"), {"__name__": "lake"})
        torch.manual_seed(0)
        backbone = BACKBONE_REGISTRY.build("simpler_lake_vit", bands=2).eval()
        image = torch.randn(1, 2, 32, 32)
        with torch.no_grad():
            intact = backbone(image)
            norm = backbone.final_norm
            backbone.prune_depth(range(2))
            features = backbone(image)
        fresh = BACKBONE_REGISTRY.build("simpler_lake_vit", bands=2)
        fresh.load_state_dict(backbone.state_dict())
    finally:
        for name in set(TERRATORCH_BACKBONE_REGISTRY._registry) - registered:
            del TERRATORCH_BACKBONE_REGISTRY._registry[name]
    assert len(features) == len(intact) == 6
    assert backbone.num_blocks == fresh.num_blocks == 2
    assert torch.equal(features[0], intact[0])
    assert torch.equal(features[-1], norm(intact[1]))


def test_fences_name_a_language_and_nothing_else():
    """With more behind it, the site shows a block as a line of text."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        opened = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)[::2]
        assert {fence for fence in opened if fence not in ("", "python", "py", "yaml", "sh", "bibtex")} == set(), page.name


def test_links_between_files_of_the_repository_lead_somewhere(hooks):
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.md")]
    assert len(pages) > 10
    for page in pages:
        for target, _ in hooks.LINK.findall(page.read_text()):
            if not (page.parent.name == "docs" and target in MADE):
                assert (page.parent / target).is_file(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("cluster.md", "../configs/cluster.yaml", "configs/cluster.yaml.md"),
        ("cluster.md", "../configs/slurm/README.md", "configs/slurm/README.md"),
        ("cluster.md", "faults.md", "faults.md"),
        ("extend.md", "criteria.md#writing-a-criterion", "criteria.md#writing-a-criterion"),
        ("index.md", "yaml.md", "yaml.md"),
        ("CONTRIBUTING.md", "docs/method.md", "method.md"),
        ("configs/README.md", "slurm/README.md", "slurm/README.md"),
        ("configs/README.md", "../docs/tiles.md", "../tiles.md"),
        ("index.md", "https://arxiv.org/abs/2603.19873", "https://arxiv.org/abs/2603.19873"),
    ],
)
def test_links_lead_to_the_same_file_in_the_site(hooks, page, link, expected):
    stand_in = type("Page", (), {"file": type("File", (), {"src_uri": page})})
    assert hooks.on_page_markdown(f"[a]({link})", stand_in, None, None) == f"[a]({expected})"


def test_sections_of_the_readme_that_do_not_exist_are_refused(hooks):
    assert "SimplerCallback" in hooks.readme_section("Quick start")
    assert "](../docs/encoders.md" in hooks.readme_section("Encoders")
    with pytest.raises(ValueError, match="There is no section 'Three lines'"):
        hooks.readme_section("Three lines")


def test_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    pytest.importorskip("material", reason="the extra docs is not installed")
    # Without --quiet, which hides the warnings that strictness counts.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    assert {"index.html", "yaml.html", "cluster.html", "CHANGELOG.html", "configs/slurm/index.html"} <= pages.keys()
    assert "SelectIndices" in pages["index.html"]  # of the README
    assert "backbone_keep" in pages["yaml.html"]
    assert 'href="configs/cluster.yaml.html"' in pages["cluster.html"]
    assert "plan_cache" in pages["configs/cluster.yaml.html"]
    assert "<h1" in pages["notebooks/quick_start.ipynb.html"]
    assert "cell_type" not in pages["notebooks/quick_start.ipynb.html"]
    assert (site / "pictures" / "settles.svg").is_file()
    assert not list(site.glob("*.py"))
    for name, page in pages.items():
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(https?:)?//", page)
        assert not loaded, name


def test_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] == "software"
    assert cited["version"] == terratorch_simpler.__version__
    assert cited["license"] == "Apache-2.0"
    assert f"version = {{{terratorch_simpler.__version__}}}" in (ROOT / "README.md").read_text()
    assert (ROOT / "CHANGELOG.md").read_text().split("## [")[1].startswith(terratorch_simpler.__version__)
    for article in cited["references"]:
        assert article["type"] == "article"
        assert article["title"]
        assert article["url"].startswith("https://")
        assert all(author.keys() == {"given-names", "family-names"} for author in article["authors"])  # people


def test_readme_is_short_and_holds_what_a_newcomer_asks():
    readme = (ROOT / "README.md").read_text()
    assert len(readme) < 9000
    headings = re.findall(r"^## (.+)$", readme, re.MULTILINE)
    assert headings[:4] == ["What you gain, and what it can cost", "Install", "Quick start", "Is the choice to be trusted?"]
    for asked in ("pip install", "HF_HOME", "select_depth(", "@software", "on_unsettled", "](docs/pictures/cuts.svg)"):
        assert asked in readme


def intervals(page):
    """Figures with intervals, without signs: a page may say loss for a negative gain."""
    text = re.sub(r"[\s*]+", " ", (ROOT / page).read_text())
    number = r"[-+]?(\d\.\d{3})"
    return {tuple(sorted(found)) for found in re.findall(rf"{number} \({number} to {number}\)", text)}


@pytest.mark.parametrize("page", ["README.md", "docs/few_labels.md", "docs/criteria.md"])
def test_figures_with_intervals_are_those_of_the_evidence(page):
    assert intervals(page)
    assert intervals(page) <= intervals("docs/evidence.md")


def test_notebooks_are_pages_with_what_they_show(hooks, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="the extra docs is not installed")
    pytest.importorskip("nbconvert", reason="the extra docs is not installed")
    pytest.importorskip("ipykernel", reason="the extra notebooks is not installed")
    drawn = "from IPython.display import Image, display\ndisplay(Image(b'\\x89PNG\\r\\n\\x1a\\n' + bytes(24), format='png'))"
    loud = "import sys\nprint('warned', file=sys.stderr)\nprint(6 * 7)"
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell(loud), nbformat.v4.new_code_cell(drawn)]
    path = tmp_path / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    page, pictures = hooks.notebook_page(path, execute=True)
    assert page.startswith("# Title")
    assert "42" in page
    assert "warned" not in page.replace("print('warned'", "")
    [name] = pictures
    assert name in page
    assert hooks.notebook_page(path, execute=False)[1] == {}


def test_changelog_has_an_entry_for_this_version():
    versions = re.findall(
        r"^## \[(.+?)\] - (?:Unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert versions[0] == terratorch_simpler.__version__


@pytest.mark.parametrize("form", ["bug", "encoder"])
def test_issue_forms_are_whole(form):
    read = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())
    assert {"name", "description", "body"} <= read.keys()
    ids = [field["id"] for field in read["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in read["body"])
    assert {field["type"] for field in read["body"]} <= {"textarea", "input", "checkboxes", "dropdown"}
