"""The benchmark of a pretrained ViT: its statistics against direct computations, and small runs from data to sentences."""

import csv
import json
from argparse import Namespace

import numpy as np
import pytest
import rasterio
import timm
import torch
from PIL import Image
from scipy import stats
from terratorch.registry import BACKBONE_REGISTRY

from benchmarks import record
from benchmarks.pretrained_vit import finetune, frozen, recovery, statistics
from benchmarks.pretrained_vit.__main__ import main
from benchmarks.pretrained_vit.data import Task, read_task
from benchmarks.pretrained_vit.encoder import digest, read_weights
from benchmarks.pretrained_vit.sentences import sentences
from terratorch_simpler.functional.hsic import layer_normed
from tests.extras import needs_peft

MODEL = "vit_tiny_patch16_224"
COUNTS = {"train": 40, "val": 8, "test": 8}
COUNTS_OF_SCENES = {"train": 6 * 7, "val": 14, "test": 5 * 7}
CODES = np.array([[10, 30], [40, 80]])


def counts(seeds=3, columns=4, places=6, classes=3):
    return np.random.default_rng(0).integers(0, 9, size=(seeds, columns, places, classes, classes))


def test_confusion_and_scores():
    truth, predicted, place = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0]), np.array([0, 0, 0, 1, 1])
    found = statistics.confusion(truth, predicted, place, 3, 3)
    assert found.sum((1, 2)).tolist() == [3, 2, 0]
    assert found.sum(0).tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert statistics.score(found.sum(0), accuracy=True) == pytest.approx(3 / 5)
    assert statistics.score(found.sum(0), accuracy=False) == pytest.approx((1 / 3 + 2 / 4) / 2)  # the third does not occur


def test_f_is_that_of_two_depths():
    """With two depths it is the paired t test: F = t^2."""
    scores = np.random.default_rng(1).normal(size=(6, 2))
    assert statistics.f_statistic(scores) == pytest.approx(stats.ttest_rel(scores[:, 0], scores[:, 1]).statistic ** 2)


def favoured(places, better=0.0, seeds=4, depths=5, spread=0.3, seed=0):
    """Counts of two classes; each place favours some depths by chance, and one depth is better everywhere."""
    rng = np.random.default_rng(seed)
    rate = np.clip(0.5 + rng.normal(0, spread, (depths, places)), 0.02, 0.98)
    rate[2] = np.clip(rate[2] + better, 0.02, 0.98)
    right = rng.binomial(500, np.broadcast_to(rate, (seeds, depths, places)))
    return np.stack([np.stack([right, 500 - right], -1), np.zeros((*right.shape, 2), int)], -2)


def test_depths_that_some_places_favour_do_not_differ():
    """The tables of F, which take the places as given, would call every one of these samples different."""
    for accuracy in (True, False):
        p = [statistics.f_test(favoured(12, seed=seed), accuracy)[1] for seed in range(12)]
        assert np.median(p) > 0.2
        assert statistics.f_test(favoured(30, better=0.4), accuracy)[1] < 0.01
    scores = statistics.score(favoured(12).sum(2), True)
    assert stats.f.sf(statistics.f_statistic(scores), 4, 12) < 1e-6


def elsewhere_best(found, depths, weights):
    """Directly: for each seed and fold, the depth that is best in other seeds on other folds, all places weighted."""
    found = found * weights[:, None, None]
    chosen = np.empty_like(found[:, 0])
    for seed, place in np.ndindex(found.shape[0], found.shape[2]):
        others = [other for other in range(len(found)) if other != seed]
        elsewhere = [other for other in range(found.shape[2]) if other % 5 != place % 5]
        score = statistics.score(found[others][:, :depths][:, :, elsewhere].sum(2), True).mean(0)
        chosen[seed, place] = found[seed, score.argmax(), place]
    return statistics.score(chosen.sum(1), True)


