"""The sweep: what every cut costs, on encoders that are really cut, and the command that compares them."""

import copy
import csv
import io
import math

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import terratorch_simpler.demo as demo
from terratorch_simpler import SlimmingPlan
from terratorch_simpler.cli import main
from terratorch_simpler.errors import ConfigurationError
from terratorch_simpler.report.tradeoffs import sweep_figure
from terratorch_simpler.sweep import COLUMNS, SweepSettings
from terratorch_simpler.sweep.cost import Cost, TensorBytes, _throughput, measure_costs
from terratorch_simpler.sweep.rows import sweep_table
from terratorch_simpler.sweep.variants import Variant, build_controls, build_variants, list_variants
from tests.families import FAMILIES, wrapped

pytestmark = pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.FewTilesWarning")
NUMBERS = ("parameters", "macs", "latency_ms", "throughput", "batch_size", "peak_memory_mib")
SHAPE = (6, 64, 64)


def plan_of(blocks=12, kept=(0, 1, 2), overview=None, **more):
    plan = SlimmingPlan("prithvi_eo_v2_tiny_tl", blocks, kept, {"name": "simpler", "args": {}}, **more)
    if overview is not None:
        object.__setattr__(plan, "overview", overview)  # also where plans have no such field yet
    return plan


def costs_of(encoders, repeats=2, shape=SHAPE):
    return measure_costs(encoders, shape, repeats, torch.no_grad)


# --- variants


def test_every_depth_and_the_blocks_that_criteria_pick_are_compared_once_a_width():
    overview = {
        "criteria": {
            "simpler": {"kept_blocks": [0, 1, 2], "scores": None},
            "knee": {"kept_blocks": [0, 1, 2], "scores": None},
            "block_influence": {"kept_blocks": [0, 2, 5], "scores": None},
        }
    }
    found = list_variants(plan_of(6, overview=overview), 2, [1.0, 0.5, 1.0])
    depths = [tuple(range(depth)) for depth in (2, 3, 4, 5, 6)]
    assert [(variant.kept, variant.width) for variant in found] == [
        (kept, width) for width in (1.0, 0.5) for kept in [*depths, (0, 2, 5)]
    ]
    assert [variant.chosen_by for variant in found if variant.width == 0.5] == [()] * 6
    assert [variant.chosen_by for variant in found if variant.width == 1.0] == [
        (), ("knee", "simpler"), (), (), (), ("block_influence",),
    ]  # fmt: skip
    assert [variant.first_blocks for variant in found[4:6]] == [True, False]


def test_without_an_overview_the_plan_itself_says_what_was_chosen():
    found = list_variants(plan_of(6, kept=(0, 4)), 1, [1.0])
    assert [variant.kept for variant in found if variant.chosen_by == ("simpler",)] == [(0, 4)]


def test_variants_share_the_weights_and_leave_the_intact_encoder_as_it_was(build):
    intact = build()
    before = copy.deepcopy(intact.state_dict())
    variants = [Variant(tuple(range(3))), Variant((0, 5, 11)), Variant(tuple(range(12)))]
    encoders = build_variants(intact, variants)
    own = {id(parameter) for parameter in intact.parameters()}
    assert all(id(parameter) in own for encoder in encoders for parameter in encoder.parameters())
    x = torch.randn(2, *SHAPE)
    for encoder, variant in zip(encoders, variants, strict=True):
        reference = build(keep=list(variant.kept))
        reference.load_state_dict(encoder.state_dict(), strict=True)
        assert encoder.kept == variant.kept
        assert torch.equal(encoder(x)[-1], reference(x)[-1])
    assert intact.num_blocks == 12
    assert intact.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in intact.state_dict().items())


def test_narrower_variants_are_those_of_the_backbone_itself(build):
    intact = build()
    before = copy.deepcopy(intact.state_dict())
    narrow, wide = build_variants(intact, [Variant(tuple(range(4)), 0.5), Variant(tuple(range(4)))])
    reference = build()
    reference.set_width(0.5)
    reference.prune_depth(range(4))
    x = torch.randn(2, *SHAPE)
    assert narrow.width == 0.5
    assert torch.equal(narrow(x)[-1], reference(x)[-1])
    assert narrow.num_parameters() == reference.num_parameters() < wide.num_parameters()
    assert all(torch.equal(value, before[name]) for name, value in intact.state_dict().items())


