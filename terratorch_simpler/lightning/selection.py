"""One selection inside a Lightning run: the trainer's device and precision, the datamodule's input, the rule's choice."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import nn
from torchmetrics import Metric

from terratorch_simpler import __version__
from terratorch_simpler.alternatives import overview
from terratorch_simpler.cache import PlanCache, hash_of_tensors, hash_of_weights, keep
from terratorch_simpler.criteria import Bounds, Criterion, Labelled
from terratorch_simpler.data import Batch, DatamoduleTiles, GeoTiffTiles, Split, TileSource
from terratorch_simpler.distributed import Processes
from terratorch_simpler.encoders import InputShape
from terratorch_simpler.errors import (
    ConfigurationError,
    FewTilesWarning,
    LabelsError,
    SimplerWarning,
    SkippedTilesWarning,
    TilesError,
    UntrainedEncoderWarning,
)
from terratorch_simpler.extraction import (
    LabelledRows,
    Measurement,
    PartialResult,
    Readout,
    Tokens,
    as_pretrained,
    check_labels,
    collect_labelled,
    count_macs,
    evaluating,
    explain,
    measure,
    random_state_kept,
)
from terratorch_simpler.indices import Span, spans_between
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.plan import SlimmingPlan

DESCRIBES = frozenset({"index", "position", "path", "window"})
NOT_INPUT = DESCRIBES | {"valid", "target"}
"""Keys of a batch that describe the tiles and do not go to the encoder."""
TILES_TO_KNOW = 64
"""How many tiles are looked at to tell whether an earlier run has seen the same."""


@dataclass(frozen=True)
class SelectionConfig:
    """How to choose; the arguments of :class:`~terratorch_simpler.SimplerCallback`."""

    criterion: Criterion
    bounds: Bounds
    width: float  # not chosen, only applied
    tokens: Tokens
    min_tiles: int
    max_tiles: int
    seed: int
    recovery: str = "none"
    compare: Callable[[Measurement], None] | None = None  # told what was measured, for every depth

    @property
    def needs_tiles(self) -> bool:
        """Whether anything has to be measured."""
        return self.criterion.needs_similarity or self.recovery != "none" or self.compare is not None

    def spans(self, num_blocks: int) -> list[Span]:
        """Ranges of blocks to find maps for."""
        wanted = set() if self.recovery == "none" else set(self.criterion.spans(num_blocks, self.bounds))
        if self.compare is not None and self.tokens == "patch":
            wanted |= {(depth, num_blocks) for depth in range(1, num_blocks)}
        return sorted(wanted)


def find_backbone(module: nn.Module) -> SimplerBackbone:
    """The one SimplerBackbone of a task, however deep it is wrapped.

    Raises:
        ConfigurationError: If there is none, or more than one.
    """
    found = [part for part in module.modules() if isinstance(part, SimplerBackbone)]
    if len(found) == 1:
        return found[0]
    if found:
        msg = f"Found {len(found)} SimplerBackbones in {type(module).__name__}, expected one: cut one encoder at a time."
        raise ConfigurationError(msg)
    arguments = getattr(module, "hparams", {}).get("model_args") or {}
    name = arguments.get("backbone") if isinstance(arguments, dict) else None
    named = f"backbone '{name}'" if isinstance(name, str) else "no SimplerBackbone"
    msg = (
        f"Found {named} in {type(module).__name__}, expected one whose name starts with 'simpler_': write "
        f"backbone: simpler_{name if isinstance(name, str) else '<name>'}."
    )
    raise ConfigurationError(msg)


@random_state_kept()  # training draws what it would have drawn with the plan given
def select(
    trainer: Trainer,
    pl_module: LightningModule,
    backbone: SimplerBackbone,
    tiles: GeoTiffTiles | None,
    how: SelectionConfig,
    processes: Processes,
    cache: PlanCache | None = None,
) -> SlimmingPlan:
    """Measure the intact encoder if the rule needs it, choose, and cut it; the same in every process.

    Args:
        trainer: Gives device, precision and progress bar.
        pl_module: The task, on the CPU.
        backbone: The intact encoder inside it.
        tiles: Tiles given by the user; None for the datamodule's training images.
        how: How to choose.
        processes: Those of the run: each measures a share of the tiles, the first one decides.
        cache: Plans of earlier runs, where a new one is kept as well.

    Returns:
        The plan that was applied.

    Raises:
        ConfigurationError: If the rule needs tiles and there are none.
        LabelsError: If the rule needs labels and there are none.
    """
    if backbone.fewest_blocks > 1:
        least = max(how.bounds.min_depth or 1, backbone.fewest_blocks)
        how = replace(how, bounds=replace(how.bounds, min_depth=least))
    if not how.needs_tiles:
        return _cut(backbone, _plan(backbone, how, None, None))
    source = _open_source(getattr(trainer, "datamodule", None), tiles, how.seed, processes)
    if how.compare is not None:
        cache = None  # a plan does not hold what is compared
    labelled: list[Labelled] = []  # in the first process, which decides
    if how.criterion.needs_labels:
        cache = None  # a plan is not found again by labels
        processes.broadcast_from_zero(lambda: labelled.append(_labelled(trainer, pl_module, how.seed)))
    with ExitStack() as held:

        def look_up() -> tuple[Path | None, SlimmingPlan | None]:
            if cache is None:
                return None, None
            return held.enter_context(
                cache.entry(_made_from(trainer, pl_module, backbone, source, how, cache.every_tile), backbone)
            )

        kept_at, plan = processes.broadcast_from_zero(look_up)
        if plan is not None:
            rank_zero_info(f"Took the plan of an earlier run with the same encoder, tiles and settings from {kept_at}.")
            return _cut(backbone, replace(plan, width=how.width))
        # The sums for maps are too large to be written every minute.
        resumable = kept_at is not None and not how.spans(backbone.full_num_blocks)
        partial_result = PartialResult(kept_at.with_suffix(".unfinished.pt")) if kept_at is not None and resumable else None
        found = _stream(trainer, pl_module, backbone, source, how, processes, partial_result)
        if how.compare is not None:
            how.compare(found)
        if labelled:
            found = replace(found, statistics=replace(found.statistics, labelled=labelled[0]))
        skipped = dict(found.skips.counts)
        data = {**source.describe(), "input_shape": _plain(found.input_shape), "skipped": skipped}
        # Should rounding differ between machines, the first process decides.
        plan = _cut(backbone, processes.broadcast_from_zero(lambda: _plan(backbone, how, found, data)))
        if kept_at is not None:
            processes.broadcast_from_zero(lambda: keep(plan, kept_at))
        return plan


def _plan(
    backbone: SimplerBackbone, how: SelectionConfig, found: Measurement | None, data: dict[str, object] | None
) -> SlimmingPlan:
    """Choose; parameters and MACs are those of the intact encoder."""
    blocks = backbone.full_num_blocks
    choice = how.criterion.choose(None if found is None else found.statistics, blocks, how.bounds)
    repairs = None if found is None else found.repairs
    parameters = backbone.num_parameters()
    shape = backbone.input_shape if found is None else found.input_shape
    macs = None if shape is None else count_macs(backbone, shape)
    return SlimmingPlan(
        backbone=backbone.name,
        full_num_blocks=blocks,
        kept_blocks=choice.kept_blocks,
        width=how.width,
        criterion={"name": how.criterion.name, "args": how.criterion.args},
        recovery=how.recovery,
        scores=choice.scores,
        similarity=None if found is None else found.similarity.tolist(),
        votes=None if found is None else found.votes,
        tiles_seen=0 if found is None else found.tiles_seen,
        rows_seen=0 if found is None else found.rows_seen,
        parameters={"before": parameters, "after": parameters},
        macs=None if macs is None else {"before": macs, "after": macs},
        data=data,
        versions=_versions(),
        overview=None if found is None else overview(backbone, how.criterion, how.bounds, choice, found, how.recovery),
        maps=None if repairs is None or how.recovery == "none" else repairs.maps(spans_between(choice.kept_blocks, blocks)),
    )


def _cut(backbone: SimplerBackbone, plan: SlimmingPlan) -> SlimmingPlan:
    """Cut, and complete the plan by what is left."""
    backbone.slim(plan)
    assert plan.parameters is not None
    plan = replace(plan, parameters={**plan.parameters, "after": backbone.num_parameters()})
    shape = (plan.data or {}).get("input_shape", backbone.input_shape)
    if plan.macs is not None and shape is not None:
        plan = replace(plan, macs={**plan.macs, "after": count_macs(backbone, shape)})
    backbone.slim(plan)  # is that already; from now on it knows the whole plan
    return plan


def _made_from(
    trainer: Trainer,
    pl_module: LightningModule,
    backbone: SimplerBackbone,
    source: TileSource,
    how: SelectionConfig,
    every_tile: bool = False,
) -> dict[str, object]:
    """Everything a plan depends on, to find it again by."""
    tiles = min(len(source), how.max_tiles)  # no more are ever streamed
    return {
        "backbone": backbone.name,
        "weights": hash_of_weights(backbone),
        "data": source.describe(),
        "changed": source.changed(),
        "seen": _seen(trainer, backbone, source, tiles, tiles if every_tile else TILES_TO_KNOW),
        "criterion": [type(how.criterion).__module__, how.criterion.name, repr(how.criterion.args)],
        "bounds": repr(how.bounds),
        "pass": [how.tokens, how.min_tiles, how.max_tiles, how.seed, how.recovery],
        "precision": trainer.precision,
        "task": f"{type(pl_module).__module__}.{type(pl_module).__qualname__}",
        "versions": _versions(),
    }


def _seen(trainer: Trainer, backbone: SimplerBackbone, source: TileSource, tiles: int, sample: int) -> list[tuple[int, str]]:
    """Hashes of tiles spread over the stream as the encoder will see them: bands, scale, transforms, normalisation.

    Names, sizes and times of files say nothing of these. The stream comes in a seeded order, so that every n-th tile of it
    is a random sample of them all.
    """
    normalised = _normaliser(trainer, backbone, source)
    found: list[tuple[int, str]] = []
    for batch in source.shard(-(-tiles // sample) or 1, 0):
        inputs = normalised({key: value for key, value in batch.items() if key not in DESCRIBES})
        for tile, position in enumerate(batch["position"]):
            if position >= tiles:
                return found
            found.append((position, hash_of_tensors({name: value[tile] for name, value in _tensors(inputs)})))
    return found


def _plain(shape: InputShape) -> list[int] | dict[str, list[int]]:
    return {name: list(part) for name, part in shape.items()} if isinstance(shape, dict) else list(shape)


def _open_source(
    datamodule: LightningDataModule | None, tiles: GeoTiffTiles | None, seed: int, processes: Processes
) -> TileSource:
    """The tiles, known alike in every process."""
    if tiles is not None:
        return processes.broadcast_from_zero(
            lambda: tiles.opened()
        )  # a thousand files are opened once, not once in every process
    if datamodule is None:
        msg = "Found neither a datamodule nor tiles, expected one of them to stream: give SimplerCallback tiles."
        raise ConfigurationError(msg)
    source: TileSource = processes.run_all(lambda: DatamoduleTiles(datamodule, seed))
    data = processes.all_gather(lambda: source.describe())
    for rank, other in enumerate(data):
        if other != data[0]:
            msg = (
                f"Found other training images in process {rank} ({other}) than in process 0 ({data[0]}), expected the same "
                "files everywhere: look for data that was not copied to every machine."
            )
            raise TilesError(msg)
    return source


def _stream(
    trainer: Trainer,
    pl_module: LightningModule,
    backbone: SimplerBackbone,
    source: TileSource,
    how: SelectionConfig,
    processes: Processes,
    partial_result: PartialResult | None,
) -> Measurement:
    how.bounds.within(how.criterion.depths(backbone.full_num_blocks), backbone.full_num_blocks)  # refuse before streaming
    if backbone.pretrained is False and processes.first:
        warnings.warn(
            f"Found '{backbone.name}' built without pretrained weights, expected pretrained ones, since a depth chosen on "
            "random weights means nothing: set backbone_pretrained: true.",
            UntrainedEncoderWarning,
            stacklevel=2,
        )
    planned = min(len(source), how.max_tiles)
    if planned < how.min_tiles and not trainer.fast_dev_run and processes.first:
        warnings.warn(
            f"Found {planned} tiles, expected at least {how.min_tiles} (min_tiles): all are used; look at the votes, or "
            "give more unlabeled tiles.",
            FewTilesWarning,
            stacklevel=2,
        )
    encoder = _outermost_encoder(pl_module, backbone)
    source.pin_memory = source.pin_memory or trainer.strategy.root_device.type == "cuda"
    with (
        on_device(pl_module, trainer.strategy.root_device),  # all of it: something may run before the encoder
        evaluating(pl_module, how.seed),  # all of it: detection models ask for boxes while they train
        _progress_bar(trainer, planned, backbone) as progress,
    ):
        found = measure(
            _forward(trainer, pl_module, backbone, source),
            backbone,
            source,
            how.criterion,
            how.bounds,
            tokens=how.tokens,
            min_tiles=how.min_tiles,
            max_tiles=how.max_tiles,
            seed=how.seed,
            stop_after=encoder,
            progress=progress,
            processes=processes,
            partial_result=partial_result,
            spans=how.spans(backbone.full_num_blocks),
        )
    peak = "" if found.peak_bytes is None else f"; at most {found.peak_bytes / 2**30:.2f} GiB of memory were in use"
    limit = "" if found.batch_limit is None else f"; memory ran out, so {found.batch_limit} tiles were sent at once"
    shared = "" if processes.count == 1 else f" in {processes.count} processes"
    rank_zero_info(
        f"Compared the blocks over {found.tiles_seen:,} tiles{shared} in {found.seconds:.1f} s; waited "
        f"{found.data_wait:.1f} s of these ({found.data_wait / found.seconds:.1%}) for tiles{peak}{limit}."
    )
    if found.skips.counts and processes.first:
        warnings.warn(f"Skipped tiles: {found.skips}.", SkippedTilesWarning, stacklevel=2)
    return found


def check_split(trainer: Trainer, pl_module: LightningModule, split: Split, seed: int) -> None:
    """Raise unless the images of the datamodule have labels of two classes at least, before anything is computed.

    Raises:
        LabelsError: If they have not.
    """
    check_labels(_labelled_source(trainer, split, seed), _ignore_index(pl_module), _called(split))


def labelled_rows(
    trainer: Trainer,
    pl_module: LightningModule,
    split: Split,
    seed: int,
    *,
    tuned: bool = False,
    readout: Readout | None = None,
    class_token: bool = False,
) -> LabelledRows:
    """Rows with labels after every block that the encoder of a task holds, by the way a batch takes in a training step.

    Args:
        trainer: Gives device and precision, and the datamodule.
        pl_module: The task, on the CPU.
        split: Which images of the datamodule; they are read without augmentation.
        seed: Seed of the order of the images and of the drawn patches.
        tuned: With adapters (LoRA) and prompts, instead of as pretrained.
        readout: What is taken for the features of a block; by default its raw output.
        class_token: With labels by image, take the class token, if there is one, instead of the mean of the patches.

    Raises:
        LabelsError: If there are no labels, or of one class only.
    """
    backbone = find_backbone(pl_module)
    source = _labelled_source(trainer, split, seed)
    encoder = _outermost_encoder(pl_module, backbone)
    with (
        on_device(pl_module, trainer.strategy.root_device),
        evaluating(pl_module, seed),
        nullcontext() if tuned else as_pretrained(encoder, backbone),
    ):
        return collect_labelled(
            _forward(trainer, pl_module, backbone, source),
            backbone,
            source,
            encoder,
            what=_called(split),
            ignore_index=_ignore_index(pl_module),
            readout=readout,
            class_token=class_token,
            seed=seed,
        )


def _labelled(trainer: Trainer, pl_module: LightningModule, seed: int) -> Labelled:
    """Labelled features of the encoder as it was tuned, for rules that need some; outputs of blocks before any norm."""
    rows = labelled_rows(trainer, pl_module, "train", seed, tuned=True, class_token=True)
    return Labelled(rows.features, rows.labels)


def _labelled_source(trainer: Trainer, split: Split, seed: int) -> DatamoduleTiles:
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None:
        msg = "Found no datamodule, expected one with labels: only the images of a datamodule have labels."
        raise LabelsError(msg)
    return DatamoduleTiles(datamodule, seed, split, labels=True)


def _called(split: Split) -> str:
    return {"train": "training images", "val": "validation images"}[split]


def _ignore_index(pl_module: LightningModule) -> int | None:
    return getattr(pl_module, "hparams", {}).get("ignore_index")  # type: ignore[no-any-return]


def _outermost_encoder(pl_module: LightningModule, backbone: SimplerBackbone) -> nn.Module:
    """What the task's model calls its encoder: the backbone, or what wraps it (TemporalWrapper, PEFT)."""
    encoder = getattr(getattr(pl_module, "model", None), "encoder", None)
    if isinstance(encoder, nn.Module) and any(part is backbone for part in encoder.modules()):
        return encoder
    # A module of the user's own: adapters are to be switched off wherever they are.
    wrappers = [part for part in pl_module.modules() if hasattr(part, "disable_adapter")]
    return next((part for part in wrappers if any(one is backbone for one in part.modules())), backbone)


