"""What docs/evidence.md says of the results: every sentence with a figure is computed from them.

Nothing is ranked where the F test over depths gives p > 0.05, and a difference is called one only if its 95 % interval
leaves out 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.pretrained_vit.statistics import LEVEL

Results = Mapping[str, Any]
WORDS = {"cover": "land cover", "water": "water", "scenes": "scenes"}
VARIANTS = {
    "lora": "With LoRA",
    "narrow": "At half the width",
    "linear": "After a linear map",
    "distill": "After a distillation",
}
"""What is fine-tuned beside the first blocks as they are."""


def frozen(found: Results) -> list[str]:
    """Of frozen probes."""
    tests = found["tests"]
    apart = [row for row in tests if row["counts"] == "yes" and row["p"] <= LEVEL]
    lines = [_gate(tests), _f_test([row for row in tests if row["counts"] == "yes"]), *_gained(found["rows"])]
    lines += _not_counted(found["rows"], [row for row in tests if row not in apart])
    if not apart:
        return lines
    mean = {row["criterion"]: row for row in found["regrets"]}
    differences = {row["criterion"]: row for row in found["differences"]}
    choices = [row for row in found["rows"] if any(_case(row) == _case(test) for test in apart)]
    lines += [_best(found, apart), _intact(mean, choices)]
    lines += [_simpler(mean, choices), _probe(mean, choices), _rules(mean, differences), _half(mean, differences)]
    lines += [_gaps(mean, differences, choices), _width(choices)]
    return lines


def _gate(tests: Sequence[Results]) -> str:
    passed = [row for row in tests if row["counts"] == "yes"]
    out = [f"{_case(row)} ({_error(row['pretrained_minus_random'])})" for row in tests if row["counts"] != "yes"]
    line = f"Pretraining matters, on the validation split, in {len(passed)} of {len(tests)} cases."
    return line + (f" What fails has no best depth: {_list(out)}." if out else "")


def _f_test(tests: Sequence[Results]) -> str:
    apart = [row for row in tests if row["p"] <= LEVEL]
    line = f"Depths differ (F test, permutations within places) in {len(apart)} of these {len(tests)} cases"
    line += f", p at most {max(row['p'] for row in apart):.2g}." if apart else "."
    alike = [f"{_case(row)} (p = {row['p']:.2g})" for row in tests if row["p"] > LEVEL]
    return line + (f" They are not ranked for {_list(alike)}." if alike else "")


def _gained(rows: Sequence[Results]) -> list[str]:
    """Gains on all blocks in all cases, which need no best depth."""
    lines = []
    for name, words in (("probe", "`probe`"), ("half", "Half of the blocks"), ("simpler", "SIMPLER")):
        of_name = [row for row in rows if row["criterion"] == name]
        above = [row for row in of_name if row["gain_on_all_blocks"][1] > 0]
        below = [row for row in of_name if row["gain_on_all_blocks"][2] < 0]
        parts = [f"{_case(row)} {_interval(row['gain_on_all_blocks'])}{_fallback(row)}" for row in of_name]
        line = (
            f"{words}, gain on all blocks: {_list(parts)}. The interval is above 0 in {len(above)} of {len(of_name)} cases"
        )
        lines.append(f"{line}, and below in {len(below)}.")
    return lines


def _fallback(row: Results) -> str:
    """How often ``probe`` did not choose, and kept half."""
    verdicts = (row["verdict"] or "").split(", ")
    if row["criterion"] != "probe" or "unsettled" not in verdicts:
        return ""
    return f" with half, since unsettled, in {verdicts.count('unsettled')} of {len(verdicts)} draws"


def _not_counted(rows: Sequence[Results], tests: Sequence[Results]) -> list[str]:
    """Regret of ``probe`` in cases that are in no mean."""
    parts = [
        f"{_case(row)} {_interval(row['regret'])}"
        for row in rows
        if row["criterion"] == "probe" and any(_case(row) == _case(test) for test in tests)
    ]
    if not parts:
        return []
    return [f"Regret of `probe` where a case fails the gate or the F test, which no mean over tasks counts: {_list(parts)}."]


def _best(found: Results, apart: Sequence[Results]) -> str:
    parts = []
    for test in apart:
        row = next(one for one in found["depths"] if one["weights"] == "pretrained" and _case(one) == _case(test))
        scores = {key: value for key, value in row.items() if key.isdigit()}
        best = max(scores, key=lambda key: scores[key][0])
        parts.append(
            f"{best} for {_case(test)} ({_error(scores[best])}; all {len(scores)}: {_error(scores[str(len(scores))])})"
        )
    return f"The highest mean test score is at depth {_list(parts)}. It is picked after the fact, so it is no estimate."


def _intact(mean: Mapping[str, Results], choices: Sequence[Results]) -> str:
    rows = [row for row in choices if row["criterion"] == "all blocks"]
    lost = [row for row in rows if row["regret"][1] > 0]
    return (
        f"Keeping all blocks loses {_interval(mean['all blocks']['mean_regret'])} to the depth that is best elsewhere, as "
        f"the mean over tasks; the interval is above 0 in {len(lost)} of {len(rows)} cases."
    )


def _simpler(mean: Mapping[str, Results], choices: Sequence[Results]) -> str:
    rows = [row for row in choices if row["criterion"] == "simpler"]
    gained = [row for row in rows if row["gain_on_all_blocks"][1] > 0]
    lower = [row for row in rows if row["gain_on_all_blocks"][2] < 0]
    line = (
        f"SIMPLER keeps {_list(_unique(row['kept'] for row in rows))} blocks, and its verdict is "
        f"{_list(_unique(row['verdict'] for row in rows))}: mean regret {_interval(mean['simpler']['mean_regret'])}. It is "
        f"above all blocks in {len(gained)} of {len(rows)} cases, and below in {len(lower)}."
    )
    half = mean.get("simpler, half where unsettled")
    if half and any(row["verdict"] == "unsettled" for row in rows):
        line += f" With `on_unsettled: half` the mean regret is {_interval(half['mean_regret'])}."
    return line


def _probe(mean: Mapping[str, Results], choices: Sequence[Results]) -> str:
    rows = [row for row in choices if row["criterion"] == "probe"]
    verdicts = [verdict for row in rows for verdict in row["verdict"].split(", ")]
    row = mean["probe"]
    each = _list([f"{WORDS[name]} {_interval(row[name])}" for name in WORDS if name in row])
    gained = [row for row in rows if row["gain_on_all_blocks"][1] > 0]
    counts = _list([f"{verdicts.count(one)} times {one}" for one in _unique(verdicts)])
    return (
        "`probe`, which sees the labels of the training images at hand and of the validation split, has a mean regret "
        f"of {_interval(row['mean_regret'])}: {each}. It is above all blocks in {len(gained)} of {len(rows)} cases. Its "
        f"verdict is {counts}."
    )


def _rules(mean: Mapping[str, Results], differences: Mapping[str, Results]) -> str:
    """The rules of ``probe``, by what they differ in the same seeds and places."""
    best, difference = mean["probe, rule best"]["mean_regret"], differences["probe"]["minus_probe,_rule_best"]
    line = f"With `rule: best` its mean regret is {_interval(best)}; that of the default minus this one is "
    return f"{line}{_interval(difference)}{_told_apart(difference)}."


def _half(mean: Mapping[str, Results], differences: Mapping[str, Results]) -> str:
    """Choices against half of the blocks, which nothing chose."""
    parts = []
    for name, words in (
        ("probe", "`probe`"),
        ("probe, rule best", "`probe` with `rule: best`"),
        ("simpler", "SIMPLER"),
        ("a third", "a third of the blocks"),
    ):
        difference = differences[name]["minus_half"]
        parts.append(f"{words} {_interval(difference)}{_told_apart(difference)}")
    regret = _interval(mean["half"]["mean_regret"])
    return f"Half of the blocks, which nothing chose, has a mean regret of {regret}. Regret minus that one: {_list(parts)}."


def _told_apart(difference: Sequence[float]) -> str:
    return ", not told apart" if difference[1] <= 0 <= difference[2] else ""


def _gaps(mean: Mapping[str, Results], differences: Mapping[str, Results], choices: Sequence[Results]) -> str:
    names = [name for name in ("angular", "block_influence", "cka_intervals") if name in mean]
    parts = [f"`{name}` {_interval(differences[name]['minus_half'])}" for name in names]
    above = [name for name in names if differences[name]["minus_half"][1] > 0]
    line = f"With a budget of half of the blocks, regrets minus that of the first half are {_list(parts)}."
    line += f" {len(above)} of the {len(names)} intervals are above 0."
    clear = [row for row in choices if row["criterion"] in names and row["verdict"] == "clear"]
    if clear:  # without labels a choice is the same for any number of them
        distinct = {(row["criterion"], row["task"]): row for row in clear}
        poor = [row for row in distinct.values() if row["regret"][1] > 0]
        line += f" Of the {len(distinct)} choices with verdict clear, {len(poor)} have a regret whose interval is above 0."
    return line


def _width(choices: Sequence[Results]) -> str:
    parts = []
    for row in {row["criterion"]: row for row in choices if ", width" in row["criterion"]}.values():
        rows = [one for one in choices if one["criterion"] == row["criterion"]]
        higher = [one for one in rows if one["gain_on_all_blocks"][1] > 0]
        lower = [one for one in rows if one["gain_on_all_blocks"][2] < 0]
        parts.append(
            f"a width of {row['criterion'].rpartition(' ')[2]} is below full width in {len(lower)} of {len(rows)} cases and "
            f"above in {len(higher)}"
        )
    return f"With all blocks, {_list(parts)}; the others cannot be told apart."


def finetuned(found: Results) -> list[str]:
    """Of fine-tuning."""
    [test] = found["tests"]
    lines = []
    if "counts" in test:
        matters = "matters" if test["counts"] == "yes" else "does not measurably matter"
        lines.append(
            f"Pretraining {matters} on the validation split: {_error(test['pretrained_minus_random'])} on random weights at "
            "the same depth."
        )
    whole = sorted((row for row in found["rows"] if row["trained"] == "whole"), key=lambda row: row["blocks"])
    *pruned, intact = whole
    lines += _edges(whole, found["runs"])
    gains = _list([f"{row['blocks']} {_interval(row['gain_on_all_blocks'])}" for row in pruned])
    if len(whole) == 2:  # one gain, which the interval tells and the test more cautiously
        gain = _interval(pruned[0]["gain_on_all_blocks"])
        lines.append(
            f"{pruned[0]['blocks']} blocks gain {gain} on all; the F test over these two gives p = {test['p']:.2g}."
        )
    elif test["p"] > LEVEL:
        lines.append(
            f"The depths are not shown to differ (F test, p = {test['p']:.2g}), so they are not ranked. Gains on all "
            f"{intact['blocks']} blocks: {gains}."
        )
    else:
        better = [str(row["blocks"]) for row in pruned if row["gain_on_all_blocks"][1] > 0]
        worse = [str(row["blocks"]) for row in pruned if row["gain_on_all_blocks"][2] < 0]
        line = f"The depths differ (F test, p = {test['p']:.2g}). Gains on all {intact['blocks']} blocks: {gains}."
        line += f" Above all blocks: {_list(better)}." if better else ""
        line += f" Below all blocks: {_list(worse)}." if worse else ""
        lines.append(line)
    for name in _unique(row["trained"] for row in found["rows"] if row["trained"] not in ("whole", "random")):
        parts = [_compared(row) for row in found["rows"] if row["trained"] == name]
        kind, _, target = name.partition(" ")
        lines.append(f"{' '.join([VARIANTS[kind], target]).rstrip()}: {_list(parts)}.")
    lines += _chosen(found["choices"])
    return lines


def _compared(row: Results) -> str:
    """Accuracy of a variant with its gains on all blocks and on the same blocks, trained whole."""
    gain = f"on all blocks {_interval(row['gain_on_all_blocks'])}"
    if row.get("gain_on_same_blocks"):
        gain += f", on the same blocks as they are {_interval(row['gain_on_same_blocks'])}"
    return f"{row['blocks']} blocks {_error(row['test_accuracy'])} (gain {gain})"


def _chosen(choices: Sequence[Results]) -> list[str]:
    """What choices of a depth gain on all blocks after fine-tuning, and on half of them."""
    told = [row for row in choices if row["criterion"] not in ("simpler, half where unsettled", "all blocks")]
    lines = []
    if told:
        parts = [f"{row['criterion']} (keeps {row['kept']}) {_interval(row['gain_on_all_blocks'])}" for row in told]
        lines.append(f"Choices gain on all blocks: {_list(parts)}.")
    if on_half := [row for row in told if row.get("gain_on_half") and row["criterion"] != "half"]:
        parts = [f"{row['criterion']} {_interval(row['gain_on_half'])}{_told_apart(row['gain_on_half'])}" for row in on_half]
        lines.append(f"On half of the blocks: {_list(parts)}.")
    return lines


def _edges(rows: Sequence[Results], runs: Sequence[Results]) -> list[str]:
    """Where the tuning ended at the lowest or highest learning rate."""
    edges = []
    for row in rows:
        tried = [run["learning_rate"] for run in runs if run["trained"] == "whole" and run["blocks"] == row["blocks"]]
        if float(row["learning_rate"]) in (min(tried), max(tried)):
            edges.append(str(row["blocks"]))
    if not edges:
        return []
    return [
        f"The validation split chose the lowest or highest learning rate at depth {_list(edges)}: one beyond may do better."
    ]


def small(found: Results) -> list[str]:
    """Of the small Prithvi."""
    rows = found["rows"]
    parts = []
    for verdict in ("clear", "weak", "unsettled", "no answer", "-"):
        names = [f"`{row['criterion']}`" for row in rows if row["verdict"] == verdict]
        if names:
            parts.append(f"{verdict if verdict != '-' else 'none'}: {_list(names)}")
    free = [row["kept"] for row in rows if row["criterion"] in ("simpler", "knee") and row["kept"] != "-"]
    return [f"Verdicts: {'; '.join(parts)}. Criteria without a budget and without labels keep {_list(free)} of 12 blocks."]


def recovered(found: Results) -> list[str]:
    """Of recovery without labels."""
    lines = []
    for kind, words in (("linear", "A linear map"), ("distill", "Distillation")):
        rows = [row for row in found["rows"] if row["recovery"] == kind]
        parts = [f"{WORDS[row['task']]} to {row['target']} {_interval(row['gain'])}" for row in rows]
        above, below = ([row for row in rows if sign * row["gain"][side] > 0] for sign, side in ((1, 1), (-1, 2)))
        lines.append(
            f"{words} gains on {rows[0]['kept']} blocks without recovery: {_list(parts)}. The interval is above 0 in "
            f"{len(above)} of {len(rows)}, and below 0 in {len(below)}."
        )
    recovered = [row for row in found["rows"] if row["recovery"] != "none"]
    if not any(row["gain"][1] > 0 for row in recovered):
        lines.append("So no recovery is shown to help here.")
    harmed = _unique(
        f"{row['recovery']} to the last block" for row in recovered if row["gain"][2] < 0 and "last" in row["target"]
    )
    if harmed and all("last" in row["target"] for row in recovered if row["gain"][2] < 0):
        lines.append(f"What harms is {_list(harmed)}; no other recovery is shown to.")
    return lines


PARTS: dict[str, Callable[[Results], list[str]]] = {
    "pretrained_vit-cpu": frozen,
    "pretrained_vit_finetune_70-cpu": finetuned,
    "pretrained_vit_finetune_70_longer-cpu": finetuned,
    "pretrained_vit_finetune_700-cpu": finetuned,
    "pretrained_vit_finetune_recovery-cpu": finetuned,
    "pretrained_vit_recovery-cpu": recovered,
    "pretrained_vit_small-cpu": small,
    "pretrained_vit_swapped-cpu": frozen,
}


def sentences(name: str, found: Results) -> str:
    """A list of all that is said of the results in a file, by its name without ending."""
    return "\n".join(f"- {line}" for line in PARTS[name](found)) + "\n"


def _case(row: Results) -> str:
    return f"{WORDS[row['task']]} with {row['labelled']} labelled images"


def _error(value: Sequence[float]) -> str:
    return f"{value[0]:.3f} ± {value[1]:.3f}"


def _interval(value: Sequence[float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*value)


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[1] <= other[2] and other[1] <= one[2]


def _unique(values: Any) -> list[str]:
    return list(dict.fromkeys(values))


def _list(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
