"""Fine-tuning on scenes at some depths of a real pretrained ViT.

    python -m benchmarks.pretrained_vit.finetune DATA --weights dinov2_vits14.pt

The first n blocks and a linear head on the mean of the LayerNormed patch tokens are trained on a few labelled scenes of
RSSCN7: AdamW, cosine schedule, flips, float32. The encoder's learning rate is chosen on the validation split from some,
for every variant on its own, with seed 0; the other seeds use it. What is tested is the last epoch. Beside the first n
blocks as they are: with LoRA, from random weights, at half the width, and after recovery without labels on all training
scenes, by a linear map or by distillation, to the output of a block. The same command goes on from where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import statistics as medians
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from terratorch.registry import BACKBONE_REGISTRY
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import terratorch_simpler  # noqa: F401  makes simpler_ known
from benchmarks import record
from benchmarks.pretrained_vit import statistics
from benchmarks.pretrained_vit.data import SCENES, Task, draw, read_task
from benchmarks.pretrained_vit.encoder import add_arguments, digest, load, read_weights
from benchmarks.pretrained_vit.frozen import RULES, choose_without_labels, extract, level, probe_choice
from benchmarks.pretrained_vit.recovery import recover
from benchmarks.pretrained_vit.statistics import Bootstrap
from terratorch_simpler import prune
from terratorch_simpler.pruning.width import Narrowing

BATCH = 10
RATES = {"random": (3e-5, 1e-4, 3e-4), "lora": (3e-4, 1e-3, 3e-3)}
"""Learning rates of the encoder that are tried."""
PRETRAINED_RATES = [3e-6, 1e-5, 3e-5]
"""The same for all weights of a pretrained encoder, by default."""
HEAD_RATE = 3e-3
"""The head starts at 0 and has few steps: with the encoder's rate it hardly moves."""
LORA = {"r": 16, "lora_alpha": 16, "target_modules": ["qkv", "fc1", "fc2"]}
WEIGHT_DECAY = 0.05
WIDTH = 0.5


class Variant(NamedTuple):
    """What is fine-tuned.

    Attributes:
        name: "whole" (all weights are trained), "lora", or, all weights as well, "random" (from a random start), "narrow"
            (half of the width), "linear" or "distill" (after that recovery).
        blocks: How many of the first blocks.
        target: The block whose output recovery aims at.
    """

    name: str
    blocks: int
    target: int | None = None

    def __str__(self) -> str:
        """What the tables call it."""
        return self.name if self.target is None else f"{self.name} to block {self.target}"


class Result(NamedTuple):
    """One run.

    Attributes:
        rate: Learning rate.
        predicted: Class of every image of the validation split, and of the test split if the learning rate is chosen.
        seconds: Of the training.
        trained: Number of trained parameters.
    """

    rate: float
    predicted: dict[str, list[int]]
    seconds: float
    trained: int


