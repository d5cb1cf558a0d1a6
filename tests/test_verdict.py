"""Whether a criterion knows: planted features, the three conventions, files as observations, and what on_unsettled does."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import layer_norm

from terratorch_simpler import (
    Knee,
    NoAnswerError,
    Simpler,
    SlimmingPlan,
    UnsettledError,
    UnsettledWarning,
    Verdict,
    select_depth,
)
from terratorch_simpler.criteria import BlockInfluence, Bounds, Choice, Fixed, Statistics, judge, verdict_on
from terratorch_simpler.distributed import Processes
from terratorch_simpler.errors import ConfigurationError, ImplausibleInputWarning
from terratorch_simpler.extraction import ExtractionConfig, PartialResult, measure
from terratorch_simpler.extraction.grouped_similarity import GroupedSimilarity
from terratorch_simpler.report import full_table, plan_figure, plan_markdown, report_page
from tests.cli_runner import Command, config, together
from tests.in_memory_tiles import Tiles, land
from tests.synthetic_features import idle

ANY_DEPTH = Bounds()
BLOCKS, TILES, ROWS, WIDTH, GROUPS = 12, 64, 4, 48, 8


def planted(kind, seed):
    """Rows of one group before the first block and after every block."""
    generator = torch.Generator().manual_seed(seed)

    def drawn():
        of_tile = torch.randn(TILES, 1, WIDTH, generator=generator).expand(-1, ROWS, -1)
        return 0.7 * of_tile + 0.7 * torch.randn(TILES, ROWS, WIDTH, generator=generator)

    states = [drawn()]
    second = drawn()
    for block in range(1, BLOCKS + 1):
        state = states[-1]
        if kind == "drifting":
            state = 0.9 * state + 0.44 * drawn()
        elif kind == "saturated":
            state = state + 0.001 * drawn()
        elif kind == "two regimes":
            state = (states[0] if block <= 6 else second) + 0.03 * drawn()
        elif kind == "tiles settle later":  # tokens inside of a tile change early, tiles as a whole later
            share = 0.05 if block > 9 else 0.9
            noise = torch.randn(TILES, ROWS, WIDTH, generator=generator)
            within = state - state.mean(1, keepdim=True)
            within = 0.6 * within + 3 * (noise - noise.mean(1, keepdim=True)) if block <= 2 else within
            state = within + (1 - share / 6) * state.mean(1, keepdim=True) + share * 0.4 * drawn().mean(1, keepdim=True)
        elif kind != "constant":
            state = 0.85 * state + 0.527 * drawn() if block <= 5 else state + 0.03 * drawn()
        states.append(state)
    if kind == "unnormalised":
        offset = 1e5 * torch.randn(TILES, 1, 1, generator=generator).expand(-1, ROWS, WIDTH)
        states = [state + offset for state in states]
    return torch.stack(states).reshape(BLOCKS + 1, TILES * ROWS, WIDTH)


def judged(kind, groups=GROUPS, files=None, criterion=None, bounds=ANY_DEPTH, **options):
    similarity = GroupedSimilarity(BLOCKS, groups + 1, Processes())
    for number in range(groups):
        similarity.update(planted(kind, number), range(0, TILES * ROWS + 1, ROWS), number)
    evidence = similarity.evidence(groups, files or [1] * TILES * groups)
    criterion = criterion or Simpler()
    choice = criterion.choose(similarity.statistics(groups), BLOCKS, bounds)
    return verdict_on(criterion, choice, bounds, BLOCKS, evidence, **{"min_tiles": 256, "seed": 0, **options}), choice


@pytest.mark.parametrize(
    ("kind", "level", "said"),
    [
        ("settled", "clear", "of the resamples choose it"),
        ("two regimes", "clear", "of the resamples choose it"),
        ("drifting", "unsettled", "still rises towards fewer blocks at 2, the first depth"),
        ("saturated", "unsettled", "All depths score the same, within 1e-06"),
        ("constant", "unsettled", "All depths score the same, within 1e-06"),
        ("unnormalised", "unsettled", "All depths score the same, within 1e-06"),
    ],
)
def test_planted(kind, level, said):
    verdict, _ = judged(kind)
    assert verdict.level == level
    assert any(said in reason for reason in verdict.reasons)
    if said.startswith("All depths"):  # the curve is rounding, wherever it rises to
        assert not any("still rises" in reason for reason in verdict.reasons)


def test_an_unsettled_choice_tells_its_causes_as_well():
    verdict, _ = judged("drifting", untrained=True, implausible="The values of band 1 are implausible.")
    assert verdict.level == "unsettled"
    assert "still rises" in verdict.reasons[0]
    assert verdict.reasons[1:] == (
        "The encoder holds random weights, on which no depth means anything.",
        "The values of band 1 are implausible.",
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": 2}, "Not enough tiles for a vote: 4 groups"),
        ({"min_tiles": 600}, "Only 512 tiles were seen, fewer than the 600"),
        ({"untrained": True}, "random weights"),
        ({"implausible": "The values of band 1 are implausible."}, "The values of band 1 are implausible"),
        ({"others": {"knee": 12}}, "more than a quarter of the 12 blocks apart: 4 (this one), 12 (knee)"),
        ({"files": [171, 171, 170]}, "Not enough places for a vote: 3 files weigh as much as 3.0 equal ones"),
    ],
)
def test_weak(options, said):
    verdict, choice = judged("settled", **options)
    assert len(choice.kept_blocks) == 4
    assert verdict.level == "weak"
    assert said in verdict.reasons[0]


def test_files_of_many_tiles_make_the_resamples_differ_more():
    similarity = GroupedSimilarity(BLOCKS, 9, Processes())
    for number in range(GROUPS):
        similarity.update(planted("settled", number), range(0, TILES * ROWS + 1, ROWS), number)
    single = similarity.evidence(GROUPS, [1] * 512)
    shared = similarity.evidence(GROUPS, [16] * 32)
    assert (single.design_effect, single.num_places) == (1, 512)
    assert (shared.design_effect, shared.num_places) == (16, 32)
    plain = single.groups.resampled(1000, 0)
    wide = shared.groups.resampled(1000, 0, shared.design_effect**0.5)
    torch.testing.assert_close(wide.hsic.std(dim=0), 4 * plain.hsic.std(dim=0))


def test_conventions_are_those_of_float64():
    similarity = GroupedSimilarity(BLOCKS, 9, Processes())
    sums = {"raw": 0, "LayerNorm": 0, "tile mean": 0}
    for number in range(GROUPS // 4):
        rows = planted("settled", number)
        similarity.update(rows, range(0, TILES * ROWS + 1, ROWS), number)
        for half in rows.double().chunk(2, dim=1):  # so few groups are compared in halves
            for name, given in {
                "raw": half,
                "LayerNorm": layer_norm(half, (WIDTH,), eps=1e-6),
                "tile mean": half.reshape(BLOCKS + 1, TILES // 2, ROWS, WIDTH).mean(2),
            }.items():
                sums[name] = sums[name] + hsic_by_loops(given)
    conventions = similarity.evidence(GROUPS // 4, [1] * 128).conventions
    assert conventions.keys() == sums.keys()
    for name, numerators in sums.items():
        own = numerators.diagonal().sqrt()
        torch.testing.assert_close(conventions[name].spans, numerators / own / own[:, None], rtol=0, atol=1e-5)


def hsic_by_loops(features):
    """Song et al. 2012, theorem 2, pair by pair."""
    m = features.shape[1]
    kernels = [x @ x.T for x in features - features.mean(1, keepdim=True)]
    for kernel in kernels:
        kernel.fill_diagonal_(0)
    return torch.tensor(
        [
            [
                ((k * l).sum() + k.sum() * l.sum() / ((m - 1) * (m - 2)) - 2 / (m - 2) * (k @ l).sum()) / (m * (m - 3))
                for l in kernels  # noqa: E741
            ]
            for k in kernels
        ],
        dtype=torch.float64,
    )


def test_tile_means_against_raw_tokens():
    verdict, _ = judged("tiles settle later")
    assert verdict.level == "unsettled"
    assert any(
        "The conventions of comparing tokens choose depths more than a quarter" in reason for reason in verdict.reasons
    )


def test_noise_and_negative_scores():
    scores = {2: -0.2, 3: -0.1, 4: -0.3}
    assert judge(scores, 3, 6, needs_positive_score=True).reasons == (
        "No depth scores above 0: the highest score is -0.100.",
    )
    assert judge(scores, 3, 6).level == "clear"
    noisy = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    assert "standard errors" in judge(scores, 3, 6, resampled=noisy).reasons[0]


def test_what_is_not_chosen_has_no_verdict():
    assert judged("settled", criterion=Fixed(keep=4))[0] is None
    assert judged("settled", bounds=Bounds(4, 4))[0] is None
    budget, _ = judged("settled", criterion=BlockInfluence(drop_blocks=4))
    assert budget.level in ("clear", "weak")


class Undecided(Simpler):
    """A criterion with a verdict of its own, which keeps three blocks."""

    name = "undecided"

    def choose(self, statistics, num_blocks, bounds):
        scores = super().choose(statistics, num_blocks, bounds).scores
        return Choice((0, 1, 2), scores, Verdict("unsettled", ("depths cannot be told apart",)))


def test_a_criterion_may_judge_itself():
    verdict, choice = judged("settled", criterion=Undecided())
    assert verdict is choice.verdict


class Sure(Undecided):
    """Says that its choice is clear."""

    def choose(self, statistics, num_blocks, bounds):
        return replace(super().choose(statistics, num_blocks, bounds), verdict=Verdict("clear", ("Best depth: 3.",)))


@pytest.mark.parametrize(
    ("doubt", "said"),
    [
        ({"untrained": True}, "The encoder holds random weights, on which no depth means anything."),
        ({"implausible": "Band 2 is implausible."}, "Band 2 is implausible."),
    ],
)
def test_what_speaks_against_any_choice_speaks_against_that_of_a_criterion_that_judges_itself(doubt, said):
    assert judged("settled", criterion=Sure())[0] == Verdict("clear", ("Best depth: 3.",))
    assert judged("settled", criterion=Sure(), **doubt)[0] == Verdict("weak", (said, "Best depth: 3."))
    assert judged("settled", criterion=Undecided(), **doubt)[0].level == "unsettled"


def test_knee_has_no_answer_where_similarity_to_later_blocks_falls():
    similarity = torch.full((6, 6), 0.9, dtype=torch.float64).fill_diagonal_(1)
    similarity[4, 5] = similarity[5, 4] = 0.1
    hsic = torch.ones(7, 7, dtype=torch.float64)
    hsic[1:, 1:] = similarity
    statistics = Statistics(hsic, hsic, hsic)
    with pytest.raises(
        NoAnswerError, match=r"falls with depth, from 0.900 after the first block to 0.100 after block 5 of 6"
    ):
        Knee().choose(statistics, 6, Bounds())


# --- one pass, resumed, by several ranks


def evidence_of(processes, keeper=None, end_after=None):
    from tests.test_distributed import small_backbone

    backbone, count = small_backbone(), 400
    tiles = Tiles(drifting(count), batch_size=5 + processes.rank)
    inner = tiles.batch
    tiles.batch = lambda positions: {**inner(positions), "path": [f"{position // 7}.tif" for position in positions]}
    sent = 0

    def forward(batch):
        nonlocal sent
        sent += len(batch["index"])
        if end_after is not None and sent > end_after:
            raise KeyboardInterrupt
        return backbone(batch["image"])

    config = ExtractionConfig(Simpler(), min_tiles=10_000, max_tiles=10_000)
    found = measure(forward, backbone, tiles, config, processes=processes, partial_result=keeper)
    return found.evidence, (found.votes, found.implausible)


def check_same(found, expected):
    assert sorted(found.tiles_of_file) == sorted(expected.tiles_of_file)
    for name, statistics in expected.conventions.items():
        torch.testing.assert_close(found.conventions[name].similarity, statistics.similarity, rtol=0, atol=1e-6)


def test_resumed_and_distributed_passes_have_the_same_evidence(tmp_path):
    expected, same = evidence_of(Processes())
    assert of_band(drifting(400)) in same[1]
    assert sum(expected.tiles_of_file) == 400
    assert len(expected.tiles_of_file) == 58
    keeper = PartialResult(tmp_path / "pass.pt")
    with pytest.raises(KeyboardInterrupt):
        evidence_of(Processes(), keeper, 250)
    assert keeper.path.exists()
    resumed, others = evidence_of(Processes(), PartialResult(tmp_path / "pass.pt"))
    check_same(resumed, expected)
    assert others == same
    for of_rank, others in together(evidence_of, tmp_path / "two", 2):
        check_same(of_rank, expected)
        assert others == same


@pytest.mark.parametrize("seed", range(20))
def test_random_weights_are_never_clear(seed):
    import timm

    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=8, embed_dim=32, num_heads=2)
    images = land(288, size=32, bands=3, seed=seed).split(32)
    assert select_depth(model, images, min_tiles=64, max_tiles=288, progress=False).verdict.level != "clear"


# --- implausible input


@pytest.mark.parametrize(
    ("spoil", "named"), [(lambda x: x * 3000, "band 4"), (lambda x: x + 5, "band 4"), (lambda x: x * 0.01, "band 4")]
)
def test_an_implausible_band_is_named(build, spoil, named):
    images = land(64, size=32)
    images[:, 4] = spoil(images[:, 4])
    backbone = build(embed_dim=48, num_heads=3, depth=6)
    valid = torch.ones(64, 32, 32, dtype=torch.bool)
    valid[:, :16] = False
    images[:, :, :16] = 1e4  # nodata
    tiles = Tiles(images, valid)
    config = ExtractionConfig(Simpler(), min_tiles=64, max_tiles=64)
    with pytest.warns(ImplausibleInputWarning, match=rf"values of {named} \(0-based\) \(mean \S+, std \S+\) are"):
        measure(lambda batch: backbone(batch["image"]), backbone, tiles, config)
    tiles.band_names = ["BLUE", "GREEN", "RED", "NIR", "SWIR", "SWIR2"]
    with pytest.warns(ImplausibleInputWarning, match=r"values of band SWIR \("):
        measure(lambda batch: backbone(batch["image"]), backbone, tiles, config)


def drifting(count, size=32):
    """Images whose band 2 grows from tile to tile: its mean depends on which are counted."""
    images = land(count, size=size)
    images[:, 2] += torch.linspace(5, 50, count)[:, None, None]
    return images


def said_of(tiles, backbone, **kwargs):
    options = {name: kwargs.pop(name) for name in ("min_tiles", "max_tiles") if name in kwargs}
    config = ExtractionConfig(Simpler(), **{"min_tiles": 10_000, "max_tiles": 10_000, **options})
    return measure(
        kwargs.pop("forward", lambda batch: backbone(batch["image"])), backbone, tiles, config, **kwargs
    ).implausible


def of_band(images, valid=None):
    pixels = images[:, 2].double() if valid is None else images[:, 2].double()[valid]
    return f"band 2 (0-based) (mean {pixels.mean():.3g}, std {pixels.std(correction=0):.3g})"


def running_out_of_memory(backbone, limit):
    """Memory runs out in the middle of the encoder with more tiles than that."""

    def check(_module, inputs):
        if len(inputs[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    backbone.blocks[2].register_forward_pre_hook(check)
    return backbone


@pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.ImplausibleInputWarning")
def test_input_is_that_of_the_tiles_that_count(build, tmp_path):
    def make():
        return build(embed_dim=48, num_heads=3, depth=6)

    images = drifting(300)
    expected = of_band(images[:200])
    for size in (1, 7, 64, 300):
        assert expected in said_of(Tiles(images, batch_size=size), make(), max_tiles=200)
    assert expected in said_of(Tiles(images, batch_size=33), running_out_of_memory(make(), 5), max_tiles=200)

    settled = idle(make, range(3, 6))
    for size in (7, 300):  # it stops after two groups, whatever was read by then
        assert of_band(images[:128]) in said_of(Tiles(images, batch_size=size), settled, min_tiles=100)

    sent = 0

    def forward(batch):
        nonlocal sent
        sent += len(batch["index"])
        if sent > 150:
            raise KeyboardInterrupt
        return backbone(batch["image"])

    backbone, keeper = make(), PartialResult(tmp_path / "pass.pt")
    with pytest.raises(KeyboardInterrupt):
        said_of(Tiles(images), backbone, partial_result=keeper, forward=forward)
    assert keeper.path.exists()
    assert of_band(images) in said_of(Tiles(images), backbone, partial_result=PartialResult(keeper.path))


# --- the plan and its report

PLAN = SlimmingPlan(
    "tiny", 12, tuple(range(7)), {"name": "simpler", "args": {}}, similarity=torch.ones(12, 12).tolist(),
    scores={6: 0.1, 7: 0.2}, tiles_seen=300, verdict=Verdict("weak", ("Only 60% of the resamples choose it.",)),
)  # fmt: skip


def test_plan_keeps_its_verdict(tmp_path):
    assert str(PLAN.verdict) == "weak: 7 of 12 blocks"
    assert PLAN.depth == 7
    found = SlimmingPlan.load(PLAN.save(tmp_path / "plan.json"))
    assert found.verdict == PLAN.verdict
    content = json.loads(PLAN.to_json())
    assert content["verdict"] == {"level": "weak", "reasons": ["Only 60% of the resamples choose it."]}
    del content["verdict"]
    assert SlimmingPlan.from_dict(content).verdict is None
    assert "verdict" not in json.loads(replace(PLAN, verdict=None).to_json())


def test_the_verdict_comes_first():
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as capture:
        console.print(full_table(PLAN))
    said = "weak: 7 of 12 blocks. Only 60% of the resamples choose it."
    assert capture.get().splitlines()[0].strip() == said
    assert "<h1>weak: 7 of 12 blocks</h1>" in report_page(PLAN)
    assert plan_figure(PLAN).get_suptitle().startswith("weak: 7 of 12 blocks\n")
    assert plan_markdown(PLAN).startswith("**weak: 7 of 12 blocks.")


# --- on_unsettled


@pytest.fixture
def flat(build):
    """A model and images between whose blocks nothing changes."""
    return idle(lambda: build(embed_dim=48, num_heads=3, depth=8), range(8)), land(64, size=32).split(32)


@pytest.mark.parametrize(("on_unsettled", "depth"), [("apply", 2), ("half", 4), ("intact", 8)])
def test_select_depth_does_what_on_unsettled_says(flat, on_unsettled, depth):
    with pytest.warns(UnsettledWarning, match="is unsettled: . of 8 blocks. "):
        plan = select_depth(*flat, min_tiles=64, progress=False, on_unsettled=on_unsettled)
    assert plan.depth == depth
    assert ("The criterion 'simpler' chose 2 of 8 blocks" in plan.verdict.reasons[-1]) == (on_unsettled != "apply")


def test_an_unsettled_choice_may_be_an_error(flat):
    with pytest.raises(UnsettledError, match="All depths score the same"):
        select_depth(*flat, min_tiles=64, progress=False, on_unsettled="error")
    with pytest.raises(ConfigurationError, match="Found on_unsettled 'halt', expected one of apply, half, intact, error"):
        select_depth(*flat, on_unsettled="halt")


@pytest.mark.parametrize(("on_unsettled", "depth"), [("apply", 3), ("half", 6), ("intact", 12), ("error", None)])
def test_fit_does_what_on_unsettled_says(on_unsettled, depth, scenes, tmp_path):
    criterion = {"class_path": "tests.test_verdict.Undecided"}
    settings = config(scenes, tmp_path, criterion=criterion, on_unsettled=on_unsettled)
    settings["trainer"] |= {"max_steps": 1, "limit_val_batches": 0}
    command = Command(tmp_path, settings)
    written = {path.name for path in (tmp_path / "simpler").iterdir()} if command.wait() == [0] else None
    assert (written is None) == (on_unsettled == "error")
    told = " ".join(command.output().split())
    assert told.count("depths cannot be told apart") == (2 if depth is None else 1)  # in the table, and in an error
    if depth is None:
        assert {path.name for path in (tmp_path / "simpler").iterdir()} == {"report.html", "report.png"}
        assert not (tmp_path / "checkpoints").exists()
    else:
        plan = SlimmingPlan.load(tmp_path / "simpler" / "plan.json")
        assert (plan.depth, plan.verdict.level) == (depth, "unsettled")
