"""Results of a study as a CSV file and as tables."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.runs import Results, judge_gate, standard_error
from terratorch_simpler.files import atomic_write
from terratorch_simpler.report.summary import block_ranges
from terratorch_simpler.sweep.rows import write_csv


def write_results(folder: Path, study: Mapping[str, Any], results: Results, place: str) -> None:
    """Write ``results.csv``, a line a run, and ``tables.md``, which says first where they come from."""
    rows = [{**run._asdict(), **found, "kept": " ".join(map(str, found["kept"]))} for run, found in results.items()]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    write_csv(rows, columns, folder / "results.csv")
    with atomic_write(folder / "tables.md") as part:
        part.write_text(f"{place}:\n\n{tables(study, results)}")


def tables(study: Mapping[str, Any], results: Results) -> str:
    """All tables, in Markdown: the gate first, then every set-up that passed."""
    gates = judge_gate(study, results)
    lines = ["### The gate", ""]
    lines += head("set-up", "pretrained", "random", "difference", "standard error", "seeds", "counts")
    for gate in gates:
        gain = gate.pretrained - gate.random
        passed = "yes" if gate.passed else "no"
        lines.append(
            f"| `{gate.setup}` | {gate.pretrained:.3f} | {gate.random:.3f} | {gain:+.3f} | {gate.error:.3f} "
            f"| {len(study['seeds'])} | {passed} |"
        )
    for gate in gates:
        if gate.passed:
            for encoder in study["depths"]:
                lines += depth_table(study, results, gate.setup, encoder)
            lines += variant_table(study, results, gate.setup)
    return "\n".join(lines) + "\n"


def depth_table(study: Mapping[str, Any], results: Results, setup: str, encoder: str) -> list[str]:
    """Scores of every depth, of a random encoder of that depth, and what rules made of it."""
    scores: dict[tuple[str, int | None], list[Mapping[str, Any]]] = defaultdict(list)
    for run, found in results.items():
        if run.setup == setup and run.encoder == encoder and run.rule == "first" and run.width == 1:
            scores[run.variant, run.depth].append({**found, "seed": run.seed})
    full = study["encoders"][encoder]["depth"]
    if ("depth", full) not in scores:
        return []
    whole = mean(scores["depth", full])
    lines = [
        "",
        f"### {setup}, {encoder}: every depth",
        "",
        *head("blocks", "test mIoU", "of full depth", "gain", "random init", "recovery's gain", "training s", "step MiB"),
    ]
    means = {}
    for depth in study["depths"][encoder]:
        if ("depth", depth) not in scores:
            continue
        found = scores["depth", depth]
        means[depth] = mean(found)
        against_whole = gain(found, scores["depth", full])
        recovered = gain(scores["recovery", depth], found)
        seconds = statistics.mean(row["seconds"] for row in found)
        memory = statistics.mean(row["step_bytes"] for row in found) / 2**20
        lines.append(
            f"| {depth} | {spread(found)} | {means[depth] / whole:.1%} | {against_whole} "
            f"| {spread(scores['random', depth])} | {recovered} | {seconds:.0f} | {memory:.0f} |"
        )
    best = max(means, key=lambda depth: means[depth])
    lines += ["", f"Best depth: {best} ({means[best]:.3f}). Regret is what a choice loses against it.", ""]
    lines += head("criterion", "kept blocks", "test mIoU", "regret", "gain on full depth", "gain on as many first blocks")
    picked: dict[tuple[str, tuple[int, ...]], list[Mapping[str, Any]]] = defaultdict(list)
    for run, found in results.items():
        if run.setup == setup and run.encoder == encoder and run.variant == "rule":
            picked[run.rule, tuple(found["kept"])].append({**found, "seed": run.seed})
    for (rule, kept), found in sorted(picked.items(), key=lambda item: (len(item[0][1]), item[0])):
        lines.append(
            f"| {rule} | {block_ranges(kept)} | {spread(found)} | {means[best] - mean(found):+.3f} "
            f"| {gain(found, scores['depth', full])} | {gain(found, scores['depth', len(kept)])} |"
        )
    return lines


def variant_table(study: Mapping[str, Any], results: Results, setup: str) -> list[str]:
    """Everything else beside the same number of first blocks at full width."""
    main = study["gate"]["encoder"]
    lines = ["", f"### {setup}: width, LoRA, several widths, and a shallow encoder pretrained as such", ""]
    lines += head("what", "blocks", "width", "test mIoU", "parameters", "gain on as many first blocks of full width")
    groups: dict[tuple[str, int | None, float], list[Mapping[str, Any]]] = defaultdict(list)
    for run, found in results.items():
        if run.setup == setup and (run.encoder == main or run.variant == "shallow"):
            groups[run.variant, run.depth, run.width].append({**found, "seed": run.seed})
            for key, score in found.items():
                if key.startswith("test_miou_"):
                    lent = {"test_miou": score, "parameters": None, "seed": run.seed}
                    groups[run.variant, run.depth, float(key.removeprefix("test_miou_"))].append(lent)
    for (variant, depth, width), found in sorted(groups.items(), key=str):
        if variant in ("shallow", "width", "lora", "slimmable"):
            parameters = found[0]["parameters"]
            count = "-" if parameters is None else f"{parameters / 1e6:.2f} M"
            against = gain(found, groups["depth", depth, 1.0])
            lines.append(f"| {variant} | {depth} | {width:g} | {spread(found)} | {count} | {against} |")
    return lines


def head(*columns: str) -> list[str]:
    """First lines of a table."""
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]


def mean(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean test mIoU over seeds."""
    return statistics.mean(row["test_miou"] for row in rows)


def spread(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation over seeds."""
    scores = [row["test_miou"] for row in rows]
    if not scores:
        return "-"
    return f"{statistics.mean(scores):.3f}" + (f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else "")


def gain(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard error of the differences of test mIoU, seed by seed."""
    against = {row["seed"]: row["test_miou"] for row in others}
    differences = [row["test_miou"] - against[row["seed"]] for row in rows if row["seed"] in against]
    if not differences:
        return "-"
    return f"{statistics.mean(differences):+.3f}" + (f" ± {standard_error(differences):.3f}" if len(differences) > 1 else "")
