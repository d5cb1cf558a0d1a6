"""LoRA and visual prompts with a cut: attached before it, they end as if they had been attached after it."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from terratorch.models import EncoderDecoderFactory

from terratorch_simpler import SimplerCallback
from terratorch_simpler.criteria import Simpler
from terratorch_simpler.errors import ConfigurationError
from terratorch_simpler.extraction import ExtractionConfig, measure
from terratorch_simpler.models.backbone import SimplerBackbone, find_backbone
from tests.extras import needs_peft
from tests.in_memory_tiles import Tiles, land

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using PEFT without a pretrained backbone"),
    pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.FewTilesWarning"),
    pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.UntrainedEncoderWarning"),
]

TINY = "simpler_prithvi_eo_v2_tiny_tl"
NECKS = [
    {"name": "SelectIndices", "indices": [2, 5, 8, 11]},
    {"name": "ReshapeTokensToImage"},
    {"name": "LearnedInterpolateToPyramidal"},
]


def lora(*targets, replace_qkv=None, **kwargs):
    config = {"target_modules": list(targets), "r": 4, "lora_alpha": 8, **kwargs}
    return {"method": "LORA", "replace_qkv": replace_qkv, "peft_config_kwargs": config}


QV_MLP = lora("q_linear", "v_linear", "mlp.fc1", "mlp.fc2", replace_qkv="qkv")
# Family: name, arguments, shape, adapters.
FAMILIES = {
    "prithvi": (TINY, {}, (6, 64, 64), QV_MLP),
    "prithvi qkv": (TINY, {}, (6, 64, 64), lora("qkv", "mlp.fc1")),
    "terramind": (
        "simpler_terramind_v1_tiny", {"backbone_modalities": ["S2L2A"]}, (12, 64, 64),
        lora("q_linear", "v_linear", "mlp.fc1", replace_qkv="qkv"),
    ),
    "dofa": (
        "simpler_dofa_small_patch16_224",
        {"backbone_model_bands": ["RED", "GREEN"], "backbone_img_size": 64, "backbone_out_indices": list(range(12))},
        (2, 64, 64), lora("q_linear", "v_linear", replace_qkv="qkv"),
    ),
    "timm": (
        "simpler_timm_vit_tiny_patch16_224", {"backbone_img_size": 64, "backbone_out_indices": list(range(12))}, (3, 64, 64),
        lora("q_linear", "v_linear", "mlp.fc1", replace_qkv="qkv"),
    ),
    "torchgeo": (
        "simpler_ssl4eos12_vit_small_patch16_224_sentinel2_all_dino",
        {"backbone_model_bands": ["RED", "GREEN"], "backbone_img_size": 64}, (2, 64, 64), lora("qkv", "mlp.fc2"),
    ),
    "clay": (
        "simpler_clay_v1_base", {"backbone_bands": ["RED", "GREEN"], "backbone_img_size": 64}, (2, 64, 64),
        lora("q_linear", "v_linear", replace_qkv="to_qkv"),
    ),
}  # fmt: skip
families = pytest.mark.parametrize("family", FAMILIES)


def model(family="prithvi", seed=0, config=None, **more):
    name, kwargs, _, adapters = FAMILIES[family]
    torch.manual_seed(seed)
    images = family in ("timm", "torchgeo")
    necks = [NECKS[0], NECKS[2]] if images else [NECKS[0], {**NECKS[1], "remove_cls_token": family != "terramind"}, NECKS[2]]
    return EncoderDecoderFactory().build_model(
        "segmentation", name, "UNetDecoder", num_classes=2, peft_config=config or adapters, necks=necks,
        decoder_channels=[16, 8, 8, 4], **kwargs, **more,
    ).eval()  # fmt: skip


def backbone_of(built):
    return next(part for part in built.modules() if isinstance(part, SimplerBackbone))


def image(family, batch=2):
    return torch.randn(batch, *FAMILIES[family][2], generator=torch.Generator().manual_seed(1))


def randomise_adapters(built):
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_" in name or "vpt_prompt" in name:
                parameter.normal_(std=0.05)
    return built


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("terratorch.models.peft_utils._has_peft", False)
    with pytest.raises(ImportError, match=r"pip install terratorch\[peft\]"):
        model()


@needs_peft
@families
@pytest.mark.parametrize("kept", [range(4), [0, 5, 11]], ids=["first four", "with gaps"])
def test_attach_then_cut_is_cut_then_attach(family, kept):
    attached, reference = randomise_adapters(model(family)), model(family, seed=3, backbone_keep=list(kept))
    intact = sum("lora_" in name for name, _ in attached.named_parameters())
    backbone_of(attached).prune_depth(kept)
    adapters = {name for name, _ in attached.named_parameters() if "lora_" in name}
    assert len(adapters) == intact * len(kept) // 12
    assert adapters == {name for name, _ in reference.named_parameters() if "lora_" in name}
    reference.load_state_dict(attached.state_dict(), strict=True)
    x = image(family)
    assert torch.equal(reference(x).output, attached(x).output)
    trained = []
    for built in (attached, reference):
        built(x).output.square().mean().backward()
        trained.append({name: parameter.grad for name, parameter in built.named_parameters() if parameter.requires_grad})
    assert trained[0].keys() == trained[1].keys()
    assert all(grad is not None for name, grad in trained[0].items() if "lora_" in name)
    assert all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(trained[0].values(), trained[1].values(), strict=True)
    )


@needs_peft
@families
def test_checkpoints_with_adapters_bring_their_shape(family):
    saved, fresh = randomise_adapters(model(family)), model(family, seed=5)
    backbone_of(saved).prune_depth(range(3))
    fresh.load_state_dict(saved.state_dict(), strict=True)
    x = image(family)
    assert torch.equal(fresh(x).output, saved(x).output)
    # and grows back
    again = model(family, seed=6)
    saved.load_state_dict(again.state_dict(), strict=True)
    assert torch.equal(saved(x).output, again(x).output)


@needs_peft
@families
def test_merged_adapters_answer_alike(family):
    built = randomise_adapters(model(family))
    backbone_of(built).prune_depth(range(5))
    x = image(family)
    before = built(x).output
    built.encoder = built.encoder.merge_and_unload()
    assert isinstance(built.encoder, SimplerBackbone)
    assert not any("lora_" in name for name, _ in built.named_parameters())
    torch.testing.assert_close(built(x).output, before, rtol=0, atol=2e-2 * float(before.abs().max()))
    assert backbone_of(copy.deepcopy(built)).num_blocks == 5


def similarity(built, images):
    backbone = backbone_of(built)
    return measure(
        lambda batch: built(batch["image"]), backbone, Tiles(images), ExtractionConfig(Simpler(), min_tiles=32),
        stop_after=built.encoder,
    ).similarity  # fmt: skip


@needs_peft
@pytest.mark.parametrize("family", ["prithvi", "terramind", "timm"])
def test_selection_measures_the_pretrained_encoder_whatever_the_adapters_start_from(family):
    name, kwargs, shape, _ = FAMILIES[family]
    built = randomise_adapters(model(family))  # as with init_lora_weights: false
    images = land(40, bands=shape[0])
    torch.manual_seed(0)
    necks = [NECKS[0], NECKS[2]] if family == "timm" else NECKS
    plain = EncoderDecoderFactory().build_model(
        "segmentation", name, "UNetDecoder", num_classes=2, necks=necks, decoder_channels=[16, 8, 8, 4], **kwargs
    ).eval()  # fmt: skip
    torch.testing.assert_close(similarity(built, images), similarity(plain, images), rtol=0, atol=1e-3)
    x = image(family)
    before = built(x).output
    similarity(built, images)
    assert torch.equal(built(x).output, before)  # the adapters are on again


@needs_peft
def test_adapters_that_were_frozen_stay_frozen():
    built = model("prithvi")
    for name, parameter in built.named_parameters():
        if "lora_A" in name or ("lora_B" in name and ".blocks.3." in name):
            parameter.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in built.named_parameters()}
    assert len(set(flags.values())) == 2
    similarity(built, land(40))
    assert {name: parameter.requires_grad for name, parameter in built.named_parameters()} == flags


class Own(LightningModule):
    """Keeps its encoder where TerraTorch's tasks do not."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image, **_):
        return self.network(image)[-1]

    def training_step(self, batch, batch_idx):
        return self(batch["image"]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@needs_peft
def test_adapters_in_a_module_of_ones_own_are_switched_off(build, datamodule, tmp_path):
    from peft import LoraConfig, get_peft_model

    def similarity_of(adapters):
        network = build(seed=3)
        if adapters:  # which do not start neutral
            network = get_peft_model(network, LoraConfig(target_modules=["attn.qkv"], r=4, init_lora_weights=False))
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
            limit_train_batches=0, limit_val_batches=0, callbacks=[SimplerCallback()],
        )  # fmt: skip
        module = Own(network)
        trainer.fit(module, datamodule=datamodule())
        return find_backbone(module).plan.similarity

    assert similarity_of(True) == similarity_of(False)


