"""``terratorch fit`` makes the optimizer before the encoder is pruned: it must hold the pruned model's tensors."""

import copy
import json
from functools import partial
from types import MethodType

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from terratorch_simpler import SimplerCallback
from terratorch_simpler.errors import CheckpointError, ConfigurationError
from terratorch_simpler.lightning.optimizers import optimizers_of, updated_optimizers
from terratorch_simpler.models.backbone import find_backbone
from tests import cli_runner

PEFT = {
    "method": "LORA",
    "replace_qkv": "qkv",
    "peft_config_kwargs": {"target_modules": ["q_linear", "v_linear", "mlp.fc1"], "r": 4, "lora_alpha": 4},
}


@pytest.fixture
def fit(scenes, tmp_path):
    """Run ``terratorch fit`` for two steps and return what was trained."""

    def run(
        name="run", *args, callback=None, others=(), model_args=None, task=None, change=None, steps=2, ranks=1, resume=None
    ):
        folder = tmp_path / name
        settings = cli_runner.config(scenes, folder, **(callback or {}))
        trainer = settings["trainer"]
        trainer |= {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
        ours, checkpoint, _ = trainer["callbacks"]
        trainer["callbacks"] = [
            *([ours] if callback is not None else []),
            *others,
            checkpoint,
            {"class_path": "tests.cli_runner.Trained", "init_args": {"folder": str(folder)}},
        ]
        settings["model"]["init_args"]["model_args"] |= {
            # Without time and location, which get no gradient when there are no coordinates.
            "backbone": "simpler_prithvi_eo_v1_100",
            "backbone_num_frames": 1,
            **(model_args or {}),
        }
        settings["model"]["init_args"] |= task or {}
        if change is not None:
            change(settings)
        args = [] if resume is None else ["--ckpt_path", str(resume)]
        command = cli_runner.Command(folder, settings, *args, ranks=ranks)
        assert command.wait() == [0] * ranks, command.output()
        return json.loads((folder / "moved.0.json").read_text()), folder / "checkpoints" / "last.ckpt"

    return run


def check(found, groups=1):
    """Every trainable tensor has moved, and the optimizer holds exactly the model's, each once."""
    held = [name for group in found["groups"] for name in group["held"]]
    assert len(found["groups"]) == groups
    assert sorted(held) == sorted(found["names"])
    assert not set(found["unchanged"]) & set(found["trainable"])
    assert found["state"] == len(found["trainable"])
    assert found["stale_state"] == 0


DEPTH = {"criterion": "fixed", "drop_blocks": 7}


@pytest.mark.parametrize(
    "callback",
    [
        DEPTH,
        {"max_depth": 6},
        {"width": 0.5, **DEPTH},
        {"width": 0.5, "criterion": "fixed", "drop_blocks": 0},
        {"recovery": "linear", "max_depth": 6},
        {"recovery": "linear", "criterion": "cka_intervals", "drop_blocks": 4},
    ],
    ids=["depth", "measured depth", "depth and width", "width", "recovery", "recovery with gaps"],
)
def test_the_optimizer_of_the_command_line_holds_the_pruned_model(fit, callback):
    found, _ = fit(callback=callback)
    check(found)
    assert len(found["kept"]) < 12 or found["width"] < 1


class DecayGroups(torch.optim.AdamW):
    """Matrices with weight decay, the rest without, as many fine-tuning recipes have it."""

    def __init__(self, params, lr):
        params = list(params)
        matrices = [value for value in params if value.ndim > 1]
        others = [value for value in params if value.ndim <= 1]
        super().__init__([{"params": matrices}, {"params": others, "weight_decay": 0.0, "lr": lr / 2}], lr=lr)


def with_optimizer(class_path, **init_args):
    def change(settings):
        settings["optimizer"] = {"class_path": class_path, "init_args": init_args}

    return change


def without_optimizer(settings):
    del settings["optimizer"]


def with_scheduler(class_path, **init_args):
    def change(settings):
        settings["lr_scheduler"] = {"class_path": class_path, "init_args": init_args}

    return change


NARROW = {"width": 0.5, **DEPTH}
REPAIRED = {"recovery": "linear", "max_depth": 6}


@pytest.mark.parametrize("callback", [NARROW, REPAIRED], ids=["width", "recovery"])
@pytest.mark.parametrize(
    "adapters",
    [{"peft_config": PEFT, "backbone_pretrained": False}, {"backbone_vpt": True, "backbone_vpt_n_tokens": 3}],
    ids=["LoRA", "VPT"],
)
def test_adapters_and_prompts_of_the_kept_blocks_are_trained(fit, callback, adapters):
    found, _ = fit(callback=callback, model_args=adapters)
    check(found)


def test_a_frozen_encoder_stays_frozen(fit):
    found, _ = fit(callback=REPAIRED, task={"freeze_backbone": True})
    check(found)
    assert all(not name.startswith("model.encoder.") for name in found["trainable"])
    assert all(name in found["unchanged"] for name in found["names"] if name.startswith("model.encoder."))


@pytest.mark.parametrize("callback", [DEPTH, NARROW, REPAIRED], ids=["depth", "width", "recovery"])
def test_a_run_that_resumes_goes_on_with_the_optimizer_of_the_pruned_model(fit, callback):
    _, checkpoint = fit(callback=callback)
    saved = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]
    found, _ = fit("resumed", callback=callback, steps=4, resume=checkpoint)
    check(found)
    assert found["step"] == 4
    assert len(saved["param_groups"][0]["params"]) == len(found["groups"][0]["held"])


