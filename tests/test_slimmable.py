"""One encoder trained at several widths: gradients of all in the same weights, and each of them usable afterwards."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from terratorch.cli_tools import LightningInferenceModel
from terratorch.tasks import SemanticSegmentationTask
from torch.utils.data import DataLoader

from terratorch_simpler import SimplerCallback, SlimmableTraining
from terratorch_simpler.cli import main
from terratorch_simpler.errors import CheckpointError, ConfigurationError
from terratorch_simpler.export.outputs import difference, outputs_of
from terratorch_simpler.functional.hsic import full_float32
from terratorch_simpler.lightning.callback import backbones_of
from terratorch_simpler.models.backbone import find_backbone
from terratorch_simpler.models.state import state_in
from terratorch_simpler.terratorch.config_width import keep_config_width
from tests.cli_runner import Command, config
from tests.extras import needs_peft

WIDTHS = [0.25, 0.5, 1.0]

pytestmark = pytest.mark.filterwarnings(
    "ignore::terratorch_simpler.errors.UntrainedEncoderWarning", "ignore::terratorch_simpler.errors.FewTilesWarning"
)


class Toy(LightningModule):
    """Regression on the last feature of an encoder; any task will do."""

    def __init__(self, backbone, lr=0.0):
        super().__init__()
        self.encoder, self.lr = backbone, lr
        self.head = torch.nn.Linear(backbone.out_channels[-1], 1)

    def forward(self, x):
        return self.head(self.encoder(x)[-1][:, 0])

    def training_step(self, batch, batch_idx):
        image, target = batch
        loss = torch.nn.functional.mse_loss(self(image), target)
        self.log("train/loss", loss)
        return {"loss": loss, "seen": len(image)}

    def validation_step(self, batch):
        image, target = batch
        self.log("val/loss", torch.nn.functional.mse_loss(self(image), target))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Gradients(Callback):
    """Keeps what the optimizer was given, step by step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})


@pytest.fixture
def toy(build):
    def make(**kwargs):
        return Toy(build("simpler_prithvi_eo_v2_tiny_tl", embed_dim=48, num_heads=3), **kwargs)

    return make


def batches(count=1, size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count * size, 6, 32, 32, generator=generator)
    targets = images.mean((1, 2, 3)).unsqueeze(1) * 10
    return DataLoader(list(zip(images, targets, strict=True)), batch_size=size)


def loss_at(module, width, batch):
    """Of a model that really is of that width."""
    narrow = copy.deepcopy(module)
    narrow.encoder.set_width(width)
    narrow.train()
    with full_float32():
        return narrow, torch.nn.functional.mse_loss(narrow(batch[0]), batch[1])


def test_a_step_adds_the_gradients_of_three_widths_in_the_same_weights(trainer, toy):
    module, seen = toy(), Gradients()
    reference = copy.deepcopy(module)
    with full_float32():
        trainer(SlimmableTraining(WIDTHS), seen).fit(module, batches())
    (found,) = seen.seen
    expected = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for width in WIDTHS:
        narrow, loss = loss_at(reference, width, next(iter(batches())))
        with full_float32():
            loss.backward()
        for name, parameter in narrow.named_parameters():
            if parameter.grad is None:
                continue
            whole = expected[name]
            if parameter.shape == whole.shape:
                whole += parameter.grad
                continue
            # Rows or columns: heads come apart in qkv and proj.
            apart = {"qkv": (3 * 3, 16), "proj": (3, 16), "fc1": (1, 192), "fc2": (1, 192)}[name.split(".")[-2]]
            columns = name.endswith(("proj.weight", "fc2.weight"))
            for target, part in [(whole.T, parameter.grad.T) if columns else (whole, parameter.grad)]:
                groups = target.reshape(*apart, -1)
                groups[:, : len(part) // apart[0]] += part.reshape(apart[0], -1, groups.shape[-1])
                target.copy_(groups.reshape(target.shape))
    unused = {name for name, value in expected.items() if not value.any()}
    assert all("embed_enc" in name for name in unused)  # scales of time and place, as in TerraTorch
    assert expected.keys() - unused == found.keys() - unused
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5 * float(expected[name].abs().max() + 1e-6)), name
    assert set(dict(module.named_parameters())) == set(dict(reference.named_parameters()))