# --- costs


def hooked_macs(encoder, x):
    """Linear layers and convolutions by their shapes, and the two products of attention, by hand."""
    found = []

    def linear(module, args, output):
        found.append(output.numel() * module.in_features)

    def convolution(module, args, output):
        found.append(output.numel() * module.weight[0].numel())

    def attention(module, args, output):
        batch, tokens, _ = args[0].shape
        found.append(2 * batch * tokens**2 * module.num_heads * module.head_dim)

    kinds = {"Linear": linear, "Conv3d": convolution, "Conv2d": convolution, "Attention": attention}
    hooks = [part.register_forward_hook(kinds[type(part).__name__]) for part in encoder.modules()
             if type(part).__name__ in kinds]  # fmt: skip
    with torch.no_grad():
        encoder(x)
    for hook in hooks:
        hook.remove()
    return sum(found)


def test_parameters_and_macs_are_those_of_the_encoder_that_was_really_cut(build):
    intact = build()
    variants = [Variant(tuple(range(depth))) for depth in (1, 5, 12)] + [Variant((0, 7))]
    for variant, cost in zip(variants, costs_of(build_variants(intact, variants)), strict=True):
        cut = build()
        cut.prune_depth(variant.kept)
        assert cost.parameters == sum(parameter.numel() for parameter in cut.parameters())
        assert cost.macs == hooked_macs(cut, torch.zeros(1, *SHAPE))
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            cut(torch.zeros(1, *SHAPE))
        assert cost.macs == counter.get_total_flops() // 2
        assert 0 < cost.latency_ms < 10_000
        assert cost.throughput > 100 / cost.latency_ms  # a tenth of one after the other, at the least
        assert math.log2(cost.batch_size).is_integer()
        assert cost.peak_memory_mib > cost.parameters * 4 / 2**20


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.key in ("terramind modalities", "prithvi time series")],
                         ids=lambda family: family.key)  # fmt: skip
def test_modalities_and_time_series_are_measured(family):
    encoders = build_variants(wrapped(family), [Variant((0,)), Variant((0, 1, 2))])
    one, three = costs_of(encoders, repeats=1, shape=family.shape)
    assert one.parameters < three.parameters
    assert one.macs < three.macs


def test_the_order_is_another_one_each_time_and_covers_all():
    order = []

    class Pass:
        def __init__(self, name, fastest):
            self.name, self.fastest = name, fastest

        def images(self, batch):
            return batch

        def seconds(self, batch):
            if batch > 64:
                raise torch.OutOfMemoryError
            order.append(self.name)
            return 1.0 if batch <= self.fastest else batch / self.fastest

    found = _throughput([Pass("a", 4), Pass("b", 1), Pass("c", 1000)], np.random.default_rng(0))
    assert found == [(4.0, 4), (1.0, 1), (64.0, 64)]
    assert {"".join(dict.fromkeys(order[i : i + 12])) for i in range(0, 24, 12)} != {"abc"}


def test_peak_memory_counts_what_lives_at_the_same_time():
    x = torch.zeros(1000)
    with torch.no_grad(), TensorBytes([x]) as found:
        y = x + 1  # 4000 bytes
        z = y * 2  # 8000
        del y
        w = z + 1  # 8000 again
        v = w.view(10, 100)
        del w
        u = v[:1] + 1  # 8400
        x += 1  # is there already
        del z
    assert found.peak == 8400
    assert u.shape == (1, 100)


def test_deeper_encoders_need_no_less_memory(build):
    encoders = build_variants(build(), [Variant(tuple(range(depth))) for depth in (1, 6, 12)])
    memory = [cost.peak_memory_mib for cost in costs_of(encoders, repeats=1)]
    assert memory == sorted(memory)
    weights = [sum(t.nbytes for t in [*e.parameters(), *e.buffers()]) / 2**20 for e in encoders]
    assert memory[-1] - memory[0] == pytest.approx(weights[-1] - weights[0], abs=0.3)  # features of all depths are returned


