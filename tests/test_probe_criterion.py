"""Criterion probe: the depth that labels ask for, with whole places held out, by callback, command and Python API."""

import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import yaml
from sklearn.linear_model import Ridge as Reference
from sklearn.metrics import jaccard_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

from terratorch_simpler import SimplerCallback, SlimmingPlan, api, planning, select_depth
from terratorch_simpler.cli import main
from terratorch_simpler.criteria import Bounds, LabelledFeatures, Probe, Statistics, build_criterion
from terratorch_simpler.criteria.base import Choice
from terratorch_simpler.criteria.probe import STRENGTHS, group_numbers, probe_blocks
from terratorch_simpler.criteria.verdict import ENOUGH_SHARE
from terratorch_simpler.data import DatamoduleTiles
from terratorch_simpler.errors import (
    ConfigurationError,
    DegenerateFeaturesError,
    DepthError,
    FewTilesWarning,
    LabelsError,
    TilesError,
)
from terratorch_simpler.extraction.labelled import patch_means, read_labels
from terratorch_simpler.functional.ridge import Ridge
from terratorch_simpler.lightning.labelled_images import probed_features
from terratorch_simpler.lightning.task import batch_normalizer
from terratorch_simpler.plan import Verdict
from terratorch_simpler.report import plan_figure, report_page
from terratorch_simpler.report.summary import reasons
from terratorch_simpler.selection_config import SelectionConfig
from tests import cli_runner
from tests.extras import needs_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.FewTilesWarning"),
    pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.UntrainedEncoderWarning"),
]
PLACES = 12


