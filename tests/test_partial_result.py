"""A pass that was ended goes on where its last group ended, and comes to the same result."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from terratorch_simpler.criteria import Simpler
from terratorch_simpler.distributed import Processes
from terratorch_simpler.errors import SimplerWarning
from terratorch_simpler.extraction import ExtractionConfig, PartialResult, measure, partial_result
from tests.cli_runner import together
from tests.in_memory_tiles import Tiles, land


class Ended(Exception):
    pass


def run(backbone, tiles, keeper=None, end_after=None, processes=None, **options):
    sent = []

    def forward(batch):
        sent.append(batch["position"])
        if end_after is not None and sum(map(len, sent)) > end_after:
            raise Ended
        return backbone(batch["image"])

    options = {"min_tiles": 10_000, **options}
    try:
        found = measure(
            forward, backbone, tiles, ExtractionConfig(Simpler(), **options), partial_result=keeper, processes=processes
        )  # fmt: skip
    except Ended:
        found = None
    return found, sent


def same(found, expected):
    torch.testing.assert_close(found.similarity, expected.similarity, rtol=0, atol=1e-5)
    names = ("votes", "tiles_seen", "rows_seen", "converged", "input_shape")
    assert all(getattr(found, name) == getattr(expected, name) for name in names)
    assert found.skips.state() == expected.skips.state()


@pytest.fixture
def small(build):
    return build(embed_dim=48, num_heads=3, depth=6)


def source(count=700, **kwargs):
    """Some tiles are broken, some show nothing."""
    valid = torch.ones(count, 32, 32, dtype=torch.bool)
    valid[3::11] = False
    return Tiles(land(count, size=32), valid, broken=range(5, count, 7), **kwargs)


@pytest.mark.parametrize("end_after", [10, 96, 130, 333, 550, 599])
def test_goes_on_where_it_was(small, tmp_path, end_after):
    expected, _ = run(small, source())
    path = tmp_path / "pass.pt"
    assert run(small, source(), PartialResult(path), end_after)[0] is None
    begun = torch.load(path, weights_only=True) if path.exists() else {"position": 0}
    assert path.exists() == (end_after >= 96 + 16)  # a group is complete once half of the next one is there
    found, sent = run(small, source(), PartialResult(path))
    same(found, expected)
    assert sent[0][0] >= begun["position"]
    assert not list(tmp_path.iterdir())


def test_ended_again_and_again(small, tmp_path):
    expected, _ = run(small, source(500))
    path, tries, found = tmp_path / "pass.pt", 0, None
    while found is None:
        found, _ = run(small, source(500), PartialResult(path), end_after=140)
        tries += 1
    assert tries > 2
    same(found, expected)


def test_ended_after_the_depth_had_settled(build, tmp_path):
    backbone = build()
    with torch.no_grad():
        for number, block in enumerate(backbone.blocks):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.mul_(1.5**number if number < 5 else 0.0)
    expected, _ = run(backbone, Tiles(land(400)), min_tiles=128)
    assert expected.converged
    keeper = PartialResult(tmp_path / "pass.pt")
    remove, keeper.remove = keeper.remove, lambda: keeper.save()
    run(backbone, Tiles(land(400)), keeper, min_tiles=128)
    keeper.remove = remove
    found, sent = run(backbone, Tiles(land(400)), keeper, min_tiles=128)
    same(found, expected)
    assert not sent  # nothing was read again


def test_is_kept_while_it_runs_not_only_at_its_end(small, tmp_path, monkeypatch):
    monkeypatch.setattr(partial_result, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(PartialResult, "remove", lambda self: None)
    run(small, source(300), PartialResult(tmp_path / "pass.pt"))
    assert torch.load(tmp_path / "pass.pt", weights_only=True)["groups"] >= 3


def in_processes(processes: Processes, path: str, end_after: int | None):
    from tests.test_distributed import small_backbone

    found, _ = run(small_backbone(), source(), PartialResult(Path(path)), end_after, processes)
    return found


def test_goes_on_with_another_number_of_processes(tmp_path):
    from tests.test_distributed import small_backbone

    expected, _ = run(small_backbone(), source())
    path = tmp_path / "pass.pt"
    for ranks, end_after in ((2, 200), (3, 60), (1, 100)):
        together(in_processes, tmp_path / f"{ranks}", ranks, str(path), end_after)
        assert path.exists()
    groups = torch.load(path, weights_only=True)["groups"]
    assert groups >= 4
    for found in together(in_processes, tmp_path / "last", 4, str(path), None):
        same(found, expected)
    assert not path.exists()


def kept(small, path):
    run(small, source(300), PartialResult(path), end_after=200)
    return path.read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.SimplerWarning")
def test_a_damaged_file_starts_anew(small, tmp_path, data):
    path = tmp_path / "pass.pt"
    whole = kept_once(small, path)
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    path.write_bytes(damaged)
    like = torch.load(tmp_path / "whole.pt", weights_only=True)
    del like["format"], like["version"]
    found = PartialResult(path).load(like)
    assert found is None or same_values(found, like)  # a flipped bit in the padding of the file changes nothing


def same_values(found, like):
    if isinstance(like, dict):
        return found.keys() == like.keys() and all(same_values(found[key], like[key]) for key in like)
    return torch.equal(found, like) if isinstance(like, torch.Tensor) else found == like


def kept_once(small, path):
    whole = path.with_name("whole.pt")
    if not whole.exists():
        whole.write_bytes(kept(small, path))
    return whole.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"position": 3},
        {"groups": 7},
        {"tiles": 65},
        {"position": "128"},
        {"version": 1},
        {"files": {1: 3}},
        {"files": {"a": 128}},
        {"format": "other"},
        {"skips": {}},
        {"input_shape": (6, 10**9, 10**9)},
        {"input_shape": None},
        {"input_shape": {"S2L2A": {}}},
        {"input_sums": {"": torch.zeros(2, 6, dtype=torch.double)}},
        {"input_sums": {0: torch.zeros(3, 6, dtype=torch.double)}},
        {"input_sums": {"": 1.0}},
        {"large": {}},
        {"extra": 1},
    ],
)
def test_sums_that_do_not_add_up_are_not_believed(small, tmp_path, change):
    path = tmp_path / "pass.pt"
    expected, _ = run(small, source(300))
    kept(small, path)
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.warns(SimplerWarning, match=r"The partial result .*pass.pt is damaged \(.*\) and is ignored"):
        found, _ = run(small, source(300), PartialResult(path))
    same(found, expected)


def test_code_in_the_file_is_not_run(small, tmp_path):
    path = tmp_path / "pass.pt"

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"format": partial_result.FORMAT, "version": partial_result.VERSION, "position": Evil()}, path)
    with pytest.warns(SimplerWarning, match="damaged"):
        run(small, source(100), PartialResult(path))
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_cannot_be_written_to_does_not_end_the_pass(small, tmp_path, monkeypatch):
    monkeypatch.setattr(partial_result, "SECONDS_BETWEEN", 0.0)
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.warns(SimplerWarning, match="Could not save the partial result"):
        found, _ = run(small, source(200), PartialResult(tmp_path / "file" / "pass.pt"))
    assert found is not None


def test_only_accepted_groups_are_saved():
    """Several processes compare several groups in a round, and the first of them may settle the depth."""
    from terratorch_simpler.extraction.grouped_similarity import GroupedSimilarity

    similarity = GroupedSimilarity(3, 5, Processes())
    for number in range(3):
        similarity.update(torch.randn(4, 128, 4), range(0, 129, 2), number)
    state = similarity.state(1)
    assert state["large"]["tiles"].tolist() == [64, 0, 0, 0, 0]
    assert state["small"]["tiles"].tolist() == [32, 32] + [0] * 12
    assert not state["large"]["hsic"][1:].any()
    assert GroupedSimilarity.is_consistent({**state, "groups": 1, "tiles": 64})
    assert not GroupedSimilarity.is_consistent({**similarity.state(3), "groups": 1, "tiles": 64})
