"""The streamed similarity against an independent float64 reference, and its invariances."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from terratorch_simpler.errors import DegenerateFeaturesError
from terratorch_simpler.functional import hsic
from terratorch_simpler.functional.angles import angle_sums
from terratorch_simpler.functional.hsic import draw_groups, full_float32, hsic_matrix, linear_cka
from terratorch_simpler.metrics import LayerSimilarity


def reference_hsic(x: torch.Tensor, y: torch.Tensor) -> float:
    """HSIC_1 as Song et al. write it, term by term with explicit loops over i != j, in float64."""
    k, m = x.double() @ x.double().T, y.double() @ y.double().T
    n = len(x)
    k = k - torch.diag(k.diagonal())
    m = m - torch.diag(m.diagonal())
    ones = torch.ones(n, 1, dtype=torch.float64)
    trace = torch.trace(k @ m)
    sums = (ones.T @ k @ ones) * (ones.T @ m @ ones) / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * (ones.T @ k @ m @ ones)
    return float(trace + sums - cross) / (n * (n - 3))


def reference_cka(groups: list[torch.Tensor]) -> torch.Tensor:
    blocks = groups[0].shape[0]
    sums = torch.tensor(
        [[sum(reference_hsic(g[i], g[j]) for g in groups) for j in range(blocks)] for i in range(blocks)],
        dtype=torch.float64,
    )
    return sums / torch.outer(sums.diagonal().sqrt(), sums.diagonal().sqrt())


def random_features(blocks: int, rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(blocks, rows, width, generator=torch.Generator().manual_seed(seed))


def structured_features(rows: int = 64, seed: int = 0) -> torch.Tensor:
    """A residual stream: each block adds less than the one before, on a large common offset, as in a ViT."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 24, generator=generator) + 30
    outputs = []
    for block in range(6):
        x = x + torch.randn(rows, 24, generator=generator) * 2.0**-block
        outputs.append(x)
    return torch.stack(outputs)


def metric_over(groups: list[torch.Tensor]) -> LayerSimilarity:
    metric = LayerSimilarity(groups[0].shape[0] - 1, len(groups))
    for number, group in enumerate(groups):
        metric.update(group, tiles=4, group=number)
    return metric


@pytest.mark.parametrize("features", [random_features(4, 40, 16), structured_features(), 1e4 * random_features(3, 30, 8)])
def test_hsic_matches_the_float64_reference(features):
    expected = [[reference_hsic(a, b) for b in features] for a in features]
    torch.testing.assert_close(hsic_matrix(features), torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=1e-5)


def test_hsic_of_four_rows_by_hand():
    # Rows e1, e1, 0, 0: K has ones at (0, 1) and (1, 0). tr KK = 2, 1'K1 = 2, 1'KK1 = 2, m = 4:
    # (2 + 2 * 2 / 6 - 2 / 2 * 2) / 4 = 1/6.
    x = torch.tensor([[[1.0], [1.0], [0.0], [0.0]]])
    assert hsic_matrix(x).item() == pytest.approx(1 / 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cka_over_groups_matches_the_reference(dtype):
    groups = [structured_features(48, seed).to(dtype) for seed in range(3)]
    tolerance = 1e-7 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(metric_over(groups).statistics().spans, reference_cka(groups), rtol=0, atol=tolerance)


def test_one_group_is_the_one_shot_value():
    features = structured_features(50)
    torch.testing.assert_close(metric_over([features]).statistics().spans, linear_cka(features))


def test_identical_blocks_are_alike_and_s_is_symmetric():
    x = random_features(1, 60, 12)
    s = linear_cka(torch.cat([x, x, random_features(1, 60, 12, seed=1)]))
    assert torch.equal(s.diagonal(), torch.ones(3).double())
    assert s[0, 1] == pytest.approx(1, abs=1e-7)
    assert abs(s[0, 2]) < 0.2
    assert torch.equal(s, s.T)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(8, 40),
    width=st.integers(2, 12),
    scale=st.floats(1e-2, 1e2),
    shift=st.floats(-50, 50),
    seed=st.integers(0, 99),
)
def test_invariant_to_rotation_scale_and_shift(rows, width, scale, shift, seed):
    x, y = random_features(2, rows, width, seed)
    rotation = torch.linalg.qr(random_features(1, width, width, seed + 1)[0])[0]
    before = linear_cka(torch.stack([x, y]))
    after = linear_cka(torch.stack([scale * x @ rotation + shift, y]))
    torch.testing.assert_close(before, after, rtol=0, atol=2e-3)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(5)), split=st.integers(0, 5))
