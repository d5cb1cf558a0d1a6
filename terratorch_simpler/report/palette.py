"""The colours of the page, the figures and the sweep: of any two that mark data, all readers can tell which is which.

tests/test_palette.py simulates readers without the receptors for green or red.
"""

from __future__ import annotations

from collections.abc import Mapping

LIGHT = {
    "paper": "#ffffff", "card": "#f6f8fa", "ink": "#1f2933", "soft": "#5b6875", "rule": "#d6dde4",
    "curve": "#1b4965", "second": "#008577", "third": "#b78300", "fourth": "#9c80da", "fifth": "#2f6fed", "sixth": "#4a0d26",
    "chosen": "#c2371f", "votes": "#bfd7ea", "control": "#b04098",
}  # fmt: skip
DARK = {
    "paper": "#12171c", "card": "#1a2128", "ink": "#e6ebf0", "soft": "#9fadba", "rule": "#33404c",
    "curve": "#8ecae6", "second": "#2fae8e", "third": "#ffe08a", "fourth": "#c3a6ff", "fifth": "#4d7dff", "sixth": "#a8602f",
    "chosen": "#ff8a65", "votes": "#27506e", "control": "#d9a300",
}  # fmt: skip
PRINT = {**LIGHT, "card": "#ffffff", "ink": "#000000", "soft": "#444444", "rule": "#bbbbbb"}
NEUTRAL = ("paper", "card", "ink", "soft", "rule")
"""Paper, text, axes and grids; all others mark data."""

INK, SOFT, RULE, CARD = (LIGHT[name] for name in ("ink", "soft", "rule", "card"))
SERIES = tuple(LIGHT[name] for name in ("curve", "second", "third", "fourth", "fifth", "sixth"))
"""Lines and points, in the order in which they are used; markers differ as well."""
CURVE, SECOND = SERIES[:2]
CHOSEN, VOTES, CONTROL = (LIGHT[name] for name in ("chosen", "votes", "control"))
VARIABLES = {colour: f"--{name}" for name, colour in LIGHT.items() if name != "paper"}
"""Variables of the page that stand for these colours, so that its charts follow light, dark and print."""


def page_colours() -> str:
    """The style sheet that gives the variables their values."""
    return (
        f":root {{ color-scheme: light dark; {_variables(LIGHT)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}\n"
        f"@media print {{ :root {{ {_variables(PRINT)} }} }}\n"
    )


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
