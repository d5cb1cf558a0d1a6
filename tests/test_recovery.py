"""Linear maps in the place of dropped blocks: their sums, what they explain, and the model they are folded into."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from terratorch_simpler.criteria import Angular, BlockInfluence, Bounds, CkaIntervals, Fixed, Simpler
from terratorch_simpler.errors import RecoveryError
from terratorch_simpler.measure import borrowed, measure
from terratorch_simpler.measure.repairs import HELD_OUT
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.recovery import RIDGE, SpanMap, SpanSums, spans_between
from terratorch_simpler.similarity import full_float32
from tests.families import FAMILIES, wrapped
from tests.memory import Tiles, land
from tests.planted import idle, random_statistics


def states(count, width, blocks=4, seed=0):
    """A residual stream with an offset, whose blocks are not linear."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator) + 3
    found = [x]
    for _ in range(blocks):
        x = x + torch.tanh(x @ torch.randn(width, width, generator=generator) / width**0.5)
        found.append(x)
    return torch.stack(found)


def every_fourth(count):
    return torch.arange(count) % 4 == 3


def sums_over(x, spans, parts=1):
    sums = SpanSums(spans)
    for part, held in zip(x.chunk(parts, dim=1), every_fourth(x.shape[1]).chunk(parts), strict=True):
        sums.add(part, held)
    return sums


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("span", [(1, 4), (0, 2), (2, 3)])
def test_map_is_the_least_squares_solution(span, parts):
    x = states(300, 12)
    before, after = (x[state].double().numpy() for state in span)
    expected = np.linalg.lstsq(before, after, rcond=None)[0]
    found = sums_over(x, [(1, 4), (0, 2), (2, 3)], parts).weight(span)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_map_solves_the_normal_equations_of_the_method():
    x = states(40, 12, seed=3).double()
    weight = sums_over(x, [(1, 4)]).weight((1, 4))
    delta = weight - torch.eye(12)
    left = (x[1].T @ x[1] + RIDGE * torch.eye(12)) @ delta
    torch.testing.assert_close(left, x[1].T @ (x[4] - x[1]), rtol=0, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(width=st.integers(2, 10), seed=st.integers(0, 999), shift=st.floats(-20, 20))
def test_what_is_explained_matches_a_fit_and_a_look_at_other_tokens(width, seed, shift):
    x = states(200, width, seed=seed) + shift
    held = every_fourth(200)
    before, after = x[1].double().numpy(), x[3].double().numpy()
    weight = np.linalg.lstsq(before[~held], after[~held], rcond=None)[0]
    rest = after[held] - before[held] @ weight
    expected = 1 - (rest**2).sum() / ((after[held] - after[held].mean(axis=0)) ** 2).sum()
    assert sums_over(x, [(1, 3)]).explained((1, 3)) == pytest.approx(expected, abs=1e-5)


def test_linear_blocks_are_explained_wholly():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 8, generator=generator)
    turn = torch.randn(8, 8, generator=generator)
    sums = sums_over(torch.stack([x, x @ turn]), [(0, 1)])
    torch.testing.assert_close(sums.weight((0, 1)), turn.double(), rtol=0, atol=1e-5)
    assert sums.explained((0, 1)) == pytest.approx(1.0, abs=1e-9)


def test_noise_is_not_explained():
    x = torch.randn(2, 4000, 8, generator=torch.Generator().manual_seed(0))
    assert abs(sums_over(x, [(0, 1)]).explained((0, 1))) < 0.02


def test_too_few_tokens_say_how_many_are_needed():
    sums = sums_over(states(15, 12), [(1, 4)])  # 12 to fit on, 3 to judge on
    assert sums.enough
    with pytest.raises(RecoveryError, match="Found 11 tokens to fit a linear map on, expected at least 12"):
        sums_over(states(14, 12), [(1, 4)]).weight((1, 4))
    with pytest.raises(RecoveryError, match="Found 0 tokens"):
        SpanSums([(1, 4)]).explained((1, 4))


