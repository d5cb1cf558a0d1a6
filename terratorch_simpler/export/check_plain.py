"""Run in a process of its own: build a model with TerraTorch alone, and save its outputs, untrained and trained.

Arguments: config, checkpoint, images, file for the outputs. Nothing of this package can be imported here.
"""

import sys

sys.modules["terratorch_simpler"] = None  # type: ignore[assignment] # any import of it fails
sys.path[:] = sys.path[1:]  # the folder of this file

import torch  # noqa: E402
from terratorch.cli_tools import build_lightning_cli  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

ANYWHERE = {
    "accelerator": "cpu",
    "devices": "1",
    "num_nodes": "1",
    "strategy": "auto",
    "precision": "32-true",
    "logger": "false",
    "callbacks": "[]",
}
OTHER_SEED = 20_011
"""Not that of a fit, whose fresh weights would be those it started from."""


def tensors(output: object) -> list[torch.Tensor]:
    """The tensors of an output, in order."""
    found = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__"):
            found += tensors(vars(leaf))
    return found


def outputs_of(task: torch.nn.Module, images: object) -> list[torch.Tensor]:
    """What it gives, in the same random state each time; of a detector every box, however low its score."""
    for part in task.modules():
        if hasattr(part, "score_thresh"):
            part.score_thresh = 0.0  # type: ignore[assignment]
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(task(images))


def main(config: str, checkpoint: str, images: str, path: str) -> None:
    """Build, run with fresh weights, load strictly, run, save."""
    arguments = [f"--trainer.{key}={value}" for key, value in ANYWHERE.items()]
    task = build_lightning_cli(["--config", config, *arguments, f"--seed_everything={OTHER_SEED}"], run=False).model
    task.eval()
    torch.set_float32_matmul_precision("highest")  # TerraTorch allows less
    inputs = torch.load(images, weights_only=True)
    untrained = outputs_of(task, inputs)
    task.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"], strict=True)
    torch.save({"untrained": untrained, "trained": outputs_of(task, inputs)}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
