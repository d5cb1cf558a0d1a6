"""What checkpoints say of a pruned encoder: averaged, old, partial and lazily loaded ones."""

import json
import pathlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.load import _lazy_load
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from terratorch_simpler import SimplerCallback
from terratorch_simpler.errors import CheckpointError
from terratorch_simpler.indices import spans_between
from terratorch_simpler.models.checkpoint import read_pruned_state
from terratorch_simpler.models.state import PrunedState
from terratorch_simpler.pruning.recovery import RecoveryWeights
from tests import cli_runner
from tests.checkpoints import as_buffers, changed, extra
from tests.extras import needs_peft
from tests.families import FAMILIES, wrapped
from tests.test_recovery import plan_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.FewTilesWarning"),
    pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.UntrainedEncoderWarning"),
]
SMALL = {"embed_dim": 48, "num_heads": 3}


@pytest.fixture
def small(build):
    """A narrow encoder, pruned in one of several ways."""

    def make(how="intact", seed=0):
        backbone = build(seed=seed, **SMALL)
        if how in ("depth", "width"):
            backbone.prune_depth([0, 3, 5, 8, 11])
        if how == "width":
            backbone.set_width(0.3)
        if how == "recovery":
            kept = [0, 1, 2, 6, 7]
            maps = {before: RecoveryWeights(torch.eye(48), torch.eye(48)) for before, _ in spans_between(kept, 12)}
            backbone.slim(plan_of(backbone, kept, maps))
        if how == "trained widths":
            backbone.mark_trained_widths([0.25, 1.0])
        return backbone

    return make


WAYS = ["intact", "depth", "width", "recovery", "trained widths"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    how=st.sampled_from(WAYS),
    decay=st.sampled_from([0.5, 0.9, 0.95, 0.99]) | st.floats(0, 1),
    updates=st.integers(1, 6),
    buffers=st.booleans(),
)
def test_averaging_leaves_the_shape_alone(small, how, decay, updates, buffers):
    backbone = small(how)
    average = AveragedModel(backbone, avg_fn=get_ema_avg_fn(decay), use_buffers=buffers)
    for _ in range(updates):
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(0.1)
        average.update_parameters(backbone)
    other = small("depth" if how == "intact" else "intact", seed=1)
    other.load_state_dict({key.removeprefix("module."): v for key, v in average.state_dict().items() if key != "n_averaged"})
    assert other.pruned_state == backbone.pruned_state
    for ours, averaged in zip(other.parameters(), average.module.parameters(), strict=True):
        assert torch.equal(ours, averaged)


AVERAGES = {
    "EMAWeightAveraging": lambda decay: EMAWeightAveraging(decay=decay),
    "WeightAveraging": lambda decay: WeightAveraging(avg_fn=get_ema_avg_fn(decay)),
}
PRUNED = {
    "depth": {"criterion": "fixed", "drop_blocks": 7},
    "width": {"criterion": "fixed", "drop_blocks": 7, "width": 0.5},
    "recovery": {"recovery": "linear", "max_depth": 6},
}


@pytest.mark.parametrize("pruned", PRUNED.values(), ids=PRUNED)
@pytest.mark.parametrize(
    ("average", "decay"),
    [("EMAWeightAveraging", 0.5), ("EMAWeightAveraging", 0.95), ("WeightAveraging", 0.9), ("WeightAveraging", 0.99)],
)
def test_checkpoints_of_averaged_weights(task, datamodule, tmp_path, decay, average, pruned):
    def fit(seed, steps, **kwargs):
        module = task(seed=seed, backbone_embed_dim=48, backbone_num_heads=3)
        saved = ModelCheckpoint(dirpath=tmp_path, filename=str(seed), enable_version_counter=False)
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0,
            callbacks=[SimplerCallback(**pruned), AVERAGES[average](decay), saved],
        )  # fmt: skip
        trainer.fit(module, datamodule=datamodule(batch_size=2), **kwargs)
        return module

    first = fit(0, 18)
    content = torch.load(tmp_path / "0.ckpt", weights_only=True)
    other = task(seed=1, backbone_embed_dim=48, backbone_num_heads=3)
    other.load_state_dict(content["state_dict"])
    assert other.model.encoder.pruned_state == first.model.encoder.pruned_state != PrunedState(tuple(range(12)), 12)
    for name, value in other.state_dict().items():
        assert torch.equal(value, content["state_dict"][name])
    resumed = fit(2, 19, ckpt_path=tmp_path / "0.ckpt")
    assert resumed.model.encoder.pruned_state == first.model.encoder.pruned_state