@pytest.mark.parametrize(("name", "expected"), [
    ("simpler_prithvi_eo_tiny", ["prithvi_eo_v2_tiny_tl", "prithvi_eo_v2_100_tl"]),
    ("simpler_terramind_v1_tiny", ["terramind_v1_small"]),
    ("simpler_timm_vit_tiny_patch16_224", []),
])  # fmt: skip
def test_controls_are_small_official_models_for_the_same_input(build, name, expected):
    settings = {"terramind_v1_tiny": {"modalities": ["S1GRD"]}, "prithvi_eo_tiny": {"bands": ["RED", "GREEN"]}}
    kwargs = settings.get(name.removeprefix("simpler_"), {})
    backbone = build(name, **kwargs)
    model_args = {f"backbone_{key}": value for key, value in kwargs.items()}
    found = list(build_controls(backbone, {"backbone": name, "backbone_drop_path": 0.1, **model_args}))
    assert [control.name for control in found] == expected
    for control in found:
        shape = (2, 64, 64)
        assert control(torch.randn(1, *shape))[-1].shape[0] == 1
        with_kwargs = list(build_controls(backbone, {"backbone": name, "backbone_kwargs": kwargs}))
        assert [part.num_parameters() for part in with_kwargs] == [part.num_parameters() for part in found]


@pytest.mark.parametrize(("settings", "message"), [
    ({"widths": (1.0, 0.0)}, r"--widths takes shares above 0 and up to 1, but got \[0\.0\]"),
    ({"widths": (1.5,)}, r"but got \[1\.5\]"),
    ({"repeats": 0}, "--repeats has to be at least 1, but is 0"),
])  # fmt: skip
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        SweepSettings(**settings)


# --- the command


def read(path):
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return tuple(reader.fieldnames), list(reader)


