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
from xml.etree.ElementTree import Element

from terratorch_simpler.files import atomic_write
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.report import summary
from terratorch_simpler.report.summary import Depth, Rule
from terratorch_simpler.report.svg import (
    Chart,
    Point,
    element,
    html,
    lowest_shown,
    picture,
    span,
    ticks,
    told,
    viridis,
    whole_ticks,
)
from terratorch_simpler.report.tradeoffs import blocks_section, measured_section

MOST_CELLS = 100
"""Blocks of which every pair gets a cell that tells its value; more would be megabytes."""
ENOUGH_VOTES = 0.95
FEW_TILES = 256
MANY_SKIPPED = 0.1

SOURCES = {
    "simpler": (
        "Cuts where the outputs of the blocks stop moving: how much neighbouring rows of the similarity differ among the "
        "kept blocks, less how much among the dropped ones.",
        ["2603.19873", "2609.36842"],
    ),
    "block_influence": (
        "Drops the blocks that turn their input least: one minus the mean cosine of a token before and after. May "
        "leave gaps.",
        ["2403.03853"],
    ),
    "angular": (
        "Drops the range of blocks with the least mean angle between what goes in and what comes out.",
        ["2403.17887"],
    ),
    "cka_intervals": ("Drops the one or two ranges of blocks across which the similarity falls least.", ["2609.36842"]),
    "knee": ("Keeps as many blocks as it takes until what follows is mostly there already. A rule of this package.", []),
    "sls": ("Keeps as many blocks as it takes until the labelled classes lie apart.", ["2407.14330"]),
    "fixed": ("Given by hand: nothing was judged.", []),
}
"""What each rule does, in a sentence, and the papers (arXiv) it is from."""
PAPERS = {
    "2603.19873": "SIMPLER: the method, its score and its published results",
    "2609.36842": "restates the score of SIMPLER; ranges of blocks by CKA; recovery by a linear map",
    "2403.03853": "ShortGPT: block influence",
    "2403.17887": "Gromov et al.: angular distance of a range of blocks",
    "2407.14330": "SLS: depth by the silhouette of labelled classes",
    "2601.22841": "slimming the width of remote-sensing encoders",
    "2010.15327": "Nguyen et al.: minibatch CKA, the similarity shown here",
}


def report_page(
    plan: SlimmingPlan,
    rows: Sequence[Mapping[str, Any]] | None = None,
    blocks: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """One page of HTML with everything inside: pictures, style and the few lines of script behind the values.

    Args:
        plan: Any plan; what it does not hold is left out.
        rows: What a sweep has measured, one mapping for each encoder.
        blocks: What it has measured of every block of the intact encoder, one mapping for each.

    Returns:
        The page. Whatever text the plan holds is only text in it.
    """
    here = resources.files("terratorch_simpler.report")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    rule = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=rule),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("link", rel="icon", href="data:,"),
        element("title", f"{summary.printable(plan.backbone)}: {summary.kept_words(plan)}"),
        _raw("style", style),
    )
    main = element("main", *_sections(plan, rows, blocks))
    footer = element(
        "footer", "Written by terratorch-simpler. This file holds all that it shows and asks no network for anything."
    )
    body = element("body", main, footer, element("div", id="tip", role="status", aria_live="polite"), _raw("script", script))
    return "<!DOCTYPE html>\n" + html(element("html", head, body, lang="en")) + "\n"


def save_page(page: str, path: str | os.PathLike[str]) -> Path:
    """Write a page, whole or not at all.

    Args:
        page: What :func:`report_page` returned.
        path: File to write; missing folders are made.
    """
    with atomic_write(path) as part:
        part.write_text(page, encoding="utf-8")
    return Path(path)


def _raw(tag: str, text: str) -> Element:
    """Our own style or script, which the serialiser must not escape; the policy of the page allows nothing else."""
    made = element(tag)
    made.text = text
    return made


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _sections(
    plan: SlimmingPlan, rows: Sequence[Mapping[str, Any]] | None, blocks: Sequence[Mapping[str, Any]] | None
) -> Iterator[Element]:
    yield _headline(plan)
    if plan.similarity is not None:
        yield _similarity(plan)
    yield _rules(plan)
    if found := summary.depths(plan):
        yield _costs(plan, found)
    if rows:
        yield measured_section(plan, rows)
    if blocks:
        yield blocks_section(blocks)
    if plan.tiles_seen or plan.data:
        yield _streamed(plan)
    yield _caveats(plan)
    yield _again(plan)
    yield _sources(plan)


