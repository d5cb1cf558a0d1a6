"""``backbone_ckpt_path`` of timm's encoders: what is loaded, from which files, and what is refused."""

import json
import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from terratorch.registry import BACKBONE_REGISTRY
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv

from terratorch_simpler.errors import CheckpointError
from terratorch_simpler.plan import SlimmingPlan
from tests import cli_runner, dinov2

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 4}
TENSORS = 52
"""Of four blocks, the class token, positions and the patch embedding; timm's features have no final norm and no head."""


def official(name=NAME, seed=3, **kwargs):
    """A model with its classifier, as one would have trained it."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SMALL, **kwargs})
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.01 * torch.randn_like(value))  # no two tensors are alike, and none is that of a new model
    return model


def saved(weights, path, prefix="", container=None):
    weights = {f"{prefix}{key}": value.clone() for key, value in weights.items()}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({container: weights, "epoch": 3} if container else weights, path)
    return str(path)


def build(path, name=NAME, **kwargs):
    return BACKBONE_REGISTRY.build(f"simpler_{name}", ckpt_path=path, **{**SMALL, **kwargs})


def assert_loaded(backbone, weights):
    own = backbone.encoder.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in own.items())


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "bin"])
@pytest.mark.parametrize("prefix", ["", "model.", "module.", "backbone.", "model.encoder.model."])
def test_files_with_and_without_prefix(tmp_path, caplog, suffix, prefix):
    weights = official().state_dict()
    path = saved(weights, tmp_path / f"weights.{suffix}", prefix)
    with caplog.at_level(logging.INFO):
        backbone = build(path)
    assert_loaded(backbone, weights)
    assert backbone.pretrained is True
    [message] = [text for text in caplog.messages if text.startswith("Loaded ") and NAME in text]
    start, _, unused = message.removesuffix(").").partition(" (4 of the file not used: ")
    assert start == f"Loaded {TENSORS} of {TENSORS} tensors of {NAME} from {path}"
    assert set(unused.split(", ")) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("container", ["state_dict", "model", "teacher"])
@pytest.mark.parametrize("name", [f"timm_{NAME}", f"{NAME}.augreg_in21k"])
def test_containers_and_forms_of_the_name(tmp_path, container, name):
    weights = official().state_dict()
    assert_loaded(build(saved(weights, tmp_path / "weights.pt", "module.", container), name), weights)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_small_patch16_dinov3", "deit_tiny_distilled_patch16_224"])
def test_other_families_of_timm(tmp_path, name):
    weights = official(name).state_dict()
    assert_loaded(build(saved(weights, tmp_path / "weights.pt", "model."), name), weights)


def test_positions_and_patches_are_resampled_as_timm_does(tmp_path):
    weights = official(img_size=64).state_dict()
    path = saved(weights, tmp_path / "weights.safetensors", "encoder.")
    model = build(path).encoder.model
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(weights["pos_embed"], [2, 2], num_prefix_tokens=1))
    ours = build(path, patch_size=8).encoder.model
    assert torch.equal(ours.patch_embed.proj.weight, resample_patch_embed(weights["patch_embed.proj.weight"], [8, 8]))
    overlay = {"state_dict": weights, "num_classes": 1000}
    timms = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, **{**SMALL, "patch_size": 8}
    ).model.state_dict()
    assert_loaded(build(path, patch_size=8), timms)


@pytest.mark.parametrize(("held", "wanted"), [(3, 1), (3, 6), (6, 6), (2, 2)])
def test_bands(tmp_path, held, wanted):
    weights = official(in_chans=held).state_dict()
    kernel = build(saved(weights, tmp_path / "weights.pt"), in_chans=wanted).encoder.model.patch_embed.proj.weight
    assert torch.equal(kernel, adapt_input_conv(wanted, weights["patch_embed.proj.weight"], held))


def test_other_bands_than_three_are_not_converted(tmp_path):
    path = saved(official(in_chans=6).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(
        CheckpointError, match=r"weights\.pt holds 6 bands in 'patch_embed.proj.weight', expected 3.*in_chans to 6"
    ):
        build(path)


def test_keep_width_and_plan_come_on_top(tmp_path):
    weights = official().state_dict()
    path = saved(weights, tmp_path / "weights.safetensors")
    whole = build(path)
    whole.prune_depth([0, 1, 3])
    whole.set_width(0.5)
    pruned = build(path, keep=[0, 1, 3], width=0.5)
    assert pruned.pruned_state == whole.pruned_state
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in pruned.state_dict().items())
    assert torch.equal(pruned.blocks[2].norm1.weight, weights["blocks.3.norm1.weight"])
    plan = SlimmingPlan(NAME, 4, (0, 1, 3), {"name": "fixed", "args": {}}, width=0.5)
    plan.save(tmp_path / "plan.json")
    planned = build(path, plan=str(tmp_path / "plan.json"))
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in planned.state_dict().items())
    image = torch.randn(1, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(pruned.eval()(image), whole.eval()(image), strict=True))


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_pruned_checkpoint_restores_its_shape(tmp_path, suffix):
    trained = build(saved(official().state_dict(), tmp_path / "weights.pt"), keep=[0, 2, 3], width=0.5)
    path = saved(trained.state_dict(), tmp_path / f"pruned.{suffix}", "model.encoder.", "state_dict")
    rebuilt = build(path)
    assert rebuilt.pruned_state == trained.pruned_state
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in rebuilt.state_dict().items())
    assert build(path, keep=[0, 3]).kept == (0, 3)


def test_pretrained_false_leaves_the_file_alone_as_terratorch_does(tmp_path, caplog):
    backbone = build(str(tmp_path / "moved.pt"), pretrained=False)
    assert backbone.pretrained is False
    assert "pretrained: false, so its ckpt_path" in caplog.text
    assert build(None).pretrained is False


def test_tensors_that_are_not_in_the_file_are_named(tmp_path, caplog):
    weights = official().state_dict()
    del weights["blocks.2.attn.qkv.bias"]
    build(saved(weights, tmp_path / "weights.pt"))
    assert f"Loaded {TENSORS - 1} of {TENSORS} tensors" in caplog.text
    assert "random as before: blocks.2.attn.qkv.bias." in caplog.text


def strange(kind, tmp_path):
    weights, path = official().state_dict(), tmp_path / f"{kind}.pt"
    if kind == "few":
        return saved({key: value for key, value in weights.items() if key.startswith("blocks.0")}, path)
    if kind == "sizes":
        return saved(official(embed_dim=96).state_dict(), path)
    if kind == "two":
        return saved({f"{part}.{key}": value for part in ("student", "teacher") for key, value in weights.items()}, path)
    if kind == "lora":
        weights["blocks.0.attn.qkv.base_layer.weight"] = weights.pop("blocks.0.attn.qkv.weight")
        return saved(weights, path)
    if kind == "text":
        path.write_text("no weights")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "numbers":
        torch.save({"epoch": 3, "lr": 0.1}, path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "few",
            rf"few\.pt \(blocks\.0\..*\) holds 12 of {TENSORS} tensors of {NAME}, expected weights .* \(cls_token,",
        ),
        (
            "sizes",
            r"weights of .*sizes\.pt \(cls_token, pos_embed, .*\) do not fit .*size mismatch.*expected those of",
        ),
        ("two", r"two\.pt holds 2 encoders \(student\., teacher\.\), expected one"),
        ("lora", r"lora\.pt holds an encoder with adapters \(LoRA\), expected plain weights"),
        ("text", r"text\.pt cannot be read as weights .*expected a state dict"),
        ("list", r"list\.pt cannot be read as weights .*expected a state dict"),
        ("numbers", r"numbers\.pt holds no tensors by name \(its keys: epoch, lr\), expected a state dict"),
        ("missing", r"There is no file .*missing\.pt, expected one with weights: change backbone_ckpt_path"),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path, kind, message):
    with pytest.raises(CheckpointError, match=message):
        build(strange(kind, tmp_path))


def test_weights_only(tmp_path):
    """A file that needs more than tensors and plain values is refused."""
    torch.save({"state_dict": official().state_dict(), "run": print}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        build(str(tmp_path / "weights.pt"))


def test_a_fit_from_local_weights(scenes, tmp_path):
    weights = official(depth=12, img_size=224).state_dict()
    config = cli_runner.config(scenes, tmp_path, criterion="fixed", drop_blocks=7)
    config["trainer"] |= {"max_steps": 1, "max_epochs": -1}
    config["model"]["init_args"]["model_args"] |= {
        "backbone": f"simpler_{NAME}",
        "backbone_pretrained": True,
        "backbone_ckpt_path": saved(weights, tmp_path / "weights.safetensors", "model."),
        "backbone_in_chans": 6,
        "backbone_img_size": 64,
        "backbone_out_indices": [2, 5, 8, 11],
        "necks": [{"name": "LearnedInterpolateToPyramidal"}],
    }
    config["optimizer"]["init_args"]["lr"] = 0.0
    command = cli_runner.Command(tmp_path, config)
    assert command.wait() == [0], command.output()
    assert f"Loaded 148 of 148 tensors of {NAME} from" in command.output()
    trained = json.loads((tmp_path / "trained.0.json").read_text())
    assert trained["kept"] == [0, 1, 2, 3, 4]
    [found] = [value for key, value in trained["weights"].items() if key.endswith("blocks.4.attn.qkv.weight")]
    assert found == pytest.approx(weights["blocks.4.attn.qkv.weight"].double().sum().item())


def test_dinov2_by_name():
    """The real encoder: features are those of timm's own model with its own loading of these weights."""
    path = dinov2.weights()
    name = "vit_small_patch14_dinov2"
    every = list(range(12))
    backbone = BACKBONE_REGISTRY.build(f"simpler_timm_{name}", ckpt_path=str(path), img_size=224, out_indices=every).eval()
    overlay = {"file": str(path), "custom_load": False}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=224).eval()
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.forward_intermediates(image, norm=False, intermediates_only=True)
        found = backbone(image)
    assert len(found) == 12
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