def test_memory_that_runs_out_adds_nothing_twice(monkeypatch):
    x = states(100, 8)
    expected = sums_over(x, [(1, 4)])
    original, calls = SpanSums._add, []

    def once(self, states, held_out, device):
        calls.append(device)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        original(self, states, held_out, device)

    monkeypatch.setattr(SpanSums, "_add", once)
    found = sums_over(x, [(1, 4)])
    assert len(calls) == 2
    assert torch.equal(found.weight((1, 4)), expected.weight((1, 4)))


def test_spans_of_kept_blocks():
    assert spans_between(range(5), 12) == [(5, 12)]
    assert spans_between([3, 4, 11], 12) == [(0, 3), (5, 11)]
    assert spans_between(range(12), 12) == []


@settings(max_examples=30, deadline=None)
@given(data=st.data(), blocks=st.integers(5, 9))
def test_rules_name_every_range_that_they_may_drop(data, blocks):
    drop = data.draw(st.integers(1, blocks - 3))
    bounds = Bounds(2, blocks - 1)
    rules = [
        Simpler(),
        Angular(drop),
        BlockInfluence(drop),
        CkaIntervals(drop),
        CkaIntervals(drop, 1),
        Fixed(drop_blocks=drop),
    ]
    for rule in rules:
        kept = rule.choose(random_statistics(blocks, data.draw(st.integers(0, 99))), blocks, bounds).kept_blocks
        assert set(spans_between(kept, blocks)) <= set(rule.spans(blocks, bounds))


# --- in a pass


def run(backbone, tiles, rule, **options):
    options = {"min_tiles": 9999, "spans": rule.spans(12, Bounds()), **options}
    return measure(lambda batch: backbone(batch["image"]), backbone, tiles, rule, Bounds(), **options)


def raw(backbone, images):
    """All tokens in all states, the class token first, computed at once."""
    seen = []
    handles = backbone.watch(seen.append)
    with torch.no_grad():
        backbone.eval()
        backbone(images)
    for handle in handles:
        handle.remove()
    return torch.stack(seen).double()


def test_sums_of_a_pass_are_those_of_all_its_tokens(build):
    backbone, images = build(embed_dim=48, num_heads=3), land(80)
    found = run(backbone, Tiles(images, batch_size=7), Fixed(5))
    everything = raw(backbone, images)  # 16 patches a tile: all are drawn
    held = torch.arange(80) % 64 % HELD_OUT == HELD_OUT - 1
    for sums, tokens in ((found.repairs.patch, everything[:, :, 1:]), (found.repairs.special, everything[:, :, :1])):
        expected = SpanSums([(5, 12)])
        expected.add(tokens.flatten(1, 2), held.repeat_interleave(tokens.shape[2]))
        assert sums.tokens.tolist() == expected.tokens.tolist()
        torch.testing.assert_close(sums._sums["gram"], expected._sums["gram"], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(sums._sums["cross"], expected._sums["cross"], rtol=1e-5, atol=1e-3)


def test_similarity_is_the_same_with_and_without_repairs(build):
    backbone, tiles = build(), Tiles(land(100))
    with_them, without = run(backbone, tiles, Simpler()), run(backbone, tiles, Simpler(), spans=())
    assert torch.equal(with_them.similarity, without.similarity)
    assert (with_them.rows_seen, with_them.votes) == (without.rows_seen, without.votes)
    assert without.repairs is None


def test_an_early_stop_counts_only_groups_that_were_judged(build):
    backbone = idle(build, range(5, 12))
    found = run(backbone, Tiles(land(400)), Fixed(5), min_tiles=128)
    assert found.repairs.patch.tokens.sum() == 16 * found.tiles_seen
    assert found.repairs.patch.explained((5, 12)) == pytest.approx(1, abs=1e-6)  # idle blocks change nothing
    torch.testing.assert_close(found.repairs.patch.weight((5, 12)), torch.eye(192).double(), rtol=0, atol=1e-6)


# --- in a model


def maps_for(backbone, images, kept):
    """Maps in closed form from all tokens, class tokens apart."""
    tokens, maps = raw(backbone, images), {}
    for before, after in spans_between(kept, 12):
        rows = [part.flatten(1, 2) for part in (tokens[:, :, 1:], tokens[:, :, :1])]
        fitted = [torch.linalg.lstsq(part[before], part[after]).solution.float() for part in rows]
        maps[before] = SpanMap(*fitted)
    return maps


def plan_of(backbone, kept, maps):
    return SlimmingPlan(
        backbone.name,
        12,
        tuple(kept),
        {"name": "fixed", "args": {}},
        recovery="linear" if maps else "none",
        maps=maps or None,
    )


def small(build, seed=0):
    torch.manual_seed(seed)
    return build(embed_dim=48, num_heads=3).eval()


def linear_block(block, turn):
    """Replace what a block does by one matrix."""
    block.forward = lambda x: x @ turn


@pytest.mark.parametrize("kept", [range(5), [0, 1, 2, 8, 9, 10, 11], [3, 4, 9], [2, 3]], ids=str)
def test_a_linear_encoder_answers_as_if_nothing_was_dropped(build, kept):
    generator = torch.Generator().manual_seed(1)
    backbone, images = small(build), torch.randn(120, 6, 64, 64, generator=generator)
    for block in backbone.blocks:
        linear_block(block, torch.linalg.qr(torch.randn(48, 48, generator=generator))[0])
    with torch.no_grad(), full_float32():
        expected = backbone(images)[-1]
        kept = list(kept)
        backbone.slim(plan_of(backbone, kept, maps_for(backbone, images, kept)))
        found = backbone(images)[-1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.fewest == 1], ids=lambda family: family.key)