def _section(title: str, how: str | None, *children: Element | str | None) -> Element:
    return element("section", element("h2", title), how and element("p", how, class_="how"), *children)


# --- what was decided


def _headline(plan: SlimmingPlan) -> Element:
    total, kept = plan.full_num_blocks, len(plan.kept_blocks)
    boxes = [_fact("blocks", f"{kept} of {total}", f"{summary.share(kept, total)} of the depth")]
    for name, pair in (("parameters", plan.parameters), ("MACs per tile", plan.macs)):
        if pair is not None:
            numbers = f"{summary.short(pair['after'])} of {summary.short(pair['before'])}"
            boxes.append(_fact(name, summary.share(pair["after"], pair["before"]), numbers))
    if plan.width != 1.0:
        boxes.append(_fact("width", f"{plan.width:.0%}", "of attention and MLP in each block"))
    if plan.recovery != "none":
        boxes.append(_fact("recovery", plan.recovery, "in place of the dropped blocks"))
    chosen = next((depth for depth in summary.depths(plan) if depth.chosen), None)
    if chosen is not None and chosen.similarity is not None and summary.is_prefix(plan.kept_blocks):
        boxes.append(_fact("similarity kept", f"{chosen.similarity:.3f}", "CKA of the last kept with the last block"))
    if plan.votes is not None:
        boxes.append(_fact("votes", f"{plan.votes.get(kept, 0.0):.0%}", "of resamples choose this depth"))
    return element(
        "header",
        element("h1", f"{summary.printable(plan.backbone)}: {summary.kept_words(plan)}"),
        element("p", _meaning(plan), class_="lede"),
        element("dl", *boxes, class_="facts"),
        element("p", "Blocks are numbered from 0, as in backbone_keep: a depth of 5 keeps blocks 0 to 4.", class_="how"),
    )


def _fact(name: str, value: str, small: str) -> Element:
    return element("div", element("dt", name), element("dd", value, element("small", small)))


def _meaning(plan: SlimmingPlan) -> str:
    total, kept = plan.full_num_blocks, len(plan.kept_blocks)
    if kept == total and plan.width == 1.0:
        return f"All {total} transformer blocks of the encoder are kept: nothing gets cheaper."
    gone = sorted(set(range(total)) - set(plan.kept_blocks))
    dropped = f"{_count(len(gone), 'block')} ({summary.block_ranges(gone)})" if gone else "No block"
    are = "are" if len(gone) > 1 else "is"
    first = f"{dropped} of the encoder's {total} transformer blocks {are} deleted before fine-tuning."
    shares = [
        f"{summary.share(pair['after'], pair['before'])} of {what}"
        for what, pair in (("its parameters", plan.parameters), ("the multiply-accumulate operations (MACs)", plan.macs))
        if pair is not None
    ]
    left = f" What is left has {' and '.join(shares)}." if shares else ""
    return f"{first}{left} Training and inference get cheaper; what that costs in accuracy, only fine-tuning tells."


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


# --- similarity


def _similarity(plan: SlimmingPlan) -> Element:
    assert plan.similarity is not None
    if plan.full_num_blocks > MOST_CELLS:
        heat = element("p", f"With more than {MOST_CELLS} blocks the picture is in report.png only.")
    else:
        heat = element("div", _heat_map(plan, plan.similarity), class_="wide")
    how = (
        "Each cell compares the outputs of two blocks of the intact encoder on the streamed tiles, by linear CKA: 1 means "
        "the same up to rotation and scale. A bright square along the diagonal is a stretch of blocks that change little. "
        "Dashed lines part kept blocks from dropped ones; the bars at the edges show the kept ones."
    )
    return _section("How alike the blocks are", None, element("div", heat, element("p", how, class_="how"), class_="pair"))