def test_the_reference_is_the_best_depth_of_other_seeds_and_places():
    found = favoured(17, seeds=3)
    bootstrap = statistics.Bootstrap(found, True, 4, resamples=6)
    assert bootstrap.measured[:, -1] == pytest.approx(elsewhere_best(found, 4, np.ones(17, int)))
    weights = np.random.default_rng(0).multinomial(17, np.full(17, 1 / 17), size=6)
    expected = [elsewhere_best(found, 4, weight) for weight in weights]  # picked anew in every sample
    assert bootstrap.scores[..., -1] == pytest.approx(np.array(expected))


def test_regret_is_zero_on_average_where_no_depth_is_better():
    """Picked by the scores that it is compared with, the best depth would win."""
    lost, picked = [], []
    for seed in range(40):
        scores = statistics.Bootstrap(favoured(10, seed=seed), True, 5, resamples=1).measured
        lost.append(statistics.regrets(scores, np.zeros(4, int)).mean())
        picked.append(scores[:, :5].mean(0).max() - scores[:, 0].mean())
    assert abs(np.mean(lost)) < 2.5 * np.std(lost) / 40**0.5
    assert np.mean(picked) > 5 * np.std(picked) / 40**0.5


def test_regrets_are_differences_of_columns():
    scores = np.array(
        [[0.9, 0.1, 0.5, 0.7], [0.1, 0.8, 0.4, 0.6], [0.2, 0.6, 0.3, 0.5]]
    )  # two depths, another, the reference
    chosen = np.array([2, 2, 0])
    assert statistics.regrets(scores, chosen) == pytest.approx([0.7 - 0.5, 0.6 - 0.4, 0.5 - 0.2])
    assert statistics.regrets(np.stack([scores, scores]), chosen).shape == (2, 3)


def test_a_difference_is_paired_by_seed_and_place():
    found = favoured(10)
    bootstrap, one, other = statistics.Bootstrap(found, True), np.array([0, 1, 2, 1]), np.full(4, 3)
    seeds = np.arange(4)
    value, low, high = bootstrap.difference(one, other)
    scores = statistics.score(found.sum(2), True)
    assert value == pytest.approx((scores[seeds, one] - scores[:, 3]).mean())
    samples = bootstrap.mean(bootstrap.scores[:, seeds, one] - bootstrap.scores[..., 3])
    assert [low, high] == pytest.approx(np.quantile(samples, [0.025, 0.975]).tolist())
    assert bootstrap.difference(other, other) == [0, 0, 0]


def test_bootstrap_resamples_places_and_seeds():
    found = counts()
    bootstrap = statistics.Bootstrap(found, accuracy=True, resamples=5)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(6, np.full(6, 1 / 6), size=5)
    drawn = rng.integers(3, size=(5, 3))
    scores = [statistics.score((found * weight[:, None, None]).sum(2), True) for weight in weights]
    assert bootstrap.scores == pytest.approx(np.array(scores))
    means = [score[seeds].mean(0) for score, seeds in zip(scores, drawn, strict=True)]
    assert bootstrap.mean(bootstrap.scores) == pytest.approx(np.array(means))
    assert bootstrap.mean(bootstrap.scores[..., 1]) == pytest.approx(np.array(means)[:, 1])


def test_gate_needs_a_clear_gain_over_places_too():
    trained, untrained = favoured(40, better=0.2, spread=0.1), favoured(40, spread=0.1, seed=1)
    gain, counts = statistics.gate(trained, untrained, True)
    best = [statistics.score(each.sum(2), True).mean(0).max() for each in (trained, untrained)]
    assert gain[0] == pytest.approx(best[0] - best[1])
    assert counts
    assert not statistics.gate(untrained, trained, True)[1]
    few = [favoured(3, spread=0.3, seed=seed) for seed in (0, 1)]  # places differ by more than seeds do
    assert statistics.gate(*few, True)[0][1] > 0.05


