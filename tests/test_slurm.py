"""The batch scripts, with commands in place of srun and terratorch that tell how they were called."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "configs" / "slurm").glob("*.sh") if path.name != "environment.sh")


def directives(path):
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", path.read_text(), re.MULTILINE))


@pytest.fixture
def called(tmp_path):
    """Run a script as SLURM would; gives the arguments of terratorch."""
    for name, text in {
        "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
        "terratorch": 'printf "%s\\n" "$@"; echo "HF_HUB_OFFLINE=$HF_HUB_OFFLINE OMP=$OMP_NUM_THREADS" >&2',
    }.items():
        tool = tmp_path / name
        tool.write_text(f"#!/bin/bash\n{text}\n")
        tool.chmod(0o755)

    def run(path, *args, **environment):
        settings = directives(path)
        slurm = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": settings["nodes"],
                 "SLURM_NTASKS_PER_NODE": settings["ntasks-per-node"], **environment}  # fmt: skip
        done = subprocess.run(
            ["bash", str(path), *args], env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "HF_HUB_OFFLINE=1 OMP=1" in done.stderr
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_is_asked_for_is_what_lightning_is_told(path, called):
    settings = directives(path)
    assert settings["ntasks-per-node"] == settings["gpus-per-node"]  # a process for every GPU
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"} if "array" in settings else {}
    arguments = called(path, "configs/cluster.yaml", "--data.init_args.batch_size", "16", **array)
    assert arguments[:5] == ["fit", "--config", "configs/cluster.yaml", "--data.init_args.batch_size", "16"]
    told = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert told["--trainer.devices"] == settings["gpus-per-node"]
    assert told["--trainer.num_nodes"] == settings["nodes"]
    assert told["--trainer.default_root_dir"] == ("runs/7_2" if array else "runs/7")  # nobody else's checkpoints
    if "requeue" in settings:
        assert settings["signal"].startswith("SIGUSR1@")  # what Lightning listens for; not to the shell (B:)
        assert settings["open-mode"] == "append"


def test_every_job_of_the_sweep_has_a_rate_of_its_own(called):
    path = next(path for path in SCRIPTS if path.stem == "sweep")
    first, last = map(int, directives(path)["array"].split("-"))
    rates = []
    for task in range(first, last + 1):
        arguments = called(path, "c.yaml", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=str(task))
        rates.append(float(arguments[arguments.index("--optimizer.init_args.lr") + 1]))
    assert len(set(rates)) == len(rates) == 4


def test_every_script_is_in_the_readme():
    table = (ROOT / "configs" / "slurm" / "README.md").read_text()
    assert all(f"`{path.name}`" in table for path in SCRIPTS)
