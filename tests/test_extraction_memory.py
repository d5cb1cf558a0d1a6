"""Running out of memory in the middle of a pass: on with fewer tiles at once, and none counted twice."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from terratorch_simpler import metrics
from terratorch_simpler.criteria import Simpler
from terratorch_simpler.distributed import Processes
from terratorch_simpler.errors import OutOfMemoryError
from terratorch_simpler.extraction import ExtractionConfig, collect_labelled, measure
from terratorch_simpler.extraction.auto_batch import AutoBatch, with_cpu_fallback
from terratorch_simpler.extraction.grouped_similarity import GroupedSimilarity
from terratorch_simpler.extraction.groups import Group, TileRef
from terratorch_simpler.extraction.recovery_statistics import RecoveryStatistics, without_special
from tests.in_memory_tiles import Tiles, land

MOST = 5
"""Tiles that fit into the memory these tests pretend to have."""


def full(tiles: int) -> None:
    if tiles > MOST:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def run(backbone, tiles, forward=None):
    forward = forward or (lambda batch: backbone(batch["image"]))
    return measure(forward, backbone, tiles, ExtractionConfig(Simpler(), min_tiles=1000))


def hook(module, before=False):
    """Runs out of memory in a module."""
    if before:
        return module.register_forward_pre_hook(lambda _, inputs: full(len(inputs[0])))
    return module.register_forward_hook(lambda _, inputs, output: full(len(output)))


STAGES = {
    "before the encoder": lambda backbone: hook(backbone, before=True),
    "patch embedding": lambda backbone: hook(backbone.encoder.patch_embed),
    "first block": lambda backbone: hook(backbone.blocks[0], before=True),
    "attention in the middle": lambda backbone: hook(backbone.blocks[6].attn),
    "last block": lambda backbone: hook(backbone.blocks[11]),
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_pass_goes_on_with_fewer_tiles_at_once(build, stage):
    backbone, images = build(), land(83)
    expected = run(backbone, Tiles(images, batch_size=16))
    STAGES[stage](backbone)
    found = run(backbone, Tiles(images, batch_size=16))
    assert (found.tiles_seen, found.rows_seen) == (expected.tiles_seen, expected.rows_seen) == (83, 83 * 16)
    torch.testing.assert_close(found.similarity, expected.similarity, rtol=0, atol=1e-6)
    assert (expected.batch_limit, found.batch_limit) == (None, 4)


def test_out_of_memory_on_the_way_to_the_device(build):
    backbone, sent = build(), []

    def forward(batch):
        sent.append(len(batch["index"]))
        full(sent[-1])
        assert len(batch["valid"]) == len(batch["position"]) == len(batch["time"]) == len(batch["image"]) == sent[-1]
        assert batch["of all"] == 7
        backbone(batch["image"])

    class WithANumber(Tiles):
        def __iter__(self):
            yield from ({**batch, "of all": torch.tensor(7)} for batch in super().__iter__())

    tiles = WithANumber(land(40), batch_size=16, extra={"time": torch.zeros(40, 1, 2)})
    assert run(backbone, tiles, forward).batch_limit == 4
    # Halved twice, then no more: also the batches that follow come in parts of four.
    assert sent == [16, 8] + [4] * 10


def test_out_of_memory_once_limits_the_rest_only(build):
    backbone, images, calls = build(), land(60), []
    expected = run(backbone, Tiles(images, batch_size=12))

    def forward(batch):
        calls.append(len(batch["index"]))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        backbone(batch["image"])

    found = run(backbone, Tiles(images, batch_size=12), forward)
    assert calls == [12, 12, 12] + [6] * 6
    torch.testing.assert_close(found.similarity, expected.similarity, rtol=0, atol=1e-6)


def test_modalities_are_split_alike(build):
    backbone = build("simpler_terramind_v1_tiny", modalities=["S2L2A", "S1RTC"])
    images = {"S2L2A": land(40, size=32, bands=12), "S1RTC": land(40, size=32, bands=2)}
    expected = run(backbone, Tiles(images))
    hook(backbone.blocks[3])
    found = run(backbone, Tiles(images))
    assert (found.batch_limit, found.rows_seen) == (4, expected.rows_seen)
    torch.testing.assert_close(found.similarity, expected.similarity, rtol=0, atol=1e-6)


@pytest.mark.parametrize("update", [1, 2, 3])
@pytest.mark.parametrize(("fails", "calls_an_update"), [("hsic_matrix", 3), ("moments", 1), ("angle_sums", 1)])
def test_groups_are_compared_on_the_cpu_if_the_device_is_full(build, monkeypatch, fails, calls_an_update, update):
    backbone, images, calls = build(), land(200), []
    expected = run(backbone, Tiles(images))
    original = getattr(metrics, fails)
    first = (update - 1) * calls_an_update + 1
    which = {first, first + 6 * calls_an_update + 1}  # a group is three updates: it is repeated, one passes, the next fails

    def out_of_memory_now_and_then(features):
        calls.append(features.shape)
        if len(calls) in which:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(features)

    monkeypatch.setattr(metrics, fails, out_of_memory_now_and_then)
    found = run(backbone, Tiles(images))
    assert (found.tiles_seen, found.rows_seen) == (200, 3200)
    assert torch.equal(found.similarity, expected.similarity)  # no half of a group was added twice
    assert found.votes == expected.votes


class FullOnce(TorchDispatchMode):
    """Runs out of memory at the k-th operator, once."""

    def __init__(self, number=None):
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.number:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return func(*args, **(kwargs or {}))


def compared(full_once):
    """A group of rows, some of them class tokens, compared and added for maps."""
    generator = torch.Generator().manual_seed(0)
    similarity = GroupedSimilarity(3, 8, Processes())
    recovery = RecoveryStatistics([(0, 2), (1, 3), (2, 3)], Processes())
    tiles = [TileRef(position, 0, 5) for position in range(64)]
    rows = torch.randn(4, 5 * len(tiles), 6, generator=generator)
    group = Group(7, tiles, 0, 64)  # no halves any more

    def compare(_):
        similarity.update(*without_special(group, rows, 1), group.number)
        recovery.add(group, rows, 1)

    with full_once:
        with_cpu_fallback(compare, torch.device("cpu"))
        recovery.accept(8)
    sums = [recovery.patch, recovery.special]
    return [
        *similarity.state(8)["large"].values(),
        *(part for one in sums for part in (one.tokens, *one._sums.values())),
    ]


def test_memory_that_runs_out_at_any_operator_loses_and_doubles_nothing():
    operators = FullOnce()
    expected = compared(operators)
    assert operators.count > 100
    assert expected[-1].any()
    for number in range(1, operators.count + 1):
        found = compared(FullOnce(number))
        assert all(map(torch.equal, found, expected)), number


def test_labelled_images_go_on_with_fewer_at_once(build):
    backbone, target = build(), {"target": torch.randint(3, (20, 64, 64), generator=torch.Generator().manual_seed(0))}
    sent = []

    def forward(batch):
        sent.append(len(batch["index"]))
        full(sent[-1])
        backbone(batch["image"])

    def collect(forward):
        tiles = Tiles(land(20), batch_size=16, extra=target)
        with torch.no_grad():
            return collect_labelled(forward, backbone, tiles, backbone, what="images")

    expected, found = collect(lambda batch: backbone(batch["image"])), collect(forward)
    assert sent == [16, 8] + [4] * 5
    torch.testing.assert_close(found.features, expected.features, rtol=0, atol=1e-5)
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.images, expected.images)


def test_a_single_tile_that_does_not_fit_is_an_error(build):
    backbone = build()

    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    backbone.blocks[0].register_forward_pre_hook(never)
    with pytest.raises(OutOfMemoryError, match="Not enough memory for the intact encoder and a single tile: use a smaller"):
        run(backbone, Tiles(land(40)))
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_other_errors_are_not_taken_for_it(build):
    backbone = build()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(backbone, Tiles(land(40)), lambda _: torch.ones(2, 3) @ torch.ones(2, 3))


def test_nothing_of_the_failed_part_is_held_while_the_next_runs():
    """The traceback of an error holds every tensor of the frames it went through."""
    alive = []

    class Extractor:
        def run(self, forward, batch):
            alive.append(sum(ref() is not None for ref in held))
            big = torch.ones(10)
            import weakref

            held.append(weakref.ref(big))
            full(len(batch["index"]))
            return torch.zeros(2, len(batch["index"]), 3), len(batch["index"])

    held = []
    batch = {"index": list(range(16)), "position": list(range(16)), "image": torch.zeros(16, 1)}
    parts = list(AutoBatch(Extractor(), None).parts(batch))
    assert [tiles for _, tiles in parts] == [4] * 4
    assert alive == [0] * 6  # of 16, 8, and four times 4


def most_memory(run) -> int:
    """Bytes of tensors that were alive at once, beside those alive before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    alive = most = 0
    for _, change in changes:
        alive += change
        most = max(most, alive)
    return most


