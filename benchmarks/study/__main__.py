"""Run the study, or what is left of it.

    python -m benchmarks.study DATA -o OUT [--jobs 2]

DATA holds ``hls_water``, ``ukis_csmask`` and ``scenes``. OUT keeps a file for every run that is done; ``results.csv`` and
``tables.md`` are written anew from these after every run, so the study can be ended and gone on with at any time.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study.data import encoder_weights, prepare, read_split
from benchmarks.study.runs import gate_runs, judge_gate, study_runs
from benchmarks.study.work import Work

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> None:
    """Pretrain what is missing, judge the gate, and run what counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-c", "--config", type=Path, default=HERE / "study.yaml")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args(arguments)
    study = yaml.safe_load(args.config.read_text())
    tiles = args.data / "hls_water"
    for setup in study["setups"].values():
        prepare(tiles, args.output / "tiles", setup["target"], setup["size"])
    work = Work(study, tiles, args.output, args.jobs)
    pretrain_missing(study, args.data, args.output, [study["gate"]["encoder"]])
    work.do(gate_runs(study))
    passed = [gate.setup for gate in judge_gate(study, work.results()) if gate.passed]
    print(f"Set-ups that count: {', '.join(passed) or 'none'}", flush=True)
    # The gate's encoder first. What SIMPLER keeps is needed to compare rules at its depth, and does not depend on labels.
    main_encoder, seeds = study["gate"]["encoder"], study["seeds"][:1]
    runs = list(study_runs(study | {"seeds": seeds}, passed, {}))
    work.do(run for run in runs if run.rule == "simpler" and run.encoder == main_encoder)
    found = {
        run.encoder: len(row["kept"]) for run, row in work.results().items() if run.rule == "simpler" and run.depth is None
    }
    runs = list(study_runs(study, passed, found))
    work.do(run for run in runs if run.encoder == main_encoder)
    pretrain_missing(study, args.data, args.output, {run.encoder for run in runs})
    work.do(runs)
    shutil.rmtree(args.output / "scratch", ignore_errors=True)


def pretrain_missing(study: dict[str, Any], data: Path, folder: Path, encoders: Iterable[str]) -> None:
    """Pretrain those encoders that have no weights yet, on training images and scenes."""
    from benchmarks.study.pretrain import pretrain, read_source

    missing = {name: encoder_weights(study, name, folder) for name in encoders}
    missing = {name: path for name, path in missing.items() if not path.exists()}
    if not missing:
        return
    names = set(read_split(data / "hls_water", "train"))
    images = read_source(data / "hls_water" / "images", "*.tif", names)
    for scene in ("ukis_csmask/images/landsat5_image", "ukis_csmask/images/landsat7_image", "scenes/L7_ETMs"):
        images += read_source(data / f"{scene}.tif", "", None)
    for name, path in missing.items():
        encoder = study["encoders"][name]
        pretrain(images, path, model=f"{study['backbone']}_mae", depth=encoder["depth"], steps=encoder["steps"])


if __name__ == "__main__":
    main()