def test_every_width_improves(trainer, toy):
    module = toy(lr=1e-3)
    losses = []

    class Losses(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            losses.append({name: float(value) for name, value in trainer.callback_metrics.items() if "val" in name})

    trainer(SlimmableTraining(WIDTHS), Losses(), max_epochs=6, num_sanity_val_steps=-1).fit(module, batches(4), batches(2))
    assert losses[0].keys() == {"val/loss", "val/loss_width_0.25", "val/loss_width_0.5"}
    for name in losses[0]:
        assert losses[-1][name] < 0.5 * losses[0][name], name
    # What validation has logged is what a model of that width answers.
    with torch.no_grad():
        for width in WIDTHS:
            narrow = copy.deepcopy(module).eval()
            narrow.encoder.set_width(width)
            values = [float(torch.nn.functional.mse_loss(narrow(image), target)) for image, target in batches(2)]
            name = "val/loss" if width == 1 else f"val/loss_width_{width:g}"
            assert losses[-1][name] == pytest.approx(sum(values) / 2, rel=1e-2)


def test_widths_in_between_are_drawn_from_the_seed(trainer, toy):
    def drawn(seed):
        slimmable = SlimmableTraining([0.2, 0.4, 0.6, 0.8, 1.0], seed=seed)
        return [slimmable._narrower_widths(batch) for batch in range(40)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert {tuple(widths) for widths in drawn(0)} == {(0.2, between) for between in (0.4, 0.6, 0.8)}
    assert SlimmableTraining([0.5, 1.0])._narrower_widths(3) == [0.5]


def test_metrics_and_logs_are_those_of_the_largest_width(trainer, task, datamodule):
    """With a learning rate of zero, all that is logged equals a run without the callback."""
    logged = []
    for callbacks in ([], [SlimmableTraining(WIDTHS)]):
        module = task(seed=1)
        module.hparams["lr"] = 0.0
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = 0.0  # running statistics of the decoder see all widths
        run = trainer(*callbacks, limit_train_batches=2, limit_val_batches=2)
        run.fit(module, datamodule=datamodule())
        logged.append({name: float(value) for name, value in run.logged_metrics.items()})
    plain, slim = logged
    assert slim.keys() - plain.keys() == {"val/loss_width_0.25", "val/loss_width_0.5"}
    assert {name: slim[name] for name in plain} == pytest.approx(plain, nan_ok=True)
    assert {name for name in plain if "val/" in name and "loss" not in name}  # TerraTorch's metrics are there
    assert vars(module).keys().isdisjoint({"training_step", "validation_step", "log", "log_dict", "plot_sample"})


@pytest.fixture
def trained(trainer, task, datamodule, tmp_path):
    """A short fit at several widths, cut in depth first; the task and its checkpoint."""
    module = task()
    saved = ModelCheckpoint(dirpath=tmp_path, filename="slim")
    callbacks = (SlimmableTraining(WIDTHS), SimplerCallback(max_depth=4), saved)
    run = trainer(*callbacks, enable_checkpointing=True, limit_train_batches=2, limit_val_batches=1)
    run.fit(module, datamodule=datamodule())
    return module.eval(), tmp_path / "slim.ckpt"


def images():
    return torch.randn(2, 6, 64, 64, generator=torch.Generator().manual_seed(1))


def answer_at(module, width):
    with module.model.encoder.at_width(width).applied():
        return outputs_of(module, images())


def test_depth_is_cut_first_and_checkpoints_can_be_used_at_each_width(trained, task, tmp_path):
    module, checkpoint = trained
    backbone = module.model.encoder
    assert backbone.num_blocks <= 4
    assert (backbone.width, backbone.trained_widths) == (1.0, (0.25, 0.5, 1.0))
    content = torch.load(checkpoint, weights_only=True)
    for width in WIDTHS:
        built = task(seed=3, backbone_width=width)
        built.load_state_dict(content["state_dict"], strict=True)
        assert built.model.encoder.pruned_state[:3] == (backbone.kept, 12, width)
        assert difference(outputs_of(built.eval(), images()), answer_at(module, width)) < 1e-6
        # From here on it is an encoder of that width like any other.
        again = task(seed=4)
        again.load_state_dict(built.state_dict(), strict=True)
        assert again.model.encoder.pruned_state == built.model.encoder.pruned_state
    with pytest.raises(CheckpointError, match=r"trained at widths 0.25, 0.5, 1 for .* of width 0.3, expected one of these"):
        task(backbone_width=0.3).load_state_dict(content["state_dict"])
    with pytest.raises(ConfigurationError, match=r"Found width 0.3 for weights that were trained at widths 0.25, 0.5, 1"):
        copy.deepcopy(backbone).set_width(0.3)
    loaded = SemanticSegmentationTask.load_from_checkpoint(checkpoint, weights_only=True).eval()
    assert difference(outputs_of(loaded, images()), outputs_of(module, images())) == 0


def test_export_writes_one_of_the_widths(trained, tmp_path, capsys):
    module, checkpoint = trained
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"model": {"class_path": "terratorch.tasks.SemanticSegmentationTask"}}))
    base = ["export", "-c", str(path), "--ckpt_path", str(checkpoint), "-o", str(tmp_path / "out")]
    assert main([*base, "--formats", "pt2", "--image_size", "64", "--width", "0.5"]) == 0
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    with torch.no_grad(), full_float32():
        assert difference([program(images())], answer_at(module, 0.5)) < 1e-4
    assert main([*base, "--width", "0.5"]) == 2
    assert "use --formats onnx or pt2" in capsys.readouterr().err
    assert main([*base, "--width", "0.3"]) == 2
    assert "trained at widths 0.25, 0.5, 1, expected one of these" in capsys.readouterr().err