def test_averaged_weights_of_the_command_line(scenes, tmp_path):
    settings = cli_runner.config(scenes, tmp_path, criterion="fixed", drop_blocks=7)
    settings["trainer"] |= {"max_steps": 18, "max_epochs": -1}
    average = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
    settings["trainer"]["callbacks"].insert(1, average)
    fit = cli_runner.Command(tmp_path / "fit", settings)
    assert fit.wait() == [0], fit.output()
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert read_pruned_state(last, None) == PrunedState((0, 1, 2, 3, 4), 12)
    settings["trainer"] |= {"max_steps": 20}
    again = cli_runner.Command(tmp_path / "again", settings, "--ckpt_path", str(last))
    assert again.wait() == [0], again.output()
    assert json.loads((tmp_path / "trained.0.json").read_text())["step"] == 20


@pytest.mark.parametrize("how", WAYS)
def test_earlier_checkpoints(small, how, tmp_path):
    backbone = small(how)
    old = as_buffers(backbone.state_dict())
    assert "kept_blocks" in old
    for state in (old, {key: value.bfloat16() if value.is_floating_point() else value for key, value in old.items()}):
        other = small("depth" if how == "intact" else "intact", seed=1)
        other.load_state_dict(state)
        assert other.pruned_state == backbone.pruned_state
        assert "kept_blocks" in state  # the caller's is untouched
    torch.save({"state_dict": {f"model.encoder.{key}": value for key, value in old.items()}}, tmp_path / "old.ckpt")
    assert read_pruned_state(tmp_path / "old.ckpt", None) == backbone.pruned_state


@pytest.mark.parametrize("form", [dict, as_buffers])
@pytest.mark.parametrize("how", WAYS)
def test_lazily_loaded_weights(small, how, form, tmp_path):
    """FSDP with full state loads tensors when they are used."""
    backbone = small(how)
    torch.save(form(backbone.state_dict()), tmp_path / "weights.pt")
    other = small("intact", seed=1)
    other.load_state_dict(_lazy_load(tmp_path / "weights.pt"))
    assert other.pruned_state == backbone.pruned_state
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), backbone.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_weights_that_were_all_cast(small, dtype):
    backbone = small("width")
    other = small(seed=1)
    other.load_state_dict({key: value.to(dtype) for key, value in backbone.state_dict().items()})
    assert other.pruned_state == backbone.pruned_state


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(3.0), torch.zeros(0, dtype=torch.uint8), torch.tensor([200] * 9, dtype=torch.uint8), torch.randn(40),
        extra(), extra(kept_blocks=[0], total_blocks=12, more=1),
        torch.tensor(list(b'{"kept_blocks": [0'), dtype=torch.uint8), [1], "x",
    ],
    ids=["number", "empty", "no text", "noise", "no keys", "other keys", "cut off", "list", "text"],
)  # fmt: skip
def test_an_extra_state_that_makes_no_sense_is_refused(small, value):
    with pytest.raises(CheckpointError, match=r"Checkpoint at '' has 'kept_blocks' .*: it is damaged, take an earlier one"):
        small().load_state_dict({**small().state_dict(), "_extra_state": value})


def test_partial_weights_are_loaded_as_by_pytorch(small):
    backbone = small("width")
    weight = torch.randn_like(backbone.encoder.norm.weight)
    found = backbone.load_state_dict({"encoder.norm.weight": weight, "other": torch.zeros(1)}, strict=False)
    assert torch.equal(backbone.encoder.norm.weight, weight)
    assert found.unexpected_keys == ["other"]
    assert set(found.missing_keys) == set(backbone.state_dict()) - {"encoder.norm.weight"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "_extra_state"'):
        backbone.load_state_dict({"encoder.norm.weight": weight})


def test_weights_of_a_decoder_alone_are_loaded(task):
    module, other = task(), task(seed=1)
    module.model.encoder.prune_depth(range(5))
    decoder = {key: value for key, value in other.state_dict().items() if "encoder" not in key}
    module.load_state_dict(decoder, strict=False)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in decoder.items())
    assert module.model.encoder.num_blocks == 5


