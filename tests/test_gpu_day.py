"""``make gpu``, on a CPU: what every check looks at on small encoders, and that nothing ends the whole but its end."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import figures, machine, models, selection, training, wheels
from benchmarks.gpu.__main__ import CHECKS, main
from benchmarks.gpu.check import Settings
from terratorch_simpler.extraction import TokenSampler
from tests import cli_runner, gpu_checks
from tests.extras import needs_peft
from tests.gpu_checks import check

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings(
    "ignore::terratorch_simpler.errors.UntrainedEncoderWarning", "ignore::terratorch_simpler.errors.FewTilesWarning"
)


def day(folder, *checks, budget=gpu_checks.LONG):
    status = main(["--device", "cpu", "-o", str(folder / "gpu.json"), "--budget", str(budget)], checks)
    return status, json.loads((folder / "gpu.json").read_text())


# --- what runs the checks


def test_a_check_that_fails_is_told_and_the_rest_goes_on(tmp_path, capsys):
    status, found = day(tmp_path, check(gpu_checks.wrong), check(gpu_checks.right), check(gpu_checks.skips))
    assert status == 1
    assert [one["verdict"] for one in found["checks"]] == ["FAIL", "PASS", "SKIP"]
    assert found["checks"][0]["findings"][1] == {"verdict": "FAIL", "what": "found 3, expected 2", "numbers": {"found": 3}}
    assert "said before the end" in found["checks"][0]["output"]
    printed = capsys.readouterr().out
    assert "FAIL  0 a check that wrong" in printed
    assert "FAIL found 3, expected 2\n" in printed
    assert "PASS as expected on cpu\n" in printed
    assert "SKIP needs CUDA\n" in printed
    assert "1 PASS, 1 FAIL, 1 SKIP in " in printed


def test_nothing_fails(tmp_path):
    assert day(tmp_path, check(gpu_checks.right), check(gpu_checks.skips))[0] == 0


def test_a_check_that_crashes_raises_or_says_nothing_fails(tmp_path):
    checks = [check(gpu_checks.crashes), check(gpu_checks.raises), check(gpu_checks.says_nothing), check(gpu_checks.right)]
    status, found = day(tmp_path, *checks)
    assert status == 1
    assert [one["verdict"] for one in found["checks"]] == ["FAIL", "FAIL", "FAIL", "PASS"]
    crashed, raised, silent, _ = (one["findings"] for one in found["checks"])
    assert crashed[0]["what"] == "found before the end"
    assert crashed[1]["what"].startswith(f"ended with status {-signal.SIGABRT}: ")
    assert raised[0]["what"] == "ended with status 1: ValueError: nothing is as it was"
    assert silent[0]["what"] == "found nothing to look at"


def gone(pid):
    """Wait until a process has ended."""
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.1)
    return True


def test_a_check_that_hangs_is_ended_with_all_it_has_started(tmp_path):
    status, found = day(tmp_path, check(gpu_checks.hangs, seconds=15), check(gpu_checks.right))
    hung, right = found["checks"]
    assert (status, hung["verdict"], right["verdict"]) == (1, "FAIL", "PASS")
    assert hung["findings"][-1]["what"] == "ended after 15 s without an answer"
    assert "in hangs" in hung["output"]  # where it was
    assert gone(int((tmp_path / "child").read_text()))


def test_no_more_time_is_spent_than_there_is(tmp_path):
    status, found = day(tmp_path, check(gpu_checks.hangs), check(gpu_checks.right), budget=5)
    assert status == 1
    assert found["checks"][0]["findings"][-1]["what"] == "ended after 5 s without an answer"
    assert found["checks"][1]["findings"][0]["what"] == "not run: no time was left"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_what_is_known_outlives_a_kill_and_no_check_does(tmp_path, number):
    code = """
        import sys
        from benchmarks.gpu.__main__ import main
        from tests import gpu_checks
        checks = [gpu_checks.check(one) for one in (gpu_checks.wrong, gpu_checks.hangs, gpu_checks.right)]
        sys.exit(main(sys.argv[1:], checks))
    """
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines()), "--device", "cpu", "-o", output]
    process = subprocess.Popen([*command, "--budget", "3600"], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)})
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait() in (-number, 128 + number)
    assert [one["verdict"] for one in json.loads(output.read_text())["checks"]] == ["FAIL", None, None]
    assert gone(int((tmp_path / "hangs").read_text()))
    assert gone(int((tmp_path / "child").read_text()))


def test_nothing_of_what_is_checked_can_bring_the_whole_down():
    code = "import sys, benchmarks.gpu.__main__; sys.exit(bool({'torch', 'terratorch_simpler'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_check_is_there():
    for one in CHECKS:
        module, _, function = one.target.partition(":")
        assert callable(getattr(sys.modules[module], function))
    assert len({one.name for one in CHECKS}) == len(CHECKS)


# --- the checks


@pytest.fixture
def settings(tmp_path, scenes):
    (tmp_path / "scenes").symlink_to(scenes)
    return Settings("cpu", True, tmp_path, tmp_path)


class Forked(cli_runner.Command):
    """A command as ``subprocess`` has it, forked from a process that has imported TerraTorch."""

    def wait(self):
        [self.returncode] = super().wait()
        return self.returncode


@pytest.fixture
def forked(monkeypatch):
    def start(settings, folder, config, *args, code=training.PLAIN):
        return Forked(folder, config, *args, before=cli_runner.fsdp_on_cpu if code == training.ON_CPU else None)

    monkeypatch.setattr(training, "start", start)


def verdicts(findings):
    return [finding.verdict for finding in findings]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (machine.machine, ["PASS"]),
        (machine.marked_tests, ["SKIP"]),
        (selection.waits, ["SKIP"]),
        # PyTorch's bfloat16 convolution is wrong on some processors with AMX.
        (selection.precisions, ["PASS", "PASS|FAIL", "SKIP"] * 2),
        (selection.batches, ["PASS"] * 4),
        (selection.random_state, ["PASS", "PASS", "SKIP"]),
        (selection.memory, ["PASS", "PASS", "SKIP"]),
        (figures.speed_and_memory, ["SKIP"] * 2),
        (figures.overhead, ["SKIP"] * 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_small_check_on_a_cpu(settings, function, expected):
    found = list(function(settings))
    assert len(found) == len(expected)
    assert all(verdict in allowed.split("|") for verdict, allowed in zip(verdicts(found), expected, strict=True)), found


@needs_peft
def test_fits(settings, forked):
    found = list(training.fit(settings))
    assert verdicts(found) == ["PASS"] * 4, found


def test_fsdp(settings, forked):
    found = list(training.fsdp(settings))
    assert verdicts(found) == ["PASS"] * 2, found
    first, last = sorted((settings.scratch / "fsdp/full/checkpoints").glob("*step=*.ckpt"))
    assert training.resumed("full", first, last).verdict == "PASS"
    assert training.resumed("full", first, first).verdict == "FAIL"


def test_real_commands(settings, monkeypatch):
    """In processes that start from nothing."""
    monkeypatch.setattr(training, "KINDS", ("full",))
    found = list(training.fsdp(settings))
    assert verdicts(found) == ["PASS"], found


def test_fits_without_peft(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(training, "CASES", {name: training.CASES[name] for name in ("LoRA",)})
    [found] = training.fit(settings)
    assert (found.verdict, found.what) == ("SKIP", "LoRA: peft is not installed")


def test_the_whole_runs_where_peft_cannot_be_imported(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['peft'] = None\n")
    output = tmp_path / "gpu.json"
    only = "--device cpu --small --budget 3600 --patience 10 --only machine random"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *only.split(), "-o", output], cwd=ROOT, text=True, capture_output=True,
        check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, output.read_text()
    found = json.loads(output.read_text())
    assert found["machine"]["terratorch"]
    assert [one["verdict"] for one in found["checks"]] == ["PASS", "PASS"]
    assert all(one["seconds_taken"] > 0 for one in found["checks"])


# --- that they would see what is wrong


def planted_wait(function):
    """A line of the package that waits for the GPU whenever it is called, as PyTorch tells it."""

    def wait(*args, **kwargs):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        return function(*args, **kwargs)

    return wait


def waits(settings, batch):
    with selection.waits_counted() as found:
        models.plan_of(models.trained_task(), models.tiles(settings, 64, batch), 40, "cpu")
    return found


def test_a_wait_for_every_batch_is_told_by_its_line(settings, monkeypatch):
    assert waits(settings, 8) == {}
    monkeypatch.setattr(TokenSampler, "sample", planted_wait(TokenSampler.sample))
    few, many = waits(settings, 8), waits(settings, 4)
    [(line, count)] = few.items()
    assert line.startswith("terratorch_simpler/extraction/hooks.py:")
    assert (count, many[line]) == (5, 10)
    found = selection.per_batch(few, many, 5)
    assert found.verdict == "FAIL"
    assert found.what.startswith(f"waits for every batch: 1 at {line} (expected none)")


def test_a_wait_for_every_group_is_none_for_every_batch():
    found = selection.per_batch({"a.py:1": 3}, {"a.py:1": 3}, 5)
    assert (found.verdict, found.what) == (
        "PASS",
        "waits for every batch: none (expected none); of a whole pass: 3 at a.py:1",
    )


def test_another_choice_and_another_similarity_fail(settings):
    plans = [models.plan_of(models.trained_task(), models.tiles(settings, 64, 8), count, "cpu") for count in (40, 32)]
    assert selection.compared("same", plans[0], plans[0], 0.0).verdict == "PASS"
    found = selection.compared("fewer tiles", *plans, 1e-9)
    assert found.verdict == "FAIL"
    assert found.numbers["similarity"] > 1e-9
    other = replace(plans[0], kept_blocks=plans[0].kept_blocks[:-1])
    found = selection.compared("other", plans[0], other, 1.0)
    assert found.verdict == "FAIL"
    assert found.what.endswith(f"keeps {len(other.kept_blocks)} blocks, expected {len(plans[0].kept_blocks)}")


def test_a_fit_that_leaves_a_tensor_still_fails():
    found = {
        "names": ["a", "b"], "trainable": ["a", "b"], "unchanged": [], "groups": [{"held": ["a", "b"]}], "state": 2,
        "stale_state": 0, "kept": [0, 1], "width": 1.0,
    }  # fmt: skip
    assert training.moved("depth", found).verdict == "PASS"
    for wrong in (
        {"unchanged": ["b"]},
        {"groups": [{"held": ["a"]}]},
        {"groups": [{"held": ["a", "b", "not of the model"]}]},
        {"state": 1},
        {"stale_state": 1},
        {"kept": list(range(12))},
    ):
        assert training.moved("depth", found | wrong).verdict == "FAIL"
    assert training.moved("depth", found | {"unchanged": ["b"]}).what.startswith("depth: 1 of 2 trainable tensors moved")


def test_a_fit_that_ends_with_an_error_fails(settings, tmp_path):
    process = training.start(settings, tmp_path / "run", {"trainer": {}}, code="raise SystemExit('nothing to train')")
    [found] = training.ended(process, tmp_path / "run", "width")
    assert (found.verdict, found.what) == ("FAIL", "width: terratorch fit ended with status 1: nothing to train")


ROW = {"decoder": "linear", "size": 224, "bar": 4.0, "limit": 4.5, "train_speedup": 4.1, "train_range": "4.0-4.2"}
INTACT = {"images_a_second": 100.0, "least": 98.0, "most": 101.0, "peak_mib": 4000.0}
CUT = {"images_a_second": 410.0, "least": 400.0, "most": 420.0, "peak_mib": 1000.0}


@pytest.mark.parametrize(
    ("row", "cut", "small", "verdict"),
    [
        ({}, {}, False, "PASS"),
        ({"train_speedup": 3.9}, {}, False, "FAIL"),
        ({}, {"peak_mib": 4000.0}, False, "FAIL"),
        ({"limit": 3.9}, {}, False, "SKIP"),
        ({"train_speedup": 0.1}, {}, True, "SKIP"),
    ],
    ids=["at the bar", "below the bar", "no less memory", "more than is possible", "small"],
)
def test_speed_is_judged_by_its_bar(row, cut, small, verdict):
    found = figures.faster(ROW | row, "train", INTACT, CUT | cut, small)
    assert found.verdict == verdict
    assert found.what.startswith("linear, 224 px, train: 410 (400-420) against 100 (98-101) images/s, ")


OUTCOMES = """
import pytest
pytestmark = pytest.mark.gpu
def test_right(): pass
def test_wrong(): assert 3 == 2
def test_left_out(): pytest.skip("nothing there")
"""


def test_marked_tests_are_run_and_told(tmp_path):
    (tmp_path / "test_outcomes.py").write_text(OUTCOMES)
    found = list(machine.run_tests([tmp_path / "test_outcomes.py"], tmp_path / "of tests"))
    assert [(one.verdict, one.what.partition(":")[0]) for one in found] == [
        ("PASS", "test_right"), ("FAIL", "test_wrong"), ("SKIP", "test_left_out"),
    ]  # fmt: skip
    assert "assert 3 == 2" in found[1].what
    (tmp_path / "test_broken.py").write_text("import pytest\npytestmark = pytest.mark.gpu\nraise ValueError('broken')\n")
    assert "FAIL" in verdicts(machine.run_tests([tmp_path / "test_broken.py"], tmp_path / "of tests"))
    (tmp_path / "test_none.py").write_text("def test_unmarked(): pass\n")
    [found] = machine.run_tests([tmp_path / "test_none.py"], tmp_path / "of none")
    assert found.what == "pytest ended with status 5 after 0 tests (expected 0 and some)"


# --- wheels for a machine that lacks them


def test_what_a_machine_lacks_is_known(tmp_path):
    there, needed = wheels.needed(wheels.THERE, "3.12"), wheels.needed(["terratorch-simpler"], "3.12")
    assert {"torch", "torchvision", "lightning", "numpy", "fsspec"} <= there.keys()
    assert {"terratorch", "timm", "torchgeo", "scipy", "rasterio", "matplotlib"} <= needed.keys() - there.keys()
    assert needed["torch"] == there["torch"]
    assert wheels.needed(["pytest"], "3.12").keys() < wheels.needed(["pytest", "lightning"], "3.12").keys()
    (tmp_path / "has.txt").write_text("SciPy==1.17.1\nlazy_loader==0.6\n")
    assert wheels.installed(tmp_path / "has.txt") == {"scipy", "lazy-loader"}