def test_a_pass_needs_less_memory_than_a_training_step_of_the_model_that_is_left(task):
    """At the size encoders are pretrained with; for small images the Gram matrices of a group are the larger part."""
    module, images, tiles = task(), land(8, size=224), Tiles(land(96, size=224), batch_size=8)
    backbone = module.model.encoder
    selection = most_memory(
        lambda: measure(
            lambda batch: module(batch["image"]), backbone, tiles,
            ExtractionConfig(Simpler(), min_tiles=1000), stop_after=backbone,
        )
    )  # fmt: skip
    backbone.prune_depth(range(5))
    optimizer = torch.optim.AdamW(module.parameters())

    def step():
        loss = module(images).output.square().mean()
        loss.backward()
        optimizer.step()

    assert 0 < selection < most_memory(step)


@pytest.mark.gpu
def test_a_gpu_that_is_full_goes_on_with_fewer_tiles_and_tells_its_peak(build):
    images = land(96, size=224)
    backbone = build().cuda()
    tiles = Tiles(images, batch_size=96)

    def forward(batch):
        backbone(batch["image"].cuda())

    roomy = run(backbone, tiles, forward)
    assert roomy.batch_limit is None
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.6 * roomy.peak_bytes) / total)
    try:
        tight = run(backbone, tiles, forward)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tight.batch_limit is not None
    assert tight.peak_bytes < roomy.peak_bytes
    assert (tight.tiles_seen, tight.rows_seen) == (roomy.tiles_seen, roomy.rows_seen)
    torch.testing.assert_close(tight.similarity, roomy.similarity, rtol=0, atol=1e-4)