def _forward(
    trainer: Trainer, pl_module: LightningModule, backbone: SimplerBackbone, source: TileSource
) -> Callable[[Batch], object]:
    """Send a batch the way of a training step: to the device, normalised, through the task's own forward."""
    datamodule: LightningDataModule | None = getattr(trainer, "datamodule", None)
    device = trainer.strategy.root_device
    # A datamodule without such a transform normalises while it reads (Sen4Map).
    if _normalisation(trainer, source) is None and isinstance(source, GeoTiffTiles) and source.means is None:
        warnings.warn(
            "Found neither means in tiles nor a normalisation in the datamodule, expected one of them, since the encoder "
            "was trained on normalised pixels: give tiles means and stds.",
            SimplerWarning,
            stacklevel=2,
        )

    def move(inputs: Batch) -> Batch:
        if datamodule is None:
            return move_data_to_device(inputs, device)  # type: ignore[no-any-return]
        return datamodule.transfer_batch_to_device(inputs, device, 0)  # type: ignore[no-any-return]

    transfer = move if device.type != "cuda" else _beside_compute(move, device)
    normalised = _normaliser(trainer, backbone, source)

    def forward(batch: Batch) -> object:
        inputs = normalised(transfer({key: value for key, value in batch.items() if key not in NOT_INPUT}))
        with precision_of(trainer):
            return pl_module(inputs.pop("image"), **inputs)

    return forward


