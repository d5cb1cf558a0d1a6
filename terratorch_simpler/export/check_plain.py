"""Run in a process of its own: build a model with TerraTorch alone, and save what it answers.

Arguments: config, checkpoint, images, file for the answer. Nothing of this package can be imported here.
"""

import sys

sys.modules["terratorch_simpler"] = None  # type: ignore[assignment] # any import of it fails
sys.path[:] = sys.path[1:]  # the folder of this file

import torch  # noqa: E402
from terratorch.cli_tools import build_lightning_cli  # noqa: E402

ANYWHERE = {
    "accelerator": "cpu",
    "devices": "1",
    "num_nodes": "1",
    "strategy": "auto",
    "precision": "32-true",
    "logger": "false",
    "callbacks": "[]",
}


def tensors(output: object) -> list[torch.Tensor]:
    """The tensors of an answer, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in tensors(part)]
    return tensors(output.output) if hasattr(output, "output") else []


def main(config: str, checkpoint: str, images: str, answer: str) -> None:
    """Build, load strictly, run, save."""
    arguments = [f"--trainer.{key}={value}" for key, value in ANYWHERE.items()]
    task = build_lightning_cli(["--config", config, *arguments], run=False).model
    task.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"], strict=True)
    task.eval()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # TerraTorch allows less
    with torch.no_grad():
        torch.save(tensors(task(torch.load(images, weights_only=True))), answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
