"""select_depth and prune: models of timm, torchvision, transformers, TerraTorch and of one's own, without a trainer."""

import copy
import inspect
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import terratorch_simpler
from terratorch_simpler import (
    BlockInfluence,
    ConfigurationError,
    DegenerateFeaturesError,
    DepthError,
    FewTilesWarning,
    Fixed,
    LabelsError,
    PlanError,
    SimplerCallback,
    SlimmingPlan,
    TilesError,
    UnsupportedEncoderError,
    prune,
    select_depth,
)
from terratorch_simpler.data.batches import BatchTiles
from terratorch_simpler.extraction import random_state_kept, token_sampling
from terratorch_simpler.functional.hsic import linear_cka
from terratorch_simpler.lightning.task import batch_normalizer
from tests import families
from tests.extras import needs_peft
from tests.in_memory_tiles import land

SMALL = {"img_size": 64, "depth": 6, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
BLOCKS = 6


def timm_model(name="vit_tiny_patch16_224", **kwargs):
    return timm.create_model(name, **{**SMALL, **kwargs})


def torchvision_model(num_layers=BLOCKS):
    return torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=num_layers, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=5
    )


def transformers_model(name, **kwargs):
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, name).config_class
    sizes = {"hidden_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 3, "intermediate_size": 96}
    return getattr(transformers, name)(config_class(**{**sizes, "image_size": 64, "patch_size": 16, **kwargs}))


class OwnModel(nn.Module):
    """A class token, a stack without a usual name, a head; no attribute tells the size of a patch."""

    def __init__(self, depth=BLOCKS, container=nn.Sequential):
        super().__init__()
        self.embed = nn.Conv2d(3, 48, 16, 16)
        self.cls = nn.Parameter(torch.zeros(1, 1, 48))
        self.stages = nn.ModuleDict(
            {"deep": container(*[nn.TransformerEncoderLayer(48, 3, 96, batch_first=True) for _ in range(depth)])}
        )
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 5)

    def forward(self, image):
        tokens = self.embed(image).flatten(2).transpose(1, 2)
        tokens = self.stages["deep"](torch.cat([self.cls.expand(len(image), -1, -1), tokens], dim=1))
        return self.head(self.norm(tokens)[:, 0])


