"""The demo: TerraTorch's own commands on generated scenes, pruned against intact, offline, on a CPU."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from terratorch_simpler.demo.comparison import (
    REPEATS,
    choices,
    compare,
    comparison_table,
    fit_and_test,
    run_terratorch,
    score_on_test,
    training_batch,
)
from terratorch_simpler.demo.scenes import LAND_COVER, write_scenes
from terratorch_simpler.errors import SimplerError
from terratorch_simpler.plan import SlimmingPlan

HERE = Path(__file__).parent
ENCODER = HERE / "encoder.pt"
CONFIG = HERE / "demo.yaml"
SPLITS = {"train": 160, "val": 128, "test": 64}
SIZE = 64
SCENES_SEED = 1
SEEDS = (0, 1, 2)
"""Of the fine-tuning."""


class DemoError(SimplerError, RuntimeError):
    """A step of the demo failed."""


def run(folder: Path, official_weights: bool = False) -> None:
    """Generate scenes, run TerraTorch on them with the encoder pruned and intact, and compare both in one table.

    Everything runs in this process, since each process would import TerraTorch anew.

    Args:
        folder: Output folder; existing scenes in it are reused.
        official_weights: Use Prithvi-EO-2.0-tiny-TL from the Hugging Face Hub instead of the encoder in this package.

    Raises:
        DemoError: If one of the commands fails.
    """
    folder = folder.resolve()
    console = Console()
    scenes = folder / "scenes"
    if not all((scenes / "splits" / f"{split}.txt").is_file() for split in SPLITS):
        console.print(f"Generating {sum(SPLITS.values())} scenes in {scenes}", soft_wrap=True)
        write_scenes(scenes, SPLITS, SIZE, seed=SCENES_SEED, merged=LAND_COVER)
    config = write_config(folder, scenes, None if official_weights else ENCODER)
    with chdir(folder):  # TerraTorch saves a copy of its config in the working folder where it has no log folder
        first = _terratorch("fit", "--config", config)
        logs = Path(first.trainer.log_dir)
        checkpoint = next((logs / "checkpoints").glob("*_state_dict.ckpt"))
        predictions = folder / "predictions"
        # TerraTorch's deployment file sets 16-mixed, bfloat16 on a CPU: its convolution can be wrong (docs/checkpoints.md).
        deploy = ("--config", logs / "config_deploy.yaml", "--ckpt_path", checkpoint, "--trainer.precision", "32-true")
        _terratorch("predict", *deploy, "--predict_output_dir", predictions)
        plan_path = logs / "simpler" / "plan.json"
        _compare(console, first, config, plan_path)
    report = f"""
The config:      {config}
The plan:        {plan_path}
The report:      {logs / "simpler" / "report.html"}
The checkpoint:  {checkpoint}
The predictions: {predictions}, {len(list(predictions.glob("*.tif")))} GeoTIFF files"""
    console.print(report, soft_wrap=True)  # paths stay whole, to be copied


def _compare(console: Console, first: Any, config: Path, plan_path: Path) -> None:
    """Fine-tune the pruned and the intact model with every seed, test them, and print the table."""
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"] = []
    intact_config = config.with_name("intact.yaml")
    intact_config.write_text(yaml.safe_dump(settings, sort_keys=False))
    planned = ("--model.init_args.model_args.backbone_plan", plan_path)
    console.print(
        f"\nThe same fit at full depth ({intact_config.name}: without SimplerCallback), and both with other seeds:"
    )
    scores: dict[str, list[float]] = {"intact": [], "pruned": [score_on_test(first)]}
    tasks = {"pruned": first.model}
    for seed in SEEDS:
        for name, path, given in (("intact", intact_config, ()), ("pruned", config, planned)):
            if (name, seed) != ("pruned", SEEDS[0]):  # that was the first fit
                try:
                    cli, score = fit_and_test(path, seed, *given)
                except (Exception, SystemExit) as err:
                    raise _failed("fit", err) from err
                tasks.setdefault(name, cli.model)
                scores[name].append(score)
            console.print(f"  {name}, seed {seed}: test mIoU {scores[name][-1]:.3f}", highlight=False)
    console.print(f"Timing both in turn, medians of {REPEATS}\n", highlight=False)
    batch = training_batch(first)
    intact, pruned = compare({name: (tasks[name], scores[name]) for name in ("intact", "pruned")}, batch)
    for line in choices(SlimmingPlan.load(plan_path)):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(comparison_table(intact, pruned, len(batch["image"])))


def write_config(folder: Path, scenes: Path, encoder: Path | None) -> Path:
    """Write the demo's config with its paths filled in.

    Args:
        folder: Folder of the config and the logs.
        scenes: Folder of scenes.
        encoder: Pretrained weights, or None for those of the Hub.

    Returns:
        Path of the config for ``terratorch fit``.
    """
    config = yaml.safe_load(CONFIG.read_text())
    data, model = config["data"]["init_args"], config["model"]["init_args"]["model_args"]
    for key, value in data.items():
        if isinstance(value, str) and value.startswith("scenes/"):
            data[key] = str(scenes / value.removeprefix("scenes/"))
    config["trainer"]["default_root_dir"] = str(folder)
    model.pop("backbone_ckpt_path")
    if encoder is not None:
        model["backbone_ckpt_path"] = str(encoder)
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _terratorch(*args: str | Path) -> Any:
    """Run a TerraTorch command and show it."""
    print("\n$ terratorch", *args, flush=True)
    try:
        return run_terratorch(*args)
    except (Exception, SystemExit) as err:
        raise _failed(str(args[0]), err) from err


def _failed(command: str, err: BaseException) -> DemoError:
    return DemoError(f"terratorch {command} failed, expected it to run: {type(err).__name__}: {err}")