def _heat_map(plan: SlimmingPlan, similarity: Sequence[Sequence[float]]) -> Element:
    blocks, side, left, top = plan.full_num_blocks, 336.0, 52.0, 14.0
    low, cell = lowest_shown(value for row in similarity for value in row), 336.0 / plan.full_num_blocks
    svg = picture(side + left + 66, side + top + 42, "Similarity of every pair of blocks", data_columns=blocks)
    for i, row in enumerate(similarity):
        for j, value in enumerate(row):
            mark = element(
                "rect", x=left + j * cell, y=top + i * cell, width=cell, height=cell,
                fill=viridis((value - low) / (1 - low)), class_="cell",
            )  # fmt: skip
            svg.append(told(mark, f"blocks {i} and {j}: {value:.3f}"))
    for first, last in summary.runs(plan.kept_blocks):
        start, length = first * cell + 1, (last - first + 1) * cell - 2
        svg.append(element("rect", x=left + start, y=top - 8, width=length, height=5.0, class_="kept picked"))
        svg.append(element("rect", x=left - 8, y=top + start, width=5.0, height=length, class_="kept picked"))
    held = set(plan.kept_blocks)
    for block in range(1, blocks):
        if (block in held) != (block - 1 in held):
            x, y = left + block * cell, top + block * cell
            for class_ in ("halo", "cut"):
                svg.append(element("line", x1=x, x2=x, y1=top, y2=top + side, class_=class_))
                svg.append(element("line", x1=left, x2=left + side, y1=y, y2=y, class_=class_))
    for block in whole_ticks(0, blocks - 1):
        middle = (block + 0.5) * cell
        svg.append(element("text", str(block), x=left + middle, y=top + side + 14, class_="middle"))
        svg.append(element("text", str(block), x=left - 12, y=top + middle + 4, class_="end"))
    svg.append(element("text", "block", x=left + side / 2, y=top + side + 32, class_="middle name"))
    svg.append(element("text", "block", transform=f"translate(13 {top + side / 2:g}) rotate(-90)", class_="middle name"))
    for step in range(64):
        y = top + side * (63 - step) / 64
        svg.append(
            element("rect", x=left + side + 16, y=y, width=13.0, height=side / 64, fill=viridis(step / 63), class_="cell")
        )
    for value in ticks(low, 1.0, 5):
        y = top + side * (1 - (value - low) / (1 - low))
        svg.append(element("text", f"{value:g}", x=left + side + 34, y=y + 4))
    return svg


# --- the rules


def _rules(plan: SlimmingPlan) -> Element:
    found = summary.rules(plan)
    cards = [_card(plan, rule) for rule in found]
    how = "The strip shows which blocks a rule keeps."
    if any(rule.scores for rule in found):
        how = (
            "Score of every depth that a rule judged, the larger the better, each rule on its own scale; the ring marks the "
            "depth it picks. The strip below shows which blocks it keeps."
        )
    if plan.votes is not None:
        how += " Bars: share of the resamples of the tiles that each depth wins, full height for all of them."
    return _section(
        "Why this depth" if len(found) == 1 else f"What {len(found)} rules would keep",
        how,
        element("p", _agreement(plan, found)) if len(found) > 1 else None,
        element("p", _firmness(plan)) if plan.tiles_seen else None,
        element("div", *cards, class_="cards"),
    )


def _agreement(plan: SlimmingPlan, found: list[Rule]) -> str:
    others = [rule for rule in found if not rule.chosen]
    alike = [rule.name for rule in others if rule.kept == tuple(plan.kept_blocks)]
    sizes = sorted({len(rule.kept) for rule in found})
    spread = f"from {sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]} in all of them"
    names = f" ({', '.join(map(summary.printable, alike))})" if alike else ""
    return (
        f"Of {_count(len(others), 'other rule')}, asked on the same tiles, {len(alike) or 'none'}{names} would keep exactly "
        f"the same blocks. The number of kept blocks: {spread}. Rules with a budget were given that of the chosen depth."
    )


