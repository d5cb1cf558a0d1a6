"""A plan as one page that needs no network, no other file and no knowledge of this package."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from terratorch_simpler.criteria import Simpler, known_criteria
from terratorch_simpler.files import atomic_write
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.report import charts, palette, summary, tradeoffs
from terratorch_simpler.report.summary import Criterion, Depth

ENOUGH_VOTES = 0.95
FEW_TILES = 256
MANY_SKIPPED = 0.1

SIMPLER = {"2603.19873": Simpler.papers["2603.19873"]}
WIDTH = {"2601.22841": "slimming the width of remote-sensing encoders"}
SIMILARITY = {"2010.15327": "Nguyen et al.: minibatch CKA, the similarity shown here"}
RECOVERY = {"2609.36842": "recovery by a linear map"}
DISTILLATION = {"2301.01296": "distillation of the output of a block"}
"""Papers cited beside those of the criteria."""


def report_page(
    plan: SlimmingPlan,
    rows: Sequence[Mapping[str, Any]] | None = None,
    blocks: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """One page of HTML with everything inside: charts, style and the few lines of script behind the values.

    Args:
        plan: Any plan; what it does not hold is left out.
        rows: Rows of a sweep, one mapping for each encoder.
        blocks: Measurements of every block of the intact encoder, one mapping for each.

    Returns:
        The page. Whatever text the plan holds is only text in it.
    """
    environment = Environment(
        loader=PackageLoader("terratorch_simpler", "report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["printable"] = summary.printable
    folder = resources.files("terratorch_simpler.report")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    style = f"{palette.page_colours()}{style}"
    criteria, depths = summary.criteria(plan), summary.depths(plan)
    page = environment.get_template("page.html.j2").render(
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'",
        # Our own files and charts: the only text that is not escaped.
        style=Markup(style),
        script=Markup(script),
        heat_map=None if plan.similarity is None else Markup(charts.similarity_chart(plan)),
        verdict=None if plan.verdict is None else {"words": str(plan.verdict), "reasons": plan.verdict.reasons},
        title=f"{summary.printable(plan.backbone)}: {summary.kept_words(plan)}",
        meaning=_meaning(plan),
        facts=list(_facts(plan)),
        criteria=[_criterion(plan, criterion) for criterion in criteria],
        scored=any(criterion.scores for criterion in criteria),
        votes=plan.votes is not None,
        agreement=_agreement(plan, criteria) if len(criteria) > 1 else None,
        firmness=_firmness(plan) if plan.tiles_seen or plan.scores else None,
        label_sets=_label_sets(plan) if summary.label_sets(plan) else None,
        costs=_costs(plan, depths) if depths else None,
        sweep={"cards": tradeoffs.cards(plan, rows), **tradeoffs.table(plan, rows)} if rows else None,
        blocks=tradeoffs.block_table(blocks) if blocks else None,
        streamed=_streamed(plan) if plan.tiles_seen or plan.data else None,
        caveats=_caveats(plan),
        reproduce=_reproduce(plan),
        papers=_papers(plan),
    )
    return page.lstrip()


def save_page(page: str, path: str | os.PathLike[str]) -> Path:
    """Write a page, whole or not at all.

    Args:
        page: What :func:`report_page` returned.
        path: File to write; missing folders are made.
    """
    with atomic_write(path) as part:
        part.write_text(page, encoding="utf-8")
    return Path(path)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _facts(plan: SlimmingPlan) -> Iterator[tuple[str, str, str]]:
    total, kept = plan.full_num_blocks, len(plan.kept_blocks)
    yield "blocks", f"{kept} of {total}", f"{summary.change(kept, total)} of the depth"
    for name, pair in (("parameters", plan.parameters), ("MACs per tile", plan.macs)):
        if pair is not None:
            numbers = f"{summary.short(pair['after'])} of {summary.short(pair['before'])}"
            yield name, summary.change(pair["after"], pair["before"]), numbers
    if plan.width != 1.0:
        yield "width", summary.percent(plan.width), "of attention and MLP in each block"
    if plan.recovery != "none":
        how = {"linear": "a map to", "distill": "trained without labels as"}[plan.recovery]
        words = f"{how} the output of block {(plan.recovery_target or total) - 1}"
        if (found := (plan.overview or {}).get("distilled")) is not None:
            after, before = (summary.percent(found[f"explained_{when}"]) for when in ("after", "before"))
            words += f", explains {after} of it, {before} before"
        yield "recovery", plan.recovery, words
    chosen = next((depth for depth in summary.depths(plan) if depth.chosen), None)
    if chosen is not None and chosen.similarity is not None and summary.is_prefix(plan.kept_blocks):
        yield "CKA to the last block", summary.score(chosen.similarity), "of the last kept one; not accuracy"
    if plan.votes is not None:
        yield "votes", summary.percent(plan.votes.get(kept, 0.0)), "of resamples choose this depth"


def _meaning(plan: SlimmingPlan) -> str:
    total, kept = plan.full_num_blocks, len(plan.kept_blocks)
    if kept == total and plan.width == 1.0:
        return f"All {total} transformer blocks of the encoder are kept: nothing gets cheaper."
    gone = sorted(set(range(total)) - set(plan.kept_blocks))
    dropped = f"{_count(len(gone), 'block')} ({summary.block_ranges(gone)})" if gone else "No block"
    are = "are" if len(gone) > 1 else "is"
    first = f"{dropped} of the encoder's {total} transformer blocks {are} deleted before fine-tuning."
    fewer = [
        f"{summary.change(pair['after'], pair['before']).lstrip('-')} fewer {what}"
        for what, pair in (("parameters", plan.parameters), ("multiply-accumulate operations (MACs)", plan.macs))
        if pair is not None and pair["after"] < pair["before"]
    ]
    left = f" What is left has {' and '.join(fewer)}." if fewer else ""
    return f"{first}{left} Training and inference get cheaper; what that costs in accuracy, only fine-tuning shows."


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _criterion(plan: SlimmingPlan, criterion: Criterion) -> dict[str, Any]:
    kind = known_criteria().get(criterion.name)
    votes = plan.votes if criterion.chosen else None
    return {
        "name": summary.printable(criterion.name),
        "chosen": criterion.chosen,
        "words": (kind.description if kind else "") or "A criterion that is not part of the package.",
        "papers": list(kind.papers) if kind else [],
        "keeps": f"Keeps {_count(len(criterion.kept), 'block')}: {summary.block_ranges(criterion.kept)}.",
        "svg": Markup(charts.criterion_chart(plan.full_num_blocks, criterion, votes)),
    }


def _label_sets(plan: SlimmingPlan) -> dict[str, Any]:
    """A row of the table and a chart for every label set."""
    blocks = plan.full_num_blocks
    rows = [
        {
            "cells": each.cells(blocks),
            "depth": each.depth,
            "chosen": each.chosen,
            "svg": Markup(
                charts.criterion_chart(
                    blocks, Criterion(each.name, tuple(range(each.depth)), each.probed["scores"], False, each.probed), None
                )
            ),
        }
        for each in summary.label_sets(plan)
    ]
    return {"head": summary.LABEL_SET_HEAD, "rows": rows}


def _agreement(plan: SlimmingPlan, criteria: list[Criterion]) -> str:
    others = [criterion for criterion in criteria if not criterion.chosen]
    [own] = [criterion for criterion in criteria if criterion.chosen]
    alike = [criterion.name for criterion in others if criterion.kept == own.kept]
    sizes = sorted({len(criterion.kept) for criterion in criteria})
    spread = f"from {sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]} in all of them"
    silent = [f" {summary.printable(name)} has no answer here." for name in (plan.overview or {}).get("no_answer", {})]
    names = f" ({', '.join(map(summary.printable, alike))})" if alike else ""
    return (
        f"Of {len(others)} other {'criterion' if len(others) == 1 else 'criteria'}, asked on the same tiles, "
        f"{len(alike) or 'none'}{names} would keep exactly the same blocks. The number of kept blocks: {spread}. "
        f"Criteria with a budget were given the depth that {summary.printable(own.name)} chose.{''.join(silent)}"
    )


def _firmness(plan: SlimmingPlan) -> str | None:
    """How much the choice depends on which tiles were seen, as far as the verdict does not say it."""
    kept = len(plan.kept_blocks)
    if plan.votes is None:
        if plan.verdict is not None:
            return None  # its reasons, which head the page, say so
        few = plan.tiles_seen < summary.FEWEST_FOR_VOTES
        why = (
            f"too few tiles were seen to draw them again (there have to be {summary.FEWEST_FOR_VOTES})"
            if few
            else "none were drawn"
        )
        return f"There are no votes: {why}, so how firm this choice is remains unknown."
    won = plan.votes.get(kept, 0.0)
    rival = max((depth for depth in plan.votes if depth != kept), key=lambda depth: plan.votes[depth], default=None)  # type: ignore[index]
    if plan.verdict is not None:
        return (
            None
            if rival is None
            else f"Of the other depths, {rival} wins most often, in {summary.percent(plan.votes[rival])} of the resamples."
        )
    again = f"Drawing the tiles again with replacement gives this depth in {summary.percent(won)} of the cases"
    if won >= ENOUGH_VOTES:
        return f"{again}: it depends little on which tiles were seen."
    beside = "" if rival is None else f", and {rival} blocks in {summary.percent(plan.votes[rival])}"
    return f"{again}{beside}. Look at the whole curve; min_depth sets a floor."


def _costs(plan: SlimmingPlan, depths: list[Depth]) -> dict[str, Any]:
    """A row for every depth, each cell a text and its share of the whole in per cent; unknown columns are left out."""
    whole = {
        "parameters": (plan.parameters or {}).get("before") or depths[-1].parameters,
        "macs": (plan.macs or {}).get("before") or depths[-1].macs,
    }
    probe, sets = summary.probed(plan), [each.name for each in summary.label_sets(plan) if each.chosen]
    score = "score" if probe is None else f"{summary.printable(probe['metric'])} ± standard error"
    columns = {
        "score": f"{score}, {summary.printable(sets[0])}" if sets else score,
        "votes": "votes",
        "parameters": "parameters",
        "macs": "MACs per tile",
        "similarity": "CKA to the last block",
        "recovery_r2": "R² of linear recovery",
    }
    shown = {key: name for key, name in columns.items() if any(getattr(depth, key) is not None for depth in depths)}

    def cell(depth: Depth, key: str) -> tuple[str, float | None]:
        value = getattr(depth, key)
        if value is None:
            return summary.MISSING, None
        if key in whole:
            share = min(value / whole[key], 1.0) * 100 if whole[key] else 0.0
            return f"{summary.short(value)} ({summary.change(value, whole[key])})", share
        if key == "votes":
            return summary.percent(value), None
        return summary.score(value, depth.error if key == "score" else None), None

    words = "One row for every number of first blocks."
    if "similarity" in shown:
        words += " CKA compares the last kept block with the last of the intact encoder: 1 is the same. It is not accuracy."
    if "recovery_r2" in shown:
        words += " R² says how much of the last block's output a linear map of the kept one restores without training."
    if not summary.is_prefix(plan.kept_blocks) or plan.width != 1.0:
        words += (
            " Rows are of first blocks at full width: the marked one is not what the plan itself costs, which stands above."
        )
    rows = [
        {
            "depth": depth.depth,
            "name": f"{depth.depth} (chosen)" if depth.chosen else str(depth.depth),
            "cells": [cell(depth, key) for key in shown],
            "chosen": depth.chosen,
        }
        for depth in depths
    ]
    return {"words": words, "head": list(shown.values()), "rows": rows, "slider": _slider(plan, depths)}


def _slider(plan: SlimmingPlan, depths: list[Depth]) -> dict[str, Any]:
    """Ends of the slider, where it starts, and what the plan keeps; its script reads all else from the page."""
    kept = len(plan.kept_blocks)
    own = summary.is_prefix(plan.kept_blocks) and plan.width == 1.0
    verdict = "" if plan.verdict is None else f" Its verdict: {summary.printable(plan.verdict.level)}."
    return {
        "first": depths[0].depth,
        "last": depths[-1].depth,
        "start": min(max(kept, depths[0].depth), depths[-1].depth),
        "own": kept if own else 0,
        "same": f"The plan keeps this depth.{verdict}",
        "other": f"The plan keeps another one: {summary.kept_words(plan)}.{verdict}",
    }


def _streamed(plan: SlimmingPlan) -> dict[str, str]:
    data = dict(plan.data or {})
    skipped = data.pop("skipped", None)
    lines = {"tiles seen": f"{plan.tiles_seen:,}", "tokens compared": f"{plan.rows_seen:,}"}
    names = {"source": "read by", "files": "files", "tiles": "tiles there are", "input_shape": "shape of a tile"}
    known = {name: _shape(data.pop(key)) for key, name in names.items() if key in data}
    reasons = skipped if isinstance(skipped, dict) else {}
    lines |= known
    lines["skipped"] = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
    lines |= {key: _shape(value) for key, value in data.items()}
    return lines


def _shape(value: object) -> str:
    if isinstance(value, list) and value and all(isinstance(size, int) for size in value):
        return " x ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def _caveats(plan: SlimmingPlan) -> list[str]:
    notes = []
    if plan.similarity is None and plan.scores:
        notes.append("The blocks were not compared, for want of tiles: the depth rests on the labels alone.")
    elif plan.similarity is None:
        notes.append("Nothing was measured for this plan: the depth was given by hand.")
    else:
        notes.append("Similarity is not accuracy. It says where representations settle, not which of them the task needs.")
    notes.append(
        "Published for SIMPLER (arXiv 2603.19873) after fine-tuning: Prithvi-EO-2.0-300M pruned to 5 of 24 blocks keeps "
        "94 % of mIoU on MADOS, 97 % of mAP on BigEarthNet v2 and 96 % of macro-F1 on Sen4Map, but TerraMind on MADOS 89 %: "
        "it loses more than 10 %. An automatic choice is not safe everywhere; fine-tune at a second depth to see."
    )
    if 0 < plan.tiles_seen < FEW_TILES:
        notes.append(f"Only {plan.tiles_seen:,} tiles were seen; with {FEW_TILES} or more the similarity is steadier.")
    if plan.tiles_seen and plan.votes is None and summary.probed(plan) is None:
        notes.append("There are no votes: how much the choice depends on which tiles were seen is not known.")
    skipped = (plan.data or {}).get("skipped")
    counts = [n for n in skipped.values() if isinstance(n, int) and n > 0] if isinstance(skipped, dict) else []
    if plan.tiles_seen and sum(counts) > MANY_SKIPPED * plan.tiles_seen:
        notes.append(f"{sum(counts):,} tiles or files could not be used: what was seen may not be typical of the rest.")
    if not summary.is_prefix(plan.kept_blocks):
        notes.append(
            "Blocks are dropped from inside of the encoder; the published results above are of encoders pruned at the end."
        )
    return notes


def _reproduce(plan: SlimmingPlan) -> dict[str, Any]:
    kept = list(plan.kept_blocks)
    keep = len(kept) if summary.is_prefix(kept) else kept
    width = "" if plan.width == 1.0 else f"\nbackbone_width: {plan.width!r}"
    name = summary.printable(plan.backbone)
    by_plan = f"backbone: simpler_{name}\nbackbone_plan: plan.json"
    by_hand = f"backbone: simpler_{name}\nbackbone_keep: {keep}{width}"
    words = "In a TerraTorch config, either of these builds the same encoder again, with nothing streamed:"
    if plan.recovery != "none":  # maps or weights lie beside the plan
        words = (
            "In a TerraTorch config, the first of these builds it again, with nothing streamed; the second without recovery:"
        )
    lines = {"criterion": str(plan.criterion["name"]), "its settings": json.dumps(plan.criterion["args"])}
    lines |= {"data": str((plan.data or {}).get("fingerprint", summary.MISSING))}
    lines |= {package: _shape(version) for package, version in (plan.versions or {}).items()}
    return {"words": words, "by_plan": by_plan.split("\n"), "by_hand": by_hand.split("\n"), "settings": lines}


def _papers(plan: SlimmingPlan) -> list[tuple[str, str]]:
    known = known_criteria()
    cited = [known[criterion.name].papers for criterion in summary.criteria(plan) if criterion.name in known]
    cited = [SIMPLER, *cited, *([SIMILARITY] if plan.similarity is not None else [])]
    if plan.width != 1.0:
        cited.append(WIDTH)
    if any(depth.recovery_r2 is not None for depth in summary.depths(plan)):
        cited.append(RECOVERY)
    if plan.recovery == "distill":
        cited.append(DISTILLATION)
    reasons: dict[str, dict[str, None]] = {}
    for papers in cited:
        for paper, reason in papers.items():
            reasons.setdefault(paper, {})[reason] = None
    return [(paper, "; ".join(words)) for paper, words in reasons.items()]
