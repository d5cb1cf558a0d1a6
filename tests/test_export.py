"""Out again to plain TerraTorch: settings, weights, a process without this package; ONNX and torch.export."""

import subprocess
import sys
import types
from contextlib import nullcontext

import pytest
import terratorch.tasks
import torch
import yaml
from lightning.pytorch.callbacks import StochasticWeightAveraging
from packaging.version import Version
from terratorch.tasks import (
    ClassificationTask,
    ObjectDetectionTask,
    PixelwiseRegressionTask,
    ScalarRegressionTask,
    SemanticSegmentationTask,
)
from torch import nn

from terratorch_simpler import SlimmingPlan, cli
from terratorch_simpler.errors import (
    CheckpointError,
    ComparisonError,
    ConfigurationError,
    ExportError,
    NotCarriedError,
    SimplerWarning,
)
from terratorch_simpler.export import Trained, export_graph, export_plain, load_trained, plain
from terratorch_simpler.export.outputs import ROUNDING, Comparison, difference, find_comparison, outputs_of
from tests.extras import needs_onnx, needs_peft
from tests.families import FAMILIES, wrapped

TINY = "simpler_prithvi_eo_v2_tiny_tl"
SELECT = {"name": "SelectIndices", "indices": [2, 5, 8, 11]}
RESHAPE = {"name": "ReshapeTokensToImage"}
PYRAMID = {"name": "LearnedInterpolateToPyramidal"}
NECKS = [SELECT, RESHAPE, PYRAMID]
UNET = {"decoder": "UNetDecoder", "decoder_channels": [16, 8, 8, 4], "num_classes": 3}
LORA = {
    "method": "LORA",
    "replace_qkv": "qkv",
    "peft_config_kwargs": {"target_modules": ["q_linear", "v_linear", "mlp.fc1"], "r": 4, "lora_alpha": 4},
}

