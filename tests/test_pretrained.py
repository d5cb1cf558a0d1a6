"""``backbone_ckpt_path``: a pruned checkpoint rebuilds its shape, and a file that the encoder does not take is an error."""

import json

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from terratorch.registry import BACKBONE_REGISTRY

from terratorch_simpler.errors import CheckpointError, ConfigurationError, DepthError, SimplerWarning
from tests import cli_runner
from tests.checkpoints import as_buffers
from tests.extras import needs_peft
from tests.families import FAMILIES, plain, wrapped
from tests.in_memory_tiles import land
from tests.test_recovery import maps_for, plan_of

SMALL = {"embed_dim": 48, "num_heads": 3}


def saved(backbone, path, prefix="model.encoder.", form=dict):
    """A checkpoint of a task around a backbone."""
    weights = {f"{prefix}{key}": value for key, value in form(backbone.state_dict()).items()}
    others = {"model.head.weight": torch.zeros(3)} if prefix else {}
    torch.save({"state_dict": {**weights, **others}, "epoch": 1}, path)
    return str(path)


def same(found, expected):
    assert found.pruned_state == expected.pruned_state
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_a_pruned_checkpoint_rebuilds_its_shape(family, width, tmp_path):
    trained = wrapped(family)
    total = trained.full_num_blocks
    trained.prune_depth(sorted({0, 1, total // 2, total - 2, total - 1}))
    trained.set_width(width)
    path = saved(trained, tmp_path / "pruned.ckpt")
    rebuilt = wrapped(family, seed=1, ckpt_path=path)
    same(rebuilt, trained)
    assert rebuilt.pretrained is True


def test_not_pretrained_takes_the_pruned_state_and_no_weights(build, tmp_path):
    """For a run from random weights of the same blocks and width, as a control."""
    trained = build(keep=[0, 3, 4], width=0.5, **SMALL)
    path = saved(trained, tmp_path / "pruned.ckpt")
    with pytest.warns(SimplerWarning, match="backbone_pretrained is false: blocks and width are taken from"):
        control = build(seed=1, ckpt_path=path, pretrained=False, **SMALL)
    assert control.pruned_state == trained.pruned_state
    assert control.pretrained is False
    same(control, build(seed=1, keep=[0, 3, 4], width=0.5, **SMALL))


@pytest.mark.parametrize("key", ["terramind", "clay", "dinov3"])
def test_families_that_load_a_file_all_the_same_do_so_here(key, tmp_path):
    family = next(family for family in FAMILIES if family.key == key)
    trained = wrapped(family, keep=[0, 1])
    path = saved(trained, tmp_path / "pruned.ckpt")
    same(wrapped(family, seed=1, ckpt_path=path, pretrained=False), trained)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kept=st.sets(st.integers(0, 11), min_size=1).map(sorted),
    width=st.sampled_from([1.0, 0.5, 0.3]),
    form=st.sampled_from([dict, as_buffers]),
    again=st.booleans(),
    data=st.data(),
)
def test_any_kept_blocks(build, tmp_path, kept, width, form, again, data):
    trained = build(keep=kept, width=width, **SMALL)
    path = saved(trained, tmp_path / "pruned.ckpt", data.draw(st.sampled_from(["", "model.encoder.", "a.b."])), form)
    same(build(seed=1, ckpt_path=path, **SMALL, **({"keep": kept, "width": width} if again else {})), trained)
    fewer = sorted(data.draw(st.sets(st.sampled_from(kept), min_size=1)))
    pruned = build(seed=1, ckpt_path=path, keep=fewer, **SMALL)
    trained.prune_depth(fewer)
    same(pruned, trained)
    others = sorted(data.draw(st.sets(st.integers(0, 11), min_size=1)))
    if not set(others) <= set(kept):
        with pytest.raises(DepthError, match=r"expected some of .*, the blocks this encoder still holds"):
            build(ckpt_path=path, keep=others, **SMALL)


def test_a_repaired_checkpoint(build, tmp_path):
    trained, kept = build(**SMALL), [0, 1, 2, 6, 7]
    plan = plan_of(trained, kept, maps_for(trained, land(40), kept))
    trained.slim(plan)
    with torch.no_grad():
        for parameter in trained.recovery.parameters():
            parameter.add_(1.0)  # trained since
    path = saved(trained, tmp_path / "pruned.ckpt")
    same(build(seed=1, ckpt_path=path, **SMALL), trained)
    plan.save(tmp_path / "plan.json")
    same(build(seed=1, ckpt_path=path, plan=str(tmp_path / "plan.json"), **SMALL), trained)
    without = saved(build(keep=list(kept), **SMALL), tmp_path / "without.ckpt")
    with pytest.raises(CheckpointError, match=r"pruned as backbone_plan \(.*\) says, and lack its recovery maps"):
        build(ckpt_path=without, plan=str(tmp_path / "plan.json"), **SMALL)


def test_one_of_the_widths_that_were_trained(build, tmp_path):
    trained = build(keep=5, width=0.5, **SMALL)
    trained.mark_trained_widths([0.25, 0.5])
    path = saved(trained, tmp_path / "pruned.ckpt")
    trained.mark_trained_widths(())  # training that starts from the file is at one width
    same(build(seed=1, ckpt_path=path, **SMALL), trained)
    narrow = build(seed=1, ckpt_path=path, width=0.25, **SMALL)
    trained.set_width(0.25)
    same(narrow, trained)
    with pytest.raises(CheckpointError, match=r"trained at widths 0\.25, 0\.5"):
        build(ckpt_path=path, width=0.3, **SMALL)


def test_a_width_above_that_of_the_file_is_refused(build, tmp_path):
    path = saved(build(width=0.5, **SMALL), tmp_path / "pruned.ckpt")
    with pytest.raises(ConfigurationError, match=r"width 0.75 for an encoder of width 0.5, expected at most that"):
        build(ckpt_path=path, width=0.75, **SMALL)


def test_another_encoder_is_refused(build, tmp_path):
    path = saved(build(keep=5, **SMALL), tmp_path / "pruned.ckpt")
    with pytest.raises(CheckpointError, match=r"of shape .* in the checkpoint, expected"):
        build(ckpt_path=path, embed_dim=96, num_heads=3)
    with pytest.raises(CheckpointError, match="encoder with 12 blocks, expected one of 'prithvi_eo_v2_tiny_tl' with 6"):
        build(ckpt_path=path, depth=6, **SMALL)
    with pytest.raises(
        CheckpointError, match=r"do not fit 'prithvi_eo_v2_tiny_tl' .*Missing key.*expected those of the same encoder"
    ):
        build(ckpt_path=path, vpt=True, vpt_n_tokens=2, **SMALL)


def test_several_encoders_in_one_file_are_refused(build, tmp_path):
    one = build(keep=5, **SMALL).state_dict()
    torch.save({f"{name}.{key}": value for name in ("a", "b") for key, value in one.items()}, tmp_path / "two.ckpt")
    with pytest.raises(CheckpointError, match=r"holds 2 pruned encoders \(a\., b\.\), expected one"):
        build(ckpt_path=str(tmp_path / "two.ckpt"), **SMALL)


@needs_peft
@pytest.mark.parametrize("replace_qkv", [None, "qkv"])
def test_adapters_are_refused_in_a_sentence(task, build, tmp_path, replace_qkv):
    targets = ["attn.qkv"] if replace_qkv is None else ["q_linear"]
    lora = {"method": "LORA", "replace_qkv": replace_qkv, "peft_config_kwargs": {"target_modules": targets, "r": 4}}
    module = task(peft_config=lora, backbone_pretrained=False)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "lora.ckpt")
    with pytest.raises(
        CheckpointError, match=r"pruned encoder with adapters \(LoRA\), expected plain weights: resume from it"
    ):
        build(ckpt_path=str(tmp_path / "lora.ckpt"))


@pytest.mark.parametrize("key", ["prithvi", "terramind", "clay"])
def test_a_file_that_the_encoder_takes_nothing_of_is_refused(key, tmp_path):
    family = next(family for family in FAMILIES if family.key == key)
    own = plain(family).state_dict()
    weights = {f"{name}.other": value + 1 for name, value in own.items()}
    if key == "prithvi":
        weights["patch_embed.proj.weight"] = own["patch_embed.proj.weight"]  # without it TerraTorch raises an error itself
    torch.save({"state_dict": weights} if key == "clay" else weights, tmp_path / "weights.pt")
    message = r"has left \d+ of \d+ matrices of .* as they were, expected weights of this encoder: change backbone_ckpt_path"
    with pytest.raises(CheckpointError, match=message), family.before():
        BACKBONE_REGISTRY.build(
            f"simpler_{family.name}", pretrained=key == "prithvi", ckpt_path=str(tmp_path / "weights.pt"), **family.kwargs
        )


@pytest.mark.parametrize("key", ["prithvi", "terramind"])
def test_an_ordinary_file_is_read_by_terratorch(key, tmp_path):
    family = next(family for family in FAMILIES if family.key == key)
    own = plain(family)
    torch.save(own.state_dict(), tmp_path / "weights.pt")
    backbone = BACKBONE_REGISTRY.build(
        f"simpler_{family.name}", pretrained=True, ckpt_path=str(tmp_path / "weights.pt"), keep=[0, 4], **family.kwargs
    )
    expected = own.blocks if key == "prithvi" else own.encoder
    for block, other in zip(backbone.blocks, (expected[0], expected[4]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(block.parameters(), other.parameters(), strict=True))


def test_a_fit_from_a_pruned_checkpoint(scenes, tmp_path):
    """Through ``terratorch fit``, whose callback leaves the pruned encoder alone."""
    first = cli_runner.config(scenes, tmp_path / "first", criterion="fixed", drop_blocks=7, width=0.5)
    first["trainer"] |= {"max_steps": 1, "max_epochs": -1}
    command = cli_runner.Command(tmp_path / "first", first)
    assert command.wait() == [0], command.output()
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    second = cli_runner.config(scenes, tmp_path / "second")
    second["trainer"] |= {"max_steps": 1, "max_epochs": -1}
    arguments = second["model"]["init_args"]["model_args"]
    arguments |= {"num_classes": 4, "backbone_pretrained": True, "backbone_ckpt_path": str(last)}
    second["data"]["init_args"]["num_classes"] = 4
    second["model"]["init_args"]["ignore_index"] = None
    second["optimizer"]["init_args"]["lr"] = 0.0
    second = yaml.safe_load(yaml.safe_dump(second))
    command = cli_runner.Command(tmp_path / "second", second, "--trainer.limit_train_batches", "0")
    command.wait()
    assert "is built with 5 of 12 blocks at width 0.5" in command.output(), command.output()
    assert json.loads((tmp_path / "first" / "trained.0.json").read_text())["kept"] == [0, 1, 2, 3, 4]
