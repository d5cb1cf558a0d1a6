"""Frozen probes of every depth of a real pretrained ViT, and what each criterion would have kept.

    python -m benchmarks.pretrained_vit DATA --weights dinov2_vits14.pt

DATA holds ``hls_water`` and ``rsscn7``; the weights are a state dict with the keys of timm's ``vit_small_patch14_dinov2``.
Three kinds of labels: land cover and water of 14 px patches of HLS tiles (red, green, blue), and scenes of RSSCN7. Features
are the outputs of every block under LayerNorm: patch tokens, or their mean for scenes. A ridge regression to one-hot is
fitted on some labelled training images, its strength chosen by cross-validation over places; its scores are mean IoU over
patches, and accuracy over scenes.

What is chosen never sees a test image: ``probe`` chooses on the validation split, the other criteria without labels. Whether
pretraining matters at all is decided on the validation split, and whether depths differ by an F test with seeds as blocks,
whose p is that of permutations within places. Where they do, the test split says what each choice costs (*regret*): it is
compared with the depth that is best in the *other* seeds and on *other* test places, so that this is not picked by the
scores it is compared with. Intervals are 95 % of a bootstrap over seeds (which images are labelled) and places of the test
split at once; places are sites for HLS, and images for RSSCN7, where it is not known which scenes are neighbours. The
validation split and the images without labels are the same in every sample, and the labelled images of seeds overlap, so
intervals are too narrow if anything.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from benchmarks import record
from benchmarks.pretrained_vit.data import SCENES, TASKS, read_task
from benchmarks.pretrained_vit.encoder import DIGEST, add_arguments, digest, load, read_weights
from benchmarks.pretrained_vit.frozen import Encoded, encode, mean_regrets, run_task


def main(arguments: Sequence[str] | None = None) -> None:
    """Embed, probe, choose, compare, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--labels", nargs="*", type=int, help="numbers of labelled images; all by default")
    parser.add_argument("--train-scenes", type=int, help="number of training scenes that are read; all by default")
    parser.add_argument("--swapped", action="store_true", help="splits of scenes change places: other scenes are tested")
    record.add_arguments(parser)
    args = parser.parse_args(arguments)
    if args.swapped and (args.tasks != [SCENES] or args.train_scenes is None):
        parser.error("--swapped is for scenes: give --tasks scenes and a number of --train-scenes.")
    state = read_weights(args.weights)
    weights = digest(state)
    print(f"Weights: SHA-256 {weights}, {'as' if weights == DIGEST else 'other than'} DINOv2 ViT-S/14's", flush=True)
    patch = load(args.model, None, args.size).patch_embed.patch_size[0]
    tasks = {}
    encoded: dict[bool, Encoded] = {}  # cover and water are of the same images
    for name in args.tasks:
        start = time.perf_counter()
        task = read_task(args.data, name, args.size, patch, args.train_scenes, args.swapped)
        if task.scenes not in encoded:
            encoded = {task.scenes: encode(args, state, task)}
            print(f"Features of {name}: {time.perf_counter() - start:.0f} s", flush=True)
        tasks[name] = run_task(args, task, encoded[task.scenes])
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    depths, choices, tests = ([row for one in tasks.values() for row in one[key]] for key in ("depths", "choices", "tests"))
    regrets, differences = mean_regrets(tasks)
    shown = {"Depths": depths, "Choices": choices, "Tests": tests, "Regret": regrets, "Differences": differences}
    for title, table in shown.items():
        record.show(title, table)
    more = {"depths": depths, "tests": tests, "regrets": regrets, "differences": differences, "weights": weights}
    name = "pretrained_vit_swapped" if args.swapped else "pretrained_vit"
    record.save(name, args, choices, arguments, module="pretrained_vit", **more)


if __name__ == "__main__":
    main()