STACKS = {
    "unet": {"backbone": TINY, "necks": NECKS, **UNET},
    "upernet": {
        "backbone": TINY, "necks": NECKS, "decoder": "UperNetDecoder", "decoder_channels": 16, "num_classes": 3,
    },
    "no necks": {"backbone": TINY, "decoder": "FCNDecoder", "decoder_channels": 16, "num_classes": 3},
    "smp": {"backbone": TINY, "necks": NECKS, "decoder": "smp_Unet", "decoder_decoder_channels": [8, 8, 4],
            "num_classes": 3},
    "out_indices": {"backbone": TINY, "backbone_out_indices": [2, 5, 8, -1], "necks": NECKS[1:], **UNET},
    "backbone_kwargs": {"backbone": TINY, "backbone_kwargs": {"bands": ["RED", "GREEN"]}, "necks": NECKS, **UNET},
    "visual prompts": {"backbone": TINY, "backbone_vpt": True, "backbone_vpt_n_tokens": 3, "necks": NECKS, **UNET},
    "lora": {"backbone": TINY, "necks": NECKS, "peft_config": LORA, **UNET},
    "temporal": {
        "backbone": TINY, "backbone_use_temporal": True, "backbone_temporal_pooling": "concat",
        "backbone_temporal_n_timestamps": 3, "necks": NECKS, **UNET,
    },
    "frames": {
        "backbone": TINY, "backbone_num_frames": 3, "necks": [SELECT, {**RESHAPE, "effective_time_dim": 3}, PYRAMID], **UNET,
    },
    "timm": {
        "backbone": "simpler_timm_vit_tiny_patch16_224", "backbone_out_indices": [2, 5, 8, 11], "necks": [PYRAMID], **UNET,
    },
    "eva": {
        "backbone": "simpler_timm_vit_small_patch16_dinov3", "backbone_out_indices": [2, 5, 8, 11], "backbone_embed_dim": 48,
        "backbone_num_heads": 3, "necks": [PYRAMID], **UNET,
    },
    "beit": {
        "backbone": "simpler_timm_beit_base_patch16_224", "backbone_out_indices": [2, 5, 8, 11], "backbone_embed_dim": 48,
        "backbone_num_heads": 3, "necks": [PYRAMID], **UNET,
    },
    "torchgeo": {
        "backbone": "simpler_ssl4eos12_vit_small_patch16_224_sentinel2_all_dino", "backbone_model_bands": ["RED", "GREEN"],
        "necks": [SELECT, PYRAMID], **UNET,
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:You are using PEFT without a pretrained backbone")
@pytest.mark.parametrize("stack", [pytest.param(name, marks=needs_peft if name == "lora" else ()) for name in STACKS])
@pytest.mark.parametrize("kept", [range(5), [3, 11]], ids=["five", "two"])
def test_plain_model_answers_alike(trained, in_process, tmp_path, stack, kept):
    task, config, checkpoint = trained(kept, **STACKS[stack])
    loaded = load_trained(config, checkpoint)
    images = loaded.example()
    config_file, weights, gap = export_plain(loaded, config, tmp_path / "plain")
    assert 0 < gap <= 1e-5 if stack == "lora" else gap == 0
    written = yaml.safe_load(config_file.read_text())
    assert "simpler" not in config_file.read_text()
    assert written["trainer"] == {"max_epochs": 1, "callbacks": []}
    assert (written["model"]["init_args"]["model_args"]["backbone"]) == STACKS[stack]["backbone"].removeprefix("simpler_")
    # and as the task that was trained
    fresh = SemanticSegmentationTask(**written["model"]["init_args"])
    fresh.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])
    for found, expected in zip(outputs_of(fresh.eval(), images), outputs_of(task, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if stack == "lora" else 0)


def test_plain_vit_adapter_has_its_ranges(trained, in_process, tmp_path):
    family = next(family for family in FAMILIES if family.key == "prithvi vit_adapter")
    settings = {f"backbone_{key}": value for key, value in family.kwargs.items()}
    with family.before():
        _, config, checkpoint = trained(backbone=f"simpler_{family.name}", **settings, **UNET)
        config_file, _, gap = export_plain(load_trained(config, checkpoint), config, tmp_path / "plain")
    assert gap == 0
    args = yaml.safe_load(config_file.read_text())["model"]["init_args"]["model_args"]
    assert args["backbone_depth"] == 5
    assert args["backbone_interaction_indexes"] == [[0, 1], [2, 2], [3, 3], [4, 4]]


def test_indices_are_mapped_where_they_are(trained, in_process, tmp_path):
    _, config, checkpoint = trained(**STACKS["unet"])
    config_file, *_ = export_plain(load_trained(config, checkpoint), config, tmp_path)
    args = yaml.safe_load(config_file.read_text())["model"]["init_args"]["model_args"]
    assert args["backbone_depth"] == 5
    assert args["necks"] == [{"name": "SelectIndices", "indices": [1, 2, 3, 4]}, RESHAPE, PYRAMID]
    assert args["backbone_pretrained"] is False


def test_classification_gets_a_neck_in_front(trained, in_process, tmp_path):
    necks = [{"name": "AggregateTokens", "pooling": "cls", "indices": [3]}]
    _, config, checkpoint = trained(
        task=ClassificationTask, backbone=TINY, necks=necks, decoder="IdentityDecoder", num_classes=3
    )
    config_file, _, gap = export_plain(load_trained(config, checkpoint), config, tmp_path / "plain")
    assert gap == 0
    args = yaml.safe_load(config_file.read_text())["model"]["init_args"]["model_args"]
    assert args["necks"] == [{"name": "SelectIndices", "indices": [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]}, *necks]


def test_checkpoint_of_a_model_built_from_a_plan_that_is_gone(trained, in_process, tmp_path):
    plan = SlimmingPlan("prithvi_eo_v2_tiny_tl", 12, (0, 1, 2), {"name": "fixed", "args": {}}).save(tmp_path / "plan.json")
    _, config, checkpoint = trained(None, **STACKS["unet"], backbone_plan=str(plan))
    plan.unlink()
    config_file, *_ = export_plain(load_trained(config, checkpoint), config, tmp_path / "plain")
    args = yaml.safe_load(config_file.read_text())["model"]["init_args"]["model_args"]
    assert args["backbone_depth"] == 3
    assert "backbone_plan" not in args


def test_learned_necks_keep_their_weights_behind_a_neck_in_front(trained, in_process, tmp_path):
    stack = {**STACKS["out_indices"], "backbone_out_indices": [0, 1, 6, 11]}
    _, config, checkpoint = trained([0, 9, 10], **stack)
    _, weights, gap = export_plain(load_trained(config, checkpoint), config, tmp_path / "plain")
    assert gap == 0
    assert any(key.startswith("model.neck.2.") for key in torch.load(weights, weights_only=True)["state_dict"])


def detection():
    bands = ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"]
    return {
        "task": ObjectDetectionTask, "factory": "ObjectDetectionModelFactory", "backbone": TINY, "backbone_bands": bands,
        "necks": [*NECKS, {"name": "FeaturePyramidNetworkNeck"}], "framework": "faster-rcnn", "num_classes": 3,
    }  # fmt: skip


@pytest.mark.parametrize("stack", [pytest.param("lora", marks=needs_peft), "detection"])
@pytest.mark.filterwarnings("ignore:You are using PEFT without a pretrained backbone")
def test_a_process_without_this_package_answers_alike(trained, tmp_path, capsys, stack):
    _, config, checkpoint = trained(range(4), **(detection() if stack == "detection" else STACKS[stack]))
    if stack == "detection":  # whose factory has no default
        hparams = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
        config["model"]["init_args"] = {key: hparams[key] for key in ("model_factory", "model_args")}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    arguments = ["-c", str(tmp_path / "fit.yaml"), "--ckpt_path", str(checkpoint), "-o", str(tmp_path / "plain")]
    assert cli.main(["export", *arguments]) == 0
    said = capsys.readouterr().out
    lines = [line.removeprefix(str(tmp_path / "plain")) for line in said.splitlines() if str(tmp_path / "plain") in line]
    assert [line.partition(" ")[0] for line in lines] == ["/model.ckpt", "/config.yaml", "/README.md"]
    assert "(outputs differ by at most" in lines[0]
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["README.md", "config.yaml", "model.ckpt"]


def test_the_other_process_really_cannot_import_us(tmp_path):
    # The script itself: with a config that needs us, it fails.
    model = {
        "class_path": "terratorch.tasks.SemanticSegmentationTask",
        "init_args": {"model_factory": "EncoderDecoderFactory", "model_args": STACKS["unet"]},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": model}))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(plain.CHECK), str(config), "no.ckpt", "no.pt", "no.pt"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "could not be instantiated" in done.stderr


SCALAR = {"backbone": TINY, "necks": [{"name": "AggregateTokens", "pooling": "mean", "indices": [3]}]}
SMALL = {"backbone": TINY, "decoder": "FCNDecoder", "decoder_channels": 8, "decoder_num_convs": 1}


def edited(checkpoint, change):
    """The checkpoint, after a change to its contents."""
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, checkpoint)


def heads(state):
    """Weights of the head: those of its last layers."""
    return [state[key] for key in state if key.startswith("model.head.") and state[key].is_floating_point()]


@pytest.mark.parametrize("format_", ["plain", "pt2"])
def test_a_model_whose_output_is_constant_is_not_compared(trained, in_process, tmp_path, format_):
    _, config, checkpoint = trained([0], num_classes=2, **SMALL)
    edited(checkpoint, lambda content: [part.zero_() for part in heads(content["state_dict"]) if part.ndim > 1])
    loaded = load_trained(config, checkpoint)
    export = {"plain": lambda: export_plain(loaded, config, tmp_path / "out")}
    export["pt2"] = lambda: export_graph(loaded, "pt2", tmp_path / "out")
    with pytest.raises(ComparisonError, match=r"for different images that differ by .* the comparison would show nothing"):
        export[format_]()
    assert not (tmp_path / "out").exists()


def test_a_model_whose_output_is_nan_is_not_compared(trained, tmp_path):
    _, config, checkpoint = trained([0], num_classes=2, **SMALL)
    edited(checkpoint, lambda content: heads(content["state_dict"])[0].fill_(float("nan")))
    with pytest.raises(ComparisonError, match="Found NaN or infinity in the outputs of the trained model"):
        export_plain(load_trained(config, checkpoint), config, tmp_path / "out")


def test_a_model_whose_outputs_are_those_of_fresh_weights_is_not_compared(trained, monkeypatch, tmp_path):
    _, config, checkpoint = trained([0], num_classes=2, **SMALL)
    loaded = load_trained(config, checkpoint)
    alike = loaded.comparison().expected
    monkeypatch.setattr(plain, "_outputs_without_us", lambda *args: (alike, alike))
    with pytest.raises(ComparisonError, match="Found outputs of freshly initialised weights that differ by 0 of"):
        export_plain(loaded, config, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_images_are_searched_for_until_answers_differ():
    # Raw pixels: normalised images are all dark to this model.
    found = find_comparison(lambda images: (images > 50).float(), lambda scale: scale * torch.tensor([[1.0], [0.1]]))
    assert found.images.tolist() == [[100.0], [10.0]]
    with pytest.raises(ComparisonError, match=f"differ by 0 of the largest value, expected at least {ROUNDING:g}"):
        find_comparison(lambda images: images * 0 + 1, lambda scale: torch.tensor([[scale], [0.0]]))


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-4, 1e-5])
def test_no_constant_is_within_the_tolerance(spread):
    expected = torch.tensor([1.0, 1.0 - spread], dtype=torch.float64)
    tolerance = Comparison(None, [expected], spread).tolerance(1e-4, [expected - 1])
    assert all(difference([torch.full_like(expected, c)], [expected]) > 4 * tolerance for c in torch.linspace(0, 2, 401))
    assert difference([expected], [expected]) == 0 < tolerance