class Segmenter(nn.Module):
    """A model around a vision transformer."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Linear(48, 4)

    def forward(self, image):
        return self.decoder(self.encoder.forward_features(image))


MODELS = {
    "timm": timm_model,
    "timm registers": lambda: timm_model("vit_small_patch16_dinov3"),
    "timm beit": lambda: timm_model("beit_base_patch16_224"),
    "timm rope mixed": lambda: timm_model("vit_small_patch16_rope_mixed_224"),
    "timm relpos": lambda: timm_model("vit_relpos_small_patch16_224"),
    "timm inside": lambda: Segmenter(timm_model()),
    "torchvision": torchvision_model,
    "ViTModel": lambda: transformers_model("ViTModel"),
    "ViTForImageClassification": lambda: transformers_model("ViTForImageClassification", num_labels=5),
    "Dinov2Model": lambda: transformers_model("Dinov2Model"),
    "Dinov2WithRegistersModel": lambda: transformers_model("Dinov2WithRegistersModel"),
    "DeiTModel": lambda: transformers_model("DeiTModel"),
    "BeitModel": lambda: transformers_model("BeitModel"),
    "DINOv3ViTModel": lambda: transformers_model("DINOv3ViTModel"),
    "CLIPVisionModel": lambda: transformers_model("CLIPVisionModel"),
    "Dinov2Backbone": lambda: transformers_model("Dinov2Backbone", out_indices=[2, 4, 6]),
}


def built(key, seed=0):
    torch.manual_seed(seed)
    model = MODELS[key]()
    with torch.no_grad():  # as unlike as trained blocks are
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter.mul_(3)
            if "gamma" in name or "lambda" in name:  # layer scale starts at nearly nothing
                parameter.fill_(1)
    return model.eval()


def batched(images, size=16):
    return list(images.split(size))


IMAGES = land(64, bands=3)


def choose(model, batches=None, **kwargs):
    defaults = {"min_tiles": 32, "progress": False}
    return select_depth(model, batched(IMAGES) if batches is None else batches, **{**defaults, **kwargs})


def answer(model, images=IMAGES[:2]):
    with torch.no_grad():
        return _tensor(model(images))


def _tensor(output):
    """The tensor of an answer, or of the forms in which transformers gives it."""
    if isinstance(output, torch.Tensor):
        return output
    names = ("logits", "last_hidden_state", "feature_maps")
    found = next((output[name] for name in names if name in getattr(output, "keys", tuple)()), output)
    return found[-1] if isinstance(found, list | tuple) else found


@pytest.mark.parametrize("key", MODELS)
def test_any_vision_transformer_is_measured_pruned_and_saved(key, tmp_path):
    model = built(key)
    plan = choose(model)
    assert plan.full_num_blocks == BLOCKS
    assert plan.kept_blocks == tuple(range(plan.depth))
    assert max(plan.scores, key=plan.scores.get) == plan.depth
    assert (plan.tiles_seen, plan.rows_seen) == (64, 64 * 16)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert plan.parameters["before"] == total
    loaded = SlimmingPlan.load(plan.save(tmp_path / "plan.json"))
    assert loaded == plan

    assert prune(model, loaded) == list(range(plan.depth))
    beside = (BLOCKS - plan.depth) * model.embed_dim if key == "timm rope mixed" else 0
    held = sum(parameter.numel() for parameter in model.parameters())
    assert held == plan.parameters["after"] - beside < total
    assert answer(model).isfinite().all()
    again = built(key, seed=1)
    prune(again, plan.depth)
    again.load_state_dict(model.state_dict())
    assert torch.equal(answer(again), answer(model))
    _tensor(model.train()(IMAGES[:2])).square().sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "attn" in name or "mlp" in name)
    with pytest.raises(PlanError, match=rf"plan is for 6 blocks, and \w+ has {plan.depth}"):
        prune(model, plan)


@pytest.mark.parametrize("key", MODELS)
def test_nothing_of_the_model_is_changed(key):
    model = built(key).train()
    first, *_, last = model.parameters()
    first.requires_grad_(False)
    last.grad = torch.ones_like(last)
    before = copy.deepcopy(model.state_dict())
    attributes = {name: dict(part.__dict__) for name, part in model.named_modules()}
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    loader = DataLoader(TensorDataset(IMAGES), batch_size=16, shuffle=True)
    choose(model, loader)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()] == hooks
    assert all(part.training for part in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()].count(False) == 1
    assert not first.requires_grad
    assert torch.equal(last.grad, torch.ones_like(last))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, part in model.named_modules():
        assert part.__dict__.keys() == attributes[name].keys()


def test_state_comes_back_after_an_error():
    model = built("timm").train()

    def broken():
        yield IMAGES[:16]
        raise ZeroDivisionError

    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        choose(model, broken())
    assert all(part.training for part in model.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("key", ["timm", "torchvision", "ViTModel"])
def test_similarity_is_linear_cka_of_the_raw_outputs(key):
    model, outputs = built(key), []
    stack = {"timm": "blocks", "torchvision": "encoder.layers", "ViTModel": "layers"}[key]
    try:
        blocks = model.get_submodule(stack)
    except AttributeError:  # transformers before 5
        blocks = model.encoder.layer
    handles = [block.register_forward_hook(lambda m, i, o: outputs.append(_tensor(o)[:, 1:])) for block in blocks]
    with torch.no_grad():
        model(IMAGES[:40])
    for handle in handles:
        handle.remove()
    plan = choose(model, [IMAGES[:40]])
    expected = linear_cka(torch.stack(outputs).flatten(1, 2))
    torch.testing.assert_close(torch.tensor(plan.similarity).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [3, [0, 2, 5]])
def test_a_pruned_timm_model_is_its_kept_blocks_and_the_final_norm(kept):
    model = built("timm")
    numbers = list(range(kept)) if isinstance(kept, int) else kept
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(IMAGES[:2]))
        for number in numbers:
            tokens = model.blocks[number](tokens)
        expected = model.forward_head(model.norm(tokens))
    assert prune(model, kept) == numbers
    assert torch.equal(answer(model), expected)
    assert [info["module"] for info in model.feature_info] == [f"blocks.{i}" for i in range(3)]
    assert model.forward_intermediates(IMAGES[:1], indices=3)[1][0].shape == (1, 48, 4, 4)
    fresh = timm_model(depth=3)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(answer(fresh.eval()), expected)


def test_frequencies_learned_for_every_block_go_with_their_blocks():
    model = built("timm rope mixed")
    freqs = model.rope.freqs.clone()
    prune(model, [1, 4])
    assert torch.equal(model.rope.freqs, freqs[:, [1, 4]])
    timm_model("vit_small_patch16_rope_mixed_224", depth=2).load_state_dict(model.state_dict())


@pytest.mark.parametrize("kept", [3, [0, 2, 5]])
def test_a_pruned_torchvision_model_is_its_kept_blocks_and_the_final_norm(kept):
    model = built("torchvision")
    numbers = list(range(kept)) if isinstance(kept, int) else kept
    with torch.no_grad():
        tokens = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(IMAGES[:2])], dim=1)
        tokens = tokens + model.encoder.pos_embedding
        for number in numbers:
            tokens = model.encoder.layers[number](tokens)
        expected = model.heads(model.encoder.ln(tokens)[:, 0])
    assert prune(model, kept) == numbers
    assert torch.equal(answer(model), expected)
    fresh = torchvision_model(3)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(answer(fresh.eval()), expected)


@pytest.mark.parametrize("key", [key for key in MODELS if key[0].isupper()])
def test_a_pruned_transformers_model_is_that_of_its_configuration(key, tmp_path):
    model = built(key)
    with torch.no_grad():
        states = model(IMAGES[:2], output_hidden_states=True).hidden_states
    prune(model, 3)
    assert model.config.num_hidden_layers == 3
    with torch.no_grad():
        pruned = model(IMAGES[:2], output_hidden_states=True).hidden_states
    assert len(pruned) == 4
    torch.testing.assert_close(pruned[1:3], states[1:3])
    expected = answer(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 3
    assert torch.equal(answer(again), expected)


def test_stages_of_a_transformers_backbone_follow():
    model = built("Dinov2Backbone")
    assert len(model(IMAGES[:1]).feature_maps) == 3
    prune(model, 3)
    assert (model.config.out_features, model.stage_names) == (["stage1", "stage2", "stage3"], model.config.stage_names)
    assert len(model(IMAGES[:1]).feature_maps) == len(model.channels) == 3


def test_a_loop_in_plain_pytorch():
    model = built("timm")
    prune(model, choose(model))
    torch.manual_seed(0)
    labels = torch.randint(5, (32,))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    before, losses = copy.deepcopy(dict(model.named_parameters())), []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(IMAGES[:32]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]


FORMS = {
    "tensors": lambda images: batched(images),
    "one tensor": lambda images: images.reshape(4, 16, 3, 64, 64),
    "generator": lambda images: (part for part in batched(images)),
    "other batch size": lambda images: batched(images, 7),
    "dictionaries": lambda images: [{"image": part, "mask": None, "filename": ["a"] * 16} for part in batched(images)],
    "pixel values": lambda images: [{"pixel_values": part} for part in batched(images)],
    "pairs": lambda images: [(part, torch.zeros(len(part))) for part in batched(images)],
    "loader": lambda images: DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=16),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_in_any_form_give_the_same_plan(form):
    expected, plan = choose(built("timm")), choose(built("timm"), FORMS[form](IMAGES))
    assert plan.kept_blocks == expected.kept_blocks
    np.testing.assert_allclose(plan.similarity, expected.similarity, atol=1e-6)


def test_a_shuffling_loader_gives_the_same_plan_again():
    def plan():
        return choose(
            built("timm"), DataLoader(TensorDataset(land(100, bands=3)), batch_size=10, shuffle=True), max_tiles=50
        )

    torch.manual_seed(3)
    first = plan()
    torch.manual_seed(4)
    assert plan() == first
    assert first.tiles_seen == 50


def test_missing_pixels_are_no_rows():
    images = IMAGES.clone()
    images[:, 1, :, :32] = float("nan")
    images[5] = float("nan")
    plan = choose(built("timm"), batched(images))
    assert (plan.tiles_seen, plan.rows_seen) == (63, 63 * 8)
    assert plan.data["skipped"] == {"nodata": 1}
    assert images.isnan().any()  # the user's own are as they were
    valid = torch.ones(16, 64, 64, dtype=torch.bool)
    valid[:, :16] = False
    masked = choose(built("timm"), [{"image": part, "valid": valid} for part in batched(IMAGES)])
    assert masked.rows_seen == 64 * 12


@pytest.mark.parametrize("container", [nn.Sequential, lambda *blocks: nn.ModuleList(blocks)])
def test_a_model_of_ones_own_by_the_path_of_its_blocks(container, tmp_path):
    class Model(OwnModel):
        def forward(self, image):
            tokens = self.embed(image).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.cls.expand(len(image), -1, -1), tokens], dim=1)
            for block in self.stages["deep"]:
                tokens = block(tokens)
            return self.head(self.norm(tokens)[:, 0])

    torch.manual_seed(0)
    model = Model(container=container).eval()
    plan = choose(model, blocks="stages.deep")
    assert plan.rows_seen == 64 * 16  # the class token was told apart
    assert plan.data["blocks"] == "stages.deep"
    stack = model.stages["deep"]
    assert prune(model, SlimmingPlan.load(plan.save(tmp_path / "plan.json"))) == list(range(plan.depth))
    assert model.stages["deep"] is stack
    assert len(stack) == plan.depth
    assert answer(model).shape == (2, 5)
    assert prune(model, [0], blocks="stages.deep") == [0]
    with pytest.raises(UnsupportedEncoderError, match="No transformer blocks were recognized in Model: set blocks"):
        prune(model, 1)


def test_a_sequential_of_parts():
    class Tokens(nn.Module):
        def forward(self, image):
            return image.flatten(2).transpose(1, 2)

    blocks = [nn.TransformerEncoderLayer(48, 3, 96, batch_first=True) for _ in range(BLOCKS)]
    model = nn.Sequential(nn.Conv2d(3, 48, 16, 16), Tokens(), nn.Sequential(*blocks), nn.LayerNorm(48))
    plan = choose(model, blocks="2")
    assert plan.rows_seen == 64 * 16
    with pytest.raises(TilesError, match="has no class token"):
        choose(model, blocks="2", tokens="cls")
    assert prune(model, plan) == list(range(plan.depth))
    assert len(model[2]) == plan.depth


def test_a_path_into_a_known_model_keeps_what_it_says_of_depth():
    model = Segmenter(transformers_model("ViTModel"))
    model.forward = lambda image: model.decoder(model.encoder(image).last_hidden_state)
    stack = next(name for name, part in model.named_modules() if isinstance(part, nn.ModuleList))
    plan = choose(model, blocks=stack)
    assert plan.data["blocks"] == stack
    prune(model, plan)
    assert model.encoder.config.num_hidden_layers == plan.depth


def test_prefix_tokens_that_do_not_fit_are_refused():
    model = built("timm")
    assert choose(model, prefix_tokens=1) == choose(model)
    with pytest.raises(TilesError, match=r"return 17 tokens, expected 2 \+ 16 \(prefix tokens and patches\)"):
        choose(model, prefix_tokens=2)
    with pytest.raises(TilesError, match="17 tokens for images of 64 x 64 pixels, which no square patches explain with 3"):
        choose(OwnModel(), blocks="stages.deep", prefix_tokens=3)


@pytest.mark.parametrize("tokens", ["cls", "mean", "all"])
def test_other_tokens(tokens):
    assert choose(built("timm"), tokens=tokens).rows_seen == 64 * (16 if tokens == "all" else 1)


def test_a_masked_autoencoder_is_refused_unless_it_sees_whole_images():
    model = transformers_model("ViTMAEModel")
    with pytest.raises(TilesError, match="tokens"):
        choose(model)
    assert choose(transformers_model("ViTMAEModel", mask_ratio=0.0)).tiles_seen == 64


@pytest.mark.parametrize(
    ("build_model", "message"),
    [
        (lambda: torchvision.models.swin_t(), "SwinTransformer is hierarchical: resolution and width change"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformer is hierarchical"),
        (lambda: timm.create_model("hiera_tiny_224"), "Hiera is hierarchical"),
        (lambda: torchvision.models.resnet18(), "ResNet is hierarchical"),
        (lambda: nn.Linear(3, 3), "No transformer blocks were recognized in Linear: set blocks"),
        (lambda: OwnModel(), "in OwnModel: set blocks to the path of its list of blocks, such as 'stages.deep'"),
        (lambda: nn.ModuleList([timm_model(), timm_model()]), r"contains 2 encoders \(0, 1\)"),
    ],
)
def test_models_without_one_stack_of_blocks_are_refused(build_model, message):
    with pytest.raises(UnsupportedEncoderError, match=message):
        choose(build_model())


def test_a_hierarchical_transformers_model_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(embed_dim=12, depths=[2, 2], num_heads=[2, 2], image_size=64, window_size=4)
    with pytest.raises(UnsupportedEncoderError, match="SwinModel is hierarchical"):
        choose(transformers.SwinModel(config))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("blocks.0", "Found a Block at blocks 'blocks.0' of VisionTransformer"),
        ("nowhere", r"Found nothing at blocks 'nowhere' .* such as blocks"),
    ],
)
def test_wrong_paths_are_refused(path, message):
    with pytest.raises(UnsupportedEncoderError, match=message):
        choose(built("timm"), blocks=path)


def test_blocks_that_pass_on_maps_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Sequential(*[nn.Conv2d(8, 8, 1) for _ in range(6)]))
    with pytest.raises(UnsupportedEncoderError, match=r"pass on a Tensor of shape \(16, 8, 4, 4\), expected tokens"):
        choose(model, blocks="1")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches yielded 0 tiles; at least 32 are needed"),
        (iter([]), r"batches yielded 0 tiles \(a generator can be used only once\)"),
        ([IMAGES[:20]], "batches yielded 20 tiles; at least 32 are needed"),
        (["a"], "batches yielded a str, expected an image tensor"),
        ([{"picture": IMAGES}], "batches yielded a dict with the keys picture, expected"),
        ([[]], "batches yielded a list, expected"),
        ([IMAGES[0]], r"images of shape \(3, 64, 64\) and type float32, expected floating-point images"),
        ([IMAGES.byte()], r"type uint8, expected floating-point images"),
    ],
)
def test_batches_that_are_no_images_are_refused(batches, message):
    with pytest.raises(TilesError, match=message):
        choose(built("timm"), batches)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": "patches"}, ConfigurationError, "Found tokens 'patches', expected one of patch, cls, mean, all"),
        ({"min_tiles": 10, "max_tiles": 5}, ConfigurationError, "Found min_tiles 10 and max_tiles 5"),
        ({"criterion": "best"}, ConfigurationError, "criterion 'best'"),
        ({"min_depth": 5}, DepthError, "min_depth 5"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        choose(built("timm"), **arguments)


def test_few_images_are_a_warning():
    with pytest.warns(FewTilesWarning, match=r"Only 64 images available \(min_tiles is 256\)") as caught:
        choose(built("timm"), min_tiles=256)
    assert caught[0].filename == __file__


def test_degenerate_features_name_the_block():
    model = built("timm")
    nn.init.constant_(model.blocks[2].mlp.fc2.bias, float("nan"))
    with pytest.raises(DegenerateFeaturesError, match="block"):
        choose(model)


def test_other_criteria_and_bounds():
    assert choose(built("timm"), criterion="knee").criterion["name"] == "knee"
    assert choose(built("timm"), criterion=BlockInfluence(2)).depth == 4
    assert choose(built("timm"), min_depth=4, max_depth=4).depth == 4
    plan = choose(built("timm"), [], criterion=Fixed([0, 3]))  # nothing is streamed
    assert (plan.kept_blocks, plan.tiles_seen) == ((0, 3), 0)
    model = built("timm")
    assert prune(model, plan) == [0, 3]
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.parameters["after"]


def test_a_criterion_that_needs_labels_takes_the_second_of_a_pair():
    labels = (IMAGES.mean(dim=(1, 2, 3)) > IMAGES.mean()).long()
    pairs = list(zip(batched(IMAGES), labels.split(16), strict=True))
    plan = choose(built("timm"), pairs, criterion=terratorch_simpler.Sls(alpha=0.01))
    assert plan.criterion["name"] == "sls"
    dictionaries = [{"image": image, "label": label} for image, label in pairs]
    assert choose(built("timm"), dictionaries, criterion=terratorch_simpler.Sls(alpha=0.01)).scores == plan.scores
    with pytest.raises(LabelsError, match="label"):
        choose(built("timm"), criterion="sls")
    with pytest.raises(ConfigurationError, match="and generator can be used only once"):
        choose(built("timm"), (pair for pair in pairs), criterion="sls")


def test_precision_and_device():
    model = built("timm")
    expected = choose(model)
    assert choose(model, device="cpu").similarity == expected.similarity
    double = choose(built("timm").double())
    np.testing.assert_allclose(double.similarity, expected.similarity, atol=1e-4)
    assert choose(built("timm").bfloat16()).tiles_seen == 64


def test_nothing_after_the_last_block_runs():
    model = built("timm")
    model.forward_head = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):  # MACs are those of the whole model, so it must run as such
        choose(model)
    model = OwnModel()
    heads = []
    model.head.register_forward_hook(lambda *_: heads.append(1))
    choose(model, blocks="stages.deep")
    assert len(heads) <= 3  # of 4 batches: only MACs are counted with the head


@needs_peft
def test_adapters_are_switched_off_for_the_choice_and_go_with_their_blocks():
    import peft

    model = built("timm")
    expected = choose(model)
    config = peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    trainable = [parameter.requires_grad for parameter in adapted.parameters()]
    plan = choose(adapted)
    np.testing.assert_allclose(plan.similarity, expected.similarity, atol=1e-6)
    assert [parameter.requires_grad for parameter in adapted.parameters()] == trainable
    assert prune(adapted, plan) == list(range(plan.depth))
    assert answer(adapted).isfinite().all()


@pytest.mark.parametrize("wrong", [0, 7, [], [6], [1, 1], "3"])
def test_depths_that_do_not_exist_are_refused(wrong):
    with pytest.raises(DepthError):
        prune(built("timm"), wrong)


def test_what_only_a_simpler_backbone_can_do_is_refused():
    plan = SlimmingPlan("vit", BLOCKS, (0, 1), {"name": "fixed", "args": {}}, width=0.5)
    with pytest.raises(PlanError, match=r"width 0\.5 and recovery 'none', and a plain model can only be pruned in depth"):
        prune(built("timm"), plan)


# --- TerraTorch


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.key)
def test_plain_terratorch_encoders_are_measured_and_pruned_as_with_simpler(family):
    wrapped, plain = families.wrapped(family), families.plain(family)
    images = [family.image(8, seed) for seed in range(4)]
    batches = [{"image": image} for image in images]
    kwargs = {"blocks": "vit_model.blocks"} if family.key == "by path" else {}
    expected, plan = choose(wrapped, batches), choose(plain, batches, **kwargs)
    assert plan.kept_blocks == expected.kept_blocks
    np.testing.assert_allclose(plan.similarity, expected.similarity, atol=1e-5)
    assert plan.parameters["before"] == expected.parameters["before"]
    depth = max(3, family.fewest)
    assert prune(plain, depth) == prune(wrapped, depth) == list(range(depth))
    assert wrapped.num_blocks == depth
    with torch.no_grad():
        with random_state_kept(0):  # TiM samples the tokens of its further modalities
            features = plain(images[0])
        with random_state_kept(0):
            like = wrapped(images[0])
    for ours, theirs in zip(_leaves(features[-1]), _leaves(like[-1]), strict=True):
        torch.testing.assert_close(ours, theirs)


def _leaves(value):
    return list(value.values()) if isinstance(value, dict) else [value]


def test_a_simpler_backbone_inside_a_model_keeps_its_decoder_working(task):
    model = task().model.eval()
    plan = choose(model, batched(land(64)))
    assert plan.backbone == "prithvi_eo_v2_tiny_tl"
    assert prune(model, plan) == list(plan.kept_blocks)
    assert model.encoder.plan == plan
    with torch.no_grad():
        assert model(land(2)).output.shape == (2, 6, 64, 64)
    with pytest.raises(DepthError, match="was pruned already"):
        choose(model, batched(land(64)))


@pytest.mark.filterwarnings(
    "ignore::terratorch_simpler.errors.UntrainedEncoderWarning", "ignore::terratorch_simpler.errors.FewTilesWarning"
)
def test_plan_is_that_of_the_callback(trainer, task, datamodule, tmp_path, monkeypatch):
    monkeypatch.setattr(token_sampling, "ROWS_PER_TILE", 5)  # of 16 patches, so that the seed counts
    module, data = task(), datamodule()
    plain = copy.deepcopy(module.model.encoder.encoder)
    simpler = copy.deepcopy(module.model.encoder)
    run = trainer(SimplerCallback(seed=3), limit_train_batches=1, limit_val_batches=0)
    run.fit(module, datamodule=data)
    callback = SlimmingPlan.load(tmp_path / "simpler" / "plan.json")

    source = terratorch_simpler.data.DatamoduleTiles(data, 3)
    normalised = batch_normalizer(run, simpler, source)
    batches = [{**batch, **normalised({"image": batch["image"]})} for batch in source]
    for model in (plain, simpler):
        plan = select_depth(model, batches, seed=3, progress=False)
        assert plan.kept_blocks == callback.kept_blocks
        np.testing.assert_allclose(plan.similarity, callback.similarity, rtol=0, atol=1e-6)
        assert (plan.tiles_seen, plan.rows_seen) == (callback.tiles_seen, callback.rows_seen)
        assert plan.votes == callback.votes
        assert plan.macs == callback.macs
        assert plan.parameters == callback.parameters


# --- the package


@pytest.mark.parametrize("name", terratorch_simpler.__all__)
def test_every_public_name_is_there(name):
    assert getattr(terratorch_simpler, name) is not None


def test_all_errors_and_criteria_are_public():
    from terratorch_simpler import criteria, errors

    named = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    named |= {
        rule.__name__ for rule in criteria.known_criteria().values() if rule.__module__.startswith("terratorch_simpler.")
    }
    assert named <= set(terratorch_simpler.__all__)
    assert terratorch_simpler.register_criterion is criteria.register


def test_the_page_runs():
    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    state = torch.get_rng_state()
    names = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "python.md", "exec"), names)
    torch.set_rng_state(state)
    assert names["kept"] == list(range(names["plan"].depth))
    arguments = set(inspect.signature(select_depth).parameters) - {"model", "batches"}
    assert {
        name for row in re.findall(r"^\| (`.*?) \| ", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    } >= arguments


def test_images_without_a_pixel_do_not_use_up_max_tiles():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=6, embed_dim=24, num_heads=2)
    images = land(256, size=32)[:, :3].clone()
    images[::2] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = select_depth(model, images.split(16), min_tiles=96, max_tiles=96, progress=False)
    assert plan.tiles_seen == 96
    assert plan.data["skipped"]["nodata"] >= 96


@pytest.mark.parametrize("frames", [0, 3])
def test_a_mask_counts_for_all_frames(frames):
    shape = (2, 4, frames, 8, 8) if frames else (2, 4, 8, 8)
    image, mask = torch.zeros(shape), torch.ones(2, 8, 8, dtype=torch.bool)
    mask[0, :4] = False
    (batch,) = BatchTiles([{"image": image, "valid": mask}], 2, 1)
    assert batch["valid"].shape == ((2, frames, 8, 8) if frames else (2, 8, 8))
    assert torch.equal(batch["valid"].flatten(0, -3)[0], mask[0])
    assert torch.equal(batch["valid"][1], torch.ones_like(batch["valid"][1]))
    with pytest.raises(TilesError, match=r"a mask 'valid' of shape \(2, 4, 4\), expected \(2,"):
        list(BatchTiles([{"image": image, "valid": mask[:, :4, :4]}], 2, 1))


def test_blocks_that_a_configuration_names_are_renumbered(tmp_path):
    """VitDet says which blocks have windows; a saved model is built from what it says."""
    transformers = pytest.importorskip("transformers")
    config = transformers.VitDetConfig(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=2, image_size=32, patch_size=8,
        window_block_indices=[0, 1, 3, 4], window_size=2, residual_block_indices=[],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.VitDetModel(config).eval()
    prune(model, [0, 2, 5])
    assert model.config.window_block_indices == [0]
    model.save_pretrained(tmp_path)
    again = transformers.VitDetModel.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images).last_hidden_state, again(images).last_hidden_state)
