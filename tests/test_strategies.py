"""Strategies and callbacks that hold the model before or beside us: DDP, sharding, compile, accumulation, averages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging

from terratorch_simpler import SimplerCallback, SlimmingPlan
from terratorch_simpler.errors import CheckpointError, ConfigurationError
from terratorch_simpler.models.checkpoint import FILES_IN_FOLDERS, read_pruned_state
from terratorch_simpler.models.state import PrunedState
from tests.cli_runner import Command, config

pytestmark = pytest.mark.filterwarnings(
    "ignore::terratorch_simpler.errors.UntrainedEncoderWarning", "ignore::terratorch_simpler.errors.FewTilesWarning"
)


def test_a_strategy_that_restores_after_wrapping_finds_the_model_cut(scenes, tmp_path):
    """What FSDP and DeepSpeed do: wrap the model, make the optimizer, and only then read the checkpoint."""
    settings = config(scenes, tmp_path, max_depth=6)
    settings["trainer"]["strategy"] = {
        "class_path": "tests.cli_runner.RestoresLast",
        "init_args": {"find_unused_parameters": True},
    }
    states = []
    for epochs in (1, 2):
        settings["trainer"]["max_epochs"] = epochs
        # A second choice would be another one, so that a run that chooses again is seen.
        settings["trainer"]["callbacks"][0]["init_args"]["max_depth"] = 6 if epochs == 1 else 4
        command = Command(tmp_path, settings, "--ckpt_path", "last", ranks=2)
        assert command.wait() == [0, 0], command.output()
        states.append([json.loads((tmp_path / f"trained.{rank}.json").read_text()) for rank in range(2)])
    first, second = states
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert second[0]["kept"] == first[0]["kept"]
    assert (second[0]["epoch"], second[0]["step"]) == (2, 2 * first[0]["step"])
    assert second[0]["held"] == first[0]["held"]
    assert "Resuming with" in command.output()


def test_blocks_are_cut_before_they_are_sharded(scenes, tmp_path):
    """PyTorch's fully_shard (FSDP2) on the CPU, in Lightning's strategy for it; FSDP itself needs a GPU."""
    settings = config(scenes, tmp_path)
    settings["model"]["class_path"] = "tests.cli_runner.ShardedTask"
    settings["trainer"].update(
        strategy={
            "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
            "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
        },
        max_epochs=1,
        enable_checkpointing=False,
        callbacks=settings["trainer"]["callbacks"][:1],
    )
    command = Command(tmp_path, settings, ranks=2)
    assert command.wait() == [0, 0], command.output()
    plan = SlimmingPlan.load(tmp_path / "simpler" / "plan.json")
    for rank in range(2):
        sharded = json.loads((tmp_path / f"sharded.{rank}.json").read_text())
        assert sharded["blocks"] == len(plan.kept_blocks) < 12
        assert sharded["types"] == ["DTensor"]


class Reader:
    """A checkpoint_io that is not asked."""

    def load_checkpoint(self, path, weights_only):
        raise AssertionError(path)


@pytest.mark.parametrize("name", FILES_IN_FOLDERS)
def test_shape_of_a_checkpoint_folder(tmp_path, trainer, task, datamodule, name):
    callback = SimplerCallback(criterion="fixed", drop_blocks=5)
    trainer(callback, limit_train_batches=0).fit(task(), datamodule=datamodule())
    (tmp_path / name).parent.mkdir(exist_ok=True)
    torch.save({"callbacks": {"Other": {"a": 1}, callback.state_key: callback.state_dict()}}, tmp_path / name)
    assert read_pruned_state(tmp_path, Reader()) == PrunedState(tuple(range(7)), 12)


@pytest.mark.parametrize("content", [{}, {"callbacks": {}}, {"callbacks": {"x": 3}}, {"callbacks": [1]}])
def test_checkpoint_folder_that_tells_no_shape_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match=r"There are no kept blocks in "):
        read_pruned_state(tmp_path, Reader())
    torch.save(content, tmp_path / "meta.pt")
    with pytest.raises(CheckpointError, match=r"There are no kept blocks in "):
        read_pruned_state(tmp_path, Reader())


@pytest.mark.parametrize("kept", [[3, 1], [1, 1], [-1, 2], [0, 12], [], [0.5], [[0]]])
def test_checkpoint_folder_with_a_shape_that_makes_no_sense_is_refused(tmp_path, kept):
    torch.save({"callbacks": {"x": {"kept_blocks": kept, "total_blocks": 12}}}, tmp_path / "meta.pt")
    with pytest.raises(CheckpointError, match="it is damaged, take an earlier one"):
        read_pruned_state(tmp_path, Reader())


def test_accumulated_gradients(trainer, task, datamodule):
    module, run = task(), trainer(SimplerCallback(), accumulate_grad_batches=3)
    run.fit(module, datamodule=datamodule())
    assert module.model.encoder.num_blocks < 12
    assert run.global_step == 2


@pytest.mark.parametrize(
    ("average", "options"),
    [(WeightAveraging, {}), (EMAWeightAveraging, {}), (StochasticWeightAveraging, {"swa_lrs": 1e-3})],
)
def test_averaged_weights(trainer, task, datamodule, tmp_path, average, options):
    saved = ModelCheckpoint(dirpath=tmp_path, filename="averaged")
    first, data = task(), datamodule()
    trainer(SimplerCallback(), average(**options), saved, enable_checkpointing=True).fit(first, datamodule=data)
    kept = first.model.encoder.kept
    assert len(kept) < 12
    second, run = task(seed=4), trainer(SimplerCallback(), average(**options), max_epochs=2)
    run.fit(second, datamodule=data, ckpt_path=tmp_path / "averaged.ckpt")
    assert second.model.encoder.kept == kept
    assert run.current_epoch >= 2  # StochasticWeightAveraging adds one to bring batch norms up to date
    with pytest.raises(ConfigurationError, match=rf"Found {average.__name__}, which has copied the intact model"):
        trainer(average(**options), SimplerCallback()).fit(task(), datamodule=data)


def test_compiled_model_is_cut_before_its_graph_is_made(trainer, task, datamodule, tmp_path):
    module = task()
    module.model = torch.compile(module.model, backend="eager")
    seen = []
    module.model._orig_mod.encoder.register_forward_hook(lambda backbone, *_: seen.append(backbone.num_blocks))
    saved = ModelCheckpoint(dirpath=tmp_path, filename="compiled")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer(SimplerCallback(), saved, enable_checkpointing=True).fit(module, datamodule=datamodule())
    kept = module.model.encoder.num_blocks
    assert kept < 12
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # it was compiled
    second = task(seed=3)
    second.model = torch.compile(second.model, backend="eager")
    trainer(SimplerCallback(), max_epochs=2).fit(second, datamodule=datamodule(), ckpt_path=tmp_path / "compiled.ckpt")
    assert second.model.encoder.num_blocks == kept


def test_the_selection_itself_compiles_nothing(trainer, task, datamodule):
    module = task()
    module.model = torch.compile(module.model, backend="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer(SimplerCallback(), limit_train_batches=0, limit_val_batches=0).fit(module, datamodule=datamodule())
    assert module.model.encoder.num_blocks < 12
    assert torch._dynamo.utils.counters["frames"]["ok"] == 0


NOTEBOOK = """
import json, sys
from pathlib import Path
from lightning.pytorch import Trainer
from terratorch.datamodules import GenericNonGeoSegmentationDataModule
from terratorch.tasks import SemanticSegmentationTask
from terratorch_simpler import SimplerCallback
from terratorch_simpler.models.backbone import find_backbone
from tests.cli_runner import Fingerprint, config

scenes, folder = map(Path, sys.argv[1:])
settings = config(scenes, folder)
task = SemanticSegmentationTask(**settings["model"]["init_args"])
data = GenericNonGeoSegmentationDataModule(**settings["data"]["init_args"])
callbacks = [SimplerCallback(output_dir=str(folder / "simpler")), Fingerprint(str(folder))]
Trainer(strategy="ddp_notebook_find_unused_parameters_true", devices=2, accelerator="cpu", max_epochs=1, logger=False,
        default_root_dir=folder, callbacks=callbacks).fit(task, datamodule=data)
(folder / "home.json").write_text(json.dumps(list(find_backbone(task).kept)))
"""


def test_processes_that_a_notebook_forks_bring_the_cut_home(scenes, tmp_path):
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, str(scenes), str(tmp_path)], cwd=root, capture_output=True, text=True, check=False
    )  # not a fork itself: PyTorch allows no forks of forks
    assert done.returncode == 0, done.stderr[-3000:]
    kept = list(SlimmingPlan.load(tmp_path / "simpler" / "plan.json").kept_blocks)
    assert json.loads((tmp_path / "home.json").read_text()) == kept
    assert json.loads((tmp_path / "trained.1.json").read_text())["kept"] == kept