LEGITIMATE = {
    "two classes": (ClassificationTask, {**SCALAR, "decoder": "IdentityDecoder", "num_classes": 2}),
    "one number": (ScalarRegressionTask, {**SCALAR, "decoder": "IdentityDecoder", "num_outputs": 1}),
    "pixelwise number": (PixelwiseRegressionTask, SMALL),
}


@pytest.mark.parametrize("head", ["usual", "zero at first", "large bias"])
@pytest.mark.parametrize("kind", LEGITIMATE)
def test_trained_models_are_no_false_alarms(trained, in_process, tmp_path, kind, head):
    task, model_args = LEGITIMATE[kind]
    _, config, checkpoint = trained([0, 7], task=task, **model_args)

    def change(content):
        for part in heads(content["state_dict"]):
            if head == "zero at first":  # and after a few small steps
                part.mul_(1e-4)
            elif head == "large bias" and part.ndim == 1:
                part.add_(300.0)  # kelvin

    edited(checkpoint, change)
    assert export_plain(load_trained(config, checkpoint), config, tmp_path / "out")[2] == 0


def test_auxiliary_heads_are_compared(trained):
    necks = [{**SELECT}, RESHAPE]
    task, _, _ = trained([0], num_classes=2, **SMALL, necks=necks)
    assert len(outputs_of(task, torch.randn(1, 6, 64, 64))) == 1
    output = task.model(torch.randn(1, 6, 64, 64))
    output.auxiliary_heads = {"aux": output.output}
    assert len(outputs_of(lambda images: output, None)) == 2


