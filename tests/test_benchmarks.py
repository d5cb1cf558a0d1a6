"""The benchmarks and the study run, on small cases, and their figures are what they say they are."""

import argparse
import csv
import json

import pytest
import torch
import yaml

from benchmarks import cka_packages, evidence, record, share_of_training, speed
from benchmarks.study.__main__ import HERE
from benchmarks.study.__main__ import main as run_study
from benchmarks.study.data import labelled, read_split
from benchmarks.study.picture import draw, figure
from benchmarks.study.runs import Run, gate_runs, judge_gate, study_runs
from benchmarks.study.tables import tables, write_results
from benchmarks.study.work import Work, settings


@pytest.fixture(scope="module")
def speeds(tmp_path_factory):
    """A narrow Prithvi of 4 blocks cut to 1."""
    folder = tmp_path_factory.mktemp("speed")
    small = "--backbone prithvi_eo_tiny --blocks 4 --keep 1 --sizes 64 --batches 2 --precisions fp32 --rounds 1 --device cpu"
    speed.main([*small.split(), "--decoders", "linear", "unet", "upernet64", "--profile", "-o", str(folder)])
    return json.loads((folder / "speed-cpu.json").read_text())


def test_speed_tells_the_limit(speeds):
    """Counted by hand: 17 tokens of width 256, two images."""
    n, d = 17, 256
    block = 2 * (n * d * 3 * d + 2 * n * n * d + n * d * d + 2 * n * d * 4 * d)
    embed = 2 * 16 * d * 6 * 256
    linear = speeds["rows"][0]
    assert linear["decoder"] == "linear"
    assert linear["limit_encoder"] == pytest.approx((embed + 4 * block) / (embed + block), rel=1e-6)
    assert 1 < linear["limit"] <= linear["limit_encoder"]
    assert speeds["rows"][1]["limit"] < linear["limit"]  # a larger decoder leaves less to gain


def test_speed_of_both_models(speeds):
    for row in speeds["rows"]:
        assert row["peak_full_mib"] > row["peak_cut_mib"] > 0
        for kind in ("train", "infer"):
            assert row[f"{kind}_speedup"] == pytest.approx(row[f"{kind}_full_s"] / row[f"{kind}_cut_s"])


def test_profile_is_a_share(speeds):
    for row in speeds["profiles"]:
        for kind in ("infer", "train"):
            shares = [value for key, value in row.items() if key.startswith(f"{kind}: ")]
            assert sum(shares) == pytest.approx(1)
            assert len(shares) >= 3


def test_results_can_be_made_again(speeds):
    assert speeds["command"].startswith("python -m benchmarks.speed --backbone prithvi_eo_tiny --blocks 4")
    assert speeds["machine"]["torch"] in torch.__version__
    assert speeds["commit"]


def test_other_packages_find_the_same(tmp_path):
    pytest.importorskip("torch_cka")
    pytest.importorskip("cka")
    size = "--layers 5 --rows 64 --width 32 --groups 3 --rounds 1 --device cpu"
    cka_packages.main([*size.split(), "-o", str(tmp_path)])
    found = {row["package"]: row for row in json.loads((tmp_path / "cka_packages-cpu.json").read_text())["rows"]}
    assert set(found) == {"terratorch_simpler", "terratorch_simpler, CKA alone", "pytorch-cka", "torch_cka"}
    assert all(row["largest_difference"] < 1e-4 for row in found.values())
    ours = found["terratorch_simpler"]
    # Four times the groups add their slots, of 5 x 5 numbers, to features that are here hardly larger.
    assert ours["peak_mib_4_groups"] - ours["peak_mib_1_group"] < 5 * 2048 / 2**20


