"""How often the package opens a checkpoint or a file of weights; Lightning and TerraTorch open them for themselves."""

import os
import re
import sys
from collections import Counter

import pytest
import torch
from lightning.pytorch import Trainer
from terratorch.registry import BACKBONE_REGISTRY

import terratorch_simpler
from terratorch_simpler import SimplerCallback
from tests.cli_runner import Command, config
from tests.families import FAMILIES, plain, wrapped

PACKAGE = os.path.dirname(terratorch_simpler.__file__) + os.sep
LIBRARIES = ("zipfile.py", f"{os.sep}torch{os.sep}serialization.py", f"{os.sep}pathlib.py", "contextlib.py")
watched: list[tuple[str, Counter]] = []


def _audit(event, arguments):
    if event == "open" and watched and str(arguments[0]) == watched[-1][0] and (opener := _opener(sys._getframe(1))):
        watched[-1][1][opener] += 1


def _opener(frame):
    """File of the package that opens a file; None if it is somebody else's."""
    while frame.f_back is not None and frame.f_code.co_filename.endswith(LIBRARIES):
        frame = frame.f_back
    name = frame.f_code.co_filename
    return os.path.relpath(name, PACKAGE) if name.startswith(PACKAGE) else None


@pytest.fixture
def opened(monkeypatch):
    """Start counting who in the package opens a file; a call of torch.load of ours counts as a read."""
    if "hook" not in globals():
        sys.addaudithook(_audit)  # cannot be removed again
        globals()["hook"] = True

    def watch(path):
        counts = Counter()
        watched.append((str(path), counts))
        original = torch.load

        def load(file, *args, **kwargs):
            if str(file) == str(path) and sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
                counts["torch.load"] += 1
            return original(file, *args, **kwargs)

        monkeypatch.setattr(torch, "load", load)
        return counts

    yield watch
    watched.clear()


def test_a_resumed_fit_reads_its_checkpoint_once(task, datamodule, tmp_path, opened):
    def fit(steps, **kwargs):
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, enable_checkpointing=False,
            callbacks=[SimplerCallback(criterion="fixed", drop_blocks=7)],
        )  # fmt: skip
        trainer.fit(task(), datamodule=datamodule(), **kwargs)
        return trainer

    path = tmp_path / "first.ckpt"
    fit(1).save_checkpoint(path)
    counts = opened(path)
    fit(2, ckpt_path=path)
    # One handle for the checksums, and one call of torch.load for the content.
    assert counts == {"torch.load": 1, "models/checkpoint.py": 1}


@pytest.mark.parametrize("pruned", [True, False])
def test_a_file_of_weights_is_read_once(tmp_path, opened, pruned):
    family = next(family for family in FAMILIES if family.key == "prithvi")
    path = tmp_path / "weights.pt"
    torch.save((wrapped(family, keep=5) if pruned else plain(family)).state_dict(), path)
    counts = opened(path)
    BACKBONE_REGISTRY.build(f"simpler_{family.name}", pretrained=True, ckpt_path=str(path), **family.kwargs)
    assert counts == {"torch.load": 1, "models/checkpoint.py": 1}


def _print_reads(event, arguments):
    if event == "open" and str(arguments[0]).endswith("last.ckpt") and (opener := _opener(sys._getframe(1))):
        print(f"\nread by {opener}\n", flush=True)


def print_reads(_rank):
    sys.addaudithook(_print_reads)


def test_a_resumed_command_reads_its_checkpoint_once(scenes, tmp_path):
    settings = config(scenes, tmp_path, criterion="fixed", drop_blocks=7)
    assert Command(tmp_path, settings, "--trainer.max_epochs", "1").wait() == [0]
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    resumed = Command(tmp_path / "resumed", settings, "--ckpt_path", last, before=print_reads)
    assert resumed.wait() == [0], resumed.output()
    assert "nothing is selected again" in resumed.output()
    # The handle for the checksums, and that of torch.load.
    assert re.findall("^read by (.*)$", resumed.output(), re.MULTILINE) == ["models/checkpoint.py"] * 2
