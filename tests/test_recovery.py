"""Linear maps in the place of dropped blocks: their sums, what they explain, and the model they are folded into."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from terratorch_simpler import SimplerCallback
from terratorch_simpler.criteria import Angular, BlockInfluence, Bounds, CkaIntervals, Fixed, Simpler
from terratorch_simpler.errors import CheckpointError, ConfigurationError, PlanError, RecoveryError, SimplerWarning
from terratorch_simpler.extraction import ExtractionConfig, evaluating, measure, recovery_statistics
from terratorch_simpler.extraction.recovery_statistics import HELD_OUT
from terratorch_simpler.functional.hsic import full_float32
from terratorch_simpler.functional.least_squares import RIDGE, NormalEquations
from terratorch_simpler.indices import spans_between
from terratorch_simpler.models.state import STATE_KEYS
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.pruning.recovery import RecoveryWeights
from tests.checkpoints import as_buffers, changed
from tests.cli_runner import together
from tests.families import FAMILIES, wrapped
from tests.in_memory_tiles import Tiles, land
from tests.synthetic_features import idle, random_statistics


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


def rows(held):
    """Numbers of the tokens to fit on, and of those to judge on."""
    return (~held).nonzero().flatten().tolist(), held.nonzero().flatten().tolist()


def sums_over(x, spans, parts=1):
    sums = NormalEquations(spans)
    for part, held in zip(x.chunk(parts, dim=1), every_fourth(x.shape[1]).chunk(parts), strict=True):
        sums.add(part, *rows(held))
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
    assert sums.sufficient
    with pytest.raises(RecoveryError, match="Only 11 tokens to fit a linear map on; at least 12"):
        sums_over(states(14, 12), [(1, 4)]).weight((1, 4))
    with pytest.raises(RecoveryError, match="Only 0 tokens"):
        NormalEquations([(1, 4)]).explained((1, 4))


def test_spans_of_kept_blocks():
    assert spans_between(range(5), 12) == [(5, 12)]
    assert spans_between([3, 4, 11], 12) == [(0, 3), (5, 11)]
    assert spans_between(range(12), 12) == []


def test_a_rule_names_no_range_that_it_never_drops():
    assert CkaIntervals(12, 1).spans(24, Bounds()) == Angular(12).spans(24, Bounds())
    assert len(CkaIntervals(12, 1).spans(24, Bounds())) == 13
    assert len(CkaIntervals(12, 2).spans(24, Bounds())) == 222
    assert BlockInfluence(2).spans(4, Bounds()) == [(0, 1), (1, 2), (2, 3), (3, 4), (0, 2), (1, 3), (2, 4)]


def test_sums_that_take_much_memory_are_said_once(build, monkeypatch):
    """Half of 24 blocks of width 1024: 3.9 GiB, and as much again for class tokens. Here with a limit below small sums."""
    assert (
        NormalEquations(CkaIntervals(12, 2).spans(24, Bounds())).nbytes(1024)
        == 2 * 8 * (25 + 222) * 1024**2 + 2 * 8 * 25 * 1024
    )
    monkeypatch.setattr(recovery_statistics, "MUCH_MEMORY", 2**16)
    backbone, rule = build(embed_dim=48, num_heads=3), CkaIntervals(3)
    with pytest.warns(SimplerWarning, match=r"Found 33 ranges of blocks that may be dropped, whose sums .* GiB") as told:
        run(backbone, Tiles(land(150)), rule)
    assert len(told) == 1


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
    return measure(lambda batch: backbone(batch["image"]), backbone, tiles, ExtractionConfig(rule, **options))


def raw(backbone, images):
    """All tokens in all states, the class token first, computed at once."""
    seen = []
    handles = backbone.register_block_hooks(seen.append)
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
    for sums, tokens in ((found.recovery.patch, everything[:, :, 1:]), (found.recovery.special, everything[:, :, :1])):
        expected = NormalEquations([(5, 12)])
        expected.add(tokens.flatten(1, 2), *rows(held.repeat_interleave(tokens.shape[2])))
        assert sums.tokens.tolist() == expected.tokens.tolist()
        torch.testing.assert_close(sums._sums["gram"], expected._sums["gram"], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(sums._sums["cross"], expected._sums["cross"], rtol=1e-5, atol=1e-3)


def test_similarity_is_the_same_with_and_without_repairs(build):
    backbone, tiles = build(), Tiles(land(100))
    with_them, without = run(backbone, tiles, Simpler()), run(backbone, tiles, Simpler(), spans=())
    assert torch.equal(with_them.similarity, without.similarity)
    assert (with_them.rows_seen, with_them.votes) == (without.rows_seen, without.votes)
    assert without.recovery is None


def test_an_early_stop_counts_only_groups_that_were_judged(build):
    backbone = idle(build, range(5, 12))
    found = run(backbone, Tiles(land(400)), Fixed(5), min_tiles=128)
    assert found.recovery.patch.tokens.sum() == 16 * found.tiles_seen
    assert found.recovery.patch.explained((5, 12)) == pytest.approx(1, abs=1e-6)  # idle blocks change nothing
    torch.testing.assert_close(found.recovery.patch.weight((5, 12)), torch.eye(192).double(), rtol=0, atol=1e-6)


# --- in a model


def maps_for(backbone, images, kept):
    """Maps in closed form from all tokens, class tokens apart."""
    tokens, maps = raw(backbone, images), {}
    for before, after in spans_between(kept, 12):
        rows = [part.flatten(1, 2) for part in (tokens[:, :, 1:], tokens[:, :, :1])]
        fitted = [torch.linalg.lstsq(part[before], part[after]).solution.float() for part in rows]
        maps[before] = RecoveryWeights(*fitted)
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


def test_fewer_blocks_take_the_maps_away(build):
    backbone, plain, images = small(build), small(build), land(3)
    backbone.slim(plan_of(backbone, [0, 1, 2, 6, 7], maps_for(backbone, land(40), [0, 1, 2, 6, 7])))
    backbone.prune_depth([0, 1, 6])
    plain.prune_depth([0, 1, 6])
    assert backbone.pruned_state == plain.pruned_state
    assert torch.equal(answer(backbone, images), answer(plain, images))


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.fewest == 1], ids=lambda family: family.key)
def test_maps_change_the_tokens_after_a_block_and_no_others(family):
    backbone, image = wrapped(family).eval(), family.image()
    total = backbone.full_num_blocks
    width = raw_width(backbone, image)
    kept = [*range(1, total // 2), total - 2]
    generator = torch.Generator().manual_seed(0)
    special = backbone._spec.prefix_tokens(backbone.encoder) > 0
    maps = {
        before: RecoveryWeights(*(torch.randn(width, width, generator=generator) / width**0.5 for _ in range(2)))
        for before, _ in spans_between(kept, total)
    }
    if not special:
        maps = {before: RecoveryWeights(one.patch, None) for before, one in maps.items()}
    cut = copy.deepcopy(backbone)
    cut.prune_depth(kept)
    parameters = cut.num_parameters()
    plan = dataclasses.replace(plan_of(backbone, kept, maps), full_num_blocks=total)
    repaired = copy.deepcopy(backbone)
    repaired.slim(plan)
    extra = sum(len(one.patch) ** 2 * (1 + special) for one in maps.values())
    assert repaired.num_parameters() == parameters + extra

    def states_of(model):
        seen = []
        handles = model.register_block_hooks(seen.append)  # hooks that were there before run first
        with evaluating(model):
            answer = list(tensors_of(model(copy.deepcopy(image))))
        for handle in handles:
            handle.remove()
        return seen, answer

    before, _ = states_of(cut)
    after, answer = states_of(repaired)
    prefix = repaired._spec.prefix_tokens(repaired.encoder)
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
    handles = backbone.register_block_hooks(seen.append)
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


# --- in files


def plan_on_disk(build, folder, kept=(0, 1, 2, 6, 7)):
    backbone = small(build)
    plan = plan_of(backbone, kept, maps_for(backbone, land(40), kept))
    plan.save(folder / "plan.json")
    return plan


def test_plan_and_maps_come_back(build, tmp_path):
    plan = plan_on_disk(build, tmp_path)
    again = SlimmingPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "plan.recovery.pt"}
    images = land(3)
    given, built = small(build), build(embed_dim=48, num_heads=3, plan=str(tmp_path / "plan.json")).eval()
    given.slim(plan)
    with torch.no_grad():
        assert torch.equal(given(images)[-1], built(images)[-1])
    assert built.plan.recovery == "linear"


@pytest.mark.parametrize("how", ["missing", "other plan", "flipped bit", "cut off", "NaN", "width", "not a tensor", "code"])
def test_maps_that_are_not_those_of_the_plan_are_refused(build, tmp_path, how):
    plan_on_disk(build, tmp_path)
    path = tmp_path / "plan.recovery.pt"
    content = torch.load(path, weights_only=True)
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "other plan":
        text = (tmp_path / "plan.json").read_text()
        (tmp_path / "plan.json").write_text(text.replace('"tiles_seen": 0', '"tiles_seen": 1'))
    elif how == "flipped bit":
        at = len(whole) // 3  # among the weights
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    elif how == "cut off":
        path.write_bytes(whole[:-100])
    else:
        patch = content["maps"][3]["patch"]
        wrong = {"NaN": patch * float("nan"), "width": patch[:-1], "not a tensor": 3, "code": print}[how]
        content["maps"][3]["patch"] = wrong
        torch.save(content, path)
    with pytest.raises(
        PlanError, match=r"There are no readable maps at .*plan\.recovery\.pt \(.*\), expected those of a plan"
    ):
        SlimmingPlan.load(tmp_path / "plan.json")


def test_a_plan_without_its_maps_cuts_nothing(build, tmp_path):
    plan = plan_on_disk(build, tmp_path)
    backbone = small(build)
    with pytest.raises(PlanError, match="Found a plan with recovery linear and no maps"):
        backbone.slim(dataclasses.replace(plan, maps=None))
    assert backbone.num_blocks == 12


def answer(model, images):
    with torch.no_grad():
        return model(images)[-1]


@pytest.mark.parametrize("into", ["intact", "cut", "other cut", "repaired elsewhere"])
def test_checkpoints_bring_their_maps(build, into):
    images, kept = land(3), [0, 1, 2, 6, 7]
    trained = small(build)
    trained.slim(plan_of(trained, kept, maps_for(trained, land(40), kept)))
    other = small(build, seed=5)
    if into == "repaired elsewhere":
        other.slim(plan_of(other, range(8), maps_for(other, land(40), range(8))))
    elif into != "intact":
        other.prune_depth(kept if into == "cut" else range(7))
    other.load_state_dict(trained.state_dict())
    assert other.pruned_state == trained.pruned_state
    assert torch.equal(answer(other, images), answer(trained, images))
    plain = small(build, seed=6)
    other.load_state_dict(plain.state_dict())  # and one without maps takes them away
    assert other.pruned_state.recovered == ()
    assert torch.equal(answer(other, images), answer(plain, images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repaired": [[8, 48, 1]]}, "has 'repaired' "),
        ({"repaired": [[3, 48, 1], [7, 48, 1]]}, "has 'repaired' "),
        ({"repaired": [[3, 48, 1], [8, 48, 2]]}, "has 'repaired' "),
        ({"repaired": [[3, 48, 1], [8, 47, 1]]}, "has 'repaired' "),
        ({"repaired": [[3, 2**40, 1], [8, 2**40, 1]]}, "has 'repaired' "),
        ({"repaired": [[3, 48, 1.5], [8, 48, 1]]}, "has '"),
        ({"repaired": [[3, 16384, 1], [8, 16384, 1]]}, "There is no map of 16384 x 16384"),
        ({"recovery.3.patch.weight": None}, r"There is no map of 48 x 48 for 'recovery\.3'"),
        ({"kept_blocks": [0, 1, 2, 6, 8]}, "has 'repaired' "),
    ],
)
@pytest.mark.parametrize("form", ["extra state", "buffers"])
def test_damaged_repairs_are_refused(build, change, message, form):
    trained, kept = small(build), [0, 1, 2, 6, 7]
    trained.slim(plan_of(trained, kept, maps_for(trained, land(40), kept)))
    said = {key: value for key, value in change.items() if key in STATE_KEYS}
    state = {**changed(trained.state_dict(), **said), **{key: value for key, value in change.items() if key not in said}}
    state = as_buffers(state) if form == "buffers" else state
    other = small(build)
    with pytest.raises(CheckpointError, match=message):
        other.load_state_dict({key: value for key, value in state.items() if value is not None})
    assert (other.num_blocks, other.pruned_state.recovered) == (12, ())


def test_vit_adapter_is_refused():
    family = next(one for one in FAMILIES if one.fewest > 1)
    backbone = wrapped(family)
    width = 192
    plan = plan_of(backbone, range(6), {6: RecoveryWeights(torch.eye(width), None)})
    with pytest.raises(RecoveryError, match="Found recovery linear with vit_adapter: true"):
        backbone.slim(dataclasses.replace(plan, full_num_blocks=backbone.full_num_blocks))


# --- in a run

in_a_run = pytest.mark.filterwarnings(
    "ignore::terratorch_simpler.errors.UntrainedEncoderWarning", "ignore::terratorch_simpler.errors.FewTilesWarning"
)


@in_a_run
@pytest.mark.parametrize(
    ("criterion", "drop", "recovery"),
    [("simpler", None, "linear"), ("angular", 4, "linear"), ("cka_intervals", 5, "linear"), ("block_influence", 5, "linear"),
     ("fixed", 6, "linear"), ("block_influence", 5, "none"), ("knee", None, "none")],
)  # fmt: skip
def test_any_rule_with_and_without_recovery_through_fit_resume_test_and_load(
    trainer, task, datamodule, tmp_path, criterion, drop, recovery
):
    module = task()
    settings = {"criterion": criterion, "drop_blocks": drop, "recovery": recovery, "output_dir": str(tmp_path / "out")}
    run = trainer(SimplerCallback(**settings), ModelCheckpoint(tmp_path / "ckpt", save_last=True), enable_checkpointing=True)
    run.fit(module, datamodule=datamodule())
    backbone = module.model.encoder
    plan = SlimmingPlan.load(tmp_path / "out" / "plan.json")
    assert plan == backbone.plan
    assert plan.criterion["name"] == criterion
    assert drop is None or backbone.num_blocks == 12 - drop
    assert plan.parameters["after"] == backbone.num_parameters()
    spans = spans_between(plan.kept_blocks, 12)
    if recovery == "linear":
        assert [repaired[:2] for repaired in plan.overview["repaired"]] == [list(span) for span in spans]
        assert (
            {int(name) for name in backbone.recovery}
            == {before for before, _ in spans}
            == {x[0] for x in backbone.pruned_state.recovered}
        )
        trained = list(backbone.recovery.parameters())
        held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
        assert {id(p) for p in trained} <= held
        assert not any(torch.equal(p, q) for p, q in zip(trained, map_weights(plan.maps), strict=True))  # it has learned
    shape, weights = backbone.pruned_state, {key: value.clone() for key, value in module.state_dict().items()}

    resumed = task(seed=3)
    trainer(SimplerCallback(**settings), max_epochs=2).fit(
        resumed, datamodule=datamodule(), ckpt_path=tmp_path / "ckpt" / "last.ckpt"
    )
    assert resumed.model.encoder.pruned_state == shape
    tested = task(seed=4)
    trainer().test(tested, datamodule=datamodule(), ckpt_path=tmp_path / "ckpt" / "last.ckpt", verbose=False)
    loaded = type(module).load_from_checkpoint(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    for other in (tested, loaded):
        assert other.model.encoder.pruned_state == shape
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in weights.items())
    given = task()
    given.model.encoder.slim(plan)
    again = task(backbone_plan=str(tmp_path / "out" / "plan.json"))
    images = torch.randn(2, 6, 64, 64)
    assert torch.equal(answer_of(given, images), answer_of(again, images))


def map_weights(maps):
    return [w.T for one in maps.values() for w in (one.patch, one.special) if w is not None]


def answer_of(module, images):
    with torch.no_grad():
        return module.eval()(images).output


@in_a_run
def test_recovery_of_one_process_and_of_two_is_the_same(tmp_path):
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        maps = together(recovered, folder, ranks)
        assert all(torch.equal(maps[0][1], one[1]) for one in maps)
        found[ranks] = maps[0]
    assert found[1][0] == found[2][0]
    torch.testing.assert_close(found[1][1], found[2][1], rtol=0, atol=1e-6)
    assert found[1][2] == pytest.approx(found[2][2], abs=1e-9)


def recovered(processes):
    from tests.test_distributed import small_backbone

    backbone = small_backbone()
    tiles = Tiles(land(230, size=64), batch_size=7 + processes.rank)
    found = measure(
        lambda batch: backbone(batch["image"]), backbone, tiles,
        ExtractionConfig(Simpler(), spans=[(3, 6)], min_tiles=9999), processes=processes,
    )  # fmt: skip
    recovery = found.recovery
    return (
        recovery.patch.tokens.tolist() + recovery.special.tokens.tolist(),
        recovery.solve([(3, 6)])[3].patch,
        recovery.patch.explained((3, 6)),
    )


@in_a_run
def test_a_plan_in_the_cache_brings_its_maps(trainer, task, datamodule, tmp_path, caplog):
    found = []
    for attempt in ("first", "second"):
        module = task()
        settings = {"plan_cache": str(tmp_path / "cache"), "output_dir": str(tmp_path / attempt)}
        with caplog.at_level("INFO"):
            trainer(SimplerCallback(recovery="linear", **settings)).fit(module, datamodule=datamodule())
        assert ("Took the plan of an earlier run" in caplog.text) == (attempt == "second")
        found.append(SlimmingPlan.load(tmp_path / attempt / "plan.json"))
    assert found[0] == found[1]
    assert all(torch.equal(p, q) for p, q in zip(*(map_weights(plan.maps) for plan in found), strict=True))


@in_a_run
def test_a_frozen_encoder_has_frozen_maps(trainer, task, datamodule, tmp_path):
    module = task()
    module.model.freeze_encoder()
    trainer(SimplerCallback(recovery="linear")).fit(module, datamodule=datamodule())
    assert len(module.model.encoder.recovery)
    assert not any(p.requires_grad for p in module.model.encoder.parameters())


def test_too_few_tiles_for_a_map_say_how_many_tokens_are_needed(build):
    found = run(build(), Tiles(land(32, size=32)), Fixed(5))  # 4 patches a tile, a quarter held out
    with pytest.raises(
        RecoveryError, match="Only 96 tokens to fit a linear map on; at least 192 are needed: stream more tiles"
    ):
        found.recovery.solve([(5, 12)])


def test_options_that_contradict_each_other():
    with pytest.raises(ConfigurationError, match="Found recovery 'quadratic', expected one of none, linear"):
        SimplerCallback(recovery="quadratic")
    with pytest.raises(ConfigurationError, match="Found recovery linear with tokens 'cls', expected 'patch'"):
        SimplerCallback(recovery="linear", tokens="cls")
    with pytest.raises(ConfigurationError, match=r"Found recovery linear with width 0\.5, expected one of them"):
        SimplerCallback(recovery="linear", width=0.5)


def test_graphs_answer_as_the_repaired_model(build, tmp_path):
    backbone, kept, images = small(build), [0, 1, 2, 6, 7], land(2, size=224)
    backbone.slim(plan_of(backbone, kept, maps_for(backbone, land(40), kept)))
    exported = torch.export.export(backbone, (images,))
    torch.testing.assert_close(exported.module()(images)[-1], answer(backbone, images), rtol=0, atol=1e-5)
    compiled = torch.compile(backbone, backend="eager")
    assert torch.equal(answer(compiled, images), answer(backbone, images))


def test_blocks_after_a_map_add_in_the_precision_of_the_others(build):
    backbone = small(build)
    backbone.slim(plan_of(backbone, (0, 2, 3), {1: RecoveryWeights(torch.eye(48), torch.eye(48))}))
    found = []
    backbone.register_block_hooks(lambda tokens: found.append(tokens.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        backbone(torch.randn(1, *backbone.input_shape))
    assert set(found) == {torch.float32}