def _normaliser(trainer: Trainer, backbone: SimplerBackbone, source: TileSource) -> Callable[[Batch], Batch]:
    """Normalise as the datamodule does, unless the tiles are normalised already."""
    normalise = _normalisation(trainer, source)
    shape = backbone.input_shape
    by_name = isinstance(getattr(normalise, "means", None), dict) and isinstance(shape, dict) and len(shape) == 1

    def normalised(inputs: Batch) -> Batch:
        if by_name and not isinstance(inputs["image"], dict):  # the datamodule knows means by modality only
            inputs["image"] = dict.fromkeys(shape, inputs["image"])
        if normalise is not None:
            image = inputs["image"]
            try:
                inputs["image"] = normalise({"image": image})["image"]
            except Exception as err:
                explain(err, backbone, image)
                raise
        return inputs

    return normalised


def _beside_compute(move: Callable[[Batch], Batch], device: torch.device) -> Callable[[Batch], Batch]:
    """Transfer on a stream of its own, while the device still computes the batch before."""
    stream = torch.cuda.Stream(device)

    def transfer(inputs: Batch) -> Batch:
        with torch.cuda.stream(stream):
            moved = move(inputs)
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(stream)
        # The memory was handed out on the other stream, and must not be used again before this one has read it.
        for _, tensor in _tensors(moved):
            tensor.record_stream(compute)
        return moved

    return transfer


