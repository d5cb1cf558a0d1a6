"""What is kept of an encoder and why: :class:`SlimmingPlan`, its file format, what block numbers and widths mean."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from terratorch_simpler.errors import DepthError, PlanError
from terratorch_simpler.files import atomic_write
from terratorch_simpler.indices import LARGEST_DEPTH, is_width, resolve_keep, spans_between
from terratorch_simpler.pruning.recovery import RecoveryWeights, load_maps, save_maps

FORMAT = "terratorch-simpler/plan"
VERSION = 1
LARGEST_FILE = 16 * 2**20
"""Bytes; the plan of an encoder with 64 blocks has a hundred thousand."""
LARGEST_NUMBER = 1e300
LARGEST_INTEGER = 2**63 - 1
MOST_RULES = 64
LONGEST_NAME = 100
RECOVERIES = ("none", "linear")


@dataclass(frozen=True)
class SlimmingPlan:
    """What to keep of an encoder, and everything the choice was made from.

    Attributes:
        backbone: Name of the intact encoder in TerraTorch's registry.
        full_num_blocks: Blocks L of the intact encoder.
        kept_blocks: Kept blocks, 0-based, ascending.
        criterion: ``name`` and ``args`` of the rule.
        width: Kept share of the units of every attention head and MLP; 1.0 is all of them.
        recovery: How the cut was repaired; "none" or "linear".
        scores: Score of every judged depth.
        similarity: Similarity S of the intact encoder's blocks, L x L.
        votes: Share of bootstrap resamples won by each depth; None with too few groups of tiles.
        tiles_seen: Tiles the similarity was measured on.
        rows_seen: Rows of tokens drawn from them.
        parameters: Parameters of the encoder, ``before`` and ``after``.
        macs: Multiply-accumulate operations of the encoder for one tile, ``before`` and ``after``.
        data: What was streamed, with a fingerprint.
        versions: Package versions.
        overview: What was not chosen. ``criteria``: by name of rule its ``kept_blocks`` and ``scores`` (by depth, or
            None) on the same statistics. ``depths``: by number of first blocks kept the ``parameters``, ``macs`` (or None),
            ``similarity`` of the last kept block with the last one, and ``recovery_r2`` (or None). ``repaired``, where
            recovery is linear: [state before, state after, share of variance explained] of each dropped range.
        maps: The linear maps by the state before the range they stand for (0 is the input of the first block, l the output
            of block l), where recovery is linear; in a file of their own beside plan.json.
    """

    backbone: str
    full_num_blocks: int
    kept_blocks: tuple[int, ...]
    criterion: Mapping[str, Any]
    width: float = 1.0
    recovery: str = "none"
    scores: Mapping[int, float] | None = None
    similarity: Sequence[Sequence[float]] | None = None
    votes: Mapping[int, float] | None = None
    tiles_seen: int = 0
    rows_seen: int = 0
    parameters: Mapping[str, int] | None = None
    macs: Mapping[str, int] | None = None
    data: Mapping[str, Any] | None = None
    versions: Mapping[str, str] | None = None
    overview: Mapping[str, Any] | None = None
    maps: Mapping[int, RecoveryWeights] | None = field(default=None, repr=False, compare=False)

    def check_encoder(self, backbone: str, num_blocks: int) -> None:
        """Raise unless the plan was made for this encoder.

        Args:
            backbone: Name of the encoder at hand.
            num_blocks: Its number of blocks when intact.

        Raises:
            PlanError: If name or depth differ.
        """
        if (self.backbone, self.full_num_blocks) != (backbone, num_blocks):
            msg = (
                f"Found a plan for backbone '{self.backbone}' with full_num_blocks {self.full_num_blocks}, expected "
                f"'{backbone}' with {num_blocks}: make a plan for this encoder."
            )
            raise PlanError(msg)

    def to_json(self) -> str:
        """The content of plan.json."""
        content = {"format": FORMAT, "version": VERSION, **{field.name: getattr(self, field.name) for field in fields(self)}}
        del content["maps"]
        if self.overview is None:
            del content["overview"]  # as in plans made before there was one
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON, whole or not at all, and the maps of a linear recovery beside it.

        Args:
            path: File to write; missing folders are made.

        Returns:
            The path.
        """
        text = self.to_json()
        if self.maps is not None:  # first, since they are looked for when there is a plan
            save_maps(self.maps, _maps_file(path), text)
        with atomic_write(path) as part:
            part.write_text(text, encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SlimmingPlan:
        """Read a plan and check every key, and the maps of a linear recovery beside it.

        Args:
            path: A plan.json.

        Raises:
            PlanError: If the file cannot be read, is of another version, or a key is missing, unknown or wrong.
        """
        try:
            with Path(path).open("rb") as file:
                content = file.read(LARGEST_FILE + 1)
            if len(content) > LARGEST_FILE:
                raise ValueError(f"larger than {LARGEST_FILE:,} bytes")
            raw = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
        except (OSError, ValueError, RecursionError) as err:
            msg = f"Found no readable plan at {path} ({err}), expected the plan.json of an earlier run: check the path."
            raise PlanError(msg) from err
        plan = cls.from_dict(raw, source=str(path))
        if plan.recovery == "none":
            return plan
        befores = [before for before, _ in spans_between(plan.kept_blocks, plan.full_num_blocks)]
        return replace(plan, maps=load_maps(_maps_file(path), content.decode("utf-8"), befores))

    @classmethod
    def from_dict(cls, raw: object, source: str = "plan") -> SlimmingPlan:
        """Build a plan from the parsed JSON of a plan file.

        Args:
            raw: Parsed JSON.
            source: Where it came from, for messages.

        Raises:
            PlanError: If it is of another version, or a key is missing, unknown or wrong.
        """
        check = _Check(source)
        if not isinstance(raw, dict):
            raise check.error("format", raw, f"an object with format '{FORMAT}'")
        values: dict[str, Any] = {"overview": None, **raw}
        if values.pop("format", None) != FORMAT:
            raise check.error("format", raw.get("format"), f"'{FORMAT}'")
        if (version := values.pop("version", None)) != VERSION or isinstance(version, bool):
            raise check.error("version", version, f"{VERSION}, the version this package reads")
        known = {field.name for field in fields(cls)} - {"maps"}
        if unknown := sorted(map(str, values.keys() - known)):
            raise check.error(unknown[0], values[unknown[0]], "no such key")
        if missing := sorted(known - values.keys()):
            raise check.error(missing[0], None, "a value")
        return cls(**check.values(values))


def _maps_file(plan: str | os.PathLike[str]) -> Path:
    return Path(plan).with_suffix(".recovery.pt")


def _refuse_constant(name: str) -> NoReturn:
    msg = f"the number {name}"
    raise ValueError(msg)


class _Check:
    """Checks the values of a plan file, key by key."""

    def __init__(self, source: str) -> None:
        self.source = source

    def error(self, key: str, found: object, expected: str) -> PlanError:
        shown = repr(found)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return PlanError(f"Found {shown} for key '{key}' in {self.source}, expected {expected}: make the plan again.")

    def values(self, raw: dict[str, Any]) -> dict[str, Any]:
        blocks = self.integer(raw, "full_num_blocks", minimum=1)
        if blocks > LARGEST_DEPTH:
            raise self.error("full_num_blocks", blocks, f"at most {LARGEST_DEPTH}")
        return {
            "backbone": self.instance(raw, "backbone", str),
            "full_num_blocks": blocks,
            "kept_blocks": self.kept_blocks(raw, blocks),
            "criterion": self.criterion(raw),
            "width": self.width(raw),
            "recovery": self.recovery(raw),
            "scores": self.by_depth(raw["scores"], "scores", blocks),
            "similarity": self.similarity(raw, blocks),
            "votes": self.by_depth(raw["votes"], "votes", blocks),
            "tiles_seen": self.integer(raw, "tiles_seen"),
            "rows_seen": self.integer(raw, "rows_seen"),
            "parameters": self.before_after(raw, "parameters"),
            "macs": self.before_after(raw, "macs"),
            "data": None if raw["data"] is None else self.instance(raw, "data", dict),
            "versions": None if raw["versions"] is None else self.instance(raw, "versions", dict),
            "overview": self.overview(raw, blocks),
        }

    def instance(self, raw: dict[str, Any], key: str, kind: type) -> Any:
        if not isinstance(raw[key], kind):
            raise self.error(key, raw[key], f"a {kind.__name__}")
        return raw[key]

    def integer(self, raw: dict[str, Any], key: str, minimum: int = 0) -> int:
        value = raw[key]
        if not _is_count(value) or value < minimum:
            raise self.error(key, value, f"an integer of at least {minimum}")
        return value  # type: ignore[no-any-return]

    def recovery(self, raw: dict[str, Any]) -> str:
        value = raw["recovery"]
        if value not in RECOVERIES:
            raise self.error("recovery", value, f"one of {', '.join(RECOVERIES)}")
        return str(value)

    def width(self, raw: dict[str, Any]) -> float:
        if not is_width(raw["width"]):
            raise self.error("width", raw["width"], "a number above 0 and at most 1")
        return float(raw["width"])

    def kept_blocks(self, raw: dict[str, Any], num_blocks: int, key: str = "kept_blocks") -> tuple[int, ...]:
        value = raw["kept_blocks"]
        if not isinstance(value, list):
            raise self.error(key, value, "a list")
        try:
            kept = resolve_keep(value, num_blocks)
        except DepthError as err:
            raise self.error(key, value, f"distinct block numbers from 0 to {num_blocks - 1}") from err
        if list(kept) != value:
            raise self.error(key, value, "block numbers in ascending order")
        return kept

    def criterion(self, raw: dict[str, Any]) -> dict[str, Any]:
        value = self.instance(raw, "criterion", dict)
        if not isinstance(value.get("name"), str) or not isinstance(value.get("args"), dict):
            raise self.error("criterion", value, "an object with 'name' and 'args'")
        return {"name": value["name"], "args": value["args"]}

    def by_depth(self, value: Any, key: str, num_blocks: int) -> dict[int, float] | None:
        if value is None:
            return None
        valid = {str(depth) for depth in range(1, num_blocks + 1)}
        if not isinstance(value, dict) or not all(k in valid and _is_number(v) for k, v in value.items()):
            raise self.error(key, value, f"numbers by depth from 1 to {num_blocks}")
        return {int(depth): float(number) for depth, number in value.items()}

    def similarity(self, raw: dict[str, Any], num_blocks: int) -> list[list[float]] | None:
        value = raw["similarity"]
        if value is None:
            return None
        square = isinstance(value, list) and len(value) == num_blocks
        if not square or not all(
            isinstance(row, list) and len(row) == num_blocks and all(map(_is_number, row)) for row in value
        ):
            raise self.error("similarity", value, f"a {num_blocks} x {num_blocks} matrix of numbers")
        return [[float(number) for number in row] for row in value]

    def before_after(self, raw: dict[str, Any], key: str) -> dict[str, int] | None:
        value = raw[key]
        if value is None:
            return None
        if not isinstance(value, dict) or set(value) != {"before", "after"}:
            raise self.error(key, value, "an object with 'before' and 'after'")
        if not all(map(_is_count, value.values())):
            raise self.error(key, value, "integers of at least 0")
        return value

    def overview(self, raw: dict[str, Any], num_blocks: int) -> dict[str, Any] | None:
        value = raw["overview"]
        if value is None:
            return None
        expected = "an object with 'criteria' and 'depths'"
        if not isinstance(value, dict) or set(value) - {"repaired"} != {"criteria", "depths"}:
            raise self.error("overview", value, expected)
        criteria, depths = value["criteria"], value["depths"]
        if not isinstance(criteria, dict) or not isinstance(depths, dict):
            raise self.error("overview", value, expected)
        if len(criteria) > MOST_RULES or any(len(name) > LONGEST_NAME for name in criteria):
            most = f"at most {MOST_RULES} criteria with names of at most {LONGEST_NAME} letters"
            raise self.error("overview", sorted(criteria), most)
        return {
            "criteria": {name: self.judged(rule, num_blocks) for name, rule in criteria.items()},
            "depths": self.costs(depths, num_blocks),
            **({"repaired": self.repaired(value["repaired"], num_blocks)} if "repaired" in value else {}),
        }

    def repaired(self, ranges: Any, num_blocks: int) -> list[list[Any]]:
        right = isinstance(ranges, list) and all(
            isinstance(one, list) and len(one) == 3 and all(map(_is_count, one[:2])) and _is_number(one[2]) for one in ranges
        )
        if not right or not all(0 <= before < after <= num_blocks for before, after, _ in ranges):
            raise self.error("overview", ranges, "lists of state before, state after and a number as 'repaired'")
        return [list(one) for one in ranges]

    def judged(self, rule: Any, num_blocks: int) -> dict[str, Any]:
        if not isinstance(rule, dict) or set(rule) != {"kept_blocks", "scores"}:
            raise self.error("overview", rule, "an object with 'kept_blocks' and 'scores' for every criterion")
        return {
            "kept_blocks": list(self.kept_blocks(rule, num_blocks, "overview")),
            "scores": self.by_depth(rule["scores"], "overview", num_blocks),
        }

    def costs(self, depths: dict[str, Any], num_blocks: int) -> dict[int, dict[str, Any]]:
        if not depths.keys() <= {str(depth) for depth in range(1, num_blocks + 1)}:
            raise self.error("overview", depths, f"depths from 1 to {num_blocks}")
        checks: dict[str, Callable[[object], bool]] = {
            "parameters": _is_count,
            "macs": lambda value: value is None or _is_count(value),
            "similarity": _is_number,
            "recovery_r2": lambda value: value is None or _is_number(value),
        }
        for cost in depths.values():
            if not isinstance(cost, dict) or cost.keys() != checks.keys():
                raise self.error("overview", cost, f"an object with {', '.join(checks)} for every depth")
            if wrong := [key for key, right in checks.items() if not right(cost[key])]:
                raise self.error("overview", cost, f"a number as '{wrong[0]}'")
        return {int(depth): dict(cost) for depth, cost in depths.items()}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_INTEGER


def _is_number(value: object) -> bool:
    """Whether it is a finite number; JSON can write some that are not, such as 1e999."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER
