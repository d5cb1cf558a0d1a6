"""Training steps and inference of whole TerraTorch models, intact and cut, in turn in one run.

    python -m benchmarks.speed --device cuda --precisions bf16 --compile false true

Builds a segmentation task as ``terratorch fit`` would, with random weights, and another with the first blocks only, and runs
both on the same noise. A training step is forward, cross entropy, backward and AdamW. Medians over rounds, each of
which runs both models; memory is the peak of one training step, in ``rates`` also that of a prediction, without the
optimizer: on a GPU what PyTorch's allocator handed out, on a CPU the tensors that operators handed out. ``limit`` is the
ratio of the two models' multiply-accumulate operations, so the most that the cut can gain. ``--profile`` tells where the
time of the cut model goes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from terratorch.tasks import SemanticSegmentationTask
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import terratorch_simpler  # noqa: F401  makes simpler_ known
from benchmarks import record
from benchmarks.timing import now, seconds
from terratorch_simpler.sweep.cost import added_memory

CLASSES = 15
RESHAPE = {"name": "ReshapeTokensToImage"}
BARS = {"linear": 4.0, "upernet": 3.5, "upernet64": 3.5, "unet": 3.0}
"""Speed-ups that a cut to 5 of 24 blocks should reach, in training and inference."""


def model_args(decoder: str, backbone: str, blocks: int, keep: int | None) -> dict[str, Any]:
    """Arguments of the factory: the decoder's features are the last block's, or those of the four quarters."""
    quarters = [blocks // 4 * (quarter + 1) - 1 for quarter in range(4)]
    pyramid = [{"name": "SelectIndices", "indices": quarters}, RESHAPE, {"name": "LearnedInterpolateToPyramidal"}]
    decoders: dict[str, dict[str, Any]] = {
        "linear": {
            "necks": [{"name": "SelectIndices", "indices": [blocks - 1]}, RESHAPE],
            "decoder": "LinearDecoder",
            "decoder_upsampling_size": 16,
            "decoder_num_classes": CLASSES,
        },
        "unet": {
            "necks": pyramid,
            "decoder": "UNetDecoder",
            "decoder_channels": [512, 256, 128, 64],
        },
        **{
            name: {
                "necks": pyramid,
                "decoder": "UperNetDecoder",
                "decoder_channels": channels,
            }
            for name, channels in (("upernet", 256), ("upernet64", 64))
        },
    }
    return {
        "backbone": f"simpler_{backbone}",
        "backbone_keep": keep,
        "backbone_pretrained": False,
        "num_classes": CLASSES,
        **decoders[decoder],
    }


class Contender:
    """One model and what it is fed.

    Args:
        decoder: Name of the decoder.
        settings: What was asked for.
        keep: Blocks to keep, None for all.
        size: Side of the image in pixels.
        batch: Images of a batch.
        precision: fp32 or bf16.
        compiled: Whether the model is compiled.
    """

    def __init__(
        self,
        decoder: str,
        settings: argparse.Namespace,
        keep: int | None,
        size: int,
        batch: int,
        precision: str,
        compiled: bool,
    ) -> None:
        """Build it."""
        torch.manual_seed(0)
        arguments = model_args(decoder, settings.backbone, settings.blocks, keep)
        arguments["backbone_img_size"] = size
        task = SemanticSegmentationTask(arguments, "EncoderDecoderFactory", loss="ce")
        self.device = settings.device
        self.model = task.model.to(self.device)
        self.run: Callable[[Tensor], Any] = torch.compile(self.model) if compiled else self.model
        self.image = torch.randn(batch, 6, size, size, device=self.device)
        self.target = torch.randint(CLASSES, (batch, size, size), device=self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.precision = precision

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of the trainer."""
        return nullcontext() if self.precision == "fp32" else torch.autocast(self.device.type, torch.bfloat16)

    def train(self) -> None:
        """One training step."""
        self.model.train()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self) -> Tensor:
        """Cross entropy of the batch."""
        with self.autocast():
            output = self.run(self.image).output
        return nn.functional.cross_entropy(output.float(), self.target)

    def infer(self) -> None:
        """One batch of predictions."""
        self.model.eval()
        with torch.inference_mode(), self.autocast():
            self.run(self.image)

    def macs(self) -> tuple[int, int]:
        """Multiply-accumulate operations of one batch: the whole model, and the encoder alone."""
        self.model.eval()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.model(self.image)
        counts = counter.get_flop_counts()
        encoder = next(sum(ops.values()) for name, ops in counts.items() if name.endswith(".encoder"))
        return counter.get_total_flops() // 2, encoder // 2

    def peak_memory(self, kind: str = "train") -> int:
        """Most bytes in use in a training step, weights and optimizer included, or in a prediction (``infer``)."""
        held = [*self.model.parameters(), *self.model.buffers(), self.image]
        if kind == "train":
            held += [self.target, *filter(torch.is_tensor, tree_leaves(list(self.optimizer.state.values())))]
        run = self.run
        if self.device.type != "cuda":
            self.run = self.model  # tensors inside of a compiled graph cannot be seen: the plain model's are an upper bound
        added = added_memory(self.train if kind == "train" else self.infer, held, self.device)
        self.run = run
        return added + sum(tensor.nbytes for tensor in held)


