"""SLS: where labelled features form clusters, and a plan from a checkpoint whose adapters were tuned at full depth."""

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import silhouette_samples

from terratorch_simpler import SimplerCallback, SlimmingPlan
from terratorch_simpler.cli import main
from terratorch_simpler.criteria import Bounds, LabelledFeatures, Sls, Statistics, build_criterion
from terratorch_simpler.criteria.sls import MOST_ROWS, silhouettes
from terratorch_simpler.errors import ConfigurationError, DegenerateFeaturesError, LabelsError
from terratorch_simpler.lightning.labelled_images import labelled_rows
from terratorch_simpler.models.backbone import find_backbone
from tests import cli_runner
from tests.checkpoints import kept_in
from tests.extras import needs_peft
from tests.rasters import write

pytestmark = [
    pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.FewTilesWarning"),
    pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.UntrainedEncoderWarning"),
    pytest.mark.filterwarnings("ignore:You are using PEFT without a pretrained backbone"),
]
ROWS = 120
INNER = "model.encoder.base_model.model."


def statistics(features, labels):
    states = torch.ones(len(features) + 1, len(features) + 1, dtype=torch.float64)
    return Statistics(states, states, states, None if labels is None else LabelledFeatures(features, labels))


def toy(*gaps, rows=ROWS, seed=0):
    """Blocks after which three classes lie so far apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    centres = torch.eye(3).repeat_interleave(3, 1)[labels]
    return statistics(
        torch.stack([gap * centres + torch.randn(rows, 9, generator=generator) for gap in gaps]), labels
    )  # fmt: skip


def choose(found, alpha=0.3, **bounds):
    return Sls(alpha).choose(found, found.num_blocks, Bounds(**bounds))


def test_the_first_block_of_the_last_run_that_clusters_is_the_depth():
    choice = choose(toy(0, 0, 9, 0, 0, 9, 9, 9))
    assert choice.kept_blocks == tuple(range(6))  # the walk ends at block 5, whatever block 3 does
    scores = list(choice.scores.values())
    assert list(choice.scores) == list(range(1, 9))
    assert all(score > 0.5 for score in (scores[2], *scores[5:]))
    assert all(score < 0.3 * scores[-1] for score in (*scores[:2], *scores[3:5]))


def test_all_blocks_that_cluster_leave_one_and_the_last_alone_leaves_all():
    assert choose(toy(9, 9, 9)).kept_blocks == (0,)
    assert choose(toy(0, 0, 9)).kept_blocks == (0, 1, 2)


def test_the_share_decides():
    found = toy(0, 2.5, 9, 9)
    scores = list(choose(found).scores.values())
    share = scores[1] / scores[-1]
    assert 0.05 < share < 0.95
    assert len(choose(found, alpha=share - 0.01).kept_blocks) == 2
    assert len(choose(found, alpha=share + 0.01).kept_blocks) == 3


def test_bounds_take_the_nearest_depth():
    found = toy(0, 0, 9, 9)
    assert len(choose(found).kept_blocks) == 3
    assert len(choose(found, min_depth=4).kept_blocks) == 4
    assert len(choose(found, max_depth=2).kept_blocks) == 2


def test_silhouettes_are_those_of_the_scaled_embedding(monkeypatch):
    seen = []

    class Embedding:
        def __init__(self, *args, **kwargs):
            seen.append((args, kwargs))

        def fit_transform(self, block):
            assert block.dtype == np.float64
            return block[:, :2] * [100, 1]  # one axis far wider than the other

    monkeypatch.setattr("terratorch_simpler.criteria.sls.TSNE", Embedding)
    features = torch.rand(1, 40, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 2
    plain = features[0, :, :2].double()
    scaled = (plain - plain.amin(0)) / (plain.amax(0) - plain.amin(0))
    within, other = [], []
    for i in range(40):  # by hand
        distance = (scaled - scaled[i]).norm(dim=1)
        same = labels == labels[i]
        within.append(distance[same].sum() / (same.sum() - 1))
        other.append(distance[~same].mean())
    a, b = torch.stack(within), torch.stack(other)
    expected = ((b - a) / torch.maximum(a, b)).mean()
    assert silhouettes(features, labels) == [pytest.approx(float(expected), abs=1e-6)]
    assert float(expected) == pytest.approx(silhouette_samples(scaled.numpy(), labels.numpy()).mean(), abs=1e-6)
    assert seen == [((2,), {"perplexity": 30, "init": "pca", "random_state": 0})]


def test_the_same_rows_of_every_block_are_embedded_and_not_too_many(monkeypatch):
    seen = []
    monkeypatch.setattr("terratorch_simpler.criteria.sls.silhouettes", lambda f, y: seen.append((f, y)) or [0.5] * len(f))
    labels = torch.arange(3000) % 7
    features = torch.arange(3000.0)[None, :, None].expand(4, -1, 2)
    for _ in range(2):
        choose(statistics(features, labels))
    (first, y), (second, _) = seen
    assert first.shape == (4, MOST_ROWS, 2)
    assert torch.equal(first, second)
    rows = first[0, :, 0].long()
    assert len(rows.unique()) == MOST_ROWS
    assert torch.equal(y, labels[rows])


@pytest.mark.parametrize(("found", "error", "message"), [
    (statistics(torch.zeros(3, 0, 2), None), LabelsError, "There are no labels for criterion 'sls'"),
    (toy(9, 9, rows=30), LabelsError, "Found 30 rows with labels for criterion 'sls', expected more than 30"),
    (statistics(torch.randn(2, 50, 4), torch.zeros(50).long()), LabelsError, "Found 1 classes in 50 rows"),
    (statistics(torch.randn(2, 50, 4), torch.arange(50)), LabelsError, "Found 50 classes in 50 rows"),
    (statistics(torch.full((2, 50, 4), torch.nan), torch.arange(50) % 2), DegenerateFeaturesError, r"blocks \[1, 2\]"),
    (statistics(torch.stack([torch.randn(50, 4), torch.ones(50, 4)]), torch.arange(50) % 2), DegenerateFeaturesError,
     r"blocks \[2\] that are not finite or all the same"),
])  # fmt: skip
def test_what_cannot_be_judged_is_refused(found, error, message):
    with pytest.raises(error, match=message):
        choose(found)


def test_classes_without_clusters_are_refused():
    with pytest.raises(LabelsError, match=r"Found a silhouette of -0\.\d+ after the last block, expected one above 0"):
        choose(toy(9, 9, 0))


@pytest.mark.parametrize("alpha", [0, 1.1])
def test_an_impossible_share_is_refused(alpha):
    with pytest.raises(ConfigurationError, match=f"Found alpha {alpha} for criterion 'sls'"):
        Sls(alpha)


def test_it_is_known_by_name():
    assert build_criterion("sls").args == {"alpha": 0.3}


# --- the plan of a checkpoint


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Images of two colours, patch by patch, with their masks."""
    folder = tmp_path_factory.mktemp("places")
    tints = np.random.default_rng(9).normal(size=(2, 6, 1, 1))
    for split, count in {"train": 40, "val": 4, "test": 4}.items():
        for number in range(count):
            random = np.random.default_rng([count, number])
            mask = np.kron(random.integers(0, 2, (4, 4)), np.ones((16, 16)))
            pixels = 1000 + 300 * np.where(mask, tints[1], tints[0]) + 30 * random.normal(size=(6, 64, 64))
            write(folder / "images" / f"{split}{number:02d}_image.tif", pixels.astype(np.float32))
            write(folder / "masks" / f"{split}{number:02d}_mask.tif", mask[None].astype(np.uint8))
        (folder / "splits").mkdir(exist_ok=True)
        (folder / "splits" / f"{split}.txt").write_text("\n".join(f"{split}{number:02d}" for number in range(count)))
    return folder


