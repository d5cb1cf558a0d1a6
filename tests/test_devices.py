"""Devices, on a machine without any: what runs together lies together, nothing waits, and all comes back where it was."""

import inspect
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics import MeanMetric

from terratorch_simpler.criteria import Bounds, Simpler
from terratorch_simpler.distributed import Processes
from terratorch_simpler.extraction import (
    ExtractionConfig,
    FeatureExtractor,
    RecoveryStatistics,
    TokenSampler,
    collector,
    measure,
    on_device,
)
from terratorch_simpler.extraction.auto_batch import AutoBatch, float64_device
from terratorch_simpler.extraction.groups import Group, TileRef
from terratorch_simpler.extraction.recovery_statistics import without_special
from terratorch_simpler.extraction.token_sampling import TokenSample
from terratorch_simpler.functional import hsic
from terratorch_simpler.functional.angles import angle_sums
from terratorch_simpler.functional.hsic import hsic_matrix, moments
from terratorch_simpler.lightning import labelled_images, selection
from terratorch_simpler.lightning import task as lightning_task
from terratorch_simpler.lightning.labelled_images import labelled_rows
from terratorch_simpler.metrics import LayerSimilarity
from terratorch_simpler.selection_config import SelectionConfig
from tests.fake_gpu import FakeGpu
from tests.families import FAMILIES, wrapped
from tests.in_memory_tiles import Tiles, land


@pytest.fixture
def gpu(monkeypatch):
    return FakeGpu(monkeypatch)


class Own(LightningModule):
    """A user's own: a scale, a buffer and a layer before the encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.register_buffer("offset", torch.zeros(6, 1, 1))
        self.mix = nn.Conv2d(6, 6, 1)
        self.encoder = encoder
        self.seen = []

    def forward(self, image):
        x = self.mix(image * self.scale + self.offset)
        self.seen.append(x.device.type)
        return self.encoder(x)


class Elsewhere(nn.Module):
    """Parts on two devices, a buffer that two share, and a metric."""

    def __init__(self, gpu):
        super().__init__()
        self.here = nn.Linear(2, 2)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.here.weight
        self.norm = nn.BatchNorm1d(2)
        self.same = nn.BatchNorm1d(2)
        self.same.running_mean = self.norm.running_mean
        self.metric = MeanMetric()
        with gpu.mode:
            self.register_buffer("there", torch.empty(3, device="cuda:1"))


def everything(module):
    held = [tensors for part in module.modules() for tensors in (part._parameters, part._buffers)]
    return [(id(tensor), tensor.device) for tensors in held for tensor in tensors.values() if tensor is not None]


@pytest.mark.parametrize("fails", [False, True])
def test_all_comes_back_where_it_was(gpu, fails):
    module = Elsewhere(gpu)
    before, state = everything(module), {name: value.clone() for name, value in module.here.state_dict().items()}
    with gpu.mode:
        try:
            with on_device(module, gpu.device):
                assert {device.type for _, device in everything(module)} == {"cuda"}
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
    assert everything(module) == before
    assert module.same.running_mean is module.norm.running_mean
    assert module.metric.device.type == module.metric.mean_value.device.type == "cpu"
    assert all(torch.equal(value, state[name]) for name, value in module.here.state_dict().items())


def test_lightnings_own_idea_of_the_device_stays(gpu, build):
    module = Own(build(embed_dim=48, num_heads=3))
    module._device = torch.device("cuda", 0)  # Lightning says so before setup, when all is on the CPU yet
    with gpu.mode, on_device(module, gpu.device):
        pass
    assert module.device == torch.device("cuda", 0)


@pytest.fixture
def lent(gpu, monkeypatch):
    """The selection's device is the GPU."""
    for part in (selection, labelled_images):
        monkeypatch.setattr(part, "on_device", lambda module, device: gpu.lent(on_device, module, device))
    return gpu


def fake_trainer(gpu, datamodule=None):
    return SimpleNamespace(
        strategy=SimpleNamespace(root_device=gpu.device), precision_plugin=SimpleNamespace(forward_context=lambda: gpu.mode),
        datamodule=datamodule, fast_dev_run=True, is_global_zero=True, progress_bar_callback=None,
    )  # fmt: skip


def one_batch(gpu, found):
    """A pass of one batch."""

    def run(forward, backbone, source, *_, **__):
        batch = next(iter(source))
        outputs = []
        handles = backbone.register_block_hooks(outputs.append)
        with gpu.mode:
            forward({key: gpu.like(value) for key, value in batch.items()})
        for handle in handles:
            handle.remove()
        found.extend(output.device.type for output in outputs)
        raise InterruptedError

    return run


@pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.UntrainedEncoderWarning")
def test_whatever_runs_before_the_encoder_is_moved_with_it(lent, build, monkeypatch):
    module, found = Own(build(embed_dim=48, num_heads=3)), []
    before = everything(module)
    monkeypatch.setattr(selection, "measure", one_batch(lent, found))
    how = SelectionConfig(Simpler(), Bounds(), 1.0, "patch", 32, 64, 0)
    with pytest.raises(InterruptedError):
        selection._stream(fake_trainer(lent), module, module.encoder, Tiles(land(40)), how, Processes(), None)
    assert found == ["cuda"] * 13
    assert module.seen == ["cuda"]
    assert everything(module) == before


