"""What was measured, beside what the paper reports."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reproduction.experiments import EXPERIMENTS, SCORES, Experiment
from terratorch_simpler.files import atomic_write
from terratorch_simpler.sweep.rows import write_csv

CSV_FILE, TABLE_FILE = "results.csv", "table.md"
COLUMNS = ("experiment", "variant", "seed", "metric", "score", "blocks", "full_blocks", "parameters")
HEADER = (
    "| data | encoder | metric | paper: full | paper: SIMPLER | paper: retained | paper: blocks | "
    "full | SIMPLER | retained | blocks | parameters | at the paper's depth |"
)

Row = dict[str, Any]


def run_folder(output: Path, name: str, variant: str, seed: int) -> Path:
    """Where one run writes.

    Args:
        output: Folder of all runs.
        name: Name of the experiment.
        variant: "full", "simpler" or "fixed".
        seed: Seed of the run.
    """
    return output / name / f"{variant}_seed{seed}"


def read_results(output: Path) -> list[Row]:
    """One line for every run that is done.

    Args:
        output: Folder of all runs.
    """
    rows = []
    for name, experiment in EXPERIMENTS.items():
        for variant in experiment.variants:
            for path in output.glob(f"{name}/{variant}_seed*/{SCORES}"):
                found = json.loads(path.read_text(encoding="utf-8"))
                rows.append(
                    {
                        "experiment": name,
                        "variant": variant,
                        "seed": int(path.parent.name.partition("_seed")[2]),
                        "metric": experiment.key,
                        "score": found["metrics"][experiment.key],
                        **{key: found[key] for key in ("blocks", "full_blocks", "parameters")},
                    }
                )
    order = list(EXPERIMENTS)
    return sorted(rows, key=lambda row: (order.index(row["experiment"]), row["variant"], row["seed"]))


def write_results(output: Path) -> None:
    """Write ``results.csv`` and ``table.md`` from all runs that are done.

    Args:
        output: Folder of all runs.
    """
    rows = read_results(output)
    write_csv(rows, COLUMNS, output / CSV_FILE)
    with atomic_write(output / TABLE_FILE) as part:
        part.write_text(render(rows), encoding="utf-8")


def render(rows: Sequence[Row]) -> str:
    """The table in Markdown; what is not known or not measured stays empty.

    Args:
        rows: What was measured.
    """
    lines = [HEADER, f"|{'---|' * HEADER.count(' | ')}---|"]
    for name, experiment in EXPERIMENTS.items():
        mine = [row for row in rows if row["experiment"] == name]
        lines.append(f"| {' | '.join((*_published(experiment), *_measured(mine)))} |")
    return "\n".join(lines) + "\n"


def _published(experiment: Experiment) -> list[str]:
    full, simpler = experiment.full, experiment.simpler
    known = full is not None and simpler is not None
    depth = "" if experiment.depth is None else f"{experiment.depth} ({experiment.parameters} M parameters)"
    scores = ["" if score is None else f"{score:.1f}" for score in (full, simpler)]
    retained = f"{simpler / full:.0%}" if known else ""  # type: ignore[operator]
    return [experiment.dataset, experiment.encoder, experiment.metric, *scores, retained, depth]


def _measured(rows: Sequence[Row]) -> list[str]:
    full, simpler, fixed = ([row for row in rows if row["variant"] == name] for name in ("full", "simpler", "fixed"))
    whole = _mean(full) if full else 0.0
    retained = f"{_mean(simpler) / whole:.0%}" if simpler and whole > 0 else ""
    blocks = _different(f"{row['blocks']} of {row['full_blocks']}" for row in simpler)
    parameters = _different(f"{row['parameters'] / 1e6:.2f} M" for row in simpler)
    return [_score(full), _score(simpler), retained, blocks, parameters, _score(fixed)]


def _mean(rows: Sequence[Row]) -> float:
    return statistics.fmean(row["score"] for row in rows)


def _score(rows: Sequence[Row]) -> str:
    """Mean in percent, and its spread over seeds."""
    if not rows:
        return ""
    scores = [100 * row["score"] for row in rows]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{100 * _mean(rows):.1f}{spread} (n = {len(scores)})"


def _different(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