def test_a_config_with_one_of_the_widths_predicts_at_it(trained, scenes, tmp_path):
    module, checkpoint = trained
    settings = config(scenes, tmp_path)
    arguments = {**module.hparams["model_args"], "backbone_width": 0.5}
    settings["model"]["init_args"]["model_args"] = arguments
    del settings["trainer"]["callbacks"], settings["optimizer"]
    (tmp_path / "deploy.yaml").write_text(json.dumps(settings))
    served = LightningInferenceModel.from_config(str(tmp_path / "deploy.yaml"), str(checkpoint))
    assert served.model.model.encoder.width == 0.5
    assert difference(outputs_of(served.model.eval(), images()), answer_at(module, 0.5)) < 1e-6


@pytest.mark.parametrize("form", ["prefix", "kwargs"])
@pytest.mark.parametrize(
    ("command", "backbone", "width", "kept"),
    [
        ("test", "simpler_prithvi", 0.5, 0.5),
        ("predict", "simpler_prithvi", 0.25, 0.25),
        ("validate", "simpler_prithvi", None, 1.0),
        ("fit", "simpler_prithvi", 0.5, 1.0),
        ("test", "prithvi", 0.5, 1.0),
    ],
)
def test_the_width_of_a_config_stays_when_the_checkpoint_replaces_the_rest(form, command, backbone, width, kept):
    def arguments(**values):
        if form == "kwargs":
            return {"backbone": backbone, "backbone_kwargs": {"bands": 6, **values}}
        return {"backbone": backbone, **{f"backbone_{key}": value for key, value in values.items()}}

    class CommandLine:
        def __init__(self, model_args):
            model = Namespace(class_path="a.Task", init_args=Namespace(model_args=model_args))
            self.config = Namespace({"subcommand": command, command: Namespace(model=model)})

        def _parse_ckpt_path(self):
            self.config[command].model.init_args.model_args = arguments(width=1.0, plan="plan.json", num_frames=2)

    keep_config_width(SimpleNamespace(LightningCLI=CommandLine))
    cli = CommandLine(arguments() if width is None else arguments(width=width))
    cli._parse_ckpt_path()
    replaced = {} if kept == width else {"plan": "plan.json"}
    assert cli.config[command].model.init_args.model_args == arguments(width=kept, num_frames=2, **replaced)


class TellsWidth(Callback):
    """Writes the width of the encoder that is used."""

    def __init__(self, path: str):
        self.path = path

    def tell(self, _trainer, pl_module):
        with open(self.path, "a") as file:
            file.write(f"{find_backbone(pl_module).width:g}\n")

    on_test_start = on_validation_start = on_predict_start = tell