class Copies(TorchDispatchMode):
    """Where copies from the GPU go: every one waits for it."""

    def __init__(self):
        super().__init__()
        self.to = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.device.type == "cpu":
            given = [value for value in tree_leaves((args, kwargs or {})) if isinstance(value, torch.Tensor)]
            if any(value.device.type == "cuda" for value in given):
                self.to.append(found.device)
        return found


TOKENS = {"patch": ("patch", 0), "with class tokens": ("patch", 1), "mean": ("mean", 0), "all": ("all", 0)}


def rows_of(gpu, backbone, tokens, special=0, images=None):
    """Rows of a batch, as a pass draws them."""

    def forward(batch):
        with gpu.mode:
            backbone(gpu.like(batch["image"]))

    images = land(64) if images is None else images
    with (
        torch.no_grad(),
        gpu.lent(on_device, backbone, gpu.device),
        FeatureExtractor(backbone, backbone, TokenSampler(tokens, with_special=bool(special))) as extractor,
    ):
        (rows, _), *_ = AutoBatch(extractor, forward).parts(next(iter(Tiles(images, batch_size=64))))
    return rows


def compare(gpu, rows, special=0, device=None):
    """What a group goes through, as far as its device has part in it."""
    group = Group(0, [TileRef(position, 0, rows.shape[1] // 64) for position in range(64)], 0, 64)
    with gpu.mode:
        rows = torch.cat([rows[:, :16], rows[:, 16:]], dim=1).to(device or float64_device(rows.device))
        drawn, _ = without_special(group, rows, special)
        recovery = RecoveryStatistics([(0, 2)], Processes())
        recovery.add(group, rows, special)
        recovery.accept(1)
        wide = drawn.float()
        found = [*moments(wide), hsic_matrix(wide), *angle_sums(wide), recovery.patch._sums["cross"]]
    return rows, found


@pytest.mark.parametrize("case", TOKENS)
def test_nothing_waits_for_the_gpu_and_no_devices_mix(gpu, build, case):
    tokens, special = TOKENS[case]
    rows, found = compare(gpu, rows_of(gpu, build(embed_dim=48, num_heads=3), tokens, special), special)
    assert {value.device.type for value in (rows, *found)} == {"cuda"}
    assert {value.dtype for value in found} == {torch.float64, torch.int64}


# TerraTorch's own code of these reads values back: the adapter checks sizes, and the other one generates tokens.
WAIT_THEMSELVES = ("prithvi vit_adapter", "terramind tim")


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.key not in WAIT_THEMSELVES], ids=lambda family: family.key
)
def test_no_family_waits_for_the_gpu_or_mixes_devices(gpu, family):
    backbone = wrapped(family)
    with torch.no_grad():
        backbone(family.image(2))  # what an encoder makes at first use
        with Copies() as copies:
            rows = rows_of(gpu, backbone, "patch", images=family.image(64))
            _, found = compare(gpu, rows)
    assert copies.to == []
    assert {value.device.type for value in (rows, *found)} == {"cuda"}


def test_means_under_bfloat16_are_those_of_the_outputs_in_float32(build):
    backbone, seen = build(embed_dim=48, num_heads=3), []

    def forward(batch):
        handles = backbone.register_block_hooks(seen.append)
        with torch.autocast("cpu", torch.bfloat16):
            backbone(batch["image"])
        for handle in handles:
            handle.remove()

    with torch.no_grad(), FeatureExtractor(backbone, backbone, TokenSampler("mean")) as extractor:
        rows, _ = extractor.run(forward, next(iter(Tiles(land(8)))))
    expected = torch.stack([output[:, 1:].float().mean(dim=1) for output in seen[: len(rows)]])
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


PLANTED = {
    "reads a value back": lambda rows: rows * rows.sum().item(),
    "chooses rows by a mask": lambda rows: rows[:, rows[0, :, 0] > 0],
    "adds what lies on the processor": lambda rows: rows + torch.zeros(rows.shape[-1]),
    "multiplies by it": lambda rows: rows @ torch.zeros(rows.shape[-1], rows.shape[-1]),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_what_waits_or_mixes_would_be_seen(gpu, build, fault, monkeypatch):
    moments_of = hsic._centred
    monkeypatch.setattr(hsic, "_centred", lambda features: moments_of(PLANTED[fault](features)))
    with pytest.raises(RuntimeError):
        compare(gpu, rows_of(gpu, build(embed_dim=48, num_heads=3), "patch"))


@pytest.mark.parametrize("copy", [Tensor.cpu, lambda rows: rows.to("cpu"), lambda rows: rows.to(torch.empty(0))])
def test_a_copy_to_the_processor_would_be_seen(gpu, build, copy, monkeypatch):
    gather = TokenSample.gather

    def hidden(self, tokens):
        copy(tokens)
        return gather(self, tokens)

    monkeypatch.setattr(TokenSample, "gather", hidden)
    backbone = build(embed_dim=48, num_heads=3)
    with Copies() as copies:
        rows_of(gpu, backbone, "patch")
    assert len(copies.to) == backbone.num_blocks + 1


def test_a_group_comes_to_the_processor_in_one_copy(gpu, monkeypatch):
    """Every copy from a GPU waits for it."""
    metric = LayerSimilarity(2, 1)
    with Copies() as copies, gpu.mode:
        metric.update(torch.empty(3, 64, 8, device="cuda"), 64, 0)
    assert len(copies.to) == 1


class NoFloat64(TorchDispatchMode):
    """A GPU without float64, as Apple's are; PyTorch for another machine cannot even pretend to have one of these."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, torch.Tensor) and value.device.type == "cuda" and value.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return found


def test_nothing_is_float64_on_a_gpu_without_it(gpu, build, monkeypatch):
    with NoFloat64():
        rows = rows_of(gpu, build(embed_dim=48, num_heads=3), "patch", 1)
        with gpu.mode, pytest.raises(TypeError, match="support float64"):
            hsic_matrix(rows)
        _, found = compare(gpu, rows, 1, float64_device(torch.device("mps")))
    assert {value.device.type for value in found} == {"cpu"}


def test_a_pass_compares_where_there_is_float64(build, monkeypatch):
    asked, backbone = [], build(embed_dim=48, num_heads=3)
    monkeypatch.setattr(collector, "float64_device", lambda device: asked.append(device) or torch.device("cpu"))
    measure(lambda batch: backbone(batch["image"]), backbone, Tiles(land(40)), ExtractionConfig(Simpler(), min_tiles=32))
    assert asked == [torch.device("cpu")]


def test_labelled_features_are_read_on_the_same_device(lent, build, monkeypatch):
    module, found = Own(build(embed_dim=48, num_heads=3)), []
    before = everything(module)
    monkeypatch.setattr(labelled_images, "collect_labelled", one_batch(lent, found))
    monkeypatch.setattr(labelled_images, "labelled_source", lambda *_: Tiles(land(40)))
    with pytest.raises(InterruptedError):
        labelled_rows(fake_trainer(lent), module, "train", 0)
    assert found == ["cuda"] * 13
    assert module.seen == ["cuda"]
    assert everything(module) == before


class Streams:
    """What CUDA is asked for, in order."""

    def __init__(self, monkeypatch):
        self.asked, self.now = [], "compute"
        streams = self

        class Stream:
            def __init__(self, device=None, name="transfer"):
                self.name = name

            def wait_stream(self, other):
                streams.asked.append((self.name, "waits for", other.name))

        @contextmanager
        def on(stream):
            streams.now = stream.name
            yield
            streams.now = "compute"

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(name=streams.now))
        monkeypatch.setattr(
            Tensor, "record_stream", lambda tensor, stream: streams.asked.append((stream.name, "keeps", tensor.data_ptr()))
        )

    def move(self, inputs):
        self.asked.append((self.now, "copies", None))
        return inputs


def check_transfer(streams, beside_compute):
    """A batch is copied on a stream of its own, awaited, and every tensor of it is kept until it was read, once."""
    image = {"S2L2A": torch.zeros(2, 3), "S1RTC": torch.zeros(2, 2)}
    batch = {"image": image, "temporal_coords": torch.zeros(2, 1), "filename": ["a", "b"]}
    transfer = beside_compute(streams.move, torch.device("cuda"))
    for _ in range(2):  # batches
        streams.asked.clear()
        moved = transfer(batch)
        kept = [tensor.data_ptr() for tensor in (*image.values(), batch["temporal_coords"])]
        assert moved is batch
        assert streams.now == "compute"
        assert streams.asked[:2] == [("transfer", "copies", None), ("compute", "waits for", "transfer")]
        assert sorted(streams.asked[2:]) == sorted(("compute", "keeps", address) for address in kept)


def test_batches_are_copied_beside_the_computation_without_a_race(monkeypatch):
    check_transfer(Streams(monkeypatch), lightning_task.overlap_transfer)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("compute.wait_stream(stream)", "pass"),
        ("compute.wait_stream(stream)", "stream.wait_stream(compute)"),
        ("tensor.record_stream(compute)", "pass"),
        ("tensor.record_stream(compute)", "tensor.record_stream(stream)"),
        ("in tree_leaves(moved)", "in moved.values()"),
        ("with torch.cuda.stream(stream):", "if True:"),
    ],
)
def test_a_race_of_streams_would_be_seen(monkeypatch, line, fault):
    source = inspect.getsource(lightning_task.overlap_transfer)
    assert source.count(line) == 1
    planted = dict(vars(lightning_task))
    exec(source.replace(line, fault), planted)
    with pytest.raises(AssertionError):
        check_transfer(Streams(monkeypatch), planted["overlap_transfer"])