def _firmness(plan: SlimmingPlan) -> str:
    """How much the choice depends on which tiles were seen."""
    kept = len(plan.kept_blocks)
    if plan.votes is None:
        few = plan.tiles_seen < summary.FEWEST_FOR_VOTES
        why = (
            f"too few tiles were seen to draw them again (there have to be {summary.FEWEST_FOR_VOTES})"
            if few
            else "none were drawn"
        )
        return f"There are no votes: {why}, so nothing tells how firm this choice is."
    won = plan.votes.get(kept, 0.0)
    again = f"Drawing the tiles again with replacement gives this depth in {won:.0%} of the cases"
    if won >= ENOUGH_VOTES:
        return f"{again}: the choice does not hang on which tiles were seen."
    rival = max((depth for depth in plan.votes if depth != kept), key=lambda depth: plan.votes[depth], default=None)  # type: ignore[index]
    beside = "" if rival is None else f", and {rival} blocks in {plan.votes[rival]:.0%}"
    return f"{again}{beside}: it is a weak choice. Look at the whole curve; min_depth sets a floor."


def _card(plan: SlimmingPlan, rule: Rule) -> Element:
    words, papers = SOURCES.get(rule.name, ("A rule that is not part of the package.", []))
    votes = plan.votes if rule.chosen else None
    keeps = f"Keeps {_count(len(rule.kept), 'block')}: {summary.block_ranges(rule.kept)}."
    links = [piece for paper in papers for piece in (" ", _link(paper, f"arXiv {paper}"))]
    return element(
        "figure",
        element("h3", rule.name, element("span", "chosen", class_="badge") if rule.chosen else None),
        element("p", words, *links),
        element("p", element("b", keeps)),
        _curve(plan.full_num_blocks, rule, votes or {}),
        class_="card picked" if rule.chosen else "card",
    )


def _curve(blocks: int, rule: Rule, votes: Mapping[int, float]) -> Element:
    """Score and votes of every depth over the strip of blocks; depth n stands over block n - 1."""
    scores, kept = rule.scores or {}, len(rule.kept)
    judged = bool(scores or votes)
    y_range = span(list(scores.values()), 0.12) if scores else (0.0, 1.0)
    chart = Chart((0.5, blocks + 0.5), y_range, height=216.0 if judged else 74.0, below=62.0)
    svg = chart.picture(
        f"Scores and kept blocks of {rule.name}",
        "blocks kept" if judged else "block",
        "score" if scores else "",
        [],
        ticks(*y_range, 4) if scores else [],
    )
    if votes:
        low, high = y_range
        for depth, won in sorted(votes.items()):
            height = low + min(max(won, 0.0), 1.0) * (high - low)
            tip = f"{depth} blocks kept: {won:.1%} of resamples"
            svg.append(chart.bar(depth, low, height, 0.72, "votes", tip))
    points = [Point(d, s, f"{d} blocks kept: score {s:.4g}{_won(votes, d)}") for d, s in sorted(scores.items())]
    svg.append(chart.line(points, "line"))
    svg.extend(chart.dots(points, "dot"))
    if kept in scores:
        svg.append(element("circle", cx=chart.x(kept), cy=chart.y(scores[kept]), r=7.5, class_="ring"))
        y = chart.y(scores[kept])
        svg.append(element("text", str(kept), x=chart.x(kept), y=y - 11 if y > 34 else y + 21, class_="middle label"))
    left, top, cell = chart.x(0.5), chart.floor + 7, chart.x(1.5) - chart.x(0.5)
    svg.append(element("rect", x=left, y=top, width=cell * blocks, height=11.0, class_="dropped"))
    for first, last in summary.runs(rule.kept):
        strip = element("rect", x=left + first * cell, y=top, width=(last - first + 1) * cell, height=11.0)
        strip.set("class", "kept picked" if rule.chosen else "kept")
        svg.append(told(strip, f"kept: blocks {summary.block_ranges(range(first, last + 1))}"))
    for number in whole_ticks(1, blocks) if judged else whole_ticks(0, blocks - 1):
        svg.append(element("text", str(number), x=chart.x(number if judged else number + 1), y=top + 25, class_="middle"))
    return svg


def _won(votes: Mapping[int, float], depth: int) -> str:
    return f"\n{votes[depth]:.1%} of resamples" if depth in votes else ""


# --- costs


