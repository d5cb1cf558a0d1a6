"""Elements of a page and charts as inline SVG. Every text that goes in is escaped when it comes out, by the serialiser."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from terratorch_simpler.report.summary import printable

VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
"""Matplotlib's colour map at equal steps: perceptually uniform, and told apart by the colour-blind."""
LONGEST_TEXT = 2000


def element(tag: str, *children: Element | str | None, **attributes: object) -> Element:
    """One element with what is inside of it.

    Args:
        tag: Name of the element.
        *children: Elements and texts in order; None is left out.
        **attributes: ``_`` stands for ``-``, a trailing one is dropped (``class_``); None is left out.
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else _clean(value)
            made.set(name.rstrip("_").replace("_", "-"), text)
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif child is not None:
            text = _clean(child)
            if len(made):
                made[-1].tail = (made[-1].tail or "") + text
            else:
                made.text = (made.text or "") + text
    return made


def _clean(text: object) -> str:
    """Text without control characters, apart from the end of a line."""
    return "\n".join(printable(line, LONGEST_TEXT) for line in str(text).split("\n"))


def html(root: Element) -> str:
    """An element as HTML."""
    return ElementTree.tostring(root, encoding="unicode", method="html")


def viridis(value: float) -> str:
    """Colour of a value from 0 to 1; what lies outside gets the colour of the end.

    Example:
        >>> viridis(0.0), viridis(0.5), viridis(7.0)
        ('#440154', '#21918c', '#fde725')
    """
    place = min(max(value, 0.0), 1.0) * (len(VIRIDIS) - 1)
    first = min(int(place), len(VIRIDIS) - 2)
    low, high = (bytes.fromhex(VIRIDIS[i][1:]) for i in (first, first + 1))
    return "#" + bytes(round(a + (b - a) * (place - first)) for a, b in zip(low, high, strict=True)).hex()


def lowest_shown(values: Iterable[float]) -> float:
    """Where the scale of a similarity that ends at 1 begins: at a tenth below all values, so that structure is seen.

    Example:
        >>> lowest_shown([0.93, 1.0]), lowest_shown([0.34, 1.0]), lowest_shown([-0.1])
        (0.8, 0.3, 0.0)
    """
    return min(max(math.floor(min(values) * 10) / 10, 0.0), 0.8)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``: steps of 1, 2 or 5 times a power of ten.

    Example:
        >>> ticks(0.0, 1.0), ticks(1, 12), ticks(0, 20)
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [2.0, 4.0, 6.0, 8.0, 10.0, 12.0], [0.0, 5.0, 10.0, 15.0, 20.0])
    """
    rough = (high - low) / most
    if not rough > 0 or math.isinf(rough):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= rough * 0.999), 10 * power)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from ``low`` to ``high``.

    Example:
        >>> log_ticks(0.4, 12)
        [0.5, 1.0, 2.0, 5.0, 10.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    return [value for value in values if low <= value <= high]


def whole_ticks(low: int, high: int) -> list[int]:
    """Round whole numbers from ``low`` to ``high``."""
    return [int(value) for value in ticks(low, high, 8) if value == int(value)]


class Point(NamedTuple):
    """A value of a chart and what is told of it."""

    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class Chart:
    """Scales over a plotting area; one unit is about one pixel.

    Attributes:
        x_range: Least and largest value from left to right.
        y_range: Least and largest value from bottom to top.
        width: Of the whole picture.
        height: Of the whole picture.
        below: Room under the plotting area for the axis, and more.
        log_x: Whether equal steps to the right are equal factors.
    """

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: float = 380.0
    height: float = 220.0
    below: float = 38.0
    left: float = 52.0
    right: float = 12.0
    above: float = 12.0
    log_x: bool = False

    def x(self, value: float) -> float:
        """Where a value is from the left."""
        limits = self.x_range
        if self.log_x:
            value, limits = math.log10(value), (math.log10(limits[0]), math.log10(limits[1]))
        return self.left + _portion(value, limits) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Where a value is from the top."""
        return self.floor - _portion(value, self.y_range) * (self.floor - self.above)

    @property
    def floor(self) -> float:
        """The lower edge of the plotting area."""
        return self.height - self.below

    def picture(
        self,
        label: str,
        x_label: str,
        y_label: str,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        **attributes: object,
    ) -> Element:
        """An empty chart: grid, numbers and names of the axes.

        Args:
            label: What the picture shows, for those who do not see it.
            x_label: Name of the horizontal axis.
            y_label: Name of the vertical axis.
            x_ticks: Values with a number.
            y_ticks: Values with a number and a line.
            **attributes: Further attributes.
        """
        svg = picture(self.width, self.height, label, **attributes)
        right = self.width - self.right
        for value in y_ticks:
            y = self.y(value)
            svg.append(element("line", x1=self.left, x2=right, y1=y, y2=y, class_="grid"))
            svg.append(element("text", _number(value), x=self.left - 5, y=y + 3.5, class_="end"))
        for value in x_ticks:
            svg.append(element("text", _number(value), x=self.x(value), y=self.floor + 14, class_="middle"))
        svg.append(element("line", x1=self.left, x2=right, y1=self.floor, y2=self.floor, class_="axis"))
        middle = (self.above + self.floor) / 2
        svg.append(element("text", x_label, x=(self.left + right) / 2, y=self.height - 5, class_="middle name"))
        if y_label:
            turned = f"translate(11 {middle:.1f}) rotate(-90)"
            svg.append(element("text", y_label, transform=turned, class_="middle name"))
        return svg

    def line(self, points: Sequence[Point], class_: str) -> Element:
        """A line through points."""
        return element("polyline", points=" ".join(f"{self.x(p.x):.1f},{self.y(p.y):.1f}" for p in points), class_=class_)

    def dots(self, points: Iterable[Point], class_: str, radius: float = 3.2) -> list[Element]:
        """A dot for every point, which tells its value."""
        return [told(element("circle", cx=self.x(p.x), cy=self.y(p.y), r=radius, class_=class_), p.tip) for p in points]

    def diamonds(self, points: Iterable[Point], class_: str, radius: float = 5.0) -> list[Element]:
        """The same with another shape, for those who do not see the colour."""
        shape = f"M0 {-radius}L{radius} 0L0 {radius}L{-radius} 0Z"
        return [
            told(element("path", d=shape, transform=f"translate({self.x(p.x):.1f} {self.y(p.y):.1f})", class_=class_), p.tip)
            for p in points
        ]

    def bar(self, x: float, low: float, high: float, width: float, class_: str, tip: str) -> Element:
        """A bar around ``x`` from one value to another."""
        top, bottom = sorted((self.y(low), self.y(high)))
        left, right = self.x(x - width / 2), self.x(x + width / 2)
        return told(element("rect", x=left, y=top, width=right - left, height=bottom - top, class_=class_), tip)

    def whisker(self, x: float, low: float, high: float, class_: str) -> Element:
        """A line from one value to another, upright."""
        return element("line", x1=self.x(x), x2=self.x(x), y1=self.y(low), y2=self.y(high), class_=class_)


def picture(width: float, height: float, label: str, **attributes: object) -> Element:
    """An empty picture. Its marks can be walked through with the arrow keys."""
    return element(
        "svg", viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, tabindex=0, class_="chart", **attributes
    )


def told(mark: Element, tip: str) -> Element:
    """A mark that tells its value when it is pointed at."""
    mark.set("class", f"tip {mark.get('class', '')}".strip())
    mark.append(element("title", tip))
    return mark


def span(values: Sequence[float], room: float = 0.08, include: Sequence[float] = ()) -> tuple[float, float]:
    """Range of an axis: all values, and a little room."""
    low, high = min([*values, *include]), max([*values, *include])
    more = (high - low) * room or abs(high) * 0.1 or 1.0
    return low - more, high + more


def _portion(value: float, limits: tuple[float, float]) -> float:
    low, high = limits
    return (value - low) / (high - low)


def _number(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:.3g}"