def test_an_encoder_that_was_pruned_when_it_was_built(fit):
    found, _ = fit(callback={"width": 0.5}, model_args={"backbone_keep": [0, 3, 7, 11]})
    check(found)
    assert (found["kept"], found["width"]) == ([0, 3, 7, 11], 0.5)


def test_slimmable_training_after_pruning(fit):
    slimmable = {"class_path": "terratorch_simpler.SlimmableTraining", "init_args": {"widths": [0.25, 0.5]}}
    found, checkpoint = fit(callback=NARROW, others=[slimmable])
    check(found)
    found, _ = fit("resumed", callback=NARROW, others=[slimmable], steps=4, resume=checkpoint)
    check(found)


def test_slimmable_training_alone(fit):
    slimmable = {"class_path": "terratorch_simpler.SlimmableTraining", "init_args": {"widths": [0.5, 1.0]}}
    found, _ = fit(others=[slimmable])
    check(found)


@pytest.mark.parametrize(
    "scheduler",
    [
        with_scheduler("torch.optim.lr_scheduler.StepLR", step_size=1, gamma=0.1),
        with_scheduler("torch.optim.lr_scheduler.CosineAnnealingLR", T_max=10),
        with_scheduler("lightning.pytorch.cli.ReduceLROnPlateau", monitor="train/loss"),
    ],
    ids=["StepLR", "cosine", "plateau"],
)
def test_a_scheduler_of_the_command_line_drives_the_same_optimizer(fit, scheduler):
    found, _ = fit(callback=NARROW, change=scheduler, steps=2)
    check(found)


def test_parameters_stay_in_the_users_groups(fit):
    found, checkpoint = fit(callback=NARROW, change=with_optimizer("tests.test_optimizer.DecayGroups", lr=1e-3))
    check(found, groups=2)
    matrices, others = found["groups"]
    assert (matrices["lr"], others["lr"]) == (1e-3, 5e-4)
    assert not any(name.endswith(".bias") for name in matrices["held"])
    assert sum(name.endswith("attn.qkv.weight") for name in matrices["held"]) == 5
    assert sum(name.endswith("attn.qkv.bias") for name in others["held"]) == 5
    change = with_optimizer("tests.test_optimizer.DecayGroups", lr=1e-3)
    check(fit("resumed", callback=NARROW, change=change, steps=4, resume=checkpoint)[0], groups=2)


@pytest.mark.parametrize("callback", [NARROW, REPAIRED], ids=["width", "recovery"])
def test_an_optimizer_of_the_task(fit, callback):
    task = {"optimizer": "AdamW", "lr": 1e-3, "scheduler": "StepLR", "scheduler_hparams": {"step_size": 1}}
    check(fit(callback=callback, task=task, change=without_optimizer)[0])


def test_learning_rates_by_name(fit):
    task = {"optimizer": "AdamW", "lr": 1e-3, "lr_overrides": {"encoder": 1e-4}}
    found, _ = fit(callback=NARROW, task=task, change=without_optimizer)
    check(found, groups=2)
    encoder, rest = found["groups"]
    assert (encoder["lr"], rest["lr"]) == (1e-4, 1e-3)
    assert all("encoder" in name for name in encoder["held"])


def test_two_processes(fit):
    found, _ = fit(callback=NARROW, ranks=2)
    check(found)


