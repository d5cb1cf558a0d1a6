"""The source `simpler` in TerraTorch's registry, and what importing the package leaves as it was."""

import subprocess
import sys

import pytest
import timm
import torch
import yaml
from terratorch.models import peft_utils
from terratorch.registry import BACKBONE_REGISTRY, MODEL_FACTORY_REGISTRY, TERRATORCH_BACKBONE_REGISTRY
from terratorch.tasks import SemanticSegmentationTask

from terratorch_simpler import cli
from terratorch_simpler.encoders import spec_of
from terratorch_simpler.errors import UnsupportedEncoderError
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.terratorch.factories import WITHOUT_REGISTRY
from tests.cli_runner import Command, config
from tests.extras import needs_peft

SIMPLER = BACKBONE_REGISTRY["simpler"]


class Late(dict):
    """A source registered after ours."""

    def build(self, name, **kwargs):
        return self[name](**kwargs)


@pytest.fixture
def late(monkeypatch):
    sources = type(BACKBONE_REGISTRY._sources)(BACKBONE_REGISTRY._sources)
    monkeypatch.setattr(BACKBONE_REGISTRY, "_sources", sources)
    source = Late(a_new_cnn=lambda **_: torch.nn.Conv2d(3, 8, 3))
    BACKBONE_REGISTRY.register_source("late", source)
    return source


def test_plain_names_go_to_the_source_that_knows_them(late):
    assert isinstance(BACKBONE_REGISTRY.build("a_new_cnn"), torch.nn.Conv2d)
    assert isinstance(BACKBONE_REGISTRY.build("late_a_new_cnn"), torch.nn.Conv2d)
    assert BACKBONE_REGISTRY.find_registry("a_new_cnn") is late
    assert BACKBONE_REGISTRY.find_class("a_new_cnn") is late["a_new_cnn"]
    assert "a_new_cnn" in BACKBONE_REGISTRY
    assert "simpler_a_new_cnn" in BACKBONE_REGISTRY  # known only once it is built
    with pytest.raises(UnsupportedEncoderError, match="Found an encoder of class Conv2d"):
        BACKBONE_REGISTRY.build("simpler_a_new_cnn")


def test_an_error_of_a_constructor_is_seen_as_it_is(monkeypatch):
    calls = []

    def broken_encoder(**kwargs):
        calls.append(kwargs)
        raise KeyError("a band nobody knows")

    monkeypatch.setitem(TERRATORCH_BACKBONE_REGISTRY._registry, "broken_encoder", broken_encoder)
    with pytest.raises(KeyError, match="a band nobody knows"):
        BACKBONE_REGISTRY.build("simpler_broken_encoder", pretrained=False)
    assert calls == [{"pretrained": False}]
    with pytest.raises(Exception, match="The model broken_encoder could not be instantiated"):  # TerraTorch's own words
        BACKBONE_REGISTRY.build("broken_encoder")
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["prithvi_eo_v2_tiny_tl", "terratorch_prithvi_eo_v2_tiny_tl", "timm_vit_tiny_patch16_224"])
def test_the_class_of_a_name_builds_it(name):
    constructor = BACKBONE_REGISTRY.find_class(f"simpler_{name}")
    assert isinstance(constructor(pretrained=False, keep=2), SimplerBackbone)


def test_the_class_of_a_name_that_cannot_be_built():
    with pytest.raises(KeyError, match="no_such_backbone"):
        BACKBONE_REGISTRY.find_class("simpler_no_such_backbone")
    with pytest.raises(UnsupportedEncoderError, match="hierarchical"):
        BACKBONE_REGISTRY.find_class("simpler_timm_resnet50")


@pytest.mark.parametrize(
    "name",
    ["timm_resnet50", "timm_cait_s24_224", "timm_vgg11", "prithvi_swin_B", "UNet", "terramind_v1_tokenizer_dem", "none"],
)
def test_what_is_refused_is_no_member(name):
    assert f"simpler_{name}" not in BACKBONE_REGISTRY


def test_members_are_what_is_listed():
    listed = [name.removeprefix("simpler_") for name in BACKBONE_REGISTRY if name.startswith("simpler_")]
    assert len(listed) == len(SIMPLER) == len(set(listed))
    assert {"terratorch_prithvi_eo_v2_300", "timm_vit_base_patch16_224", "timm_clay_v1_base"} <= set(listed)
    known = set(timm.list_models()) | set(TERRATORCH_BACKBONE_REGISTRY)
    for name in listed[::20]:
        assert name in SIMPLER
        assert name.partition("_")[2] in known
        assert callable(SIMPLER[name])
    refused = {name for source in ("terratorch", "timm") for name in map(f"{source}_{{}}".format, BACKBONE_REGISTRY[source])}
    for name in sorted(refused - set(listed))[::40]:
        assert f"simpler_{name}" not in BACKBONE_REGISTRY
        with pytest.raises(UnsupportedEncoderError):
            BACKBONE_REGISTRY.find_class(f"simpler_{name}")


