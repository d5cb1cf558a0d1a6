"""Which runs a study has: one line of its results each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Results = Mapping["Run", Mapping[str, Any]]


class Run(NamedTuple):
    """One fine-tuning.

    Attributes:
        setup: Name of the set-up.
        encoder: Name of the encoder.
        variant: What is compared: "depth", "random", "rule", "shallow", "width", "recovery", "lora" or "slimmable".
        rule: Name of the rule that chooses what is kept, "first" for the first blocks.
        depth: Kept blocks; None if the rule says.
        width: Kept width.
        seed: Seed of labels, decoder and order.
    """

    setup: str
    encoder: str
    variant: str
    rule: str
    depth: int | None
    width: float
    seed: int

    @property
    def key(self) -> str:
        """Name of its file."""
        return "-".join(str(value) for value in self)


def gate_runs(study: Mapping[str, Any]) -> Iterator[Run]:
    """The pretrained and a random encoder at full depth, in every set-up."""
    encoder = study["gate"]["encoder"]
    depth = study["encoders"][encoder]["depth"]
    for seed in study["seeds"]:
        for setup in study["setups"]:
            for variant in ("depth", "random"):
                yield Run(setup, encoder, variant, "first", depth, 1.0, seed)


class Gate(NamedTuple):
    """What the gate says of a set-up: means over seeds, the standard error of their difference, and whether it counts.

    Differences are taken seed by seed: a pretrained and a random encoder of one seed see the same labels in the same order.
    """

    setup: str
    pretrained: float
    random: float
    error: float
    passed: bool


def judge_gate(study: Mapping[str, Any], results: Results) -> list[Gate]:
    """Judge all set-ups whose runs are there."""
    found, gate = [], study["gate"]
    for setup in study["setups"]:
        runs = [run for run in gate_runs(study) if run.setup == setup]
        if not all(run in results for run in runs):
            continue
        pretrained, random = (
            [results[run]["test_miou"] for run in runs if run.variant == variant] for variant in ("depth", "random")
        )
        differences = [one - other for one, other in zip(pretrained, random, strict=True)]
        difference = statistics.mean(differences)
        error = standard_error(differences)
        passed = difference >= gate["margin"] and difference >= gate["errors"] * error
        found.append(Gate(setup, statistics.mean(pretrained), statistics.mean(random), error, passed))
    return found


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def study_runs(study: Mapping[str, Any], setups: Sequence[str], simpler_depth: Mapping[str, int]) -> Iterator[Run]:
    """All runs in set-ups that passed; the cheapest answers first.

    Args:
        study: The study's settings.
        setups: Those that passed the gate.
        simpler_depth: Depth that SIMPLER picked for an encoder, where that is known yet.
    """
    main = study["gate"]["encoder"]
    full = study["encoders"][main]["depth"]
    deep = [encoder for encoder in study["depths"] if encoder != main]
    for setup in setups:
        tuned = not study["setups"][setup]["freeze"]
        for seed in study["seeds"]:
            for depth in study["depths"][main]:
                yield Run(setup, main, "depth", "first", depth, 1.0, seed)
            for rule in study["rules"]:
                yield Run(setup, main, "rule", rule, None, 1.0, seed)
            for depth in study["random_depths"]:
                yield Run(setup, main, "random", "first", depth, 1.0, seed)
            shallow = study["shallow"]
            yield Run(setup, shallow, "shallow", "first", study["encoders"][shallow]["depth"], 1.0, seed)
            budgets = sorted({full // 2, simpler_depth.get(main, full // 2)})
            for rule in study["rules_with_budget"]:
                for depth in budgets:
                    yield Run(setup, main, "rule", rule, depth, 1.0, seed)
            for width in study["widths"]:
                for depth in (full // 2, full):
                    yield Run(setup, main, "width", "first", depth, width, seed)
            for depth in study["recovery_depths"]:
                yield Run(setup, main, "recovery", "first", depth, 1.0, seed)
            if tuned:
                for depth in study["lora_depths"]:
                    yield Run(setup, main, "lora", "first", depth, 1.0, seed)
                yield Run(setup, main, "slimmable", "first", full, 1.0, seed)
    for setup in setups:
        for encoder in deep:
            for seed in study["deep_seeds"]:
                for rule in study["rules"]:
                    yield Run(setup, encoder, "rule", rule, None, 1.0, seed)
                for depth in study["depths"][encoder]:
                    yield Run(setup, encoder, "depth", "first", depth, 1.0, seed)
                yield Run(setup, encoder, "random", "first", study["encoders"][encoder]["depth"], 1.0, seed)