def _costs(plan: SlimmingPlan, found: list[Depth]) -> Element:
    """A row for every depth; columns of which nothing is known are left out."""
    whole = {
        "parameters": (plan.parameters or {}).get("before") or found[-1].parameters,
        "macs": (plan.macs or {}).get("before") or found[-1].macs,
    }
    columns = {
        "score": ("score", lambda depth: summary.score(depth.score)),
        "votes": ("votes", lambda depth: summary.MISSING if depth.votes is None else f"{depth.votes:.1%}"),
        "parameters": ("parameters", lambda depth: _amount(depth.parameters, whole["parameters"])),
        "macs": ("MACs per tile", lambda depth: _amount(depth.macs, whole["macs"])),
        "similarity": ("similarity to the last block", lambda depth: _fixed(depth.similarity)),
        "recovery_r2": ("R² of linear recovery", lambda depth: _fixed(depth.recovery_r2)),
    }
    shown = {key: column for key, column in columns.items() if any(getattr(depth, key) is not None for depth in found)}
    head = element(
        "tr", element("th", "blocks kept", scope="col"), *(element("th", n, scope="col") for n, _ in shown.values())
    )
    body = []
    for depth in found:
        cells = [element("td", cell(depth)) for _, cell in shown.values()]
        name = f"{depth.depth} (chosen)" if depth.chosen else str(depth.depth)
        body.append(element("tr", element("th", name, scope="row"), *cells, class_="picked" if depth.chosen else None))
    table = element("table", element("thead", head), element("tbody", *body))
    how = (
        "One row for every number of first blocks. Similarity says how far the last kept block already is where the intact "
        "encoder ends (CKA, 1 is the same)."
    )
    if "recovery_r2" in shown:
        how += " R² says how much of the last block's output a linear map of the kept one restores without training."
    if not summary.is_prefix(plan.kept_blocks) or plan.width != 1.0:
        how += (
            " Rows are of first blocks at full width: the marked one is not what the plan itself costs, which stands above."
        )
    return _section("What every depth costs and keeps", how, element("div", table, class_="scroll"))


def _amount(part: int | None, whole: int | None) -> Element | str:
    if part is None:
        return summary.MISSING
    length = min(part / whole, 1.0) * 100 if whole else 0.0
    bar = element(
        "svg",
        element("rect", width=100, height=8, class_="all"),
        element("rect", width=length, height=8, class_="part"),
        viewBox="0 0 100 8", preserveAspectRatio="none", class_="share", aria_hidden="true",
    )  # fmt: skip
    return element("span", bar, f"{part:,} ({summary.share(part, whole)})")


def _fixed(value: float | None) -> str:
    return summary.MISSING if value is None else f"{value:.3f}"


# --- what it rests on


def _streamed(plan: SlimmingPlan) -> Element:
    data = dict(plan.data or {})
    skipped = data.pop("skipped", None)
    lines = {"tiles seen": f"{plan.tiles_seen:,}", "tokens compared": f"{plan.rows_seen:,}"}
    names = {"source": "read by", "files": "files", "tiles": "tiles there are", "input_shape": "shape of a tile"}
    known = {name: _shape(data.pop(key)) for key, name in names.items() if key in data}
    reasons = skipped if isinstance(skipped, dict) else {}
    lines |= known
    lines["skipped"] = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
    lines |= {key: _shape(value) for key, value in data.items()}
    how = (
        "Tiles that went through the intact encoder once, without training it. Those that could not be used are counted by "
        "reason. The fingerprint is made of names, sizes and order of the files and of the seed: other data, another one."
    )
    return _section("What was streamed", how, _list(lines))


def _shape(value: object) -> str:
    if isinstance(value, list) and value and all(isinstance(size, int) for size in value):
        return " x ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def _list(lines: Mapping[str, str]) -> Element:
    pieces = [
        element(tag, summary.printable(text)) for pair in lines.items() for tag, text in zip(("dt", "dd"), pair, strict=True)
    ]
    return element("dl", *pieces, class_="list")