def test_maps_change_the_tokens_after_a_block_and_no_others(family):
    backbone, image = wrapped(family).eval(), family.image()
    total = backbone.full_num_blocks
    width = raw_width(backbone, image)
    kept = [*range(1, total // 2), total - 2]
    generator = torch.Generator().manual_seed(0)
    special = backbone._adapter.prefix_tokens(backbone.encoder) > 0
    maps = {
        before: SpanMap(*(torch.randn(width, width, generator=generator) / width**0.5 for _ in range(2)))
        for before, _ in spans_between(kept, total)
    }
    if not special:
        maps = {before: SpanMap(one.patch, None) for before, one in maps.items()}
    cut = copy.deepcopy(backbone)
    cut.keep_blocks(kept)
    parameters = cut.num_parameters()
    plan = dataclasses.replace(plan_of(backbone, kept, maps), full_num_blocks=total)
    repaired = copy.deepcopy(backbone)
    repaired.slim(plan)
    extra = sum(len(one.patch) ** 2 * (1 + special) for one in maps.values())
    assert repaired.num_parameters() == parameters + extra

    def states_of(model):
        seen = []
        handles = model.watch(seen.append)  # hooks that were there before run first
        with borrowed(model):
            answer = list(tensors_of(model(copy.deepcopy(image))))
        for handle in handles:
            handle.remove()
        return seen, answer

    before, _ = states_of(cut)
    after, answer = states_of(repaired)
    prefix = repaired._adapter.prefix_tokens(repaired.encoder)
    first = mapped(before[0], maps[0], prefix)
    if family.key.startswith("clay"):  # watched before the stack is entered, mapped on entering it
        assert set(maps) == {0, total // 2, total - 1}
    else:
        torch.testing.assert_close(after[0], first, rtol=0, atol=1e-5)
    again = copy.deepcopy(repaired)
    with torch.no_grad():
        for parameter in repaired.recovery.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(states_of(again)[1], answer, strict=True))  # a copy runs its own maps


def mapped(tokens, span_map, prefix):
    if span_map.special is None:
        return tokens @ span_map.patch
    return torch.cat([tokens[..., :prefix, :] @ span_map.special, tokens[..., prefix:, :] @ span_map.patch], dim=-2)


def raw_width(backbone, image):
    seen = []
    handles = backbone.watch(seen.append)
    with torch.no_grad():
        backbone(copy.deepcopy(image))
    for handle in handles:
        handle.remove()
    return seen[0].shape[-1]


def tensors_of(answer):
    for part in answer if isinstance(answer, list | tuple) else [answer]:
        yield from (
            tensors_of(list(part.values()))
            if isinstance(part, dict)
            else [part]
            if isinstance(part, torch.Tensor)
            else (tensors_of(part))
        )