def _tensors(batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in batch.items():
        if isinstance(value, dict):  # modalities
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield name, value


def _normalisation(trainer: Trainer, source: TileSource) -> Callable[[Batch], Batch] | None:
    """The datamodule's batch transform of evaluation: some put random crops into the one for training."""
    datamodule = getattr(trainer, "datamodule", None)
    if getattr(source, "means", None) is not None:
        return None
    for name in ("predict_aug", "val_aug", "aug"):
        transform = getattr(datamodule, name, None)
        if transform is not None:
            return transform  # type: ignore[no-any-return]
    return None


def precision_of(trainer: Trainer) -> AbstractContextManager[object]:
    """The trainer's precision for one forward pass.

    True half and double precision convert the weights only after setup; casting them here and back would round them, so
    half precision is run as autocast, and double precision as it is.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin, HalfPrecision):
        dtype = torch.bfloat16 if plugin.precision == "bf16-true" else torch.float16
        return torch.autocast(trainer.strategy.root_device.type, dtype=dtype)
    return nullcontext() if isinstance(plugin, DoublePrecision) else plugin.forward_context()


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Borrow a device: Lightning moves the model there only after setup.

    Afterwards all parameters and buffers are the same objects as before, each on the device where it was.
    """
    held = [
        (tensors, name, tensor, tensor.device)
        for part in module.modules()
        for tensors in (part._parameters, part._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    metrics = [(part, part.device) for part in module.modules() if isinstance(part, Metric)]  # their states are neither
    try:
        nn.Module.to(module, device)  # that of a LightningModule would change what it says its device is
        yield
    finally:
        for tensors, name, tensor, own in held:
            tensors[name] = tensor
            if tensor.device != own:
                tensor.data = tensor.data.to(own)
        for metric, own in metrics:
            metric.to(own)


@contextmanager
def _progress_bar(trainer: Trainer, planned: int, backbone: SimplerBackbone) -> Iterator[Callable[[int], None]]:
    """A bar on rank zero, if the run shows bars at all."""
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task(f"Comparing the blocks of {backbone.name}", total=planned)
        yield lambda tiles: bar.update(task, completed=tiles)


def _versions() -> dict[str, str]:
    others = {package: metadata.version(package) for package in ("terratorch", "torch", "lightning")}
    # Not by its metadata: a source tree on the path has none.
    return {"python": platform.python_version(), "terratorch_simpler": __version__, **others}