def test_evidence_is_made_from_results(tmp_path):
    machine = {"on": "cpu", "device": "a CPU", "cores": 2, "python": "3.11", "torch": "2", "terratorch": "1"}
    found = {"command": "python -m benchmarks.speed", "commit": "abc", "machine": machine}
    rows = [{"train_speedup": 4.567, "compile": False}, {"train_speedup": None, "compile": False}]
    (tmp_path / "speed-cpu.json").write_text(json.dumps({**found, "profiles": [{"a": 1}], "rows": rows}))
    page = (
        "Before\n<!-- results: speed-cpu -->\nold\n<!-- end -->\nAfter\n<!-- results: speed-cpu/profiles -->\n<!-- end -->\n"
    )
    text = evidence.fill(page, tmp_path)
    assert "old" not in text
    assert text.startswith("Before\n")
    assert "\nAfter\n" in text
    assert "`python -m benchmarks.speed` at commit abc on a CPU, 2 cores" in text
    assert "| train speedup |\n|---|\n| 4.57 |\n| - |" in text
    assert evidence.fill(text, tmp_path) == text
    with pytest.raises(SystemExit, match="expected the results of a benchmark: run make bench"):
        evidence.fill("<!-- results: other-cpu -->\n<!-- end -->", tmp_path)


def test_committed_page_is_what_the_results_say():
    page = evidence.PAGE.read_text()
    assert evidence.fill(page, record.RESULTS) == page


STUDY = yaml.safe_load((HERE / "study.yaml").read_text())


def scored(runs, score):
    return {
        run: {"test_miou": score(run), "seconds": 1.0, "step_bytes": 2**20, "parameters": 10, "kept": [0, 1]} for run in runs
    }


def test_gate_needs_a_clear_margin():
    def score(run):
        pretrained = run.variant == "depth"
        if run.setup == "cover_frozen":  # clear
            return 0.5 + 0.05 * run.seed + 0.1 * pretrained + 0.01 * pretrained * run.seed
        if run.setup == "cover_few":  # clear, but too small to matter
            return 0.5 + 0.001 * run.seed + 0.01 * pretrained
        return 0.5 + 0.1 * pretrained * (-1) ** run.seed  # lost in the noise

    gates = {gate.setup: gate for gate in judge_gate(STUDY, scored(gate_runs(STUDY), score))}
    assert [name for name, gate in gates.items() if gate.passed] == ["cover_frozen"]
    # Differences .10 to .14, seed by seed: what seeds have in common takes no part.
    assert gates["cover_frozen"].error == pytest.approx((0.00025 / 5) ** 0.5)
    assert gates["cover_frozen"].pretrained - gates["cover_frozen"].random == pytest.approx(0.12)


def test_unfinished_gate_is_not_judged():
    results = scored(list(gate_runs(STUDY))[:-1], lambda run: 0.5)
    assert len(judge_gate(STUDY, results)) == len(STUDY["setups"]) - 1


def test_runs_are_listed_once_and_frozen_ones_have_no_adapters():
    runs = list(study_runs(STUDY, ["cover_frozen", "cover_few"], {"deep12": 6}))
    assert len(runs) == len(set(runs))
    assert {run.variant for run in runs if run.setup == "cover_frozen"}.isdisjoint({"lora", "slimmable"})
    assert {run.depth for run in runs if run.rule == "angular"} == {6}
    more = study_runs(STUDY, ["cover_frozen"], {"deep12": 10})
    assert {run.depth for run in more if run.rule == "angular"} == {6, 10}


def test_tables_tell_regret():
    runs = [*gate_runs(STUDY), *study_runs(STUDY, ["cover_frozen"], {"deep12": 2})]
    results = scored(runs, lambda run: (run.depth or 2) / 20 - 0.3 * (run.variant == "random") + 0.01 * run.seed)
    text = tables(STUDY, results)
    assert "Best depth: 12 (0.620)" in text
    assert "| simpler | 0-1 | 0.120 ± 0.016 | +0.500 | -0.500 ± 0.000 | +0.000 ± 0.000 |" in text
    assert "| 6 | 0.320 ± 0.016 | 51.6% | -0.300 ± 0.000 | 0.020 ± 0.016 | +0.000 ± 0.000 | 1 | 1 |" in text