def _caveats(plan: SlimmingPlan) -> Element:
    notes = []
    if plan.similarity is None:
        notes.append("Nothing was measured for this plan: the depth was given by hand.")
    else:
        notes.append("Similarity is not accuracy. It says where representations settle, not which of them the task needs.")
    notes.append(
        "Published for SIMPLER (arXiv 2603.19873) after fine-tuning: Prithvi-EO-2.0-300M cut to 5 of 24 blocks keeps 94 % "
        "of mIoU on MADOS, 97 % of mAP on BigEarthNet v2 and 96 % of macro-F1 on Sen4Map, but TerraMind on MADOS 89 %: it "
        "loses more than 10 %. An automatic cut is not safe everywhere; fine-tune at a second depth to see."
    )
    if 0 < plan.tiles_seen < FEW_TILES:
        notes.append(f"Only {plan.tiles_seen:,} tiles were seen; with {FEW_TILES} or more the similarity is steadier.")
    if plan.tiles_seen and plan.votes is None:
        notes.append("There are no votes: how much the choice depends on which tiles were seen is not known.")
    skipped = (plan.data or {}).get("skipped")
    counts = [n for n in skipped.values() if isinstance(n, int) and n > 0] if isinstance(skipped, dict) else []
    if plan.tiles_seen and sum(counts) > MANY_SKIPPED * plan.tiles_seen:
        notes.append(f"{sum(counts):,} tiles or files could not be used: what was seen may not be typical of the rest.")
    if not summary.is_prefix(plan.kept_blocks):
        notes.append("Blocks are dropped from inside of the encoder; the published results above are of cuts at its end.")
    return _section("What to keep in mind", None, element("ul", *(element("li", note) for note in notes)))


def _again(plan: SlimmingPlan) -> Element:
    kept = list(plan.kept_blocks)
    keep = len(kept) if summary.is_prefix(kept) else kept
    width = "" if plan.width == 1.0 else f"\nbackbone_width: {plan.width:g}"
    name = summary.printable(plan.backbone)
    by_plan = f"backbone: simpler_{name}\nbackbone_plan: plan.json"
    by_hand = f"backbone: simpler_{name}\nbackbone_keep: {keep}{width}"
    how = "In a TerraTorch config, either of these builds the same slimmed encoder again, with nothing streamed:"
    if plan.recovery != "none":  # the maps lie beside the plan
        how = (
            "In a TerraTorch config, the first of these builds it again, with nothing streamed; the second without recovery:"
        )
    known = "trainer:\n  callbacks:\n    - class_path: terratorch_simpler.SimplerCallback"
    lines = {"criterion": str(plan.criterion["name"]), "its settings": json.dumps(plan.criterion["args"])}
    lines |= {"data": str((plan.data or {}).get("fingerprint", summary.MISSING))}
    lines |= {package: _shape(version) for package, version in (plan.versions or {}).items()}
    return _section(
        "How to reproduce it",
        how,
        _code(by_plan),
        _code(by_hand),
        element(
            "p",
            "Names that start with simpler_ are known once terratorch_simpler is imported. In a config, list its callback, "
            "which leaves a pruned encoder as it is; in Python, write ",
            element("code", "import terratorch_simpler"),
            " first:",
        ),
        _code(known),
        element("p", "To choose again, run ", element("code", "terratorch-simpler plan -c CONFIG"), " with these:"),
        _list(lines),
    )


def _code(text: str) -> Element:
    """Lines of YAML."""
    lines = [element("code", line) for line in text.splitlines()]
    for line in lines[:-1]:
        line.tail = "\n"
    return element("pre", *lines)


def _sources(plan: SlimmingPlan) -> Element:
    shown = {paper for rule in summary.rules(plan) for paper in SOURCES.get(rule.name, ("", []))[1]}
    shown |= {"2603.19873"} | ({"2010.15327"} if plan.similarity is not None else set())
    shown |= {"2601.22841"} if plan.width != 1.0 else set()
    if any(depth.recovery_r2 is not None for depth in summary.depths(plan)):
        shown.add("2609.36842")
    items = [
        element("li", _link(paper, f"arXiv {paper}"), f": {words}") for paper, words in PAPERS.items() if paper in shown
    ]
    return _section("Sources", "Please cite SIMPLER, and the papers of the rules that you used.", element("ul", *items))


def _link(paper: str, text: str) -> Element:
    return element("a", text, href=f"https://arxiv.org/abs/{paper}", rel="noreferrer")