@pytest.mark.parametrize("name", ["simpler_prithvi_eo_v2_tiny_tl", "simpler_clay_v1_base"])
def test_selection_measures_the_encoder_without_its_prompts(build, name):
    kwargs = {"bands": ["RED", "GREEN"], "img_size": 64} if "clay" in name else {}
    images = land(40, bands=2 if "clay" in name else 6)
    plain, prompted = build(name, **kwargs), build(name, vpt=True, vpt_n_tokens=4, **kwargs)
    prompted.encoder.load_state_dict(plain.encoder.state_dict(), strict=False)
    randomise_adapters(prompted)

    def run(backbone):
        return measure(
            lambda batch: backbone(batch["image"]), backbone, Tiles(images), ExtractionConfig(Simpler(), min_tiles=32)
        )

    before = prompted(images[:2])[-1]
    assert torch.equal(run(prompted).similarity, run(plain).similarity)
    assert torch.equal(prompted(images[:2])[-1], before)
    assert not torch.equal(plain(images[:2])[-1], before)


@pytest.mark.parametrize("kept", [[0, 1, 2], [1, 4, 9]])
def test_prompts_are_cut_with_their_blocks(build, kept):
    attached = randomise_adapters(build(vpt=True, vpt_n_tokens=4))
    prompts = [prompt.detach().clone() for prompt in attached.encoder.vpt_prompt_embeddings]
    attached.prune_depth(kept)
    assert all(torch.equal(a, prompts[b]) for a, b in zip(attached.encoder.vpt_prompt_embeddings, kept, strict=True))
    reference = build(seed=4, vpt=True, vpt_n_tokens=4, keep=kept)
    reference.load_state_dict(attached.state_dict(), strict=True)
    x = torch.randn(2, 6, 64, 64)
    assert torch.equal(reference(x)[-1], attached(x)[-1])