def test_picture_tells_gains_seed_by_seed(tmp_path):
    """Full depth scores .6 more than none, whatever the seed; SIMPLER keeps 2 blocks."""
    runs = [*gate_runs(STUDY), *study_runs(STUDY, ["cover_frozen"], {"deep12": 2})]
    results = scored(runs, lambda run: (run.depth or 2) / 20 - 0.3 * (run.variant == "random") + 0.01 * run.seed)
    for run, found in results.items():
        found["kept"] = range(run.depth or 2)
    write_results(tmp_path, STUDY, results, "here")
    with (tmp_path / "results.csv").open() as file:
        drawn = figure(list(csv.DictReader(file)))
    panels = {axes.get_title(): axes for axes in drawn.axes}
    assert panels.keys() == {"cover_frozen, deep12", "cover_frozen, deep24"}
    lines = {bars.get_label(): bars.lines[0] for bars in panels["cover_frozen, deep12"].containers}
    depths, gains = lines["pretrained, first blocks"].get_data()
    assert list(depths) == STUDY["depths"]["deep12"]
    assert list(gains) == pytest.approx([(depth - 12) / 20 for depth in depths])
    assert list(lines["random weights, first blocks"].get_ydata()) == pytest.approx([-0.75, -0.6, -0.45, -0.3])
    rules = {points.get_label(): points.get_offsets() for points in panels["cover_frozen, deep12"].collections}
    assert rules["simpler"].tolist() == [[2, pytest.approx(-0.5)]]
    draw(tmp_path / "results.csv", tmp_path / "depths.png")
    assert (tmp_path / "depths.png").stat().st_size > 10_000


def test_no_picture_of_the_gate_alone(tmp_path):
    write_results(tmp_path, STUDY, scored(gate_runs(STUDY), lambda run: 0.5), "here")
    draw(tmp_path / "results.csv", tmp_path / "depths.png")
    assert not (tmp_path / "depths.png").exists()


def fewer_tiles(shared_data, tiles, **counts):
    """A data set of the first tiles of each split."""
    tiles.mkdir(parents=True)
    for name in ("images", "landcover", "water_mask"):
        (tiles / name).symlink_to(shared_data / "hls_water" / name)
    (tiles / "splits").mkdir()
    for split, count in counts.items():
        (tiles / f"splits/{split}.txt").write_text("\n".join(read_split(shared_data / "hls_water", split)[:count]))


def test_share_of_training_is_that_of_real_runs(shared_data, tmp_path):
    """Fits twice: with the selection, and with the intact encoder."""
    data = tmp_path / "hls_water"
    fewer_tiles(shared_data, data, train=40, val=2, test=2)
    only = "--device cpu --epochs 2 --encoders prithvi_eo_v2_tiny_tl"
    share_of_training.main([*only.split(), "--data", str(data), "-o", str(tmp_path)])
    [row] = json.loads((tmp_path / "share_of_training-cpu.json").read_text())["rows"]
    assert row["tiles"] == 40
    assert 1 <= row["kept"] <= 12
    assert 0 < row["of_that_pass_s"] < row["selection_s"] < row["training_intact_s"] + row["selection_s"]
    assert row["share_of_intact"] == pytest.approx(row["selection_s"] / row["training_intact_s"])
    assert row["share_of_cut"] == pytest.approx(row["selection_s"] / row["training_cut_s"])