def test_strength_is_chosen_by_the_score_of_the_task(monkeypatch):
    """The score decides: if it is turned round, the worst strength is taken."""
    rng = np.random.default_rng(0)
    y = (np.arange(500) % 10 == 0).astype(np.int64)  # one class prevails
    x = (1.5 * y[:, None] + rng.normal(size=(500, 4))).astype(np.float32)
    patches, places = Task("water", 2, {}, {}, {}, ()), np.arange(500) % 7
    predicted = frozen.fit(x, y, places, patches)(x)
    assert (predicted == y).mean() > 0.92
    score = statistics.score
    monkeypatch.setattr(statistics, "score", lambda *args: -score(*args))
    assert not frozen.fit(x, y, places, patches)(x).any()  # shrunk to the most frequent class


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tiles of four kinds of land cover that differ in colour, and scenes of seven kinds."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    hls, scenes = root / "hls_water", root / "rsscn7"
    for folder in ("images", "landcover", "water_mask", "splits"):
        (hls / folder).mkdir(parents=True)
    (scenes / "splits").mkdir(parents=True)
    with (hls / "tiles.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["tile", "site_group"])
        for split, count in COUNTS.items():
            names = [f"{split}{n}" for n in range(count)]
            (hls / f"splits/{split}.txt").write_text("\n".join(names))
            for n, name in enumerate(names):
                table.writerow([name, f"{split}{n % 4}"])
                codes = np.kron(rng.permutation(CODES.flatten()).reshape(2, 2), np.ones((16, 16), np.uint8)).astype(np.uint8)
                image = (codes * 10.0 + rng.normal(0, 50, (6, 32, 32))).astype(np.int16)
                write(hls / f"images/{name}_image.tif", image)
                write(hls / f"landcover/{name}_landcover.tif", codes[None])
                write(hls / f"water_mask/{name}_mask.tif", (codes[None] == 80).astype(np.uint8))
            kinds = [f"k{n % 7}/{split}{n}" for n in range(COUNTS_OF_SCENES[split])]
            (scenes / f"splits/{split}.txt").write_text("\n".join(kinds))
            for n, name in enumerate(kinds):
                (scenes / name).parent.mkdir(exist_ok=True)
                pixels = np.clip(30 * (n % 7) + rng.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(scenes / f"{name}.jpg")
    return root


def write(path, pixels):
    with rasterio.open(
        path, "w", driver="GTiff", count=len(pixels), height=32, width=32, dtype=pixels.dtype.name
    ) as file:  # fmt: skip
        file.write(pixels)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.pt"
    torch.save(timm.create_model(MODEL, img_size=32, num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def found(data, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    small = f"{data} --weights {weights} --model {MODEL} --size 32 --seeds 2 --labels 14 16 --device cpu -o {folder}"
    main(small.split())
    return json.loads((folder / "pretrained_vit-cpu.json").read_text())


def test_frozen_probes_of_every_depth(found):
    assert [(row["task"], row["labelled"]) for row in found["tests"]] == [("cover", 16), ("water", 16), ("scenes", 14)]
    assert [row["weights"] for row in found["depths"][:3]] == ["pretrained", "random", "none (most frequent class)"]
    for row in found["depths"]:
        assert {key for key in row if key.isdigit()} == {str(depth) for depth in range(1, 13)}
    # All classes are as frequent, 14 px patches aside: one of seven scenes is right.
    assert found["depths"][-1]["1"] == pytest.approx(1 / 7)
    criteria = [row["criterion"] for row in found["rows"] if row["task"] == "cover"]
    assert {"probe", "simpler", "angular", "block_influence", "cka_intervals", "half", "all blocks, width 0.5"} <= {
        *criteria
    }
    assert len(criteria) == len(set(criteria))
    by_name = {row["criterion"]: row for row in found["rows"] if row["task"] == "scenes"}
    assert by_name["half"]["kept"] == "6"
    assert by_name["half"]["score"] == pytest.approx(found["depths"][6]["6"][0])
    assert found["weights"]
    assert str(found).count("/tmp") == 0


def test_no_case_without_a_gate_is_in_the_means(found):
    assert any(row["counts"] == "no" or row["p"] > 0.05 for row in found["tests"])
    counted = {row["task"] for row in found["tests"] if row["counts"] == "yes" and row["p"] <= 0.05}
    for row in found["regrets"]:
        assert row.keys() == {"criterion", "mean_regret", *counted}
    for row in found["rows"]:
        assert ("regret" in row) == ("gain_on_all_blocks" in row) == ("score" in row)


@needs_peft
def test_fine_tuning_saves_every_run(data, weights, tmp_path):
    small = f"{data} --weights {weights} --model {MODEL} --size 64 --seeds 2 --labels 7 --epochs 1 --depths 1 2 12 --steps 2"
    others = "--targets 3 --random 1 --lora 1 --narrow 1 --linear 1 --distill 1"
    finetune.main([*small.split(), *others.split(), "--device", "cpu", "-o", str(tmp_path)])
    found = json.loads((tmp_path / "pretrained_vit_finetune_7-cpu.json").read_text())
    variants = [("whole", 1), ("whole", 2), ("whole", 12)]
    variants += [(name, 1) for name in ("random", "lora", "narrow", "linear to block 3", "distill to block 3")]
    assert [(row["trained"], row["blocks"]) for row in found["rows"]] == variants
    assert len(found["runs"]) == len(variants) * (3 + 1)
    assert found["rows"][2]["gain_on_all_blocks"] is None
    low, high = found["rows"][0]["gain_on_all_blocks"][1:]
    assert low <= high
    trained = {row["trained"]: row["trained_parameters_M"] for row in found["rows"] if row["blocks"] == 1}
    assert (
        trained["lora"]
        < trained["narrow"]
        < trained["whole"]
        == trained["distill to block 3"]
        < trained["linear to block 3"]
    )
    assert found["command"].startswith("python -m benchmarks.pretrained_vit.finetune DATA/")
    choices = {row["criterion"]: row for row in found["choices"]}
    assert choices["all blocks"]["score"] == pytest.approx(found["rows"][2]["test_accuracy"][0])
    assert choices["all blocks"]["gain_on_all_blocks"] == [0, 0, 0]
    assert "half" not in choices  # six blocks were not fine-tuned
    distilled = found["rows"][-1]
    assert distilled["gain_on_same_blocks"][0] == pytest.approx(
        distilled["test_accuracy"][0] - found["rows"][0]["test_accuracy"][0]
    )
    assert found["rows"][0]["gain_on_same_blocks"] is None
    assert sentences("pretrained_vit_finetune_70-cpu", found)


def test_stopped_fine_tuning_goes_on_and_ends_as_if_it_had_not(data, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "commit", lambda: "0123abcdef")
    run, begin, done, begun = finetune.run, finetune.start, [], []

    def digested(variant, *args):
        encoder = begin(variant, *args)
        begun.append((str(variant), digest(encoder.state_dict())))
        return encoder

    monkeypatch.setattr(finetune, "start", digested)

    def stopped_at(limit):
        def counted(variant, *args):
            if len(done) == limit:
                raise KeyboardInterrupt
            done.append(str(variant))
            return run(variant, *args)

        monkeypatch.setattr(finetune, "run", counted)

    def start(folder, seeds=2):
        small = f"{data} --weights {weights} --model {MODEL} --size 32 --labels 7 --epochs 1 --depths 1 12 --random 1"
        finetune.main([*small.split(), "--seeds", str(seeds), "--rates", "1e-5", "--device", "cpu", "-o", str(folder)])
        found = json.loads((folder / "pretrained_vit_finetune_7-cpu.json").read_text())
        for line in [*found["rows"], *found["runs"]]:
            assert {"training_s", "s"} & line.keys()
            for time in ("training_s", "s"):
                line.pop(time, None)
        return found

    stopped_at(2)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "stopped")
    stopped_at(None)
    found = start(tmp_path / "stopped")
    assert done == ["whole", "whole", "random"]
    assert not any((tmp_path / "stopped" / "unfinished").iterdir())
    assert found == start(tmp_path / "whole")
    assert len(done) == 6  # what is finished is done again
    assert begun[:3] == begun[3:]  # random weights too

    stopped_at(7)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "other")
    stopped_at(None)
    start(tmp_path / "other", seeds=3)  # other settings
    assert len(done) == 7 + 3


@pytest.mark.parametrize(("made_at", "runs"), [("0123abcdef", 1), ("0123abcdef+", 2), ("unknown", 2)])
def test_results_of_changed_code_are_not_gone_on_from(tmp_path, monkeypatch, made_at, runs):
    monkeypatch.setattr(record, "commit", lambda: made_at)
    asked = Namespace(output=tmp_path, device=torch.device("cpu"))
    made = [record.Unfinished("any", asked)("part", lambda number=number: number) for number in range(2)]
    assert made == list(range(runs)) + made[:1] * (2 - runs)


@pytest.mark.parametrize("kind", ["linear", "distill"])
def test_fine_tuning_starts_from_what_recovery_has_found(data, weights, kind):
    task = finetune.read_task(data, "scenes", 64, 16)
    args = Namespace(model=MODEL, size=64, weights=weights, steps=3)
    encoder = finetune.start(finetune.Variant(kind, 2, 5), read_weights(weights), args, task)
    intact = BACKBONE_REGISTRY.build(f"simpler_{MODEL}", img_size=64, ckpt_path=str(weights)).eval()
    recovered = recovery.recover(intact, task, kind, 2, 5, 3).encoder
    images, seen = task.images["val"][:2], []
    encoder.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        encoder.forward_features(images)
        (expected,) = recovery.last_features(recovered, task._replace(images={"val": images}))["val"]
    found = layer_normed(seen[0])[:, 1:].mean(1, keepdim=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_choices_are_compared_in_the_same_seeds_and_places(data, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "LEVEL", 1.0)
    monkeypatch.setattr(statistics, "gate", lambda *_: ([0.1, 0.01], True))
    small = f"{data} --weights {weights} --model {MODEL} --size 32 --seeds 2 --labels 14 --tasks scenes --device cpu"
    main([*small.split(), "--train-scenes", "14", "--swapped", "-o", str(tmp_path)])
    found = json.loads((tmp_path / "pretrained_vit_swapped-cpu.json").read_text())
    score = {row["criterion"]: row["score"] for row in found["rows"] if "score" in row}
    assert [row["criterion"] for row in found["differences"]] == [row["criterion"] for row in found["regrets"]]
    for row in found["differences"]:
        for other in ("half", "probe", "probe, rule best"):
            difference = row[f"minus_{other}".replace(" ", "_")]
            if row["criterion"] == other:
                assert difference is None
                continue
            value, low, high = difference
            assert low <= value <= high
            assert value == pytest.approx(score[other] - score[row["criterion"]])  # what regret is against cancels out
    assert "- With `rule: best` its mean regret is " in sentences("pretrained_vit_swapped-cpu", found)


@pytest.mark.parametrize("arguments", ["--tasks scenes cover --train-scenes 14", "--tasks scenes"])
def test_only_scenes_are_swapped(data, weights, arguments, capsys):
    with pytest.raises(SystemExit):
        main([str(data), "--weights", str(weights), "--swapped", *arguments.split()])
    assert "--swapped is for scenes: give --tasks scenes and a number of --train-scenes" in capsys.readouterr().err


def test_swapped_scenes_are_tested_on_what_was_not_read_before(data):
    before = read_task(data, "scenes", 32, 16, 14)
    after = read_task(data, "scenes", 32, 16, 14, swapped=True)
    assert after.places["train"].tolist() == before.places["test"].tolist()
    assert after.places["val"].tolist() == before.places["train"].tolist()
    seen = {name for places in before.places.values() for name in places}
    assert len(after.places["test"]) == COUNTS_OF_SCENES["train"] - 14
    assert not seen & set(after.places["test"])
    for split in ("train", "val", "test"):
        kinds = [int(name[1]) for name in after.places[split]]
        assert after.labels[split][:, 0].tolist() == kinds
    again = read_task(data, "scenes", 32, 16, None)
    same = again.places["train"].tolist().index(after.places["test"][0])
    assert torch.equal(again.images["train"][same], after.images["test"][0])
    with pytest.raises(SystemExit, match=r"expected some to be left to test: give fewer --train-scenes\.$"):
        read_task(data, "scenes", 32, 16, swapped=True)


def test_recoveries_are_compared_with_none(data, weights, tmp_path):
    small = f"{data} --weights {weights} --model {MODEL} --size 64 --seeds 2 --labels 16 --steps 2 --tasks cover"
    recovery.main([*small.split(), "--depth", "11", "--device", "cpu", "-o", str(tmp_path)])
    found = json.loads((tmp_path / "pretrained_vit_recovery-cpu.json").read_text())
    assert [(row["recovery"], row["target"]) for row in found["rows"]] == [
        ("none", "-"),
        ("linear", "block 12 (last)"),
        ("distill", "block 12 (last)"),
    ]
    none, *recovered = found["rows"]
    for row in recovered:
        assert row["gain"][0] == pytest.approx(row["score"][0] - none["score"][0])
        assert row["gain"][1] <= row["gain"][0] <= row["gain"][2]
    assert " to " in recovered[1]["explained"]
    assert found["command"].startswith("python -m benchmarks.pretrained_vit.recovery DATA/")
    assert sentences("pretrained_vit_recovery-cpu", found).count("without recovery") == 2


def test_missing_files_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"There is no file .*none.pt, expected a state dict"):
        read_weights(tmp_path / "none.pt")


def test_digest_is_of_names_and_values():
    one = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert digest(one) == digest(dict(reversed(one.items())))
    assert digest(one) != digest({"a": torch.zeros(2), "b": torch.ones(2)})


def fake(p=1e-3, counts="yes"):
    """Results of one case."""
    row = {"task": "cover", "labelled": 16}
    figures = {"score": 0.4, "regret": [0.1, 0.05, 0.2], "gain_on_all_blocks": [-0.1, -0.2, 0.1]}
    names = ["probe", "probe, rule best", "all blocks", "half", "a third", "simpler", "angular", "all blocks, width 0.5"]
    rows = [row | {"criterion": name, "kept": "2", "verdict": "unsettled"} | figures for name in names]
    mean = [{"criterion": name, "mean_regret": [0.1, 0.05, 0.2], "cover": [0.1, 0.05, 0.2]} for name in names]
    differences = [
        {"criterion": name, "minus_half": [0.0, -0.1, 0.1], "minus_probe,_rule_best": [0.05, 0.01, 0.1]} for name in names
    ]
    test = row | {"pretrained_minus_random": [0.1, 0.01], "counts": counts, "F_over_depths": 9.0, "p": p}
    depths = [row | {"weights": "pretrained", "1": [0.4, 0.01], "2": [0.3, 0.01]}]
    return {"tests": [test], "rows": rows, "regrets": mean, "differences": differences, "depths": depths}


def test_sentences_rank_nothing_without_an_f_test():
    said = sentences("pretrained_vit-cpu", fake())
    assert "depth 1 for land cover with 16 labelled images (0.400 ± 0.010; all 2: 0.300 ± 0.010)" in said
    assert "SIMPLER keeps 2 blocks, and its verdict is unsettled: mean regret 0.100 (0.050 to 0.200)" in said
    assert "Regret minus that one: `probe` 0.000 (-0.100 to 0.100), not told apart, `probe` with `rule: best`" in said
    assert "0.100 (0.050 to 0.200); that of the default minus this one is 0.050 (0.010 to 0.100).\n" in said
    assert "no mean over tasks counts" not in said
    for without in (fake(p=0.2), fake(counts="no")):
        said = sentences("pretrained_vit-cpu", without)
        assert "mean regret" not in said
        assert "which no mean over tasks counts: land cover with 16 labelled images 0.100 (0.050 to 0.200)" in said
        assert "SIMPLER keeps" not in said
        assert "SIMPLER, gain on all blocks: land cover with 16 labelled images -0.100 (-0.200 to 0.100). The" in said
        assert "(-0.200 to 0.100) with half, since unsettled, in 1 of 1 draws. The" in said
    assert "not ranked for land cover with 16 labelled images (p = 0.2)" in sentences("pretrained_vit-cpu", fake(p=0.2))


def test_sentences_of_fine_tuning_follow_the_intervals():
    rows = [
        {"trained": "whole", "blocks": 3, "test_accuracy": [0.6, 0.01], "gain_on_all_blocks": [0.1, 0.05, 0.2]},
        {"trained": "whole", "blocks": 6, "test_accuracy": [0.5, 0.01], "gain_on_all_blocks": [0.0, -0.05, 0.2]},
        {"trained": "whole", "blocks": 12, "test_accuracy": [0.5, 0.01], "gain_on_all_blocks": None},
    ]
    distilled = {
        "trained": "distill to block 7",
        "blocks": 3,
        "test_accuracy": [0.7, 0.01],
        "gain_on_all_blocks": [0.2, 0.05, 0.3],
        "gain_on_same_blocks": [0.1, 0.02, 0.18],
    }
    choices = [
        {
            "criterion": "probe",
            "kept": "3",
            "gain_on_all_blocks": [0.1, 0.05, 0.2],
            "gain_on_half": [0.1, -0.05, 0.2],
        },
        {"criterion": "half", "kept": "6", "gain_on_all_blocks": [0.0, -0.05, 0.2], "gain_on_half": [0.0, 0.0, 0.0]},
    ]
    runs = [{"trained": "whole", "blocks": 3, "seed": 0, "learning_rate": rate} for rate in (1e-5, 3e-5, 1e-4)]
    runs = [{**run, "blocks": blocks} for run in runs for blocks in (3, 6, 12)]
    for row, rate in zip(rows, ("1e-05", "3e-05", "3e-05"), strict=True):
        row["learning_rate"] = rate
    found = {"tests": [{"F_over_depths": 9.0, "p": 0.01}], "rows": rows, "runs": runs, "choices": choices}
    found["rows"] = [*rows, distilled]
    said = sentences("pretrained_vit_finetune_70-cpu", found)
    assert "Above all blocks: 3." in said
    gain = "gain on all blocks 0.200 (0.050 to 0.300), on the same blocks as they are 0.100 (0.020 to 0.180)"
    assert f"- After a distillation to block 7: 3 blocks 0.700 ± 0.010 ({gain})." in said
    assert "- Choices gain on all blocks: probe (keeps 3) 0.100 (0.050 to 0.200) and half (keeps 6) 0.000" in said
    assert "- On half of the blocks: probe 0.100 (-0.050 to 0.200), not told apart.\n" in said
    assert "chose the lowest or highest learning rate at depth 3:" in said
    said = sentences("pretrained_vit_finetune_70-cpu", found | {"tests": [{"F_over_depths": 1.0, "p": 0.4}]})
    assert (
        "- The depths are not shown to differ (F test, p = 0.4), so they are not ranked. Gains on all 12 blocks: 3 " in said
    )
    assert "Above" not in said
    said = sentences("pretrained_vit_finetune_recovery-cpu", found | {"rows": [rows[0], rows[2]]})
    assert "- 3 blocks gain 0.100 (0.050 to 0.200) on all; the F test over these two gives p = 0.01.\n" in said
