"""What is kept of an encoder and why: :class:`SlimmingPlan` and plan.json, its file format, checked by pydantic."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NoReturn, NotRequired

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    SkipValidation,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    with_config,
)
from typing_extensions import TypedDict  # pydantic refuses that of typing before Python 3.12

from terratorch_simpler.errors import PlanError
from terratorch_simpler.files import atomic_write
from terratorch_simpler.indices import LARGEST_DEPTH, Span, spans_between

if TYPE_CHECKING:
    from torch import Tensor

    from terratorch_simpler.pruning.recovery import RecoveryWeights
else:  # pydantic looks the names up, and checks neither; a plan without recovery is read without PyTorch
    RecoveryWeights = Tensor = Any

FORMAT = "terratorch-simpler/plan"
VERSION = 1
PLAN_FILE = "plan.json"
LARGEST_FILE = 16 * 2**20
"""Bytes; the plan of an encoder with 64 blocks has a hundred thousand."""
LARGEST_NUMBER = 1e300
LARGEST_INTEGER = 2**63 - 1
MIN_GROUP_TILES = 32
"""Fewest tiles of a group; fewer usable tiles in all are an error."""
MIN_BOOTSTRAP_GROUPS = 4
"""With fewer groups than this, a bootstrap over groups says nothing."""
RECOVERIES = ("none", "linear", "distill")


def _within_depth(number: int, info: ValidationInfo[int]) -> int:
    if number > info.context:
        raise ValueError(f"Input should be at most {info.context}, the number of blocks")
    return number


def _within_depth_or_none(number: int | None, info: ValidationInfo[int]) -> int | None:
    return None if number is None else _within_depth(number, info)


def _block_numbers(blocks: Sequence[int], info: ValidationInfo[int]) -> Sequence[int]:
    if not blocks or list(blocks) != sorted(set(blocks)) or blocks[-1] >= info.context:
        raise ValueError(f"Input should be distinct block numbers from 0 to {info.context - 1} in ascending order")
    return blocks


def _square(matrix: Sequence[Sequence[float]], info: ValidationInfo[int]) -> Sequence[Sequence[float]]:
    if {len(matrix), *map(len, matrix)} != {info.context}:
        raise ValueError(f"Input should be a {info.context} x {info.context} matrix")
    return matrix


def _ascending(states: tuple[int, int, float]) -> list[float]:
    if states[0] >= states[1]:
        raise ValueError("Input should be a state, a later state and a number")
    return list(states)


# Numbers are strict: true, "4" and 4.0 are no counts. JSON writes the keys of objects as text, so depths are not.
# The validation context is the number of blocks of the intact encoder.
Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST_INTEGER)]
Number = Annotated[float, Field(strict=True, ge=-LARGEST_NUMBER, le=LARGEST_NUMBER, allow_inf_nan=False)]
Depth = Annotated[int, Field(ge=1), AfterValidator(_within_depth)]
State = Annotated[Count, AfterValidator(_within_depth)]
ByDepth = Mapping[Depth, Number]
Level = Literal["clear", "weak", "unsettled"]


class CriterionUsed(TypedDict):
    """The criterion that has chosen, and its arguments."""

    name: str
    args: dict[str, Any]


@with_config(extra="forbid")
class BeforeAndAfter(TypedDict):
    """A cost of the encoder before and after pruning."""

    before: Count
    after: Count


@with_config(extra="forbid")
class VerdictFields(TypedDict):
    """A verdict in plan.json."""

    level: Level
    reasons: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=64)]


@with_config(extra="forbid")
class Alternative(TypedDict):
    """What another criterion keeps."""

    kept_blocks: Annotated[list[Count], AfterValidator(_block_numbers)]
    scores: ByDepth | None
    verdict: NotRequired[VerdictFields]


@with_config(extra="forbid")
class CostOfDepth(TypedDict):
    """What an encoder of the first blocks costs and keeps."""

    parameters: Count
    macs: Count | None
    similarity: Number | None
    recovery_r2: Number | None


@with_config(extra="forbid")
class Probed(TypedDict):
    """Scores of the probe at every depth, where the criterion is probe."""

    metric: Annotated[str, Field(max_length=100)]
    judged_on: Annotated[str, Field(max_length=100)]
    groups: Count
    errors: ByDepth
    baseline: Number
    best_depth: Depth
    intact: Number


@with_config(extra="forbid")
class Distillation(TypedDict):
    """What a distillation has trained on, and how much of its target the pruned encoder explains."""

    steps: Count
    tiles: Count
    held_out: Count
    explained_before: Number
    explained_after: Number


@with_config(extra="forbid")
class ProbedSet(Probed):
    """The same of one of several label sets, with the depth that it asks for."""

    depth: Depth
    level: Level
    scores: ByDepth


@with_config(extra="forbid")
class Overview(TypedDict):
    """What was not chosen."""

    criteria: Annotated[dict[Annotated[str, Field(max_length=100)], Alternative], Field(max_length=64)]
    depths: dict[Depth, CostOfDepth]
    no_answer: NotRequired[dict[Annotated[str, Field(max_length=100)], Annotated[str, Field(max_length=1000)]]]
    probe: NotRequired[Probed]
    distilled: NotRequired[Distillation]
    label_sets: NotRequired[Annotated[dict[Annotated[str, Field(max_length=100)], ProbedSet], Field(max_length=16)]]
    repaired: NotRequired[list[Annotated[tuple[State, State, Number], AfterValidator(_ascending)]]]


@dataclass(frozen=True)
class Verdict:
    """How reliable a choice is: ``str(verdict)`` reads like "clear: 7 of 12 blocks".

    Attributes:
        level: How sure it is.
        reasons: Sentences with their figures, the weightiest first.
        depth: Number of blocks that the plan keeps; set by the plan.
        num_blocks: Blocks of the intact encoder; set by the plan.
    """

    level: Level
    reasons: tuple[str, ...] = ()
    depth: int | None = None
    num_blocks: int | None = None

    def __str__(self) -> str:
        return self.level if self.depth is None else f"{self.level}: {self.depth} of {self.num_blocks} blocks"

    def doubted(self, doubts: Sequence[str]) -> Verdict:
        """The same with further reasons, for each of which a clear verdict becomes weak."""
        if not doubts:
            return self
        if self.level != "clear":
            return replace(self, reasons=(*self.reasons, *doubts))
        return replace(self, level="weak", reasons=(*doubts, *self.reasons))

    def as_plain(self) -> VerdictFields:
        """What plan.json holds."""
        return {"level": self.level, "reasons": list(self.reasons)}

    @classmethod
    def from_plain(cls, fields: VerdictFields | Verdict | None) -> Verdict | None:
        """The verdict of a plan.json."""
        return cls(fields["level"], tuple(fields["reasons"])) if isinstance(fields, dict) else fields


def _checked_as(schema: Any) -> GetPydanticSchema:
    return GetPydanticSchema(lambda _, handler: handler.generate_schema(schema))


@dataclass(frozen=True)
class SlimmingPlan:
    """What to keep of an encoder, and everything the choice was made from.

    Attributes:
        backbone: Name of the intact encoder in TerraTorch's registry.
        full_num_blocks: Blocks L of the intact encoder.
        kept_blocks: Kept blocks, 0-based, ascending.
        criterion: ``name`` and ``args`` of the criterion.
        width: Kept share of the units of every attention head and MLP; 1.0 is all of them.
        recovery: What makes up for dropped blocks: "none", "linear" or "distill".
        recovery_target: Number of blocks of the intact encoder whose output the recovery is for; None for all of them.
        scores: Score of every depth that the criterion can judge; of several label sets, for the one that asks for most
            blocks.
        similarity: Similarity S of the intact encoder's blocks, L x L.
        votes: Share of bootstrap resamples that choose each depth; None with too few groups of tiles, for criteria with
            labels and for ``fixed``.
        tiles_seen: Tiles the similarity was measured on.
        rows_seen: Rows of tokens drawn from them.
        parameters: Parameters of the encoder, ``before`` and ``after``.
        macs: Multiply-accumulate operations of the encoder for one tile, ``before`` and ``after``.
        data: What was streamed, with a fingerprint.
        versions: Package versions.
        overview: What was not chosen. ``criteria``: by name its ``kept_blocks`` and ``scores`` (by depth, or None) on the
            same statistics, and for ``simpler`` its ``verdict`` where the criterion is probe. ``depths``: by number of first
            blocks kept the ``parameters``, ``macs`` (or None), ``similarity`` of the last kept block with the last one (or
            None), and ``recovery_r2`` (or None). ``no_answer``: by name of a criterion that has none, why. ``repaired``,
            where recovery is linear: [state before, state after, share of variance explained] of each dropped range.
            ``distilled``, where recovery is distill: ``steps``, ``tiles`` trained on, tiles ``held_out``, and the share of
            the target's variance on these that the pruned encoder ``explained_before`` and ``explained_after``. ``probe``,
            where that is the criterion: ``metric``; what it was ``judged_on``, "validation" or "cross-validation", with how
            many ``groups``; standard ``errors`` of the scores by depth; the ``baseline``, a constant prediction;
            ``best_depth``; and the score of the ``intact`` encoder. ``label_sets``, in its place where labels came by name:
            the same of each, with its ``scores``, the ``depth`` that it asks for and the ``level`` of its verdict.
        verdict: How reliable the choice is, and why; None if the depth was given by hand or only one was allowed, and in
            plans of earlier versions.
        maps: The linear maps by the state before the range they stand for (0 is the input of the first block, l the output
            of block l), where recovery is linear; in a file of their own beside plan.json.
        weights: The trained weights of the pruned encoder, by name, where recovery is distill; in that file as well.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    backbone: str
    full_num_blocks: Annotated[int, Field(strict=True, ge=1, le=LARGEST_DEPTH)]
    kept_blocks: Annotated[tuple[Count, ...], AfterValidator(_block_numbers)]
    criterion: Annotated[Mapping[str, Any], _checked_as(CriterionUsed)]
    width: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    recovery: Annotated[str, Field(pattern=f"^({'|'.join(RECOVERIES)})$")] = "none"
    scores: ByDepth | None = None
    similarity: Annotated[Sequence[Sequence[Number]], AfterValidator(_square)] | None = None
    votes: ByDepth | None = None
    tiles_seen: Count = 0
    rows_seen: Count = 0
    parameters: Annotated[Mapping[str, int], _checked_as(BeforeAndAfter)] | None = None
    macs: Annotated[Mapping[str, int], _checked_as(BeforeAndAfter)] | None = None
    data: Mapping[str, Any] | None = None
    versions: Mapping[str, Any] | None = None
    overview: Annotated[Mapping[str, Any], _checked_as(Overview)] | None = None
    verdict: Annotated[Verdict | None, _checked_as(VerdictFields | None), AfterValidator(Verdict.from_plain)] = None
    recovery_target: Annotated[int | None, Field(strict=True, ge=1), AfterValidator(_within_depth_or_none)] = None
    maps: SkipValidation[Mapping[int, RecoveryWeights] | None] = field(default=None, repr=False, compare=False)
    weights: SkipValidation[Mapping[str, Tensor] | None] = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.verdict is not None:
            verdict = replace(self.verdict, depth=self.depth, num_blocks=self.full_num_blocks)
            object.__setattr__(self, "verdict", verdict)

    @property
    def depth(self) -> int:
        """Number of kept blocks."""
        return len(self.kept_blocks)

    @property
    def recovered_spans(self) -> list[Span]:
        """Ranges of blocks that linear maps stand for."""
        return spans_between(self.kept_blocks, self.recovery_target or self.full_num_blocks)

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
        del content["maps"], content["weights"], content["verdict"]
        if self.recovery_target is None:
            del content["recovery_target"]
        if self.overview is None:
            del content["overview"]  # as in plans made before there was one
        if self.verdict is not None:
            content["verdict"] = self.verdict.as_plain()
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON, atomically, and the maps or weights of a recovery beside it.

        Args:
            path: File to write; missing folders are made.

        Returns:
            The path.
        """
        text = self.to_json()
        if self.maps is not None or self.weights is not None:  # first, since they are looked for when there is a plan
            from terratorch_simpler.pruning.recovery import save_maps, save_weights

            if self.maps is not None:
                save_maps(self.maps, _recovery_file(path), text)
            if self.weights is not None:
                save_weights(self.weights, _recovery_file(path), text)
        with atomic_write(path) as part:
            part.write_text(text, encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SlimmingPlan:
        """Read a plan and check every key, and the maps or weights of a recovery beside it.

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
            msg = f"There is no readable plan at {path} ({err}), expected the plan.json of an earlier run: check the path."
            raise PlanError(msg) from err
        plan = cls.from_dict(raw, source=str(path))
        if plan.recovery == "none":
            return plan
        from terratorch_simpler.pruning.recovery import load_maps, load_weights

        text = content.decode("utf-8")
        if plan.recovery == "distill":
            return replace(plan, weights=load_weights(_recovery_file(path), text))
        befores = [before for before, _ in plan.recovered_spans]
        return replace(plan, maps=load_maps(_recovery_file(path), text, befores))

    @classmethod
    def from_dict(cls, raw: object, source: str = "plan") -> SlimmingPlan:
        """Build a plan from the parsed JSON of a plan file.

        Args:
            raw: Parsed JSON.
            source: Where it came from, for messages.

        Raises:
            PlanError: If it is of another version, or a key is missing, unknown or wrong.
        """
        content: dict[str, Any] = {**_ADDED_LATER, **raw} if isinstance(raw, dict) else {"format": raw}
        if (found := content.pop("format", None)) != FORMAT:
            raise _wrong_key("format", found, f"Input should be '{FORMAT}'", source)
        if (version := content.pop("version", None)) != VERSION or isinstance(version, bool):
            raise _wrong_key("version", version, f"Input should be {VERSION}, the version this package reads", source)
        known = {field.name for field in fields(cls)} - {"maps", "weights"}
        if different := sorted(map(str, known ^ content.keys())):  # pydantic would fill in what is missing
            key = different[0]
            raise _wrong_key(key, content.get(key), "Field required" if key in known else "Unknown key", source)
        blocks = content["full_num_blocks"]
        try:
            # A number of blocks that is wrong itself is the first error of all.
            return _SCHEMA.validate_python(content, context=blocks if type(blocks) is int else 0)
        except ValidationError as err:
            first = err.errors(include_url=False, include_context=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise _wrong_key(key, first["input"], first["msg"].removeprefix("Value error, "), source) from err


def format_score(value: float) -> str:
    """A score with three decimals, as everywhere that one is shown; with one digit if it is smaller, or as 1e+300.

    Args:
        value: A score or its standard error.

    Example:
        >>> format_score(0.85), format_score(0.0), format_score(0.0004), format_score(-3e7)
        ('0.850', '0.000', '0.0004', '-3e+07')
    """
    size = abs(value)
    if size == 0 or 0.0005 <= size < 1e4:
        return f"{value:.3f}"
    return f"{value:.1g}" if size < 1 else f"{value:.3g}"


_SCHEMA = TypeAdapter(SlimmingPlan)
_ADDED_LATER = {"overview": None, "verdict": None, "recovery_target": None}


def package_versions() -> dict[str, str]:
    """Versions of the packages that a plan or an export depends on."""
    from terratorch_simpler import __version__  # which imports this module

    others = {package: metadata.version(package) for package in ("terratorch", "torch", "lightning")}
    # Not metadata.version() for our own: a source tree that is only on the path has no metadata.
    return {"python": platform.python_version(), "terratorch_simpler": __version__, **others}


def _wrong_key(key: str, found: object, problem: str, source: str) -> PlanError:
    shown = repr(found)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return PlanError(f"Found {shown} for key '{key}' in {source}. {problem}: make the plan again.")


def _recovery_file(plan: str | os.PathLike[str]) -> Path:
    return Path(plan).with_suffix(".recovery.pt")


def _refuse_constant(name: str) -> NoReturn:
    msg = f"the number {name}"
    raise ValueError(msg)