def test_terratorch_evaluates_at_the_width_of_the_config(scenes, tmp_path):
    """Lightning's command line replaces all arguments of the model by those of the fit."""
    settings = config(scenes, tmp_path, max_depth=4)
    settings["trainer"].update(limit_train_batches=2, limit_val_batches=1, max_epochs=1)
    fitted = json.loads(json.dumps(settings))
    fitted["trainer"]["callbacks"].insert(
        1, {"class_path": "terratorch_simpler.SlimmableTraining", "init_args": {"widths": WIDTHS}}
    )
    fit = Command(tmp_path, fitted)
    assert fit.wait() == [0], fit.output()[-3000:]
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    tells = {"class_path": "tests.test_slimmable.TellsWidth", "init_args": {"path": str(tmp_path / "widths.txt")}}
    settings["trainer"].update(callbacks=[*settings["trainer"]["callbacks"], tells])
    settings["trainer"].update(limit_val_batches=1, limit_test_batches=1, limit_predict_batches=1)
    asked = json.loads(json.dumps(settings))
    asked["model"]["init_args"]["model_args"]["backbone_width"] = 0.5
    on_command_line = ["--model.init_args.model_args.backbone_width", "0.25"]
    for run, command, arguments in (
        (settings, "test", []),
        (asked, "test", []),
        (asked, "validate", on_command_line),
    ):
        folder = tmp_path / f"{command} {len(list(tmp_path.iterdir()))}"
        run["trainer"]["default_root_dir"] = str(folder)
        done = Command(folder, run, "--ckpt_path", str(checkpoint), *arguments, command=command)
        assert done.wait() == [0], done.output()[-3000:]
        deployed = (folder / "config_deploy.yaml").read_text()
        assert ("backbone_width: 0.5" in deployed) == (run is asked and not arguments)
    assert (tmp_path / "widths.txt").read_text().split() == ["1", "0.5", "0.25"]
    asked["model"]["init_args"]["model_args"]["backbone_width"] = 0.3
    refused = Command(tmp_path / "refused", asked, "--ckpt_path", str(checkpoint), command="test")
    assert refused.wait() == [1]
    assert "trained at widths 0.25, 0.5, 1 for" in " ".join(refused.output().split())


def test_a_run_goes_on_at_all_widths(trained, trainer, task, datamodule):
    _, checkpoint = trained
    module = task(seed=5)
    run = trainer(SimplerCallback(), SlimmableTraining(WIDTHS), max_epochs=2, limit_train_batches=2, limit_val_batches=1)
    run.fit(module, datamodule=datamodule(), ckpt_path=checkpoint)
    assert run.global_step == 4
    assert module.model.encoder.trained_widths == (0.25, 0.5, 1.0)


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_accumulation_and_precision(trainer, task, datamodule, options):
    module = task(backbone_keep=3)
    run = trainer(SlimmableTraining(WIDTHS), limit_train_batches=4, limit_val_batches=1, **options)
    run.fit(module, datamodule=datamodule())
    assert run.global_step == (2 if "accumulate_grad_batches" in options else 4)
    assert all(torch.isfinite(value) for value in run.logged_metrics.values())
    assert module.model.encoder.pruned_state.trained_widths == (0.25, 0.5, 1.0)


def test_averaged_weights(trainer, task, datamodule):
    module = task(backbone_keep=3)
    callbacks = (SlimmableTraining(WIDTHS), EMAWeightAveraging(decay=0.5))
    trainer(*callbacks, limit_train_batches=2, limit_val_batches=1).fit(module, datamodule=datamodule())
    assert all(torch.isfinite(p).all() for p in module.parameters())
    with pytest.raises(ConfigurationError, match=r"Found EMAWeightAveraging, .* list SlimmableTraining first"):
        trainer(EMAWeightAveraging(), SlimmableTraining(WIDTHS)).fit(task(), datamodule=datamodule())


@pytest.mark.filterwarnings("ignore:You are using PEFT without a pretrained backbone")
@needs_peft
def test_adapters_are_trained_at_all_widths(trainer, task, datamodule):
    kwargs = {"target_modules": ["q_linear", "v_linear", "mlp.fc1"], "r": 4}
    module = task(backbone_keep=3, peft_config={"method": "LORA", "replace_qkv": "qkv", "peft_config_kwargs": kwargs})
    trainer(SlimmableTraining(WIDTHS), limit_train_batches=3, limit_val_batches=1).fit(module, datamodule=datamodule())
    changed = [p for name, p in module.named_parameters() if "lora_B" in name]
    assert len(changed) == 9
    assert all(p.abs().sum() > 0 for p in changed)


def test_a_task_gets_its_steps_back_after_an_error(trainer, toy):
    class Stop(Callback):
        def on_train_batch_end(self, *args):
            raise ValueError("stopped")

    module = toy()
    for _ in range(2):
        with pytest.raises(ValueError, match="stopped"):
            trainer(SlimmableTraining(WIDTHS), Stop()).fit(module, batches(), batches())
        assert vars(module).keys().isdisjoint({"training_step", "validation_step"})


def test_two_processes_train_the_same_weights(scenes, tmp_path):
    settings = config(scenes, tmp_path, max_depth=4)
    settings["trainer"].update(max_epochs=1, limit_train_batches=2)
    settings["trainer"]["callbacks"].insert(
        1, {"class_path": "terratorch_simpler.SlimmableTraining", "init_args": {"widths": [0.3, 1.0]}}
    )
    command = Command(tmp_path, settings, ranks=2)
    assert command.wait() == [0, 0], command.output()
    first, second = (json.loads((tmp_path / f"trained.{rank}.json").read_text()) for rank in range(2))
    assert first["weights"] == second["weights"]
    assert any(name.endswith("_extra_state") for name in first["weights"])