class Detector(nn.Module):
    """Gives boxes whose score is high enough, as torchvision's do."""

    score_thresh = 0.05

    def forward(self, images):
        scores = images.mean((1, 2, 3)).sigmoid() / 100
        return [{"scores": score[score > self.score_thresh]} for score in scores.split(1)]


def test_detectors_answer_boxes_of_any_score():
    detector = Detector()
    images = torch.randn(2, 3, 4, 4)
    assert [part["scores"].numel() for part in detector(images)] == [0, 0]
    assert [part.numel() for part in outputs_of(detector, images)] == [1, 1]
    assert detector.score_thresh == 0.05


def fresh_head(state):
    for part in heads(state):
        part.normal_(std=0.02)


def fresh_weights(state):
    for part in state.values():
        if part.is_floating_point():
            part.normal_(std=0.02).abs_()


def swapped_blocks(state):
    for key in [key for key in state if ".encoder.blocks.0." in key]:
        other = key.replace(".blocks.0.", ".blocks.1.")
        state[key], state[other] = state[other], state[key]


def fresh_buffer(state):
    state[next(key for key in state if key.endswith("running_mean"))].zero_()


def lost_buffer(state):
    del state[next(key for key in state if key.endswith("running_mean"))]


@pytest.mark.parametrize("fault", [fresh_head, fresh_weights, swapped_blocks, fresh_buffer, lost_buffer])
def test_faults_of_the_export_are_seen(trained, in_process, monkeypatch, tmp_path, fault):
    _, config, checkpoint = trained([0, 7], **STACKS["unet"])
    means = next(key for key in torch.load(checkpoint, weights_only=True)["state_dict"] if key.endswith("running_mean"))
    edited(checkpoint, lambda content: content["state_dict"][means].normal_())

    class Faulty(nn.Module):
        def __init__(self, task):
            super().__init__()
            self.task = task

        def state_dict(self):
            state = {key: value.clone() for key, value in self.task.state_dict().items()}
            fault(state)
            return state

    unwrap = plain.unwrap
    monkeypatch.setattr(plain, "unwrap", lambda task: Faulty(unwrap(task)))
    expected = pytest.raises(RuntimeError, match="running_mean") if fault is lost_buffer else pytest.raises(
        ExportError, match="Found outputs of the plain model that differ by"
    )  # fmt: skip
    with expected:
        export_plain(load_trained(config, checkpoint), config, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c: c.update(sklearn_model_path="m.joblib", sklearn_fitted=True),
            "'sklearn_fitted', 'sklearn_model_path' in",
        ),
        (lambda c: c["hyper_parameters"].update(temperature=2.0), "'temperature' in the hyper_parameters"),
        (lambda c: c["state_dict"].update({"gate.weight": torch.ones(2)}), "'gate.weight' in the state_dict"),
        (
            lambda c: c.update(current_model_state={}, averaging_state={"n_averaged": torch.tensor(0)}),
            "of which WeightAveraging has averaged none yet",
        ),
        (
            lambda c: c.update(callbacks={"Own": {"ema": {k: v + 1 for k, v in c["state_dict"].items()}}}),
            "state of callback 'Own'",
        ),
    ],
    ids=["key", "argument", "tensor", "no average yet", "weights of a callback"],
)
def test_what_the_plain_model_would_lose_is_refused_by_name(trained, tmp_path, capsys, change, said):
    _, config, checkpoint = trained([0], num_classes=2, **SMALL)
    edited(checkpoint, change)
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    arguments = ["-c", str(tmp_path / "fit.yaml"), "--ckpt_path", str(checkpoint), "-o", str(tmp_path / "out")]
    assert cli.main(["export", *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(NotCarriedError):
        load_trained(config, checkpoint)


@pytest.mark.skipif(not hasattr(terratorch.tasks, "EmbeddingClassificationTask"), reason="TerraTorch has it since 1.2.13")
def test_estimators_beside_the_checkpoint_are_refused(trained, in_process, tmp_path):
    task = terratorch.tasks.EmbeddingClassificationTask
    decoder = {"decoder": "SklearnDecoder", "decoder_num_classes": 2, "num_classes": 2}
    _, config, checkpoint = trained([0, 7], task=task, **SCALAR, **decoder)
    with pytest.raises(NotCarriedError, match="Found 'sklearn_fitted', 'sklearn_model_path' in checkpoint"):
        load_trained(config, checkpoint)
    edited(checkpoint, lambda content: [content.pop(key) for key in ("sklearn_fitted", "sklearn_model_path")])
    with pytest.raises(ComparisonError, match="differ by 0 of the largest value"):  # an estimator that is not fitted
        export_plain(load_trained(config, checkpoint), config, tmp_path / "out")


def test_what_lightning_keeps_for_itself_is_left_out(trained, tmp_path):
    _, config, checkpoint = trained([0], num_classes=2, **SMALL)

    def change(content):
        swa = {"n_averaged": 0, "average_model_state": {k: v + 1 for k, v in content["state_dict"].items()}}
        content["callbacks"] = {"ModelCheckpoint": {"best_model_score": torch.tensor(1.0)}, "Averaging": swa}
        content["averaging_state"] = {"n_averaged": torch.tensor(3)}
        content["current_model_state"] = {k: v + 1 for k, v in content["state_dict"].items()}
        content.update(MixedPrecision={}, datamodule_hyper_parameters={}, optimizer_states=[{}], Own={"seen": 3})

    edited(checkpoint, change)
    own = {**config, "data": {"class_path": "my.package.Own"}}
    averages = torch.load(checkpoint, weights_only=True)["state_dict"]
    state = load_trained(own, checkpoint).task.state_dict()
    assert all(torch.equal(averages[key], value) for key, value in state.items())
    with pytest.raises(NotCarriedError, match="Found 'Own' in checkpoint"):
        load_trained(config, checkpoint)
    load_trained(config, checkpoint, known=["Own"])


class PassesOn(SemanticSegmentationTask):
    """A task that leaves its arguments to TerraTorch's."""

    def __init__(self, extra=1, **kwargs):
        super().__init__(**kwargs)


def test_arguments_that_a_task_passes_on_are_kept(trained):
    task, config, checkpoint = trained([0], task=PassesOn, num_classes=2, **SMALL)
    config["model"]["class_path"] = f"{__name__}.PassesOn"
    assert load_trained(config, checkpoint).hparams["model_args"] == task.hparams["model_args"]


def test_averages_that_lightning_keeps_aside_are_refused(trained, trainer, tmp_path):
    task, config, checkpoint = trained([0], **STACKS["unet"])
    averaging = StochasticWeightAveraging(swa_lrs=0.1)
    averaging.setup(trainer(), task, "fit")
    averaging.n_averaged = torch.tensor(2)
    state = averaging.state_dict()
    next(value for key, value in state["average_model_state"].items() if key.endswith("running_mean")).add_(1)
    edited(checkpoint, lambda content: content.update(callbacks={averaging.state_key: state}))
    load_trained(config, checkpoint)  # the averages are the weights, as after the fit; statistics are taken anew
    heads(state["average_model_state"])[0].add_(1)
    edited(checkpoint, lambda content: content.update(callbacks={averaging.state_key: state}))
    with pytest.raises(NotCarriedError, match="state of callback 'StochasticWeightAveraging' of checkpoint"):
        load_trained(config, checkpoint)


@pytest.mark.filterwarnings("ignore:You are using PEFT without a pretrained backbone")
@needs_peft
def test_adapters_that_cannot_be_folded_in_are_said(trained, monkeypatch):
    _, config, checkpoint = trained(**STACKS["lora"])
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.get_delta_weight", lambda self, adapter: self.weight * 0.01)
    with pytest.raises(ExportError, match=r"once the adapters are folded into the weights, expected at most 0\.0001"):
        load_trained(config, checkpoint)


def test_what_has_other_outputs_is_not_written(trained, monkeypatch, tmp_path):
    _, config, checkpoint = trained(**STACKS["unet"])
    monkeypatch.setattr(plain, "_outputs_without_us", lambda *args: ([torch.zeros(2, 3, 224, 224)], []))
    with pytest.raises(ExportError, match=r"differ by 1 of the largest value, expected at most 1e-05"):
        export_plain(load_trained(config, checkpoint), config, tmp_path / "plain")
    assert list((tmp_path / "plain").iterdir()) == []


def test_what_terratorch_cannot_build_is_not_written(trained, tmp_path):
    _, config, checkpoint = trained(**STACKS["unet"])
    broken = {**config, "data": {"class_path": "terratorch.datamodules.NoSuchDataModule"}}
    with pytest.raises(ExportError, match="Found that TerraTorch cannot build the model without this package"):
        export_plain(load_trained(config, checkpoint), broken, tmp_path / "plain")
    assert list((tmp_path / "plain").iterdir()) == []


def test_formats_are_written_together_or_not_at_all(trained, monkeypatch, tmp_path):
    _, config, checkpoint = trained(**STACKS["unet"])
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.pt2").write_text("of an earlier export")
    monkeypatch.setattr(plain, "_outputs_without_us", lambda *args: ([torch.zeros(2, 3, 224, 224)], []))
    arguments = ["-c", str(tmp_path / "fit.yaml"), "--ckpt_path", str(checkpoint), "-o", str(tmp_path / "out")]
    assert cli.main(["export", *arguments, "--formats", "pt2", "plain"]) == 1
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["of an earlier export"]


TERRAMIND = {"backbone": "simpler_terramind_v1_tiny", "backbone_modalities": ["S2L2A", "S1RTC"], "necks": NECKS, **UNET}


def test_family_the_host_cannot_express_is_one_clear_sentence(trained, tmp_path, capsys):
    _, config, checkpoint = trained(**TERRAMIND)
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    arguments = ["-c", str(tmp_path / "fit.yaml"), "--ckpt_path", str(checkpoint), "-o", str(tmp_path / "plain")]
    assert cli.main(["export", *arguments, "--formats", "onnx", "plain"]) == 2
    said = capsys.readouterr().err
    assert "Found 'terramind_v1_tiny' pruned to 5 of 12 blocks, expected an encoder whose depth TerraTorch can set" in said
    assert "onnx or pt2" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "plain").exists()


DOFA = {
    "backbone": "simpler_dofa_small_patch16_224", "backbone_model_bands": ["RED", "GREEN"], "decoder": "FCNDecoder",
    "decoder_channels": 16, "num_classes": 3, "necks": [RESHAPE],
}  # fmt: skip


@pytest.mark.parametrize("stack", [TERRAMIND, DOFA, STACKS["out_indices"], STACKS["timm"]], ids=lambda s: s["backbone"][8:])
def test_intact_encoder_of_any_family_can_be_expressed(trained, in_process, tmp_path, stack):
    _, config, checkpoint = trained(None, **stack)
    assert export_plain(load_trained(config, checkpoint), config, tmp_path / "plain")[2] == 0


@needs_onnx
@pytest.mark.parametrize("stack", ["unet", pytest.param("lora", marks=needs_peft), "modalities"])
@pytest.mark.filterwarnings("ignore:You are using PEFT without a pretrained backbone")
def test_graphs_answer_alike_for_any_number_of_images(trained, tmp_path, stack):
    import onnxruntime

    _, config, checkpoint = trained(**(TERRAMIND if stack == "modalities" else STACKS[stack]))
    loaded = load_trained(config, checkpoint)
    images = loaded.example(batch=3)
    images = tuple(images.values()) if isinstance(images, dict) else (images,)
    expected = outputs_of(loaded.task, loaded.example(batch=3))[0]
    program, gap = export_graph(loaded, "pt2", tmp_path)
    assert gap < 1e-5
    with torch.no_grad():
        found = torch.export.load(program).module()(*images)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()  # TerraTorch allows bfloat16 in products
    path, gap = export_graph(loaded, "onnx", tmp_path)
    assert gap < 1e-5
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    assert names == (["S2L2A", "S1RTC"] if stack == "modalities" else ["image"])
    found = torch.from_numpy(session.run(None, dict(zip(names, (i.numpy() for i in images), strict=True)))[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_without_the_extra_no_onnx_is_written(trained, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    monkeypatch.setitem(sys.modules, "onnxscript", types.ModuleType("onnxscript"))
    monkeypatch.setitem(sys.modules, package, None)  # as if not installed
    _, config, checkpoint = trained(**STACKS["unet"])
    with pytest.raises(ExportError, match=rf"There is no package {package}, .*: install terratorch-simpler\[onnx\]"):
        export_graph(load_trained(config, checkpoint), "onnx", tmp_path)
    assert not (tmp_path / "model.onnx").exists()


ANY_BATCH = Version(torch.__version__) >= Version("2.10")
"""Older versions tie this model's graph to the number of images."""


def one_image_at_a_time():
    return pytest.warns(SimplerWarning, match="expected any number: the graph takes one image at a time")


def test_graph_of_another_image_size(trained, tmp_path):
    _, config, checkpoint = trained(**STACKS["unet"])
    with nullcontext() if ANY_BATCH else one_image_at_a_time():
        path, _ = export_graph(load_trained(config, checkpoint), "pt2", tmp_path, size=96)
    batch = 5 if ANY_BATCH else 1
    with torch.no_grad():
        assert torch.export.load(path).module()(torch.zeros(batch, 6, 96, 96)).shape == (batch, 3, 96, 96)
    with one_image_at_a_time():
        path, _ = export_graph(load_trained(config, checkpoint), "pt2", tmp_path, size=100)  # TerraTorch pads to 128
    with torch.no_grad():
        assert torch.export.load(path).module()(torch.zeros(1, 6, 100, 100)).shape == (1, 3, 100, 100)


def test_detection_cannot_be_a_graph(trained, tmp_path):
    _, config, checkpoint = trained(range(4), **detection())
    with pytest.raises(ExportError, match="cannot be written as a graph; export it as plain"):
        export_graph(load_trained(config, checkpoint), "onnx", tmp_path)
    assert not (tmp_path / "model.onnx").exists()


def test_wrong_checkpoints_are_said(trained, tmp_path):
    _, config, checkpoint = trained(**STACKS["unet"])
    with pytest.raises(CheckpointError, match="There is no readable checkpoint at"):
        load_trained(config, tmp_path / "none.ckpt")
    content = checkpoint.read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="There is no readable checkpoint at"):
        load_trained(config, tmp_path / "half.ckpt")
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="There is no state_dict with hyper_parameters"):
        load_trained(config, tmp_path / "other.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    saved["hyper_parameters"]["model_args"]["backbone"] = "prithvi_eo_v2_tiny_tl"
    torch.save(saved, tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="the model is plain TerraTorch already"):
        load_trained(config, tmp_path / "plain.ckpt")
    saved["hyper_parameters"]["model_args"].update(backbone=TINY, num_classes=9)
    torch.save(saved, tmp_path / "classes.ckpt")
    with pytest.raises(CheckpointError, match="do not fit the model"):
        load_trained(config, tmp_path / "classes.ckpt")
    with pytest.raises(ConfigurationError, match=r"There is no model\.class_path"):
        load_trained({}, checkpoint)
    with pytest.raises(ConfigurationError, match=r"Found model\.class_path 'terratorch\.tasks\.Nothing'"):
        load_trained({"model": {"class_path": "terratorch.tasks.Nothing"}}, checkpoint)


def test_dinov3_is_loaded_without_the_file_it_was_trained_from(trained, tmp_path):
    family = next(family for family in FAMILIES if family.key == "dinov3")
    (tmp_path / "weights.pth").write_bytes(b"")
    with family.before():
        _, config, checkpoint = trained(
            [0, 1],
            backbone="simpler_dinov3_vits16",
            backbone_ckpt_path=str(tmp_path / "weights.pth"),
            decoder="FCNDecoder",
            decoder_channels=16,
            num_classes=3,
        )
        (tmp_path / "weights.pth").unlink()
        assert load_trained(config, checkpoint).backbone.kept == (0, 1)


class _Encoder(torch.nn.Module):
    """An encoder as a model."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        return types.SimpleNamespace(output=self.encoder(images)[-1])


class _Task(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)


@needs_onnx
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_graphs_of_every_family(family, tmp_path, monkeypatch, capfd):
    backbone = wrapped(family, keep=max(family.fewest, 2))
    loaded = Trained("a.Task", _Task(_Encoder(backbone)), {"model_args": {}}, {})
    monkeypatch.setattr(Trained, "example", lambda self, size=None, batch=2, scale=1.0: family.image(batch))
    if family.key == "by path":
        monkeypatch.undo()  # it does not tell its input
    for format_ in ("onnx", "pt2"):
        if format_ in family.graphs:
            assert export_graph(loaded, format_, tmp_path)[1] < 1e-5
        else:
            with pytest.raises(ExportError, match=r"cannot trace to|There is no input shape for"):
                export_graph(loaded, format_, tmp_path)
    assert backbone.terratorch_kwargs() is not None or not family.exports