def settings(places, folder, **callback):
    config = cli_runner.config(places, folder, **callback)
    config["data"]["init_args"].update(num_classes=2, means=[1000.0] * 6, stds=[300.0] * 6)
    config["model"]["init_args"]["model_args"].update(
        num_classes=2,
        peft_config={
            "method": "LORA", "replace_qkv": "qkv",
            "peft_config_kwargs": {"target_modules": ["q_linear", "v_linear"], "r": 4, "lora_alpha": 8},
        },
    )  # fmt: skip
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:2]
    return config


@pytest.fixture(scope="module")
def tuned(places, tmp_path_factory):
    """Config, and the checkpoint of a fit that has tuned adapters at full depth."""
    folder = tmp_path_factory.mktemp("tuned")
    config = settings(places, folder)
    config["trainer"]["callbacks"][0]["init_args"]["criterion"] = {
        "class_path": "terratorch_simpler.criteria.Fixed", "init_args": {"keep": 12},
    }  # fmt: skip
    command = cli_runner.Command(folder, config, "--trainer.max_epochs", "1")
    assert command.wait() == [0], command.output()[-3000:]
    config = settings(places, folder, criterion="sls")
    path = folder / "sls.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, folder / "checkpoints" / "last.ckpt"


@needs_peft
def test_a_plan_from_tuned_adapters_is_applied_to_a_new_run(tuned, places, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("terratorch_simpler.criteria.sls.MOST_ROWS", 150)
    config, checkpoint = tuned
    assert main(["plan", "-c", str(config), "-o", str(tmp_path), "--ckpt_path", str(checkpoint)]) == 0, capsys.readouterr()
    plan = SlimmingPlan.load(tmp_path / "plan.json")
    assert plan.criterion == {"name": "sls", "args": {"alpha": 0.3}}
    assert plan.votes is None
    assert plan.tiles_seen == 40
    assert (tmp_path / "report.png").stat().st_size > 10_000
    depth, scores = len(plan.kept_blocks), plan.scores
    assert all(scores[block] >= 0.3 * scores[12] for block in range(depth, 13))
    assert depth == 1 or scores[depth - 1] < 0.3 * scores[12]
    # Applied to the re-tuning: the index of the cut is all that is needed beside the adapters.
    again = settings(places, tmp_path, plan=str(tmp_path / "plan.json"))
    command = cli_runner.Command(tmp_path / "again", again, "--trainer.max_epochs", "1")
    assert command.wait() == [0], command.output()[-3000:]
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert kept_in(state) == plan.kept_blocks
    assert main(["plan", "-c", str(config), "-o", str(tmp_path / "x"), "--ckpt_path",
                 str(tmp_path / "checkpoints" / "last.ckpt")]) == 2 or depth == 12  # fmt: skip
    if depth < 12:
        assert f"holds {depth} of 12 blocks at width" in capsys.readouterr().err


@needs_peft
@pytest.mark.parametrize(("content", "message"), [
    (b"nothing", "There is no readable checkpoint at"),
    ({"state_dict": {}}, "has no 'kept_blocks', expected one written with a 'simpler_' backbone"),
    ({"state_dict": {INNER + "kept_blocks": torch.arange(12), INNER + "total_blocks": torch.tensor(12)}},
     "that do not fit the model"),
])  # fmt: skip
def test_checkpoints_of_something_else_are_refused(tuned, tmp_path, capsys, content, message):
    path = tmp_path / "other.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert main(["plan", "-c", str(tuned[0]), "-o", str(tmp_path / "out"), "--ckpt_path", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_peft
def test_adapters_are_on_for_labelled_features_and_off_for_the_similarity(datamodule, trainer, task, monkeypatch):
    lora = {"method": "LORA", "replace_qkv": "qkv", "peft_config_kwargs": {"target_modules": ["q_linear"], "r": 4}}
    made, plain = task(peft_config=lora), task()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    run = trainer()
    data = datamodule()
    data.setup("fit")
    data.trainer, run.datamodule = run, data
    tuned, off, without = (
        labelled_rows(run, module, "train", 0, tuned=on) for module, on in ((made, True), (made, False), (plain, True))
    )
    torch.testing.assert_close(off.features, without.features, rtol=0, atol=1e-3)
    assert (tuned.features - off.features).abs().max() > 0.1
    assert torch.equal(tuned.labels, without.labels)


def test_without_labels_nothing_is_streamed(datamodule, trainer, task, tmp_path, monkeypatch):
    monkeypatch.setattr("terratorch_simpler.lightning.selection.measure", lambda *a, **k: pytest.fail("streamed"))
    data = datamodule()
    setup = data.setup

    def without_labels(stage):
        setup(stage)
        data.train_dataset.segmentation_mask_files = data.train_dataset.image_files

    data.setup = without_labels
    made = task()
    with pytest.raises(LabelsError, match="There is no mask and no label in the data"):
        trainer(SimplerCallback(criterion="sls", output_dir=str(tmp_path))).fit(made, datamodule=data)
    assert find_backbone(made).num_blocks == 12
    assert not list(tmp_path.glob("*.json"))