# --- adapters in some blocks only


def in_blocks(layers):
    return lora("qkv", layers_to_transform=layers)


@needs_peft
def test_block_numbers_are_those_of_the_intact_encoder():
    built = model(config=in_blocks([1, 3, 8]))
    backbone_of(built).prune_depth([0, 3, 8])
    with_adapters = [any("lora_" in name for name, _ in block.named_parameters()) for block in backbone_of(built).blocks]
    assert with_adapters == [False, True, True]
    fresh = model(seed=2, config=in_blocks([1, 3, 8]))
    fresh.load_state_dict(built.state_dict(), strict=True)
    x = image("prithvi")
    assert torch.equal(fresh(x).output, built(x).output)


@needs_peft
def test_block_numbers_of_a_prefix_cut_at_build():
    built = model(config=in_blocks([0, 3]), backbone_keep=5)
    adapters = {name.split(".blocks.")[1].split(".")[0] for name, _ in built.named_parameters() if "lora_" in name}
    assert adapters == {"0", "3"}


@needs_peft
def test_adapters_for_blocks_that_are_gone_are_refused():
    with pytest.raises(ConfigurationError, match=r"Found adapters \(LoRA\) for blocks \[7\], expected some of \[0, 1, 2\]"):
        model(config=in_blocks([2, 7]), backbone_keep=3)
    with pytest.raises(ConfigurationError, match=r"Found adapters \(LoRA\) for blocks \[7\]"):
        model(config=lora("blocks.1.attn.qkv", "blocks.7.attn.qkv"), backbone_keep=3)


@needs_peft
def test_block_numbers_with_gaps_at_build_are_refused():
    with pytest.raises(ConfigurationError, match=r"for blocks \[0, 1\] of an encoder pruned to blocks \[0, 4, 9\]"):
        model(config=in_blocks([0, 1]), backbone_keep=[0, 4, 9])


@needs_peft
def test_a_cut_that_drops_every_adapter_is_refused():
    built = model(config=in_blocks([10, 11]))
    with pytest.raises(ConfigurationError, match=r"in blocks \[10, 11\] only, expected some in the kept blocks \[0, 1, 2\]"):
        backbone_of(built).prune_depth(range(3))
    assert backbone_of(built).num_blocks == 12


@needs_peft
def test_fit_trains_adapters_and_decoder_only(trainer, tmp_path, datamodule, task):
    made = task(peft_config=QV_MLP)
    callback = SimplerCallback(output_dir=str(tmp_path / "simpler"))
    before = {
        name: parameter.detach().clone()
        for name, parameter in made.named_parameters()
        if "base_layer" in name and ".0." in name
    }
    trainer(callback, limit_train_batches=3, limit_val_batches=1).fit(made, datamodule=datamodule())
    assert 2 <= backbone_of(made).num_blocks <= 10
    after = dict(made.named_parameters())
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())
    changed = [parameter for name, parameter in made.named_parameters() if "lora_B" in name]
    assert len(changed) == 4 * backbone_of(made).num_blocks
    assert all(parameter.abs().sum() > 0 for parameter in changed)  # they start at zero