@pytest.fixture(scope="module")
def config(tmp_path_factory, scenes):
    """The demo's config on small scenes, with the encoder that ships with the package."""
    folder = tmp_path_factory.mktemp("run")
    path = demo.write_config(folder, scenes, demo.ENCODER)
    settings = yaml.safe_load(path.read_text())
    settings["trainer"]["callbacks"] = [{"class_path": "terratorch_simpler.SimplerCallback"}]
    settings["trainer"].update(enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    settings["data"]["init_args"].update(num_workers=0, predict_data_root=str(scenes / "images"))
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def swept(config, tmp_path_factory):
    """Folder of one sweep, with a setting overridden."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("terratorch_simpler.sweep.cost.LARGEST_BATCH", 2)
        args = ["--repeats", "2", "--widths", "0.5", "1.0", "--data.init_args.batch_size", "4"]
        assert main(["sweep", "-c", str(config), "-o", str(folder), *args]) == 0
    return folder


def diagnosed_of(folder):
    return read(folder / "blocks.csv")[1]


def test_the_command_writes_a_line_for_every_depth_and_the_controls(swept, build):
    plan = SlimmingPlan.load(swept / "plan.json")
    columns, rows = read(swept / "sweep.csv")
    names = ("simpler", "knee", "block_influence", "angular", "cka_intervals")
    assert columns[: len(COLUMNS)] == COLUMNS
    assert set(columns[len(COLUMNS) :]) == {f"score_{name}" for name in names}
    for row in rows:
        whole = (row["kind"], row["width"]) == ("slimmed", "1.0")
        first = whole and row["kept"] == " ".join(map(str, range(int(row["depth"]))))
        for name in names:
            score = plan.overview["criteria"][name]["scores"].get(int(row["depth"])) if first else None
            assert row[f"score_{name}"] == ("" if score is None else str(score))
    assert (swept / "sweep.png").stat().st_size > 10_000
    page = (swept / "report.html").read_text()
    assert "prithvi_eo_v2_100_tl" in page
    assert f"{float(diagnosed_of(swept)[4]['effective_dimension']):.1f}" in page
    blocks, diagnosed = read(swept / "blocks.csv")
    assert blocks == ("block", "explained_variance", "effective_dimension", "feature_correlation")
    assert [int(row["block"]) for row in diagnosed] == list(range(12))  # numbered as in backbone_keep
    assert all(1 <= float(row["effective_dimension"]) <= 192 for row in diagnosed)
    narrow = [row for row in rows if row["width"] == "0.5"]
    assert [int(row["depth"]) for row in narrow][:12] == list(range(1, 13))
    assert all(row["chosen_by"] == row["similarity"] == row["recovery_r2"] == "" for row in narrow)
    assert int(narrow[3]["parameters"]) == build(keep=4, width=0.5).num_parameters()
    slim = [row for row in rows if row["kind"] == "slimmed" and row["width"] == "1.0"]
    prefixes = [row for row in slim if row["kept"] == " ".join(map(str, range(int(row["depth"]))))]
    assert [int(row["depth"]) for row in prefixes] == list(range(1, 13))
    assert [row["name"] for row in rows if row["kind"] == "control"] == ["prithvi_eo_v2_100_tl"]
    assert {row["name"] for row in slim} == {"prithvi_eo_v2_tiny_tl"}
    for row in rows:
        assert all(float(row[column]) > 0 for column in NUMBERS)
        assert row["knn"] == row["linear"] == row["knn_recovered"] == ""
    cut = build(keep=5)
    assert int(prefixes[4]["parameters"]) == cut.num_parameters()
    assert [float(row["similarity"]) for row in prefixes] == [line[-1] for line in plan.similarity]
    chosen = next(row for row in slim if "simpler" in row["chosen_by"].split())
    assert chosen["kept"] == " ".join(map(str, plan.kept_blocks))
    assert (int(chosen["parameters"]), int(chosen["macs"])) == (plan.parameters["after"], plan.macs["after"])
    last = prefixes[-1]
    assert (int(last["parameters"]), int(last["macs"])) == (plan.parameters["before"], plan.macs["before"])


def test_the_table_has_a_line_for_every_row_and_no_empty_columns(swept):
    _, rows = read(swept / "sweep.csv")
    numbers = {*NUMBERS, "depth", "width", "similarity", "recovery_r2"}
    parsed = [
        {
            key: (float(value) if key in numbers else value) if value or key == "chosen_by" else None
            for key, value in row.items()
        }
        for row in rows
    ]
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(sweep_table([{**row, "depth": int(row["depth"])} for row in parsed]))
    text = console.export_text()
    assert all(f"first {depth} " in text for depth in range(1, 13))
    assert "prithvi_eo_v2_100_tl" in text
    assert "simpler" in text
    assert "k-NN" not in text


@pytest.mark.parametrize(("args", "message"), [
    (["--widths", "2"], "but got [2.0]"),
    (["--repeats", "0"], "--repeats has to be at least 1"),
])  # fmt: skip
def test_impossible_arguments_are_status_2(config, capsys, args, message):
    assert main(["sweep", "-c", str(config), *args]) == 2
    assert message in capsys.readouterr().err


def test_an_encoder_that_is_cut_already_is_refused(config, tmp_path, capsys):
    keep = ["--model.init_args.model_args.backbone_keep", "3"]
    assert main(["sweep", "-c", str(config), "-o", str(tmp_path), *keep]) == 2
    assert "Blocks or width of the encoder are given" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_figure_draws_every_depth_and_names_the_controls():
    cost = Cost(10, 10, 1.0, 1.0, 1, 1.0)._asdict()
    rows = [
        {**dict.fromkeys(COLUMNS), **cost, "kind": "slimmed", "name": "x", "depth": depth, "width": 1.0,
         "kept": "", "chosen_by": "simpler" if depth == 2 else "", "latency_ms": depth, "similarity": 0.1 * depth}
        for depth in (1, 2, 3)
    ]  # fmt: skip
    rows.append({**dict.fromkeys(COLUMNS), **cost, "kind": "control", "name": "small", "width": 1.0})
    axes = sweep_figure(rows).axes[0]
    assert {text.get_text() for text in axes.texts} == {"1", "2", "3"}
    assert {"small", "width 1", "chosen by a criterion"} <= set(axes.get_legend_handles_labels()[1])


def test_a_criterion_picks_what_it_chose_whatever_is_kept():
    """on_unsettled: half keeps others."""
    overview = {"criteria": {"simpler": {"kept_blocks": [0, 1, 2], "scores": None}}}
    plan = plan_of(6, kept=(0, 1), overview=overview)
    picked = {len(each.kept): each.chosen_by for each in list_variants(plan, 1, [1.0]) if each.chosen_by}
    assert picked == {3: ("simpler",)}