@needs_peft
def test_adapters_alone_are_loaded(task):
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    lora = {"method": "LORA", "peft_config_kwargs": {"target_modules": ["attn.qkv", "mlp.fc1"], "r": 4}}
    module, other = (task(seed=seed, peft_config=lora, backbone_pretrained=False) for seed in (0, 1))
    for one in (module, other):
        one.model.encoder.base_model.model.prune_depth(range(5))
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "lora_" in name:
                value.normal_()
    saved = get_peft_model_state_dict(module.model.encoder)
    assert saved
    set_peft_model_state_dict(other.model.encoder, saved)
    expected = {name: value for name, value in module.named_parameters() if "lora_" in name}
    assert all(torch.equal(value, expected[name]) for name, value in other.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_the_plain_encoder_are_refused(task, build, strict):
    plain = {f"model.encoder.{key}": value for key, value in build("prithvi_eo_v2_tiny_tl").state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"holds 'prithvi_eo_v2_tiny_tl' without 'simpler_'.*give the file as backbone_ckpt_path"
    ):
        task().load_state_dict(plain, strict=strict)


def test_blocks_that_a_checkpoint_lacks_are_not_made_up(small):
    state = {key: value for key, value in small("depth").state_dict().items() if ".blocks.4." not in key}
    for backbone in (small(seed=1), small("intact", seed=1)):
        with pytest.raises(CheckpointError, match=r"keeps the blocks \[0, 3, 5, 8, 11\] and holds no weights of \[11\]"):
            backbone.load_state_dict(state, strict=False)


def test_an_ordinary_checkpoint_to_resume_from_is_refused(task, datamodule, tmp_path):
    plain = task("prithvi_eo_v2_tiny_tl")
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, logger=False, limit_train_batches=1, limit_val_batches=0
    )
    trainer.fit(plain, datamodule=datamodule())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    again = Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, logger=False, callbacks=[SimplerCallback()])
    with pytest.raises(
        CheckpointError, match=r"has no 'kept_blocks'.*to start from its weights give it as backbone_ckpt_path"
    ):
        again.fit(task(), datamodule=datamodule(), ckpt_path=tmp_path / "plain.ckpt")


def test_no_weights_are_read_for_the_shape(small, tmp_path):
    """A damaged weight is none of its business; Lightning reads them all afterwards."""
    weights = {f"e.{key}": value for key, value in small("depth").state_dict().items()}
    large = torch.full((400_000,), 7.25)
    torch.save({"state_dict": {**weights, "large": large}}, tmp_path / "x.ckpt")
    content = bytearray((tmp_path / "x.ckpt").read_bytes())
    content[content.index(large[:64].numpy().tobytes()) + 5] ^= 1
    (tmp_path / "x.ckpt").write_bytes(content)
    assert read_pruned_state(tmp_path / "x.ckpt", None) == small("depth").pruned_state


def test_files_of_old_pytorch(small, tmp_path):
    weights = {f"e.{key}": value for key, value in small("depth").state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    assert read_pruned_state(tmp_path / "x.ckpt", None) == small("depth").pruned_state


def test_a_checkpoint_that_holds_more_than_tensors_is_resumed_if_the_user_says_so(task, datamodule, tmp_path):
    def trainer(epochs):
        return Trainer(
            accelerator="cpu", max_epochs=epochs, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
            enable_model_summary=False, limit_train_batches=1, limit_val_batches=0,
            callbacks=[SimplerCallback(criterion="fixed", drop_blocks=7), ModelCheckpoint(tmp_path, "first")],
        )  # fmt: skip

    module = task()
    module.hparams["somewhere"] = pathlib.PurePosixPath("/data")
    trainer(1).fit(module, datamodule=datamodule())
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        trainer(2).fit(task(), datamodule=datamodule(), ckpt_path=tmp_path / "first.ckpt")
    other = task(seed=1)
    trainer(2).fit(other, datamodule=datamodule(), ckpt_path=tmp_path / "first.ckpt", weights_only=False)
    assert other.model.encoder.num_blocks == 5


ATTRIBUTES = {
    "prithvi": ("embed_dim", "patch_embed", "num_frames", "img_size", "norm", "forward_features"),
    "dofa": ("dofa_model", "wavelengths"),
    "torchgeo": ("vit_model",),
    "timm": ("model",),
    "terramind": ("modalities", "merge_method"),
}


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.key in ATTRIBUTES], ids=lambda one: one.key)
def test_attributes_of_the_encoder_are_reachable(family):
    backbone = wrapped(family)
    for name in ATTRIBUTES[family.key]:
        assert getattr(backbone, name) == getattr(backbone.encoder, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing_like_it'"):
        _ = backbone.nothing_like_it
    assert hasattr(backbone, "prepare_features_for_image_model") == hasattr(
        backbone.encoder, "prepare_features_for_image_model"
    )


@pytest.mark.parametrize(
    ("given", "expected"), [(None, list(range(12))), ([2, 4, 8, 10], [2, 4, 8, 10]), ([-1, 3], [-1, 3])]
)
def test_out_indices_are_those_of_the_intact_encoder(build, given, expected):
    backbone = build(out_indices=given)
    backbone.prune_depth([0, 5])
    assert backbone.out_indices == expected
    assert len(backbone(torch.zeros(1, 6, 32, 32))) == len(expected)


def test_shape_that_a_callback_tells_and_what_weights_tell_are_one(small):
    for how in WAYS:
        backbone = small(how)
        assert changed(backbone.state_dict())["_extra_state"].tolist() == backbone.pruned_state.as_tensor().tolist()