def planted(*gaps, kind="segmentation", rows=240, seed=0, places=PLACES, prefix=""):
    """Blocks after which labels can be told so well; every place has an offset of its own."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.arange(rows) % places
    offset = torch.randn(places, 8, generator=generator)[images]
    if kind == "multilabel":
        labels = torch.randint(0, 2, (rows, 3), generator=generator)
        signal = torch.nn.functional.pad(labels.float(), (0, 5))
    elif kind == "regression":
        labels = torch.randn(rows, generator=generator)
        signal = labels[:, None] * torch.ones(8)
    else:
        labels = torch.randint(0, 3, (rows,), generator=generator)
        signal = torch.eye(8)[labels]
    features = torch.stack([gap * signal + offset + torch.randn(rows, 8, generator=generator) for gap in gaps])
    return LabelledFeatures(features, labels, images, tuple(f"{prefix}place{n}_2020.tif" for n in range(places)), kind)


def choose(labelled, criterion=None, **bounds):
    blocks = 4 if labelled is None else len(labelled.features)
    states = torch.ones(blocks + 1, blocks + 1, dtype=torch.float64)
    return (criterion or Probe()).choose(Statistics(states, states, states, labelled), blocks, Bounds(**bounds))


@pytest.mark.parametrize("kind", ["segmentation", "classification", "multilabel", "regression"])
def test_the_planted_depth_is_found(kind):
    choice = choose(planted(0.2, 1, 6, 6, 1, 0.5, kind=kind))
    assert choice.kept_blocks in ((0, 1, 2), (0, 1, 2, 3))
    assert choice.verdict.level == "clear"
    assert choice.details["probe"]["best_depth"] in (3, 4)
    assert choice.details["probe"]["judged_on"] == "cross-validation"
    assert choice.details["probe"]["groups"] == PLACES
    assert "Smallest depth not distinguishable from the best: " in choice.verdict.reasons[0]
    assert "; all 6: " in choice.verdict.reasons[0]


def test_the_verdict_says_what_the_best_depth_would_score():
    labelled = planted(0.2, 1, 2.9, 3, 1, 0.5)
    choices = {rule: choose(labelled, Probe(rule=rule)) for rule in ("one_standard_error", "best")}
    best = len(choices["best"].kept_blocks)
    assert len(choices["one_standard_error"].kept_blocks) < best < 6
    score = choices["best"].scores[best]
    assert f"; the best, {best}: {score:.3f}; all 6: " in choices["one_standard_error"].verdict.reasons[-1]
    assert f"Best depth: {best} (mean IoU {score:.3f} ± " in choices["best"].verdict.reasons[-1]
    assert "the best," not in choices["best"].verdict.reasons[-1]


@pytest.mark.parametrize("kind", ["segmentation", "classification", "multilabel", "regression"])
def test_resamples_vary_as_the_jackknife_says(kind):
    labelled = planted(0.2, 1, 2.9, 3, 1, 0.5, kind=kind)
    result = probe_blocks(labelled, labelled.images)
    drawn = result.resampled(20_000)
    torch.testing.assert_close(drawn.mean(dim=0), result.scores, rtol=0, atol=2e-3)
    torch.testing.assert_close(drawn.std(dim=0), result.errors, rtol=0.03, atol=1e-4)
    differences = (drawn[:, :, None] - drawn[:, None, :]).std(dim=0)
    torch.testing.assert_close(differences, result.errors_of_differences, rtol=0.03, atol=1e-4)
    assert torch.equal(result.resampled(5), result.resampled(5))


@pytest.mark.parametrize("rule", ["one_standard_error", "best"])
@pytest.mark.parametrize("gaps", [(0.2, 1, 2.9, 3, 1, 0.5), (0.2, 1, 2.6, 3.2, 3, 2.8), (0.2, 1, 3, 1)])
def test_the_share_is_that_of_places_drawn_again(gaps, rule):
    """Scores that are computed again on places drawn with replacement choose the depth about as often."""
    labelled = planted(*gaps, kind="classification", rows=960, places=24)
    targets = torch.eye(3)[labelled.labels].double()
    right = []
    for features in labelled.features:
        ridge = Ridge.fit(features, targets)
        held_out = ridge.leave_group_out(features, targets, labelled.images, STRENGTHS)
        best = max(held_out, key=lambda predicted: (predicted.argmax(1) == labelled.labels).sum())
        right.append(torch.bincount(labelled.images, (best.argmax(1) == labelled.labels).double()))
    by_place = torch.stack(right) / torch.bincount(labelled.images)
    drawn = torch.randint(24, (4000, 24), generator=torch.Generator().manual_seed(1))
    scores, noise = by_place[:, drawn].mean(dim=2).T, probe_blocks(labelled, labelled.images).errors_of_differences
    best = scores.argmax(dim=1)
    depths = best + 1
    if rule == "one_standard_error":
        depths = (scores.max(dim=1).values[:, None] - scores <= noise[best] + 1e-6).int().argmax(dim=1) + 1
    choice = choose(labelled, Probe(rule=rule))
    share = float((depths == len(choice.kept_blocks)).double().mean())
    found = [re.search(r"Only (\d+) % of the resamples choose (\d+) blocks", reason) for reason in choice.verdict.reasons]
    if choice.verdict.level == "clear":
        assert share > ENOUGH_SHARE - 0.06
        assert not any(found)
    else:
        assert choice.verdict.level == "weak"
        assert share == pytest.approx(int(found[0][1]) / 100, abs=0.06)
        assert int(found[0][2]) == len(choice.kept_blocks)


def test_depths_that_other_places_would_choose_are_named():
    verdict = choose(planted(0.2, 1, 2.9, 3, 1, 0.5)).verdict
    assert verdict.level == "weak"
    assert verdict.reasons[0].endswith(
        " % of the resamples choose 3 blocks, expected at least 80 %; eight of ten choose 3 to 4."
    )


def test_scores_are_those_of_scikit_learn_on_the_same_folds():
    labelled = planted(0.5, 3, 1)
    choice = choose(labelled)
    targets = torch.eye(3)[labelled.labels].double().numpy()
    for block, features in enumerate(labelled.features.double().numpy(), start=1):
        centred = features - features.mean(axis=0)
        penalty = (centred**2).sum() / centred.shape[1]
        scores = []
        for strength in STRENGTHS:
            predicted = cross_val_predict(
                Reference(strength * penalty), features, targets, groups=labelled.images.numpy(), cv=LeaveOneGroupOut()
            ).argmax(axis=1)
            scores.append(jaccard_score(labelled.labels, predicted, average="macro"))
        assert choice.scores[block] == pytest.approx(max(scores), abs=1e-6)


def test_one_standard_error_and_best():
    labelled = planted(0, 4, 4.1, 4, 0)
    best = choose(labelled, Probe(rule="best"))
    smallest = choose(labelled)
    assert len(best.kept_blocks) == best.details["probe"]["best_depth"]
    assert len(smallest.kept_blocks) <= len(best.kept_blocks)
    result = probe_blocks(labelled, labelled.images)
    block = best.details["probe"]["best_depth"] - 1
    noise = result.errors_of_differences[block]
    alike = (result.scores[block] - result.scores <= noise + 1e-6).nonzero().flatten()
    assert len(smallest.kept_blocks) == int(alike[0]) + 1


@pytest.mark.parametrize(("gaps", "message"), [
    ((5, 5, 5, 5, 5), "The depths cannot be told apart"),
    ((0, 0, 0, 0, 0), "No depth beats the baseline"),
])  # fmt: skip
def test_where_labels_do_not_tell_half_is_kept(gaps, message):
    labelled = planted(*gaps, kind="classification")
    choice = choose(labelled)
    assert choice.verdict.level == "unsettled"
    assert choice.kept_blocks == (0, 1, 2)
    assert any(message in reason for reason in choice.verdict.reasons)
    assert len(choose(labelled, max_depth=2).kept_blocks) == 2


def test_bounds_limit_best_and_choice():
    labelled = planted(0, 2, 8, 8)
    assert choose(labelled, max_depth=2).details["probe"]["best_depth"] == 2
    assert len(choose(labelled, min_depth=4).kept_blocks) == 4


def test_a_depth_that_alone_is_allowed_has_no_verdict():
    for labelled in (planted(0, 2, 8, 8), planted(5, 5, 5, 5), {"a": planted(0, 2, 8, 8), "b": planted(5, 5, 5, 5)}):
        states = torch.ones(5, 5, dtype=torch.float64)
        choice = Probe().choose(Statistics(states, states, states, labelled), 4, Bounds(2, 2))
        assert choice.kept_blocks == (0, 1)
        assert choice.verdict is None


def test_a_better_depth_beyond_the_bounds_is_named():
    reason = choose(planted(0, 2, 8, 1), max_depth=2).verdict.reasons[-1]
    assert re.search(r"; beyond the bounds, 3: 1\.000; all 4: ", reason)
    assert "beyond" not in choose(planted(0, 2, 8, 1), max_depth=3).verdict.reasons[-1]


def with_validation(train, validation):
    return replace(train, validation=validation)


def test_places_that_are_left_out_of_the_fits_are_told():
    train, validation = planted(0, 6, 0), planted(0, 6, 0, seed=1, places=10)
    groups = Probe(groups="(place[0-9]+)_")
    verdict = choose(with_validation(train, validation), groups).verdict
    assert verdict.level == "weak"
    assert "10 of 12 groups of training images are also in validation, so they were not fitted." in verdict.reasons
    assert "also in validation" not in str(
        choose(with_validation(train, planted(0, 6, 0, places=5)), groups).verdict.reasons
    )
    every = with_validation(train, planted(0, 6, 0, seed=1))
    with pytest.raises(LabelsError, match="12 of 12 groups of training images are also in validation and must not be"):
        choose(every, groups)


def test_training_and_validation_have_labels_of_one_kind():
    images, many = planted(0, 6, kind="classification"), planted(0, 6, kind="multilabel")
    heights = planted(0, 6, kind="regression", prefix="other")
    with pytest.raises(LabelsError, match="Training labels are for classification, and validation labels for regression"):
        choose(with_validation(images, heights))
    fewer = replace(many, labels=many.labels[:, :2])
    with pytest.raises(LabelsError, match="are for multilabel of 3 labels, and validation labels for multilabel of 2"):
        choose(with_validation(many, fewer))


def test_validation_places_are_judged_and_never_fitted(monkeypatch):
    seen = {}
    original = probe_blocks

    def spy(train, groups, validation=None, validation_groups=None, one_more=None):
        seen.update(train=groups, validation=validation_groups)
        return original(train, groups, validation, validation_groups)

    monkeypatch.setattr("terratorch_simpler.criteria.probe.probe_blocks", spy)
    train, validation = planted(0, 6, 0), planted(0, 6, 0, seed=1, places=5)
    labelled = LabelledFeatures(train.features, train.labels, train.images, train.names, train.kind, validation)
    choice = choose(labelled, Probe(groups="(place[0-9]+)_"))
    assert choice.details["probe"]["judged_on"] == "validation"
    assert choice.details["probe"]["groups"] == 5
    assert not set(seen["train"].tolist()) & set(seen["validation"].tolist())
    assert len(seen["train"].unique()) == PLACES - 5
    one = planted(0, 6, 0, seed=1, places=1)  # no standard error over one place
    labelled = LabelledFeatures(train.features, train.labels, train.images, train.names, train.kind, one)
    assert choose(labelled).details["probe"]["judged_on"] == "cross-validation"


def test_groups_are_named_by_the_expression():
    labelled = LabelledFeatures(
        torch.zeros(1, 4, 1), torch.zeros(4), torch.tensor([0, 1, 2, 0]), ("b_1.tif", "a_1.tif", "b_2.tif")
    )
    assert group_numbers(labelled, None).tolist() == [0, 1, 2, 0]
    assert group_numbers(labelled, "^([ab])_").tolist() == [0, 1, 0, 0]
    with pytest.raises(ConfigurationError, match=r"does not match 'b_1.tif', expected every file to match"):
        group_numbers(labelled, "(c)")


@pytest.mark.parametrize(("labelled", "error", "message"), [
    (None, LabelsError, "There are no labels for criterion 'probe'"),
    (planted(1, 1, places=1), LabelsError, "Labelled rows come from 1 group, expected at least 2"),
    (LabelledFeatures(torch.randn(2, 6, 3), torch.ones(6).long(), torch.arange(6), tuple("abcdef")), LabelsError,
     "All labels are the same"),
    (LabelledFeatures(torch.randn(2, 6, 3), torch.arange(6) % 2, torch.arange(6) % 2, ("a", "b")), LabelsError,
     "Without any one group all labels are the same"),
    (LabelledFeatures(torch.full((2, 6, 3), torch.nan), torch.arange(6) % 2, torch.arange(6) % 3, ("a", "b", "c")),
     DegenerateFeaturesError, r"after blocks \[1, 2\] are not finite"),
])  # fmt: skip
def test_what_cannot_be_judged_is_refused(labelled, error, message):
    with pytest.raises(error, match=message):
        choose(labelled)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"rule": "first"}, "rule is 'first' for criterion 'probe'"),
    ({"groups": "("}, "expected a regular expression"),
    ({"groups": "abc"}, "expected a group in parentheses"),
])  # fmt: skip
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Probe(**arguments)


def test_it_is_known_by_name():
    assert build_criterion("probe").args == {"groups": None, "rule": "one_standard_error"}


# --- labels


def test_labels_of_every_kind_are_read():
    def read(target, ignore=None, kind=None):
        return read_labels({"target": target}, ignore, kind)

    values, kind = read(torch.tensor([[[1.0, -9999.0]]]), -9999)
    assert kind == "regression"
    assert values.isnan().tolist() == [[[False, True]]]
    assert read(torch.tensor([1, 2]))[1] == "classification"
    assert read(torch.zeros(1, 2, 2).long())[1] == "segmentation"
    assert read(torch.tensor([[0, 1, 1]]))[1] == "multilabel"
    assert read(torch.tensor([1, 2]), kind="regression")[0].dtype == torch.float32
    assert read(torch.tensor([[[1.0, torch.nan]]]), kind="segmentation")[0].tolist() == [[[1, -1]]]
    with pytest.raises(LabelsError, match="not all 0 or 1"):
        read(torch.tensor([[0, 2]]))


def test_a_patch_has_the_mean_of_its_values():
    values = torch.tensor([[[1.0, 2, torch.nan, torch.nan], [3, torch.nan, torch.nan, 5]]])
    means = patch_means(values, (2, 2))
    assert means[0, 0, 0] == 2
    assert means[0, 0, 1].isnan()


# --- one plan everywhere


def pairs(kind, batches=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        images = torch.randn(8, 3, 32, 32, generator=generator)
        patches = torch.randint(0, 2, (8, 2, 2), generator=generator)
        pixels = patches.repeat_interleave(16, 1).repeat_interleave(16, 2)
        of_image = torch.randint(0, 2, (8, 3), generator=generator)
        labels = {
            "segmentation": pixels, "regression": pixels.float(), "classification": of_image[:, 0], "multilabel": of_image,
        }[kind]  # fmt: skip
        yield images + (pixels[:, None] if labels.ndim == 3 else of_image[:, :, None, None]), labels


@pytest.mark.parametrize(("kind", "metric"), [
    ("segmentation", "mean IoU"), ("classification", "accuracy"), ("multilabel", "mAP"), ("regression", "R2"),
])  # fmt: skip
def test_pairs_of_images_and_labels_of_every_kind(kind, metric, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2)
    plan = select_depth(
        model, list(pairs(kind)), criterion="probe", validation=list(pairs(kind, 2, 1)), min_tiles=32, progress=False
    )
    assert plan.overview["probe"]["metric"] == metric
    assert plan.overview["probe"]["judged_on"] == "validation"
    assert set(plan.scores) == {1, 2, 3}
    assert plan.votes is None
    assert SlimmingPlan.load(plan.save(tmp_path / "plan.json")).overview["probe"] == plan.overview["probe"]
    assert any(f"{metric} by validation over 16 groups" in reason for reason in reasons(plan))
    assert plan.verdict.level in ("clear", "unsettled")
    assert f"{metric} ± standard error" in [axes.get_ylabel() for axes in plan_figure(plan).axes]
    assert "constant prediction" in report_page(plan)


def test_validation_is_for_probe_alone():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=5, embed_dim=24, num_heads=2)
    with pytest.raises(ConfigurationError, match="validation is given to criterion 'simpler'"):
        select_depth(model, [], validation=[])


@pytest.fixture(scope="module")
def config(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    settings = cli_runner.config(scenes, folder, criterion="probe")
    settings["trainer"]["callbacks"] = settings["trainer"]["callbacks"][:1]
    return folder, settings


def test_fit_and_command_make_one_plan(config, tmp_path, capsys):
    folder, settings = config
    command = cli_runner.Command(folder, settings, "--trainer.max_epochs", "1")
    assert command.wait() == [0], command.output()[-3000:]
    fitted = SlimmingPlan.load(folder / "simpler" / "plan.json")
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["plan", "-c", str(path), "-o", str(tmp_path)]) == 0
    planned = SlimmingPlan.load(tmp_path / "plan.json")
    assert planned.kept_blocks == fitted.kept_blocks
    assert planned.overview["probe"] == fitted.overview["probe"]
    assert planned.scores == fitted.scores
    assert fitted.overview["probe"]["judged_on"] == "validation"


def test_python_makes_the_plan_of_the_callback(trainer, task, datamodule):
    module, run, data = task(), trainer(), datamodule()
    data.setup("fit")
    data.trainer, run.datamodule = run, data
    backbone = module.model.encoder
    labelled = probed_features(run, module, 0)
    expected = Probe().choose(
        Statistics(*[torch.ones(13, 13, dtype=torch.float64)] * 3, labelled), backbone.full_num_blocks, Bounds()
    )

    def batches(split):
        source = DatamoduleTiles(data, 0, split, labels=True)
        normalise = batch_normalizer(run, backbone, source)
        return [
            {**batch, **normalise({"image": batch["image"]}), "mask": batch["target"]} for batch in source
        ]  # fmt: skip

    plan = select_depth(backbone, batches("train"), criterion="probe", validation=batches("val"), progress=False)
    assert plan.kept_blocks == expected.kept_blocks
    np.testing.assert_allclose(list(plan.scores.values()), list(expected.scores.values()), atol=1e-6)


def test_real_tiles_have_groups(shared_data):
    tiles = sorted((shared_data / "hls_water" / "images").iterdir())[:4]
    labelled = LabelledFeatures(torch.zeros(1, 4, 1), torch.zeros(4), torch.arange(4), tuple(map(str, tiles)))
    assert group_numbers(labelled, r"/(\d+)_image").tolist() == [0, 1, 2, 3]


# --- fewer tiles than comparing blocks needs


def test_a_few_labelled_images_are_enough(tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2)
    with pytest.warns(FewTilesWarning) as warned:
        plan = select_depth(model, list(pairs("segmentation", 2)), criterion="probe", on_unsettled="half", progress=False)
    [text] = [str(each.message) for each in warned if issubclass(each.category, FewTilesWarning)]
    assert text.startswith("The blocks were not compared: there are 16 usable tiles, and comparing needs at least 32.")
    assert warned[0].filename == __file__
    assert (plan.similarity, plan.votes, plan.tiles_seen) == (None, None, 0)
    assert set(plan.scores) == set(plan.overview["depths"]) == {1, 2, 3}
    assert list(plan.overview["criteria"]) == ["probe"]
    assert plan.overview["depths"][3]["macs"] == plan.macs["before"]
    assert plan.data["input_shape"] == [3, 32, 32]
    assert SlimmingPlan.load(plan.save(tmp_path / "plan.json")) == plan
    assert main(["show", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    assert "mean IoU by cross-validation over 16 groups" in " ".join(shown.split())
    assert "similarity" not in shown
    page = report_page(plan)
    assert "The blocks were not compared, for want of tiles" in page
    assert "How alike the blocks are" not in page
    assert [axes.get_ylabel() for axes in plan_figure(plan).axes] == ["mean IoU ± standard error"]


@pytest.mark.parametrize(("criterion", "options"), [("simpler", {}), ("sls", {})])
def test_other_criteria_need_their_tiles(criterion, options):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=6, embed_dim=24, num_heads=2)
    with pytest.raises(TilesError, match="batches yielded 16 tiles; at least 32 are needed to compare blocks"):
        select_depth(model, list(pairs("segmentation", 2)), criterion=criterion, progress=False, **options)


def test_the_callback_does_without_tiles_too(trainer, task, datamodule, tmp_path):
    callback = SimplerCallback(criterion="probe", max_tiles=20, min_tiles=20, output_dir=str(tmp_path))
    run, module = trainer(callback, max_epochs=0), task()
    with pytest.warns(FewTilesWarning, match="not compared: there are 20 usable tiles") as warned:
        run.fit(module, datamodule=datamodule())
    assert sum(issubclass(each.category, FewTilesWarning) for each in warned) == 1
    plan = SlimmingPlan.load(tmp_path / "plan.json")
    assert plan.similarity is None
    assert plan.depth == module.model.encoder.num_blocks
    assert plan.macs["after"] <= plan.macs["before"]
    assert (tmp_path / "report.png").exists()
    run, module = trainer(SimplerCallback(criterion="probe", recovery="linear", max_tiles=20, min_tiles=20)), task()
    with pytest.raises(TilesError, match="Only 20 usable tiles; comparing blocks needs at least 32"):
        run.fit(module, datamodule=datamodule())


@pytest.mark.parametrize(("images", "patches"), [(8, 36), (600, 16)])
def test_few_images_give_more_of_their_patches(monkeypatch, images, patches):
    found = []
    monkeypatch.setattr(
        Probe, "_probe", lambda _self, labelled, _: found.append(labelled) or (_ for _ in ()).throw(KeyError)
    )
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2, embed_dim=12, num_heads=1, num_classes=0)
    generator = torch.Generator().manual_seed(0)
    image, mask = (
        torch.randn(images, 3, 96, 96, generator=generator),
        torch.arange(2).repeat_interleave(48).expand(images, 96, 96),
    )
    batches = list(zip(image.split(50), mask.split(50), strict=True))
    with pytest.raises(KeyError):
        select_depth(model, batches, criterion="probe", progress=False)
    counts = found[0].images.bincount()
    assert set(counts.tolist()) == {patches}
    assert len(counts) == min(images, 512)


# --- several label sets


def label_sets(**sets):
    states = torch.ones(7, 7, dtype=torch.float64)
    return Probe().choose(Statistics(states, states, states, sets), 6, Bounds())


def test_half_is_enough_for_all_label_sets():
    """One set is unsettled, and another needs more than half."""
    config = SelectionConfig(Probe(), Bounds(), 1.0, "patch", 32, 64, 0, on_unsettled="half")
    sets = {"sure": planted(0.2, 0.5, 1, 1, 8, 8), "noise": planted(5, 5, 5, 5, 5, 5)}
    choice = Probe().choose(Statistics.of_labels(sets), 6, Bounds())
    kept, verdict = planning._settle(config, choice, choice.verdict, 6)
    assert verdict.level == "unsettled"
    assert len(kept) == choice.details["label_sets"]["sure"]["depth"] == 5
    choice = Probe().choose(Statistics.of_labels(sets["noise"]), 6, Bounds())
    assert planning._settle(config, choice, choice.verdict, 6)[0] == (0, 1, 2)


@pytest.mark.parametrize(("on_unsettled", "depth", "target"), [("apply", None, None), ("half", 3, 3), ("intact", 6, None)])
def test_what_on_unsettled_keeps_is_not_held_against_a_recovery(monkeypatch, on_unsettled, depth, target):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=6, embed_dim=24, num_heads=2, num_classes=0)
    config = SelectionConfig(
        Probe(), Bounds(), 1.0, "patch", 32, 64, 0, recovery="distill", recovery_target=3, on_unsettled=on_unsettled
    )
    choice = Choice((0, 1, 2, 3), verdict=Verdict("unsettled", ("Because.",)))
    monkeypatch.setattr(planning, "_choose", lambda *_: choice)
    arguments = (api._encoder_of(model, None, None), config, None, None, planted(5, 5, 5, 5, 5, 5))
    if depth is None:
        with pytest.raises(DepthError, match="Found recovery_target 3, and the criterion 'probe' keeps block 3"):
            planning.build_plan(*arguments)
        return
    plan = planning.build_plan(*arguments)
    assert (plan.depth, plan.recovery_target) == (depth, target)


@pytest.mark.parametrize(("train", "validation", "message"), [
    (torch.full((12, 3), -1), None, "There is no class at all in the labels of the"),
    (torch.arange(36).reshape(12, 3) % 2, torch.full((4, 3), -1), "There is no class at all in the labels of the"),
    (torch.arange(12) % 3, torch.rand(4), "Training labels are for classification, and validation labels for regression"),
])  # fmt: skip
def test_labels_without_any_value_are_refused(train, validation, message):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2, num_classes=0)
    batches = [[(torch.randn(len(labels), 3, 32, 32), labels)] for labels in (train, validation) if labels is not None]
    with pytest.raises(LabelsError, match=message):
        select_depth(model, batches[0], criterion="probe", validation=(*batches, None)[1], progress=False)


def test_two_validation_images_with_values_are_scored():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2, num_classes=0)
    train, validation = ([(torch.randn(number, 3, 32, 32), torch.rand(number))] for number in (12, 2))
    plan = select_depth(model, train, criterion="probe", validation=validation, progress=False)
    assert plan.overview["probe"]["judged_on"] == "validation"
    assert plan.verdict.level != "clear"


@needs_peft
def test_probes_of_a_model_with_tuned_adapters_are_of_the_pretrained_one():
    import peft

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2, num_classes=0)
    batches = list(pairs("classification"))
    alone = select_depth(model, batches, criterion="probe", progress=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv", "fc1"], r=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert select_depth(adapted, batches, criterion="probe", progress=False).scores == alone.scores


def test_few_labels_on_random_weights_are_never_clear():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2, num_classes=0)
    for parameter in model.blocks[-1].parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.ones_(model.blocks[-1].norm1.weight)
    torch.nn.init.ones_(model.blocks[-1].norm2.weight)
    train, validation = (list(pairs("classification", 3, seed)) for seed in (0, 1))
    plan = select_depth(model, train, criterion="probe", validation=validation, progress=False)
    assert "The encoder holds random weights, on which no depth means anything." in plan.verdict.reasons
    assert plan.verdict.level != "clear"


def test_progress_counts_the_blocks_of_all_label_sets():
    one = planted(0.2, 0.5, 1, 1, 8, 6)
    for sets, fits in ((one, 6), ({"cover": one, "height": one}, 12)):
        seen = []
        Probe().choose(replace(Statistics.of_labels(sets), progress=seen.append), 6, Bounds())
        assert seen == list(range(1, fits + 1))


@pytest.mark.parametrize("shown", [True, False])
def test_fits_have_a_progress_bar_in_a_terminal(shown, monkeypatch):
    totals, bar = [], planning.progress_bar
    monkeypatch.setattr(planning, "progress_bar", lambda *args: totals.append(args[:2]) or bar(*args))
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2)
    select_depth(model, list(pairs("segmentation", 2)), criterion="probe", progress=shown)
    assert totals == [(shown, 3)]


def test_the_largest_depth_of_the_label_sets_is_kept():
    early, late = planted(6, 6, 6, 1, 1, 0.5), planted(0.2, 0.5, 1, 1, 8, 6, kind="regression", seed=3)
    choice = label_sets(cover=early, height=late)
    alone = {name: choose(each) for name, each in (("cover", early), ("height", late))}
    entries = choice.details["label_sets"]
    assert {name: entry["depth"] for name, entry in entries.items()} == {"cover": 1, "height": 5}
    for name, entry in entries.items():
        expected = {**alone[name].details["probe"], "scores": alone[name].scores, "depth": len(alone[name].kept_blocks)}
        assert entry == {**expected, "level": alone[name].verdict.level}
    assert choice.kept_blocks == tuple(range(5))
    assert choice.scores == alone["height"].scores
    assert choice.verdict.level == "clear"
    assert [reason.partition(": ")[0] for reason in choice.verdict.reasons] == ["cover", "height"]
    assert "probe" not in choice.details


def test_the_verdict_is_that_of_the_least_sure_label_set():
    choice = label_sets(cover=planted(6, 6, 6, 1, 1, 0.5), noise=planted(0, 0, 0, 0, 0, 0, kind="regression"))
    assert choice.verdict.level == "unsettled"
    assert choice.verdict.reasons[0].startswith("noise: ")
    assert choice.verdict.reasons[-1].startswith("cover: Smallest depth not distinguishable")
    assert choice.details["label_sets"]["noise"]["depth"] == 3


def test_errors_name_the_label_set():
    one_class = LabelledFeatures(torch.randn(6, 6, 3), torch.ones(6).long(), torch.arange(6), tuple("abcdef"))
    with pytest.raises(LabelsError, match=r"^Label set 'cover': All labels are the same"):
        label_sets(height=planted(*[1] * 6), cover=one_class)


def several(batches=4, seed=0):
    """Pixel classes, pixel values and image classes beside each other, each with gaps of its own."""
    for (images, cover), (_, scene) in zip(
        pairs("segmentation", batches, seed), pairs("classification", batches, seed), strict=True
    ):
        height = cover.float().masked_fill(torch.arange(32) < 16, torch.nan)  # half of the patches
        cover, scene = cover.index_fill(0, torch.tensor([0]), -1), scene.index_fill(0, torch.tensor([1]), -1)
        yield {"image": images, "mask": {"cover": cover, "height": height, "scene": scene}}


def test_label_sets_share_one_pass_and_are_probed_as_alone(tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2)
    passes = []
    handle = model.blocks[0].register_forward_hook(lambda _, args, __: passes.append(len(args[0])))
    plan = select_depth(
        model, list(several()), criterion="probe", validation=list(several(2, 1)), min_tiles=32, progress=False
    )
    handle.remove()
    assert passes.count(8) == 4 + 4 + 2  # similarity, labels, validation; single images are those of the MAC count
    entries = plan.overview["label_sets"]
    for name, entry in entries.items():
        alone = select_depth(
            model, [{**batch, "mask": batch["mask"][name]} for batch in several()], criterion="probe", min_tiles=32,
            validation=[{**batch, "mask": batch["mask"][name]} for batch in several(2, 1)], progress=False,
        )  # fmt: skip
        probe = {**alone.overview["probe"], "scores": alone.scores, "depth": alone.depth, "level": alone.verdict.level}
        assert entry == probe
    assert [entries[name]["metric"] for name in ("cover", "height", "scene")] == ["mean IoU", "R2", "accuracy"]
    assert [entries[name]["groups"] for name in ("cover", "height", "scene")] == [14, 16, 14]
    assert plan.depth == max(entry["depth"] for entry in entries.values())
    loaded = SlimmingPlan.load(plan.save(tmp_path / "plan.json"))
    assert loaded == plan
    assert main(["show", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    page = report_page(plan)
    for name, entry in entries.items():
        cells = [f"{entry['depth']} of 3", f"{entry['scores'][entry['depth']]:.3f} ± ", f"{entry['baseline']:.3f}"]
        [line] = [line for line in shown.splitlines() if line.strip().startswith(f"{name} ") and " of 3 " in line]
        assert all(cell in line for cell in cells)
        assert all(cell in page for cell in [f'<th scope="row">{name}</th>', *cells])
    assert plan_figure(plan).axes


def test_a_few_images_with_label_sets_are_enough():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2)
    batches = [(batch["image"], batch["mask"]) for batch in several(2)]
    with pytest.warns(FewTilesWarning, match="not compared"):
        plan = select_depth(model, batches, criterion="probe", progress=False)
    assert list(plan.overview["label_sets"]) == ["cover", "height", "scene"]
    assert plan.similarity is None


@pytest.mark.parametrize(("change", "options", "message"), [
    (lambda sets: {}, {}, r"Found 0 label sets \(\), expected 1 to 16"),
    (lambda sets: {7: sets["cover"]}, {}, r"Found 1 label sets \(7\), expected 1 to 16, named by 1 to 100 characters"),
    (lambda sets: {"cover": sets["cover"], "none": torch.zeros(8).long()}, {},
     "Found only class 0 in the labels of the batches, label set 'none', expected two classes"),
    (lambda sets: {"many": torch.arange(16).reshape(8, 2)}, {}, "Label set 'many': Labels of an image are not all 0 or 1"),
    (lambda sets: sets, {"criterion": "sls"}, r"Labels come by name \(cover, height, scene\), expected a tensor"),
])  # fmt: skip
def test_label_sets_that_cannot_be_probed_are_refused(change, options, message):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2)
    batches = [(batch["image"], change(batch["mask"])) for batch in several()]
    with pytest.raises(LabelsError, match=message):
        select_depth(model, batches, progress=False, **{"criterion": "probe", **options})


def test_batches_and_validation_have_the_same_label_sets():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2)
    first, second, *_ = several()
    del second["mask"]["cover"]
    with pytest.raises(LabelsError, match="has the label sets height, scene, and the first one cover, height, scene"):
        select_depth(model, [first, second], criterion="probe", progress=False)
    with pytest.raises(
        LabelsError, match="label sets cover, height, scene, and validation height, scene, expected the same"
    ):
        select_depth(model, [first], validation=[second], criterion="probe", progress=False)
    with pytest.raises(LabelsError, match="label sets cover, height, scene, and validation no name"):
        select_depth(
            model, [first], validation=list(pairs("segmentation", 1)), criterion="probe", progress=False
        )  # fmt: skip


# --- through the commands


def test_fit_then_test_in_the_same_folder(scenes, tmp_path):
    settings = cli_runner.config(scenes, tmp_path, criterion="probe")
    assert settings["optimizer"]
    fit = cli_runner.Command(tmp_path, settings, "--trainer.max_epochs", "1")
    assert fit.wait() == [0], fit.output()[-3000:]
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    test = cli_runner.Command(tmp_path, settings, "--ckpt_path", last, command="test")
    assert test.wait() == [0], test.output()[-3000:]
    assert "test/mIoU" in test.output()
    plan = SlimmingPlan.load(tmp_path / "simpler" / "plan.json")
    weights = torch.load(last, weights_only=True)["state_dict"]
    blocks = {int(name.split(".blocks.")[1].split(".")[0]) for name in weights if ".encoder.blocks." in name}
    assert sorted(blocks) == list(range(plan.depth))


def test_a_sweep_keeps_what_the_probe_chooses(config, tmp_path):
    _, settings = config
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["sweep", "-c", str(path), "-o", str(tmp_path), "--repeats", "1"]) == 0
    plan = SlimmingPlan.load(tmp_path / "plan.json")
    assert plan.criterion["name"] == "probe"
    assert plan.overview["probe"]["judged_on"] == "validation"
    assert "probe" in (tmp_path / "sweep.csv").read_text()


@pytest.mark.parametrize(("what", "status", "kept"), [("error", 1, None), ("half", 0, 6), ("intact", 0, 12)])
def test_what_the_command_does_where_nothing_is_settled(config, tmp_path, monkeypatch, capsys, what, status, kept):
    monkeypatch.setattr("terratorch_simpler.planning.verdict_on", lambda *_, **__: Verdict("unsettled", ("Because.",)))
    _, settings = config
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["plan", "-c", str(path), "-o", str(tmp_path / "out"), "--on_unsettled", what]) == status
    written = {found.name for found in (tmp_path / "out").iterdir()}
    if kept is None:
        assert written <= {"report.html", "report.png"}
        assert "Because. on_unsettled is 'error': give the depth by hand" in " ".join(capsys.readouterr().err.split())
    else:
        assert len(SlimmingPlan.load(tmp_path / "out" / "plan.json").kept_blocks) == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image, _: image, "There is no mask and no label in the data, expected one of them"),
        (lambda image, label: (image, torch.zeros_like(label)), "Found only class 0 in the labels of the batches"),
        (lambda image, label: {"image": image, "mask": label, "filename": ["a.tif"] * len(image)},
         "Labelled rows come from 1 group, expected at least 2 for cross-validation"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_probed_are_refused(change, message):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=12, num_heads=1, num_classes=0)
    batches = [change(*pair) for pair in pairs("segmentation", 4)]
    with pytest.raises(LabelsError, match=message):
        select_depth(model, batches, criterion="probe", progress=False)