def test_one_listed_name_of_every_kind_of_timm_can_be_cut():
    kinds = {}
    for name in SIMPLER:
        model = name.removeprefix("timm_")
        if name.startswith("timm_") and model != "clay_v1_base":
            kinds.setdefault((timm.model_entrypoint(model).__module__, model.partition("_")[0]), model)
    assert len(kinds) > 5
    for model in kinds.values():
        with torch.device("meta"):
            spec_of(BACKBONE_REGISTRY["timm"].build(model, pretrained=False))


# --- factories


def test_every_factory_of_terratorch_is_looked_at():
    by_registry = {"EncoderDecoderFactory", "ObjectDetectionModelFactory", "GenericModelFactory"}
    no_backbone = {"FullModelFactory"}
    assert set(MODEL_FACTORY_REGISTRY) - by_registry - no_backbone <= WITHOUT_REGISTRY


@pytest.fixture
def other_factory(scenes, tmp_path):
    def make(factory):
        settings = config(scenes, tmp_path)
        settings["model"]["init_args"]["model_factory"] = factory
        settings["model"]["init_args"]["model_args"]["backbone"] = "simpler_timm_vit_tiny_patch16_224"
        return settings

    return make


@pytest.mark.parametrize("factory", sorted(WITHOUT_REGISTRY))
def test_other_factories_are_refused_by_our_commands(other_factory, factory, tmp_path, capsys):
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(other_factory(factory)))
    assert cli.main(["plan", "-c", str(tmp_path / "old.yaml")]) == 2
    said = capsys.readouterr().err
    assert f"Found model_factory {factory} with backbone 'simpler_timm_vit_tiny_patch16_224', expected" in said
    assert "set model_factory: EncoderDecoderFactory." in said


@pytest.mark.parametrize("factory", ["ClayModelFactory", "TimmModelFactory"])
def test_other_factories_are_refused_by_fit(other_factory, factory, tmp_path):
    run = Command(tmp_path / "run", other_factory(factory))
    assert run.wait() == [1]
    assert f"SettingsError: Found model_factory {factory}" in run.output()


# --- importing


def test_importing_the_package_leaves_terratorchs_classes_alone():
    code = (
        "from terratorch.models import peft_utils; before = dict(vars(peft_utils));"
        "import terratorch_simpler, terratorch_simpler.lightning.callback;"
        "assert vars(peft_utils) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_peft
@pytest.mark.filterwarnings("ignore:You are using PEFT without a pretrained backbone")
def test_lora_on_heads_that_are_narrow_at_build():
    host = peft_utils.QKVSep
    lora = {"method": "LORA", "replace_qkv": "qkv", "peft_config_kwargs": {"target_modules": ["q_linear"], "r": 2}}
    for width in (1.0, 0.5):
        model_args = {
            "backbone": "simpler_prithvi_eo_v2_tiny_tl", "backbone_pretrained": False, "backbone_width": width,
            "backbone_keep": 2, "decoder": "FCNDecoder", "num_classes": 2, "peft_config": lora,
        }  # fmt: skip
        task = SemanticSegmentationTask(model_factory="EncoderDecoderFactory", model_args=model_args).eval()
        split = next(part for part in task.modules() if isinstance(part, host))
        assert (type(split) is host) == (width == 1)
        assert split.q_linear.base_layer.weight.shape == (192 * width, 192)
        assert task(torch.zeros(1, 6, 64, 64)).output.shape == (1, 2, 64, 64)
        assert peft_utils.QKVSep is host


def test_walks_that_end_in_any_order_leave_terratorchs_class_alone(build):
    host = peft_utils.QKVSep
    backbone = build(width=0.5, keep=2)
    walks = [backbone.named_modules() for _ in range(3)]
    for walk in walks:
        assert next(name for name, _ in walk if name.endswith(".qkv"))
    for walk in walks:
        walk.close()
    assert peft_utils.QKVSep is host
    next(name for name, _ in backbone.named_modules() if name.endswith(".qkv"))
    assert peft_utils.QKVSep is host
    left = backbone.named_modules()  # left where it is, as in a traceback that somebody keeps
    assert next(name for name, part in left if part is backbone.blocks)
    assert peft_utils.QKVSep is host


def test_names_are_known_whatever_is_imported_first():
    """One of our modules that imports TerraTorch comes first, after somebody has only looked whether TerraTorch is there."""
    code = (
        "import terratorch_simpler, importlib.util, sys\n"
        "assert importlib.util.find_spec('terratorch') is not None and 'terratorch' not in sys.modules\n"
        "from terratorch_simpler.models.backbone import SimplerBackbone\n"
        "from terratorch.registry import BACKBONE_REGISTRY\n"
        "assert 'simpler_prithvi_eo_v2_tiny_tl' in BACKBONE_REGISTRY and 'prithvi_eo_v2_tiny_tl' in BACKBONE_REGISTRY\n"
        "assert isinstance(BACKBONE_REGISTRY.build('simpler_prithvi_eo_v2_tiny_tl', pretrained=False), SimplerBackbone)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_argument_of_timm_that_begins_like_one_of_ours_is_no_typo():
    name = "simpler_timm_vit_tiny_patch16_224"
    backbone = BACKBONE_REGISTRY.build(name, pretrained=False, pretrained_cfg="augreg_in21k")
    assert backbone.num_blocks == 12