class Classifier(nn.Module):
    """A linear layer on the mean of the LayerNormed patch tokens."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        tokens = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        logits: Tensor = self.head(tokens.mean(1))
        return logits


def start(variant: Variant, state: dict[str, Tensor], args: argparse.Namespace, task: Task) -> nn.Module:
    """The encoder that fine-tuning starts from."""
    encoder = load(args.model, None if variant.name == "random" else state, args.size)
    if variant.blocks < len(encoder.blocks):
        prune(encoder, variant.blocks)
    if variant.name == "narrow":
        Narrowing(encoder.blocks, WIDTH).apply()
    if variant.name == "lora":
        from peft import LoraConfig, inject_adapter_in_model  # of the extra 'peft'

        inject_adapter_in_model(LoraConfig(**LORA), encoder)
    if variant.name in ("linear", "distill"):
        _recover(encoder, variant, args, task)
    return encoder


def _recover(encoder: nn.Module, variant: Variant, args: argparse.Namespace, task: Task) -> None:
    """Give a pruned encoder what recovery without labels has found, its final norm aside."""
    intact = BACKBONE_REGISTRY.build(f"simpler_{args.model}", img_size=args.size, ckpt_path=str(args.weights)).eval()
    recovered = recover(intact, task, variant.name, variant.blocks, variant.target, args.steps)
    explained = " to ".join(f"{value:.2f}" for value in recovered.explained)
    print(f"{variant}, {variant.blocks} blocks: explained {explained}, {recovered.seconds:.0f} s", flush=True)
    [vit] = [part for part in recovered.encoder.modules() if isinstance(part, VisionTransformer)]
    encoder.blocks.load_state_dict(vit.blocks.state_dict())
    for name in ("patch_embed", "cls_token", "pos_embed"):
        setattr(encoder, name, getattr(vit, name))
    for recovery in recovered.encoder.recovery.values():
        encoder.recovery = recovery
        encoder.blocks[-1].register_forward_hook(recovery.after)


def finetune(encoder: nn.Module, args: argparse.Namespace, task: Task, seed: int, rate: float) -> tuple[Result, nn.Module]:
    """Train a copy of an encoder once, and predict the classes of the validation split."""
    encoder = copy.deepcopy(encoder)
    torch.manual_seed(seed)
    model = Classifier(encoder, task.classes)
    chosen = draw(task, args.labels, seed)
    images, labels = task.images["train"][chosen], torch.from_numpy(task.labels["train"][chosen, 0])
    groups = [
        {"params": [parameter for parameter in encoder.parameters() if parameter.requires_grad], "lr": rate},
        {"params": list(model.head.parameters()), "lr": HEAD_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    steps = args.epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    model.train()
    for _ in range(args.epochs):
        for part in torch.randperm(len(images)).split(BATCH):
            batch = images[part]
            for axis in (2, 3):
                flipped = torch.rand(len(batch), 1, 1, 1) < 0.5
                batch = torch.where(flipped, batch.flip(axis), batch)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), labels[part]).backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - start
    predicted = {"val": predict(model, task.images["val"])}
    return Result(rate, predicted, seconds, sum(part.numel() for group in groups for part in group["params"])), model


def predict(model: nn.Module, images: Tensor) -> list[int]:
    """Classes of images."""
    model.eval()
    with torch.inference_mode():
        classes: list[int] = torch.cat([model(batch).argmax(1) for batch in images.split(32)]).tolist()
    return classes


def accuracy(task: Task, result: Result, split: str) -> float:
    """Share of the images of a split whose class is predicted."""
    return float((np.array(result.predicted[split]) == task.labels[split][:, 0]).mean())


def count(task: Task, found: dict[Variant, list[Result]], split: str) -> NDArray[np.int64]:
    """Confusion matrices of every seed, variant and image of a split, (seeds, variants, images, classes, classes)."""
    truth = task.labels[split][:, 0]
    images = np.arange(len(truth))

    def matrices(result: Result) -> NDArray[np.int64]:
        return statistics.confusion(truth, np.array(result.predicted[split]), images, len(truth), task.classes)

    return np.array([[matrices(one) for one in results] for results in zip(*found.values(), strict=True)])


def rows(task: Task, found: dict[Variant, list[Result]]) -> list[dict[str, Any]]:
    """A line for every variant; gains are on all blocks, and on as many blocks as they are, in the same seeds and images."""
    names = list(found)
    intact = max((one for one in found if one.name == "whole"), key=lambda one: one.blocks)
    counts = count(task, found, "test")
    bootstrap = Bootstrap(counts, accuracy=True)
    scores = bootstrap.measured
    errors = bootstrap.mean(bootstrap.scores).std(0)

    def gain(variant: Variant, base: Variant) -> list[float] | None:
        if variant == base or base not in found:
            return None
        one, other = names.index(variant), names.index(base)
        samples = bootstrap.mean(bootstrap.scores[..., one] - bootstrap.scores[..., other])
        return statistics.interval((scores[:, one] - scores[:, other]).mean(), samples)

    return [
        {
            "trained": str(variant),
            "blocks": variant.blocks,
            "learning_rate": f"{results[0].rate:g}",
            "test_accuracy": [float(scores[:, column].mean()), float(errors[column])],
            "gain_on_all_blocks": gain(variant, intact),
            "gain_on_same_blocks": gain(variant, Variant("whole", variant.blocks)),
            "trained_parameters_M": results[0].trained / 1e6,
            "training_s": medians.median(one.seconds for one in results),
        }
        for column, (variant, results) in enumerate(found.items())
    ]


def tests(task: Task, found: dict[Variant, list[Result]]) -> dict[str, Any]:
    """The gate on the validation split, at the depths that have random weights too, and the F test over depths."""
    whole = {variant: results for variant, results in found.items() if variant.name == "whole"}
    random = {variant: results for variant, results in found.items() if variant.name == "random"}
    line: dict[str, Any] = {}
    if random:
        same = {variant: whole[Variant("whole", variant.blocks)] for variant in random}
        gain, counts = statistics.gate(count(task, same, "val"), count(task, random, "val"), True)
        line = {"pretrained_minus_random": gain, "counts": "yes" if counts else "no"}
    f, p = statistics.f_test(count(task, whole, "test"), True)
    return line | {"F_over_depths": f, "p": p}


def choose(args: argparse.Namespace, state: dict[str, Tensor], task: Task) -> dict[str, tuple[list[int], str]]:
    """The depth that each criterion chooses for every seed, and its verdicts; those that leave gaps are left out."""
    encoder = load(args.model, state, args.size)
    kept, verdicts = choose_without_labels(encoder, task)
    features = extract(encoder, task)
    found = {}
    for name, rule in RULES.items():
        probes = [probe_choice(task, features, len(features["train"]), args.labels, s, rule) for s in range(args.seeds)]
        found[name] = ([len(one.kept_blocks) for one in probes], ", ".join(level(one.verdict) for one in probes))
    for name, one in kept.items():
        if one == list(range(len(one))):
            found[name] = ([len(one)] * args.seeds, verdicts.get(name, "-"))
    return found


def judge(task: Task, found: dict[Variant, list[Result]], chosen: dict[str, tuple[list[int], str]]) -> list[dict[str, Any]]:
    """A line for every choice whose depths were all trained: its score and its gains on all blocks and on half of them."""
    whole = {variant: results for variant, results in found.items() if variant.name == "whole"}
    depths = [variant.blocks for variant in whole]
    bootstrap = Bootstrap(count(task, whole, "test"), accuracy=True)
    columns = {
        name: np.array([depths.index(depth) for depth in kept])
        for name, (kept, _) in chosen.items()
        if set(kept) <= set(depths)
    }
    table = []
    for name, column in columns.items():
        kept, verdict = chosen[name]
        words = ", ".join(map(str, kept if len(set(kept)) > 1 else kept[:1]))
        line: dict[str, Any] = {"criterion": name, "kept": words, "verdict": verdict}
        line["score"] = float(np.take_along_axis(bootstrap.measured, column[:, None], 1).mean())
        for base in ("all blocks", "half"):
            if base in columns:
                line[f"gain_on_{base.replace(' ', '_')}"] = bootstrap.difference(column, columns[base])
        table.append(line)
    return table


def run(
    variant: Variant, args: argparse.Namespace, state: dict[str, Tensor], task: Task
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Results of a variant by seed as mappings, and a line for every run, those of the tuning among them."""
    results: list[Result] = []
    runs = []
    encoder = start(variant, state, args, task)
    for seed in range(args.seeds):
        tried = []
        for rate in [one.rate for one in results[:1]] or RATES.get(variant.name, args.rates):
            one, model = finetune(encoder, args, task, seed, rate)
            tried.append((one, model))
            line = {"trained": str(variant), "blocks": variant.blocks, "seed": seed, "learning_rate": rate}
            line |= {"validation": accuracy(task, one, "val"), "s": one.seconds}
            runs.append(line)
            print(*(f"{value:.3g}" if isinstance(value, float) else value for value in line.values()), flush=True)
        best, model = max(tried, key=lambda each: accuracy(task, each[0], "val"))
        best.predicted["test"] = predict(model, task.images["test"])
        results.append(best)
    return [one._asdict() for one in results], runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune, test, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--size", type=int, default=126)
    parser.add_argument("--labels", type=int, default=70, help="number of labelled scenes")
    parser.add_argument("--name", help="end of the name of the results; by default the number of labels")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 5, 7, 9, 12], help="from few blocks to all")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=PRETRAINED_RATES,
        help="learning rates that are tried for pretrained weights",
    )
    for name, words in {
        "lora": "with LoRA",
        "random": "from random weights",
        "narrow": f"at {WIDTH} of the width",
        "linear": "after a linear map",
        "distill": "after a distillation",
    }.items():
        parser.add_argument(f"--{name}", type=int, nargs="*", default=[], help=f"depths that are trained {words}, too")
    parser.add_argument("--targets", type=int, nargs="+", default=[7, 12], help="blocks that recovery aims at")
    parser.add_argument("--steps", type=int, default=60, help="of a distillation, of 32 images each")
    record.add_arguments(parser)
    args = parser.parse_args(arguments)
    state = read_weights(args.weights)
    patch = load(args.model, None, args.size).patch_embed.patch_size[0]
    task = read_task(args.data, SCENES, args.size, patch)
    variants = [Variant("whole", depth) for depth in args.depths]
    variants += [Variant(name, depth) for name in ("random", "lora", "narrow") for depth in getattr(args, name)]
    for name in ("linear", "distill"):
        variants += [Variant(name, depth, target) for depth in getattr(args, name) for target in args.targets]
    chosen = choose(args, state, task)
    name = f"pretrained_vit_finetune_{args.name or args.labels}"
    unfinished = record.Unfinished(name, args, weights=digest(state))
    found: dict[Variant, list[Result]] = {}
    runs: list[dict[str, Any]] = []
    for variant in variants:
        results, lines = unfinished(f"{variant}, {variant.blocks}", lambda one=variant: run(one, args, state, task))
        found[variant] = [Result(**one) for one in results]
        runs += lines
        if len(found) < len(args.depths):
            continue
        table = rows(task, found)  # saved as soon as depths can be compared: the rest takes long
        test = tests(task, found)
        choices = judge(task, found, chosen)
        more = {"tests": [test], "choices": choices, "runs": runs, "weights": digest(state)}
        record.save(name, args, table, arguments, module="pretrained_vit.finetune", **more)
    unfinished.finish()
    record.show("Fine-tuning", table)
    record.show("Choices", choices)


if __name__ == "__main__":
    main()