def test_order_of_groups_and_split_over_processes_do_not_matter(order, split):
    groups = [structured_features(20, seed) for seed in range(5)]
    together = metric_over(groups)
    parts = [LayerSimilarity(5, 5), LayerSimilarity(5, 5)]
    for position, number in enumerate(order):
        parts[position < split].update(groups[number], tiles=4, group=number)
    for name, whole in together.metric_state.items():
        assert torch.equal(getattr(parts[0], name) + getattr(parts[1], name), whole)  # what a sum over two processes does


def test_states_are_sums_so_that_torchmetrics_can_merge_processes():
    reductions = LayerSimilarity(2, 2)._reductions.values()
    assert {function.__name__ for function in reductions} == {"dim_zero_sum"}


def test_memory_does_not_grow_with_groups_added_again():
    metric = LayerSimilarity(2, 2)
    before = sum(state.numel() for state in metric.metric_state.values())
    for _ in range(20):
        metric.update(random_features(3, 10, 4), tiles=4, group=1)
    assert sum(state.numel() for state in metric.metric_state.values()) == before


def readable(setting):
    """A setting, or what PyTorch says if it refuses to tell it."""
    try:
        return setting()
    except RuntimeError as err:
        return str(err).split(":")[0]


BACKENDS = torch.backends
OF_EACH = {  # a setting for each backend and operator came with PyTorch 2.9
    name: part
    for name, part in {
        "all": BACKENDS,
        "cuda.matmul": BACKENDS.cuda.matmul,
        "cudnn": BACKENDS.cudnn,
        "cudnn.conv": getattr(BACKENDS.cudnn, "conv", None),
        "cudnn.rnn": getattr(BACKENDS.cudnn, "rnn", None),
        "mkldnn": BACKENDS.mkldnn,
        "mkldnn.matmul": getattr(BACKENDS.mkldnn, "matmul", None),
        "mkldnn.conv": getattr(BACKENDS.mkldnn, "conv", None),
    }.items()
    if hasattr(part, "fp32_precision")
}


def all_settings():
    return {
        "legacy": readable(torch.get_float32_matmul_precision),
        "cuda.matmul.allow_tf32": readable(lambda: BACKENDS.cuda.matmul.allow_tf32),
        "cudnn.allow_tf32": readable(lambda: BACKENDS.cudnn.allow_tf32),
        **{name: readable(lambda part=part: part.fp32_precision) for name, part in OF_EACH.items()},
    }


def set_of_each(name, value):
    OF_EACH[name].fp32_precision = value


def set_allow_tf32(part, value):
    part.allow_tf32 = value


CHANGES = st.one_of(
    st.builds(lambda value: (torch.set_float32_matmul_precision, value), st.sampled_from(["highest", "high", "medium"])),
    st.builds(
        lambda part, value: (set_allow_tf32, part, value),
        st.sampled_from([BACKENDS.cuda.matmul, BACKENDS.cudnn]),
        st.booleans(),
    ),
    *(
        st.builds(
            lambda name, value: (set_of_each, name, value),
            st.just(name),
            st.sampled_from(["ieee", "tf32", "none", *(["bf16"] if "mkldnn" in name else [])]),
        )
        for name in OF_EACH
        if name in ("all", "cuda.matmul", "mkldnn.matmul", "cudnn.conv")
    ),
)


@pytest.fixture
def precision():
    """Restores every setting: later tests on this worker trace models, for which PyTorch reads all of them."""
    before, of_each = all_settings(), {name: part.fp32_precision for name, part in OF_EACH.items()}
    legacy = [(part, part.allow_tf32) for part in (BACKENDS.cuda.matmul, BACKENDS.cudnn)]
    matmul = torch.get_float32_matmul_precision()
    yield
    for name in ("all", "cuda.matmul", "mkldnn.matmul", "cudnn.conv", "cudnn.rnn"):
        if name in OF_EACH:
            OF_EACH[name].fp32_precision = "none"
    for part, allowed in legacy:
        part.allow_tf32 = allowed
    torch.set_float32_matmul_precision(matmul)
    for name in ("cuda.matmul", "mkldnn.matmul", "cudnn.conv", "cudnn.rnn"):
        if name in OF_EACH:
            OF_EACH[name].fp32_precision = of_each[name]
    assert all_settings() == before


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(CHANGES, max_size=6))
def test_settings_of_precision_are_left_alone_whichever_way_they_were_made(precision, changes):
    for change, *arguments in changes:
        change(*arguments)
    before = all_settings()
    with full_float32():
        inside = all_settings()
        with full_float32():
            assert all_settings() == inside
    assert inside["legacy"] == "highest"
    assert inside["cuda.matmul.allow_tf32"] is False
    assert {value for name, value in inside.items() if name in ("cuda.matmul", "mkldnn.matmul")} <= {"ieee"}
    assert all_settings() == before


