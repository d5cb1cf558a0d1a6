"""What our commands print when all is well: no adverts, no source lines, no folders of a training, each file once."""

import sys

import pytest
import yaml

from terratorch_simpler.cli import main
from terratorch_simpler.commands import quiet
from tests.cli_runner import config as run_config


@pytest.fixture
def config(tmp_path, scenes, monkeypatch):
    """A config as users write it: no logger named, a progress bar, a callback that chooses quickly."""
    monkeypatch.chdir(tmp_path)
    settings = run_config(scenes, tmp_path)
    for key in ("logger", "enable_progress_bar"):
        del settings["trainer"][key]
    settings["trainer"]["callbacks"] = [
        {"class_path": "terratorch_simpler.SimplerCallback", "init_args": {"min_tiles": 32, "max_tiles": 32}}
    ]
    with open("config.yaml", "w") as file:
        yaml.safe_dump(settings, file)
    return "config.yaml"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("command", "files"),
    [
        (["plan"], ["report.html", "report.png", "plan.json"]),
        (["sweep", "--repeats", "1"], ["blocks.csv", "report.html", "report.png", "sweep.csv", "sweep.png", "plan.json"]),
    ],
    ids=["plan", "sweep"],
)
def test_commands_are_quiet_and_say_once_what_they_have_written(config, tmp_path, capfd, caplog, command, files):
    for number, replaced in enumerate([False, True]):
        assert main([command[0], "-c", config, *command[1:], "--trainer.callbacks.seed", str(number)]) == 0
        out, err = capfd.readouterr()
        said = out + err + "".join(caplog.messages)
        assert not [
            word for word in ("litlogger", "GPU available", "Seed set", ".py:", "overridden", "Timing") if word in said
        ]
        assert any("Replaces the plan of an earlier" in line for line in caplog.messages) == replaced
        assert any("Replaces the comparison" in line for line in caplog.messages) == (replaced and command[0] == "sweep")
        written = [str(tmp_path / "simpler" / name) for name in files]
        assert out.split()[-len(files) :] == written
        assert all(said.count(path) == 1 for path in written)
        assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "simpler"}
        caplog.clear()


def test_warnings_have_no_source_lines_and_lightnings_own_are_left_out(capsys):
    import warnings

    before = warnings.formatwarning
    with quiet():
        assert warnings.formatwarning(UserWarning("few tiles"), UserWarning, "a.py", 3, "line") == "Warning: few tiles\n"
    assert warnings.formatwarning is before


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("shown", [True, False])
def test_a_progress_bar_is_for_terminals(monkeypatch, capsys, terminal, shown):
    import rich
    from rich.console import Console

    from terratorch_simpler.extraction import progress_bar

    monkeypatch.setattr(rich, "_console", Console(file=sys.stdout, force_terminal=terminal, width=100))
    with progress_bar(shown, 4, "Timing 4 encoders", thread=False) as progress:
        progress(2)
    assert ("Timing 4 encoders" in capsys.readouterr().out) == (terminal and shown)
