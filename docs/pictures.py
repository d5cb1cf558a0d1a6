"""Draw the pictures of concepts.md into docs/pictures: ``python docs/pictures.py``. A test fails if they are out of date.

The similarities are synthetic; the package computes scores and votes. Every block adds something independent to the
residual stream, so that V_l, the variance after block l, determines all pairs: HSIC(H_i, H_j) = min(V_i, V_j)^2, and CKA is
the smaller variance over the larger one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import torch

from terratorch_simpler.criteria import Bounds, GroupSums, Simpler, bootstrap
from terratorch_simpler.indices import feature_position

sys.path.insert(0, str(Path(__file__).parent))  # also where a test loads this file by its path
from svg import Chart, Point, element, viridis

FOLDER = Path(__file__).parent / "pictures"
BLOCKS = 12
GROUPS = 12
NOISE = 0.4
"""Spread of what a block adds from one group of tiles to the next, in logarithms."""
SETTLES = [0.1, 0.15, 0.22, 0.34, 0.55, *[0.02] * 7]
"""What each block adds, as a share of the variance that is there: five that move, seven that do not."""
DRIFTS = [0.05] * BLOCKS
SCORES = (-0.05, 0.2)
"""Scale of both curves, so that a flat one looks flat."""
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #4a5662; }
.name, .head { fill: #1f2933; } .head { font-size: 14px; font-weight: 600; }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.grid { stroke: #d6dde4; } .axis { stroke: #5b6875; }
.curve { fill: none; stroke: #1b4965; stroke-width: 2; } .dot { fill: #1b4965; } .picked { fill: #c2371f; }
.votes { fill: #bfd7ea; } .cut { fill: none; stroke: #c2371f; stroke-width: 2.5; }
.halo { fill: none; stroke: #fff; stroke-width: 5; }
.cell { shape-rendering: crispEdges; }
.stream { stroke: #5b6875; stroke-width: 2; } .gone { fill: none; stroke: #9aa7b3; stroke-dasharray: 3 2; }
.heads { fill: #2c728e; } .mlp { fill: #5ec962; } .norm { fill: #fde725; stroke: #b8a300; }
.map { fill: #f4c9c1; stroke: #c2371f; }
.link { fill: none; stroke: #1b4965; stroke-width: 1.5; } .asked { fill: #c2371f; }
"""


def picture(width: int, height: int, label: str, *children: Element) -> Element:
    """A picture that stands for itself, on white paper whatever the page looks like."""
    paper = element("rect", width=width, height=height, rx=8, fill="#ffffff")
    return element(
        "svg", element("title", label), element("style", STYLE), paper, *children,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", width=width, height=height,
    )  # fmt: skip