def compare(full: Contender, cut: Contender, settings: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run both in turn, after one round that does not count.

    Returns:
        Both beside each other, and images a second and peak memory of each.
    """
    full_macs, full_encoder = full.macs()
    cut_macs, cut_encoder = cut.macs()
    found: dict[str, Any] = {"limit": full_macs / cut_macs, "limit_encoder": full_encoder / cut_encoder}
    rates = []
    for kind, runs in (("train", (full.train, cut.train)), ("infer", (full.infer, cut.infer))):
        rounds = [[seconds(run, settings.device) for run in runs] for _ in range(settings.rounds + 1)][1:]
        slow, fast = (statistics.median(times) for times in zip(*rounds, strict=True))
        ratios = sorted(first / second for first, second in rounds)
        found |= {
            f"{kind}_full_s": slow,
            f"{kind}_cut_s": fast,
            f"{kind}_speedup": statistics.median(ratios),
            f"{kind}_range": f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
        }
        for name, one, times in zip(("intact", "cut"), (full, cut), zip(*rounds, strict=True), strict=True):
            rate = sorted(len(one.image) / time for time in times)
            rates.append(
                {"run": kind, "model": name, "images_a_second": statistics.median(rate), "least": rate[0], "most": rate[-1],
                 "peak_mib": one.peak_memory(kind) / 2**20}
            )  # fmt: skip
    peak_full, peak_cut = (rate["peak_mib"] for rate in rates if rate["run"] == "train")
    return found | {"peak_full_mib": peak_full, "peak_cut_mib": peak_cut}, rates


@contextmanager
def staged(model: nn.Module, device: torch.device, spent: dict[str, float]) -> Iterator[None]:
    """Adds up the time of the stages of a forward pass, each waited for."""
    encoder = model.encoder.encoder
    stages = {"encoder": [model.encoder], "patch embedding": [encoder.patch_embed], "blocks": encoder.blocks}
    stages |= {"neck": [model.neck], "decoder": [model.decoder], "head": [model.head]}
    started: dict[nn.Module, float] = {}
    handles = []

    for name, modules in stages.items():
        for module in modules:

            def before(module: nn.Module, *_: Any) -> None:
                started[module] = now(device)

            def after(module: nn.Module, *_: Any, name: str = name) -> None:
                spent[name] += now(device) - started.pop(module)

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def profile(contender: Contender, repeats: int) -> dict[str, float]:
    """Shares of the time of one prediction and one training step, by what it is spent on.

    The model runs plainly, also if it is compiled. What is left of the whole after its stages are the copies that TerraTorch
    makes of every feature, resizing to the image and padding.
    """
    device, found = contender.device, {}
    contender.run = contender.model
    with torch.inference_mode():
        spent: dict[str, float] = defaultdict(float)
        contender.infer()
        with staged(contender.model, device, spent):
            total = sum(seconds(contender.infer, device) for _ in range(repeats))
    rest = spent.pop("encoder") - spent["blocks"] - spent["patch embedding"]
    spent["rest of encoder (norm, position, mapping)"] = rest
    spent["copies and resizing"] = total - sum(spent.values())
    found |= {f"infer: {name}": value / total for name, value in spent.items()}
    step: dict[str, float] = defaultdict(float)
    contender.train()
    contender.model.train()
    for _ in range(repeats):
        losses: list[Tensor] = []
        step["forward and loss"] += seconds(lambda kept=losses: kept.append(contender.loss()), device)
        step["backward"] += seconds(losses[0].backward, device)
        step["optimizer"] += seconds(contender.optimizer.step, device)
        contender.optimizer.zero_grad(set_to_none=True)
    whole = sum(step.values())
    return found | {f"train: {name}": value / whole for name, value in step.items()}


def main(arguments: list[str] | None = None) -> None:
    """Measure every combination asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    record.add_arguments(parser)
    parser.add_argument("--backbone", default="prithvi_eo_v2_300")
    parser.add_argument("--blocks", type=int, default=24, help="of the intact encoder")
    parser.add_argument("--keep", type=int, default=5)
    parser.add_argument("--decoders", nargs="+", choices=sorted(BARS), default=["linear", "upernet64", "upernet", "unet"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512], help="sides of the image in pixels")
    parser.add_argument("--batches", nargs="+", type=int, help="one for each size; by default 2, on a GPU 32 and 8")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], help="by default fp32, on a GPU bf16 as well")
    parser.add_argument("--compile", nargs="+", choices=["false", "true"], default=["false"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="also where the time of the cut model goes")
    settings = parser.parse_args(arguments)
    batches = settings.batches or ([32, 8] if settings.device.type == "cuda" else [2, 2])[: len(settings.sizes)]
    if len(batches) != len(settings.sizes):
        parser.error(f"Found {len(batches)} batches for {len(settings.sizes)} sizes, expected one for each: give --batches.")
    precisions = settings.precisions or (["fp32", "bf16"] if settings.device.type == "cuda" else ["fp32"])
    rows, profiles, rates = [], [], []
    chosen = itertools.product(zip(settings.sizes, batches, strict=True), precisions, settings.compile, settings.decoders)
    for (size, batch), precision, compiled, decoder in chosen:
        case = {"decoder": decoder, "size": size, "batch": batch, "precision": precision, "compile": compiled == "true"}
        full, cut = (
            Contender(decoder, settings, keep, size, batch, precision, case["compile"]) for keep in (None, settings.keep)
        )
        row, of_each = compare(full, cut, settings)
        rows.append(case | row | {"bar": BARS[decoder]})
        rates += [case | rate for rate in of_each]
        print(" ".join(f"{key}={record.cell(value)}" for key, value in rows[-1].items()), flush=True)
        del full
        if settings.profile and not case["compile"]:
            profiles.append(case | profile(cut, max(1, settings.rounds)))
        del cut
        gc.collect()
        torch.compiler.reset()
        path = record.save("speed", settings, rows, arguments, profiles=profiles, rates=rates)
    record.show("cut to intact", rows)
    record.show("images a second and memory", rates)
    record.show("where the time of the cut model goes", profiles)
    print(path)


if __name__ == "__main__":
    main()