@pytest.fixture(scope="module")
def small_study(shared_data, tmp_path_factory):
    """One set-up of each kind, one epoch, two seeds, a dozen tiles."""
    folder = tmp_path_factory.mktemp("study")
    fewer_tiles(shared_data, folder / "data" / "hls_water", train=40, val=2, test=4)
    for name in ("ukis_csmask", "scenes"):
        (folder / "data" / name).symlink_to(shared_data / name)
    few = {"labels": 4, "epochs": 1}
    study = STUDY | {
        "seeds": [0, 1],
        "deep_seeds": [0],
        "encoders": {"deep12": STUDY["encoders"]["deep12"], "shallow6": {"depth": 2, "steps": 2}},
        "setups": {name: STUDY["setups"][name] | few for name in ("cover_frozen", "cover_few")},
        "gate": {"encoder": "deep12", "margin": -2.0, "errors": -1e9},  # all pass
        "depths": {"deep12": [1, 12]},
        "random_depths": [],
        "rules": ["simpler"],
        "rules_with_budget": ["cka_intervals"],
        "widths": [0.5],
        "recovery_depths": [2],
        "lora_depths": [2],
        "slimmable": [0.5, 1.0],
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    command = [str(folder / "data"), "-o", str(folder / "out"), "-c", str(folder / "study.yaml")]
    run_study(command)
    return folder, study, command


def test_study_does_every_run(small_study):
    folder, study, _ = small_study
    results = Work(study, folder, folder / "out", 1).results()
    found = {run.variant for run in results}
    assert found == {"depth", "random", "rule", "shallow", "width", "recovery", "lora", "slimmable"}
    with (folder / "out/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results)
    assert all(0 <= float(row["test_miou"]) <= 1 for row in rows)
    [shallow] = {row["parameters"] for row in rows if row["variant"] == "shallow"}
    [one] = {row["parameters"] for row in rows if row["variant"] == "depth" and row["depth"] == "1"}
    assert int(shallow) > int(one)
    assert {row["kept"] for row in rows if row["variant"] == "depth" and row["depth"] == "1"} == {"0"}
    assert {row["width"] for row in rows if row["variant"] == "width"} == {"0.5"}
    assert all(row["test_miou_0.5"] for row in rows if row["variant"] == "slimmable")
    assert "### cover_few: width, LoRA" in (folder / "out/tables.md").read_text()


def test_study_goes_on_where_it_ended(small_study, capsys):
    folder, _, command = small_study
    runs = folder / "out/runs"
    before = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    lost = runs / f"{Run('cover_few', 'deep12', 'depth', 'first', 1, 1.0, 1).key}.json"
    score = json.loads(lost.read_text())["found"]["test_miou"]
    lost.unlink()
    run_study([*command, "--jobs", "2"])  # a process of its own finds the same
    after = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert {path for path in before if after[path] != before[path]} == {lost}
    assert json.loads(lost.read_text())["found"]["test_miou"] == score  # the same seed, the same score
    assert "1/1 cover_few-deep12-depth-first-1" in capsys.readouterr().out


def test_result_of_other_settings_counts_no_more(tmp_path):
    run = next(gate_runs(STUDY))
    row = {"run": run._asdict(), "settings": settings(run, STUDY), "found": {"test_miou": 0.5}}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{run.key}.json").write_text(json.dumps(row))
    assert Work(STUDY, tmp_path, tmp_path, 1).results() == {run: {"test_miou": 0.5}}
    other = STUDY | {"setups": {name: setup | {"labels": 7} for name, setup in STUDY["setups"].items()}}
    assert not Work(other, tmp_path, tmp_path, 1).results()


def test_labels_are_training_tiles(shared_data):
    data = shared_data / "hls_water"
    chosen = labelled(data, 32, 0)
    assert len(set(chosen)) == 32
    assert set(chosen) <= set(read_split(data, "train"))
    assert chosen != labelled(data, 32, 1)
    assert labelled(data, 32, 0) == labelled(data, 136, 0)[:32]


def test_results_hold_no_paths_of_the_machine(tmp_path):
    asked = argparse.Namespace(device=torch.device("cpu"), output=tmp_path, data=tmp_path / "tiles")
    path = record.save("speed", asked, [], ["--data", str(tmp_path / "tiles"), "-o", str(tmp_path)])
    assert str(tmp_path) not in path.read_text()
    assert json.loads(path.read_text())["command"] == "python -m benchmarks.speed --data DATA/tiles"