@pytest.mark.parametrize("widths", [[], [0.5], [0.5, 0.5], [0.5, 0.5, 1.0]])
def test_several_widths_are_needed(widths):
    with pytest.raises(ConfigurationError, match=r"Found widths .*, expected at least two and each only once"):
        SlimmableTraining(widths)


@pytest.mark.parametrize("widths", [[0, 1], [0.5, 2], ["auto", 1.0]])
def test_what_is_no_width_is_refused(widths):
    with pytest.raises(ConfigurationError, match=r"Found width .*, expected a number above 0 and at most 1"):
        SlimmableTraining(widths)


def test_the_largest_width_is_that_of_the_encoder(trainer, task, datamodule):
    with pytest.raises(ConfigurationError, match=r"Found widths up to 1 for an encoder of width 0.5, expected its own"):
        trainer(SlimmableTraining(WIDTHS)).fit(task(backbone_keep=3, backbone_width=0.5), datamodule=datamodule())


def test_sharded_weights_are_refused(trainer, task, datamodule, monkeypatch):
    run = trainer(SlimmableTraining(WIDTHS))
    monkeypatch.setattr(type(run), "strategy", FSDPStrategy())
    with pytest.raises(ConfigurationError, match="Found strategy FSDPStrategy, expected one that keeps weights whole"):
        run.callbacks[0].setup(run, task(), "fit")


def test_averaged_weights_of_a_run_that_resumes_say_their_widths(task, datamodule, tmp_path):
    def fit(seed, epochs, first, **kwargs):
        module = task(seed=seed, backbone_embed_dim=48, backbone_num_heads=3)
        saved = ModelCheckpoint(dirpath=tmp_path, filename=str(seed), enable_version_counter=False)
        trainer = Trainer(
            accelerator="cpu", max_epochs=epochs, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
            enable_model_summary=False, limit_train_batches=1, limit_val_batches=0,
            callbacks=[*first, EMAWeightAveraging(decay=0.9), saved],
        )  # fmt: skip
        trainer.fit(module, datamodule=datamodule(), **kwargs)
        return torch.load(tmp_path / f"{seed}.ckpt", weights_only=True)["state_dict"]

    assert state_in(fit(0, 1, []), "test").trained_widths == ()
    resumed = fit(1, 2, [SlimmableTraining([0.5, 1.0])], ckpt_path=tmp_path / "0.ckpt")
    assert state_in(resumed, "test").trained_widths == (0.5, 1.0)


def test_a_fit_at_one_width_holds_no_narrower_ones(trainer, task, datamodule, tmp_path):
    """Their slices are no longer trained: neither a resumed run nor an export may take them for it."""
    module = task(backbone_embed_dim=48, backbone_num_heads=3, backbone_keep=3)
    module.model.encoder.mark_trained_widths((0.5, 1.0))
    averaged = EMAWeightAveraging(decay=0.9)
    trainer(SimplerCallback(), averaged, limit_train_batches=1, limit_val_batches=0).fit(module, datamodule=datamodule())
    assert module.model.encoder.trained_widths == ()
    assert all(copy.trained_widths == () for copy in backbones_of(averaged))


def test_a_run_that_resumes_at_one_width_is_tested_and_holds_no_narrower_ones(scenes, tmp_path):
    """As users do it: terratorch fit with an optimizer section, resumed without SlimmableTraining, and test after it."""
    settings = config(scenes, tmp_path, max_depth=4)
    settings["trainer"].update(limit_train_batches=2, limit_val_batches=1)
    at_one_width = json.loads(json.dumps(settings))
    slimmable = {"class_path": "terratorch_simpler.SlimmableTraining", "init_args": {"widths": [0.5, 1.0]}}
    settings["trainer"]["callbacks"].insert(1, slimmable)
    assert settings["optimizer"]
    last = tmp_path / "checkpoints" / "last.ckpt"
    for run, arguments, widths in (
        (settings, ["--trainer.max_epochs", "1"], (0.5, 1.0)),
        (at_one_width, ["--ckpt_path", str(last)], ()),
    ):
        fit = Command(tmp_path, run, *arguments)
        assert fit.wait() == [0], fit.output()[-3000:]
        assert state_in(torch.load(last, weights_only=True)["state_dict"], "test").trained_widths == widths
    test = Command(tmp_path, at_one_width, "--ckpt_path", str(last), command="test")
    assert test.wait() == [0], test.output()[-3000:]
    assert "test/mIoU" in test.output()
