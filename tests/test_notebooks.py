"""The notebooks: nothing is stored in them, they run from an empty folder, draw, and find what they say.

Without Jupyter's packages (extra ``notebooks``) and PEFT they are not run, unless NEEDS_NOTEBOOKS is set, as in CI.
"""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NEEDED = ("nbclient", "nbformat", "ipykernel", "peft")
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

CHECKS = {
    "quick_start": """
assert 1 < kept < plan.full_num_blocks
assert score["test/mIoU"] > 0.25  # one class everywhere: less than 0.1
assert len(predictions) == 4
""",
    "choose_a_depth": """
assert len(plans["settled after block 5"].kept_blocks) == 6
assert 1 < len(plan.kept_blocks) < plan.full_num_blocks
assert depth == list(range(1, plan.full_num_blocks + 1))
assert 4 <= len(decided.kept_blocks) < len(plan.kept_blocks)
""",
    "terramind_multimodal": """
assert 4 <= kept < plan.full_num_blocks
assert set(plan.data["input_shape"]) == {"S2L2A", "S1RTC"}
assert answered[-1] == kept - 1
assert score["test/mIoU"] > 0.15  # one class everywhere: less than 0.1
""",
    "cut_lora_export": """
assert gap < 1e-4
assert agreement > 0.999
assert abs(plain_score["mIoU"] - score["test/mIoU"]) < 1e-3
assert size(tuned.model.encoder, trained_only=True) < cut / 5 < intact / 5
assert all(path.stat().st_size / 1e6 < sizes["weights of the intact model"] for path in files.values())
""",
}
"""What is asked of each in the end, in its own kernel."""


def test_each_is_asked_for_its_results():
    assert [path.stem for path in NOTEBOOKS] == sorted(CHECKS)


@EACH
def test_nothing_is_stored(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}


@EACH
def test_notebook_runs_and_finds_what_it_says(path, tmp_path, monkeypatch):
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        reason = f"found no {', '.join(missing)} (pip install '.[notebooks,peft]')"
        (pytest.fail if os.environ.get("NEEDS_NOTEBOOKS") else pytest.skip)(reason)
    import nbformat

    (tmp_path / "tmp").mkdir()
    for name, folder in (("TMPDIR", "tmp"), ("JUPYTER_RUNTIME_DIR", "runtime"), ("IPYTHONDIR", "ipython")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # another one would draw nothing into the notebook
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS[path.stem]))
    execute(notebook, tmp_path)  # the first error ends it
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert list((tmp_path / "tmp").glob(f"{path.stem}_*")) == []  # its folder went with the kernel


def execute(notebook, folder: Path) -> None:
    """Run all cells in a folder, in the interpreter that runs the tests, whatever kernels are registered."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class ThisPython(AsyncKernelManager):
        shutdown_wait_time = 600.0  # by default a kernel is killed if it takes more than a few seconds to end

        @property
        def kernel_spec(self):
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name="this Python", language="python")

    place = {"metadata": {"path": str(folder)}}
    # No cell has a time limit, and a busy machine may be slow to start a kernel.
    NotebookClient(notebook, kernel_manager_class=ThisPython, resources=place, timeout=None, startup_timeout=600).execute()
