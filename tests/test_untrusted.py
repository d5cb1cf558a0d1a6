"""Plans and checkpoints from strangers: a typed error or what they say, never a wrong cut, never code."""

import json
import pickle
import zipfile
from io import StringIO

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from terratorch_simpler import SlimmingPlan
from terratorch_simpler import plan as plan_module
from terratorch_simpler.errors import CheckpointError, DepthError, PlanError
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.models.checkpoint import read_checkpoint, read_pruned_state
from terratorch_simpler.models.state import PrunedState
from terratorch_simpler.report import full_table, report_page
from tests.checkpoints import as_buffers, changed, said

BLOCKS = 4
PLAN = SlimmingPlan(
    backbone="small",
    full_num_blocks=BLOCKS,
    kept_blocks=(0, 1),
    criterion={"name": "simpler", "args": {}},
    scores={2: 0.25},
    similarity=[[1.0] * BLOCKS] * BLOCKS,
    votes={2: 1.0},
    tiles_seen=64,
    rows_seen=1024,
    parameters={"before": 100, "after": 60},
    macs={"before": 1000, "after": 600},
    data={"source": "GeoTiffTiles", "fingerprint": "abc"},
    versions={"torch": "2"},
    overview={
        "criteria": {
            "simpler": {"kept_blocks": [0, 1], "scores": {2: 0.5}},
            "block_influence": {"kept_blocks": [0, 3], "scores": None},
        },
        "depths": {
            depth: {"parameters": 25 * depth, "macs": 250 * depth, "similarity": 0.75, "recovery_r2": None}
            for depth in range(1, BLOCKS + 1)
        },
    },
)

NUMBERS = st.integers() | st.integers(-3, 8) | st.floats() | st.sampled_from([1e308, -0.0, 10**400, 2**63])
PLAIN = st.none() | st.booleans() | NUMBERS | st.text(max_size=20)
ANY = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
many = settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def small():
    from terratorch.registry import BACKBONE_REGISTRY

    def build() -> SimplerBackbone:
        torch.manual_seed(0)
        encoder = BACKBONE_REGISTRY.build("prithvi_eo_tiny", pretrained=False, embed_dim=48, num_heads=3, depth=BLOCKS)
        return SimplerBackbone(encoder, name="small")

    return build