def test_precision_of_a_pytorch_without_settings_for_each_backend(precision, monkeypatch):
    monkeypatch.setattr(hsic, "_matmul_backends", lambda: [])
    torch.set_float32_matmul_precision("medium")
    linear_cka(random_features(2, 20, 4))
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("offset", [0.0, 1.0, 123.4])
def test_constant_block_is_named(offset):
    features = random_features(4, 30, 8)
    features[2] = offset
    with pytest.raises(DegenerateFeaturesError, match=r"constant over all tokens after encoder block 2 \(0-based\)"):
        linear_cka(features)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_named(value):
    features = random_features(4, 30, 8)
    features[1, 3, 2] = value
    features[3, 0, 0] = value
    with pytest.raises(DegenerateFeaturesError, match=r"NaN or Inf after encoder block 1, 3 \(0-based\)"):
        linear_cka(features)


def test_fewer_than_four_rows_are_refused():
    with pytest.raises(DegenerateFeaturesError, match="Only 3 rows of tokens; HSIC needs at least 4"):
        linear_cka(random_features(2, 3, 4))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric LayerSimilarity was called before")
def test_nothing_seen_is_refused():
    with pytest.raises(DegenerateFeaturesError, match="no rows of tokens to compare"):
        LayerSimilarity(2, 2).compute()


def test_bootstrap_draws_whole_groups_and_repeats_with_the_seed():
    counts = draw_groups(4, 200, seed=3)
    assert counts.shape == (200, 4)
    assert torch.equal(counts, counts.round())
    assert (counts.sum(dim=1) == 4).all()
    assert len({tuple(count) for count in counts.tolist()}) > 5
    assert torch.equal(counts, draw_groups(4, 200, seed=3))
    assert not torch.equal(counts, draw_groups(4, 200, seed=4))


def test_angles_and_cosines_match_a_loop_over_tokens():
    groups = [structured_features(40, seed) for seed in range(3)]
    found = metric_over(groups).statistics()
    states = torch.cat(groups, dim=1).double()
    for i in range(6):
        for j in range(6):
            cosines = [
                float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) for a, b in zip(states[i], states[j], strict=True)
            ]
            assert float(found.cosine[i, j]) == pytest.approx(sum(cosines) / 120, abs=1e-12)
            angles = [math.acos(min(1.0, cosine)) / math.pi for cosine in cosines]
            assert float(found.angle[i, j]) == pytest.approx(sum(angles) / 120, abs=1e-7)


def test_angles_by_hand():
    right, opposite, same = torch.tensor([0.0, 2.0]), torch.tensor([-3.0, 0.0]), torch.tensor([5.0, 0.0])
    x = torch.tensor([1.0, 0.0]).expand(300, 2)
    for other, cosine, angle in ((right, 0, 0.5), (opposite, -1, 1), (same, 1, 0), (torch.zeros(2), 0, 0.5)):
        cosines, angles = angle_sums(torch.stack([x, other.expand(300, 2)]))
        assert cosines[0, 1] == pytest.approx(300 * cosine)
        assert angles[0, 1] == pytest.approx(300 * angle)


def test_resampled_statistics_are_those_of_the_drawn_groups():
    groups = [structured_features(20 + seed, seed) for seed in range(4)]
    sums = metric_over(groups).sums()
    drawn = draw_groups(4, 5, seed=1)
    found = sums.resampled(5, seed=1)
    for number, counts in enumerate(drawn.int().tolist()):
        again = [group for group, count in zip(groups, counts, strict=True) for _ in range(count)]
        expected = metric_over(again).statistics()
        for name in ("hsic", "cosine", "angle", "similarity"):
            torch.testing.assert_close(getattr(found, name)[number], getattr(expected, name))


def test_only_rules_that_look_at_a_constant_input_refuse_it():
    features = structured_features()
    features[0] = 7.0
    found = metric_over([features]).statistics()
    assert found.similarity.shape == (5, 5)
    with pytest.raises(DegenerateFeaturesError, match="Found an input of the first encoder block that is constant"):
        _ = found.spans