def planted(steps: Sequence[float], seed: int = 2) -> GroupSums:
    """Groups of tiles in which every block adds about what ``steps`` say."""
    noise = torch.randn(GROUPS, len(steps), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    added = torch.tensor(steps, dtype=torch.float64) * torch.exp(NOISE * noise)
    variance = torch.cat([torch.ones(GROUPS, 1, dtype=torch.float64), (1 + added).cumprod(dim=1)], dim=1)
    hsic = torch.minimum(variance[:, :, None], variance[:, None, :]) ** 2
    unused = torch.zeros_like(hsic)  # of the angles, which SIMPLER does not look at
    return GroupSums(hsic, unused, unused, torch.ones(GROUPS))


def choice(title: str, label: str, steps: Sequence[float]) -> Element:
    """Similarity, score and votes, as in report.png."""
    groups, criterion, bounds = planted(steps), Simpler(), Bounds()
    found = groups.total()
    chosen = criterion.choose(found, BLOCKS, bounds)
    votes = bootstrap(criterion, groups, bounds, seed=0)
    scores, kept = dict(chosen.scores or {}), len(chosen.kept_blocks)
    left, top, cell = 60, 60, 19
    side = cell * BLOCKS
    children = [element("text", title, x=20, y=28, class_="head")]
    low = 0.2
    for i, row in enumerate(found.similarity.tolist()):
        for j, value in enumerate(row):
            fill = viridis((value - low) / (1 - low))
            children.append(
                element("rect", x=left + j * cell, y=top + i * cell, width=cell, height=cell, fill=fill, class_="cell")
            )
    for class_ in ("halo", "cut"):
        children.append(element("rect", x=left, y=top, width=kept * cell, height=kept * cell, class_=class_))
    for number in range(BLOCKS):
        middle = (number + 0.5) * cell
        children.append(element("text", number, x=left + middle, y=top + side + 15, class_="middle"))
        children.append(element("text", number, x=left - 6, y=top + middle + 4, class_="end"))
    children.append(element("text", "block", x=left + side / 2, y=top + side + 34, class_="middle name"))
    turned = f"translate(22 {top + side / 2:g}) rotate(-90)"
    children.append(element("text", "block", transform=turned, class_="middle name"))
    scale = left + side + 18
    for step in range(40):
        y = top + side - (step + 1) * side / 40
        children.append(element("rect", x=scale, y=y, width=12, height=side / 40 + 0.5, fill=viridis((step + 0.5) / 40)))
    for value in (0.2, 0.4, 0.6, 0.8, 1.0):
        y = top + side - (value - low) / (1 - low) * side
        children.append(element("text", f"{value:g}", x=scale + 18, y=y + 4))
    children.append(element("text", "linear CKA", x=scale - 6, y=top - 12, class_="name"))

    chart = Chart((1, BLOCKS - 1), SCORES, width=380, height=300, left=58, right=52)
    drawn = chart.picture("", "blocks kept", "score g(c)", list(range(2, BLOCKS - 1)), [-0.05, 0, 0.05, 0.1, 0.15, 0.2])
    for name, value in (("x", 390), ("y", 32), ("width", 380), ("height", 300)):
        drawn.set(name, str(value))

    def of_score(share: float) -> float:
        return SCORES[0] + share * (SCORES[1] - SCORES[0])

    bars = [
        chart.bar(depth, SCORES[0], of_score(share), 0.7, "votes", f"{depth} blocks: {share:.0%} of votes")
        for depth, share in votes.items()
        if share
    ]
    drawn[:] = bars + list(drawn)
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = chart.y(of_score(share)) + 3.5
        drawn.append(element("text", f"{share:.0%}", x=chart.width - chart.right + 5, y=y))
    points = [Point(depth, value, f"{depth} blocks: {value:.3f}") for depth, value in scores.items()]
    drawn.append(chart.line(points, "curve"))
    drawn.extend(chart.dots(points, "dot"))
    drawn.extend(chart.dots([point for point in points if point.x == kept], "picked", 6))
    won = votes.get(kept, 0)
    children += [
        drawn,
        element("rect", x=438, y=14, width=12, height=12, class_="votes"),
        element("text", "votes of resampled tiles (right)", x=456, y=24),
        element("circle", cx=662, cy=20, r=6, class_="picked"),
        element("text", f"chosen: {kept} ({won:.0%})", x=674, y=24),
    ]
    return picture(790, 340, label, *children)


def block(x: int, y: int, width: float = 1.0, there: bool = True) -> list[Element]:
    """Attention with four heads, and an MLP; what is dropped is an outline."""
    parts = []
    for class_, places, size in (("heads", (0, 14, 28, 42), 11), ("mlp", (60,), 48)):
        for place in places:
            box = {"x": x + place, "y": y, "height": 13}
            if width < 1 or not there:
                parts.append(element("rect", width=size, class_="gone", **box))
            if there:
                parts.append(element("rect", width=size * width, class_=class_, **box))
    return parts


def column(x: int, title: str, words: str, kept: Sequence[int], width: float = 1.0, repaired: bool = False) -> list[Element]:
    """An encoder from its first block at the top to its final norm; kept blocks of all, dropped ones as outlines."""
    top, step = 84, 22
    end = top + step * BLOCKS
    parts = [
        element("text", title, x=x, y=30, class_="head"),
        element("text", words, x=x, y=50),
        element("line", x1=x + 54, x2=x + 54, y1=62, y2=end + 40, class_="stream"),
    ]
    for number in range(BLOCKS):
        parts += block(x, top + number * step, width, number in kept)
    if repaired:
        dropped = [number for number in range(BLOCKS) if number not in kept]
        starts = [number for number in dropped if number - 1 not in dropped]
        for start in starts:
            last = next(number for number in range(start, BLOCKS + 1) if number not in dropped) - 1
            y, height = top + start * step - 3, (last - start) * step + 19
            parts.append(element("rect", x=x - 4, y=y, width=116, height=height, rx=4, class_="map", fill_opacity="0.35"))
            parts.append(element("text", "linear map W", x=x + 54, y=y + height / 2 + 4, class_="middle name"))
    parts.append(element("rect", x=x + 24, y=end + 4, width=60, height=15, rx=4, class_="norm"))
    parts.append(element("text", "norm", x=x + 54, y=end + 15, class_="middle name"))
    return parts


def cuts() -> Element:
    """Depth, gaps and width beside the intact encoder."""
    columns = (
        column(30, "intact", "12 blocks", range(BLOCKS)),
        column(200, "depth", "first 5 blocks", range(5)),
        column(370, "gaps, recovery", "5 blocks, two maps", (0, 1, 2, 7, 11), repaired=True),
        column(535, "width 0.5", "half of each head and MLP", range(BLOCKS), 0.5),
        column(715, "depth and width", "first 5, width 0.5", range(5), 0.5),
    )
    key = [
        element("rect", x=30, y=402, width=11, height=13, class_="heads"),
        element("text", "attention head", x=47, y=413),
        element("rect", x=150, y=402, width=36, height=13, class_="mlp"),
        element("text", "MLP", x=192, y=413),
        element("rect", x=240, y=402, width=36, height=13, class_="gone"),
        element("text", "dropped", x=282, y=413),
        element("line", x1=350, x2=380, y1=409, y2=409, class_="stream"),
        element("text", "tokens: always as wide as in the intact encoder", x=387, y=413),
    ]
    label = "An encoder of twelve blocks: intact, pruned in depth, with gaps and linear maps, slimmed in width, and both"
    return picture(850, 430, label, *(part for parts in columns for part in parts), *key)


def indices(asked: Sequence[int] = (2, 5, 8, 11), kept: int = 5) -> Element:
    """The kept block that each index of the intact encoder maps to."""
    top, step, left, right = 66, 22, 150, 430
    parts = [
        element("text", "intact: 12 blocks", x=left, y=30, class_="head"),
        element("text", f"pruned: first {kept}", x=right, y=30, class_="head"),
        element("text", f"indices: {list(asked)}", x=left, y=50),
        element("text", "mapped to", x=right, y=50),
    ]
    for number in range(BLOCKS):
        y = top + number * step
        class_ = "end asked" if number in asked else "end"
        parts += [*block(left, y), element("text", number, x=left - 8, y=y + 11, class_=class_)]
        parts += block(right, y, there=number < kept)
        if number < kept:
            parts.append(element("text", number, x=right + 118, y=y + 11))
    for index in asked:
        position = feature_position(index, kept, BLOCKS)
        start, end = top + index * step + 6.5, top + position * step + 6.5
        curve = f"M{left + 112} {start:g}C{left + 190} {start:g} {right - 90} {end:g} {right - 6} {end:g}"
        parts.append(element("path", d=curve, class_="link"))
        parts.append(element("circle", cx=right - 6, cy=end, r=3.5, class_="dot"))
    parts.append(element("text", "index i maps to kept block ceil((i + 1) k / L) - 1", x=left, y=top + 12 * step + 20))
    label = f"Indices {list(asked)} of an encoder of twelve blocks, mapped to the first {kept}"
    return picture(620, 370, label, *parts)


def pictures() -> dict[str, str]:
    """All of them: SVG by the name of the file."""
    converged = "An encoder that settles after five blocks: one peak, one depth with nearly all votes"
    drifted = "An encoder that drifts to the end: a flat curve and split votes"
    settles = choice("It settles after five blocks", converged, SETTLES)
    drifts = choice("It drifts to the end", drifted, DRIFTS)
    drawn = {"settles": settles, "drifts": drifts, "cuts": cuts(), "indices": indices()}
    for root in drawn.values():
        ElementTree.indent(root, " ")
    return {f"{name}.svg": ElementTree.tostring(root, encoding="unicode") + "\n" for name, root in drawn.items()}


if __name__ == "__main__":
    for name, text in pictures().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