def places(value, path=()):
    """Every place inside of nested lists and dictionaries."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def load(files, content: bytes) -> SlimmingPlan | None:
    (files / "plan.json").write_bytes(content)
    try:
        return SlimmingPlan.load(files / "plan.json")
    except PlanError:
        return None


def sound(plan: SlimmingPlan) -> bool:
    blocks = plan.full_num_blocks
    kept = list(plan.kept_blocks)
    overview = plan.overview or {"criteria": {}, "depths": {}}
    rules, costs = overview["criteria"].values(), overview["depths"].values()
    numbers = [
        *(number for rule in rules for number in (rule["scores"] or {}).values()),
        *(float(cost["parameters"]) for cost in costs),
        *(cost["similarity"] for cost in costs if cost["similarity"] is not None),
        *(plan.scores or {}).values(),
        *(plan.votes or {}).values(),
        *(n for row in plan.similarity or [] for n in row),
    ]
    return (
        0 < blocks <= 1024
        and kept == sorted(set(kept))
        and set(kept) <= set(range(blocks))
        and all(rule["kept_blocks"] and set(rule["kept_blocks"]) <= set(range(blocks)) for rule in rules)
        and set(overview["depths"]) <= set(range(1, blocks + 1))
        and 0 < plan.width <= 1
        and all(isinstance(number, float) and abs(number) < float("inf") for number in numbers)
    )


@many
@given(data=st.data())
def test_plan_with_anything_anywhere(files, small, data):
    raw = json.loads(PLAN.save(files / "whole.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        raw = replaced(raw, data.draw(st.sampled_from(sorted(places(raw), key=str))), data.draw(ANY))
    plan = load(files, json.dumps(raw).encode())
    if plan is None:
        return
    assert sound(plan)
    assert SlimmingPlan.load(plan.save(files / "again.json")) == plan
    assert report_page(plan).encode("utf-8")
    Console(file=StringIO()).print(full_table(plan))
    backbone = _once(small)
    try:
        plan.check_encoder(backbone.name, backbone.full_num_blocks)
    except PlanError:
        return
    assert plan.full_num_blocks == BLOCKS


_built = []


def _once(small):
    if not _built:
        _built.append(small())
    return _built[0]


@many
@given(data=st.data())
def test_plan_with_other_bytes(files, data):
    whole = PLAN.save(files / "whole.json").read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 20)))
    plan = load(files, whole[:start] + data.draw(st.binary(max_size=10)) + whole[end:])
    assert plan is None or sound(plan)


@settings(max_examples=500, deadline=None)
@given(content=st.binary(max_size=300))
def test_anything_for_a_plan(tmp_path_factory, content):
    assert load(tmp_path_factory.getbasetemp(), content) is None


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format": "terratorch-simpler/plan", "version": 1' + b"0" * 5000 + b"}",
        pickle.dumps({"a": 1}),
    ],
    ids=["deep lists", "deep objects", "long number", "pickle"],
)
def test_hostile_plans(files, content):
    assert load(files, content) is None


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"NaN", b"Infinity"])
def test_numbers_that_are_not_finite(files, number):
    whole = PLAN.save(files / "whole.json").read_bytes()
    assert whole.count(b"0.25") == 1
    assert load(files, whole.replace(b"0.25", number)) is None


def test_large_plans_are_not_read(files, monkeypatch):
    monkeypatch.setattr(plan_module, "LARGEST_FILE", 100)
    with pytest.raises(PlanError, match="larger than 100 bytes"):
        SlimmingPlan.load(PLAN.save(files / "large.json"))


@many
@given(data=st.data())
def test_blocks_that_a_plan_keeps_are_the_blocks_that_are_kept(small, data):
    kept = data.draw(st.lists(st.integers(-1, BLOCKS), max_size=5))
    in_another_file = {"maps", "weights"}
    written = {key: value for key, value in vars(PLAN).items() if key not in in_another_file}
    raw = {**json.loads(json.dumps(written)), "kept_blocks": kept, "format": plan_module.FORMAT, "version": 1}
    backbone = _once(small)
    try:
        plan = SlimmingPlan.from_dict(raw)
    except PlanError:
        assert kept != sorted(set(kept)) or not kept or not set(kept) <= set(range(BLOCKS))
        return
    try:
        backbone.match_checkpoint(PrunedState(tuple(range(BLOCKS)), BLOCKS))
        backbone.slim(plan)
    except DepthError:
        pytest.fail("a plan that was read did not fit")
    assert list(backbone.kept) == kept == said(backbone.state_dict()["_extra_state"])["kept_blocks"]
    assert len(backbone.blocks) == len(kept)


# --- checkpoints


@pytest.fixture(scope="module")
def checkpoint(files, small):
    backbone = small()
    backbone.prune_depth([0, 2])
    weights = {f"model.encoder.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 1, "global_step": 3}, files / "whole.ckpt")
    return files / "whole.ckpt"


def parse_state(path):
    try:
        return read_pruned_state(path, None)
    except CheckpointError:
        return None


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_checkpoint_cut_off_anywhere(files, checkpoint, data):
    whole = checkpoint.read_bytes()
    (files / "cut.ckpt").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert parse_state(files / "cut.ckpt") is None


def flip(content: bytes, at: int, bits: int) -> bytes:
    return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_checkpoint_with_other_bytes(files, checkpoint, data):
    whole = checkpoint.read_bytes()
    with zipfile.ZipFile(checkpoint) as archive:  # half of the examples hit what tells where things are
        pickled = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    start, end = pickled.header_offset, pickled.header_offset + pickled.file_size + 200
    at = data.draw(st.integers(start, end) | st.integers(0, len(whole) - 1))
    (files / "other.ckpt").write_bytes(flip(whole, at, data.draw(st.integers(1, 255))))
    assert parse_state(files / "other.ckpt") in (None, PrunedState((0, 2), BLOCKS))


def test_every_bit_of_the_kept_blocks_counts(files, checkpoint):
    """PyTorch itself reads another block or weight from such a file and says nothing."""
    whole = checkpoint.read_bytes()
    kept = b'{"kept_blocks": [0, 2], "total_blocks": 4}'
    assert whole.count(kept) == 1
    at = whole.index(kept)
    for bit in range(8 * len(kept)):
        (files / "flipped.ckpt").write_bytes(flip(whole, at + bit // 8, 1 << bit % 8))
        with pytest.raises(CheckpointError, match="Bad CRC-32"):
            read_pruned_state(files / "flipped.ckpt", None)


def test_checkpoint_without_sums(files, checkpoint):
    """``torch.serialization.set_crc32_options(False)`` leaves them out."""
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save(torch.load(checkpoint, weights_only=True), files / "sumless.ckpt")
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    assert parse_state(files / "sumless.ckpt") == PrunedState((0, 2), BLOCKS)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.floats(0, 1) | st.floats(), min_size=1, max_size=3).map(
        lambda numbers: torch.tensor(numbers, dtype=torch.float64).view(torch.int64)
    )
    | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3).map(lambda bits: torch.tensor(bits, dtype=torch.int64))
    | st.sampled_from([torch.tensor(0.5), torch.tensor([0.5]), torch.zeros(1000, dtype=torch.int64), torch.ones(1, 1)])
)
def test_checkpoint_that_says_any_width(files, widths):
    state = {"kept_blocks": torch.tensor([0, 2]), "total_blocks": torch.tensor(BLOCKS), "kept_widths": widths}
    torch.save({"state_dict": {f"e.{name}": value for name, value in state.items()}}, files / "wide.ckpt")
    shape = parse_state(files / "wide.ckpt")
    if shape is not None:
        said = widths.view(torch.float64).tolist()
        assert said == sorted(set(said))
        assert shape == PrunedState((0, 2), BLOCKS, said[-1], tuple(said) if len(said) > 1 else ())
        assert 0 < said[0] <= said[-1] <= 1
    elif widths.dtype == torch.int64 and widths.ndim == 1 and 0 < len(widths) < 4:
        said = widths.view(torch.float64).tolist()
        assert said != sorted(set(said)) or not all(0 < width <= 1 for width in said)


SHAPES = st.lists(st.integers(-2, 6), max_size=6) | st.lists(st.floats(allow_nan=True), max_size=3)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=SHAPES, total=st.integers(-1, 2**40) | st.floats())
def test_checkpoint_that_says_any_shape(files, small, kept, total):
    backbone = _once(small)
    state = {**as_buffers(backbone.state_dict()), "kept_blocks": torch.tensor(kept), "total_blocks": torch.tensor(total)}
    torch.save({"state_dict": {f"e.{name}": value for name, value in state.items()}}, files / "said.ckpt")
    shape = parse_state(files / "said.ckpt")
    state = changed(backbone.state_dict(), kept_blocks=kept, total_blocks=total)
    torch.save({"state_dict": {f"e.{name}": value for name, value in state.items()}}, files / "said.ckpt")
    assert parse_state(files / "said.ckpt") == shape
    if shape is None:
        return
    assert shape == PrunedState(tuple(kept), total)
    assert list(shape[0]) == sorted(set(kept))
    assert 0 <= kept[0] <= kept[-1] < total <= 1024
    if total != BLOCKS:
        with pytest.raises(CheckpointError, match=f"Found a checkpoint of an encoder with {total} blocks"):
            backbone.match_checkpoint(shape)


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize("content", [{"state_dict": Evil()}, {"state_dict": {}, "hyper_parameters": Evil()}, Evil(), [1], 3])
def test_code_in_a_checkpoint_is_not_run(files, capsys, content):
    torch.save(content, files / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"^There (is|are) no "):
        read_checkpoint(files / "evil.ckpt")
    assert "ran" not in capsys.readouterr().out


def test_state_that_is_no_state(files):
    for state in ({"a": 1}, [torch.ones(1)], torch.ones(2), None):
        torch.save({"state_dict": state}, files / "odd.ckpt")
        with pytest.raises(CheckpointError, match=r"There is no state_dict in|has no 'kept_blocks'"):
            read_pruned_state(files / "odd.ckpt", None)


def test_weights_only_everywhere():
    """Nothing here reads a pickle but through PyTorch's reader of tensors and plain values.

    But for what the processes of a run send each other, and where the user of the fit says so.
    """
    from pathlib import Path

    package = Path(__file__).parents[1] / "terratorch_simpler"
    for path in package.rglob("*.py"):
        text = path.read_text()
        if path.name == "checkpoint.py":
            text = text.replace("weights_only=weights_only", "weights_only=True")
            assert text.count("weights_only: bool") == text.count("weights_only: bool = True") == 2
        if path.name == "distributed.py":
            text = text.replace("import pickle", "")
        for call in text.split("torch.load(")[1:]:
            assert "weights_only=True" in call.split(")")[0], path
        for word in ("import pickle", "yaml.load(", "yaml.unsafe", "eval(", "exec(", "weights_only=False", "shell=True"):
            found = text.replace(".eval(", "")
            assert word not in found, (path, word)