class OwnOptimizer(LightningModule):
    """Makes its optimizer at once, where the callback finds it, or does not."""

    def __init__(self, task, hidden):
        super().__init__()
        self.task = task
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        if hidden:
            self.made = lambda: optimizer
        else:
            self.optimizer = optimizer

    def forward(self, *args, **kwargs):
        return self.task(*args, **kwargs)

    def training_step(self, batch, batch_idx):
        return self.task(batch["image"]).output.mean()

    def configure_optimizers(self):
        return self.made() if hasattr(self, "made") else self.optimizer


@pytest.fixture
def trainer(tmp_path):
    return Trainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[SimplerCallback(criterion="fixed", drop_blocks=7)],
    )  # fmt: skip


def test_an_optimizer_that_a_module_holds(task, datamodule, trainer):
    module = OwnOptimizer(task(), hidden=False)
    trainer.fit(module, datamodule=datamodule())
    assert set(module.optimizer.param_groups[0]["params"]) == set(module.parameters())


def test_an_early_optimizer_that_is_not_found_is_refused(task, datamodule, trainer):
    with pytest.raises(ConfigurationError, match=r"holds 84 tensors that are no part of the pruned OwnOptimizer"):
        trainer.fit(OwnOptimizer(task(), hidden=True), datamodule=datamodule())


def as_on_the_command_line(module):
    """Give a module an optimizer as LightningCLI does."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module.configure_optimizers = MethodType(partial(lambda module, optimizer: optimizer, optimizer=optimizer), module)


def steps(module, optimizer, count=2):
    """A few steps of training."""
    for _ in range(count):
        optimizer.zero_grad()
        module(torch.ones(2, 6, 32, 32)).output.square().mean().backward()
        optimizer.step()


def test_the_state_of_an_optimizer_that_still_holds_dropped_blocks_is_converted(task):
    """Earlier checkpoints hold the state of all parameters of the intact model."""
    old = task()
    optimizer = torch.optim.AdamW(old.parameters(), lr=1e-3)
    find_backbone(old).prune_depth([0, 3, 7])
    steps(old, optimizer)
    new = task()
    as_on_the_command_line(new)
    with updated_optimizers(new) as changes:
        find_backbone(new).prune_depth([0, 3, 7])
    new.load_state_dict(old.state_dict())
    [change], [resumed] = changes, optimizers_of(new)
    state = copy.deepcopy(optimizer.state_dict())
    change.convert_state(state)
    resumed.load_state_dict(state)
    for before, after in zip(old.parameters(), new.parameters(), strict=True):
        assert (before in optimizer.state) == (after in resumed.state)
        if before in optimizer.state:
            assert torch.equal(optimizer.state[before]["exp_avg"], resumed.state[after]["exp_avg"])
    assert [len(group["params"]) for group in resumed.param_groups] == [len(list(new.parameters()))]
    change.convert_state(present := resumed.state_dict())
    assert len(present["state"]) == len(resumed.state)
    state["param_groups"][0]["params"].pop()
    with pytest.raises(CheckpointError, match=r"optimizer holds 76 tensors, expected 77 as in the pruned model"):
        change.convert_state(state)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)


def test_lists_and_names_of_parameters_that_an_optimizer_keeps_elsewhere():
    module = Small()
    module.lbfgs = torch.optim.LBFGS(module.parameters())
    module.named = {"one": torch.optim.SGD(module.named_parameters(), lr=0.1)}
    left_out = module.last.bias
    module.some = [torch.optim.SGD([module.first.weight, module.last.weight], lr=0.1)]
    with updated_optimizers(module):
        module.first = nn.Linear(2, 3)
    new = [module.first.weight, module.first.bias, module.last.weight, module.last.bias]
    assert list(map(id, module.lbfgs._params)) == list(map(id, new))
    [named] = module.named["one"].param_groups
    assert named["param_names"] == ["first.weight", "first.bias", "last.weight", "last.bias"]
    [some] = module.some[0].param_groups
    assert not any(value is left_out for value in some["params"])


def test_distilled_weights_are_those_that_fit_trains(fit):
    callback = {"criterion": "fixed", "drop_blocks": 8, "recovery": "distill", "recovery_steps": 2, "recovery_target": 6}
    found, _ = fit(callback=callback)
    blocks = [name for name in found["names"] if ".blocks." in name]
    assert {name.split(".blocks.")[1].partition(".")[0] for name in blocks} == {"0", "1", "2", "3"}
    assert found["kept"] == [0, 1, 2, 3]
    assert not set(blocks) & set(found["unchanged"])
    held = {name for group in found["groups"] for name in group["held"]}
    assert set(found["trainable"]) == held
