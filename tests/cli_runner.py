"""Real ``terratorch fit`` commands in processes of their own, one or several that train together.

TerraTorch takes ten seconds to import: a server process has done so, and every command is a fork of it.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from terratorch.tasks import SemanticSegmentationTask
from timm.models.vision_transformer import Block
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from terratorch_simpler.distributed import Processes
from terratorch_simpler.models.backbone import find_backbone

PRELOAD = [
    "terratorch.__main__",
    "terratorch.tasks",
    "terratorch.datamodules",
    "terratorch_simpler.lightning.callback",
    "tests.cli_runner",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)

MEANS = [650.0, 900.0, 925.0, 2250.0, 1950.0, 1350.0]
STDS = [500.0, 550.0, 650.0, 850.0, 850.0, 800.0]
DATA = {
    "batch_size": 8,
    "num_workers": 0,
    "num_classes": 6,
    "img_grep": "*_image.tif",
    "label_grep": "*_mask.tif",
    "no_data_replace": 0,
    "means": MEANS,
    "stds": STDS,
}
"""Arguments of TerraTorch's generic datamodule for the scenes."""
# Time and location get no gradient when there are no coordinates.
WITHOUT_COORDINATES = {"backbone": "simpler_prithvi_eo_v1_100", "backbone_num_frames": 1}


def config(scenes: Path, folder: Path, **callback) -> dict:
    """A narrow Prithvi on generated scenes; checkpoints every epoch, and the last one to resume from."""
    data = {
        f"{split}_{key}": str(scenes / below)
        for split in ("train", "val", "test")
        for key, below in (("data_root", "images"), ("label_data_root", "masks"), ("split", f"splits/{split}.txt"))
    }
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "default_root_dir": str(folder),
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": True,
            "num_sanity_val_steps": 0,
            "callbacks": [
                {
                    "class_path": "terratorch_simpler.SimplerCallback",
                    "init_args": {"output_dir": str(folder / "simpler"), **callback},
                },
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": str(folder / "checkpoints"), "save_last": True},
                },
                {"class_path": "tests.cli_runner.Fingerprint", "init_args": {"folder": str(folder)}},
            ],
        },
        "data": {
            "class_path": "terratorch.datamodules.GenericNonGeoSegmentationDataModule",
            "init_args": {**DATA, **data},
        },
        "model": {
            "class_path": "terratorch.tasks.SemanticSegmentationTask",
            "init_args": {
                "model_factory": "EncoderDecoderFactory",
                "model_args": {
                    "backbone": "simpler_prithvi_eo_v2_tiny_tl",
                    "backbone_pretrained": False,
                    "backbone_embed_dim": 48,
                    "backbone_num_heads": 3,
                    "necks": [
                        {"name": "SelectIndices", "indices": [2, 5, 8, 11]},
                        {"name": "ReshapeTokensToImage"},
                        {"name": "LearnedInterpolateToPyramidal"},
                    ],
                    "decoder": "UNetDecoder",
                    "decoder_channels": [16, 8, 8, 4],
                    "num_classes": 6,
                },
                "ignore_index": -1,
            },
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
    }


class Fingerprint(Callback):
    """Writes, at the end of fit in every process, what it has trained."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_fit_end(self, trainer, pl_module):
        weights = {name: value.double().sum().item() for name, value in pl_module.state_dict().items()}
        held = sum(parameter.numel() for group in trainer.optimizers[0].param_groups for parameter in group["params"])
        found = {
            "kept": list(find_backbone(pl_module).kept),
            "weights": weights,
            "held": held,
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
        }
        (self.folder / f"trained.{trainer.global_rank}.json").write_text(json.dumps(found))


class Trained(Callback):
    """Writes, at the end of training, which tensors have moved and what the optimizer holds."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.before = {}

    def on_train_start(self, trainer, pl_module):
        self.before = {name: value.detach().clone() for name, value in pl_module.named_parameters()}

    def on_train_end(self, trainer, pl_module):
        names = {id(value): name for name, value in pl_module.named_parameters()}
        [optimizer] = trainer.optimizers
        groups = [
            {"lr": group["initial_lr"] if "initial_lr" in group else group["lr"],
             "held": [names.get(id(value), "not of the model") for value in group["params"]]}
            for group in optimizer.param_groups
        ]  # fmt: skip
        found = {
            "names": list(names.values()),
            "trainable": [name for name, value in pl_module.named_parameters() if value.requires_grad],
            "unchanged": [name for name, value in pl_module.named_parameters() if torch.equal(value, self.before[name])],
            "groups": groups,
            "state": sum(value in optimizer.state for group in optimizer.param_groups for value in group["params"]),
            "stale_state": len(set(map(id, optimizer.state)) - set(names)),
            "kept": list(find_backbone(pl_module).kept),
            "width": find_backbone(pl_module).width,
            "step": trainer.global_step,
        }
        (self.folder / f"moved.{trainer.global_rank}.json").write_text(json.dumps(found))


class RestoresLast(DDPStrategy):
    """Reads checkpoints after the model was wrapped and the optimizer made, as FSDP and DeepSpeed do."""

    @property
    def restore_checkpoint_after_setup(self):
        return True


def fsdp_on_cpu(_rank) -> None:
    """Let FSDP shard on a CPU: PyTorch asks for an explicit device there."""
    original = FullyShardedDataParallel.__init__

    def init(self, module, *args, device_id=None, **kwargs):
        original(self, module, *args, device_id=torch.device("cpu") if device_id is None else device_id, **kwargs)

    FullyShardedDataParallel.__init__ = init


class CpuFSDP(FSDPStrategy):
    """Lightning refuses its own class on a CPU, and no other."""

    def __init__(self, state_dict_type: str = "full"):
        super().__init__(state_dict_type=state_dict_type, auto_wrap_policy={Block})


def fsdp_config(scenes: Path, folder: Path, kind: str, callback: dict) -> dict:
    """Two steps with FSDP, and a checkpoint after every second one, ``full`` or ``sharded``."""
    found = config(scenes, folder, **callback)
    trainer = found["trainer"]
    trainer |= {
        "strategy": {"class_path": "tests.cli_runner.CpuFSDP", "init_args": {"state_dict_type": kind}},
        "limit_val_batches": 0,
        "max_steps": 2,
        "max_epochs": -1,
    }
    ours, checkpoint, _ = trainer["callbacks"]
    checkpoint["init_args"]["every_n_train_steps"] = 2
    trainer["callbacks"] = [ours, checkpoint]
    found["model"]["init_args"]["model_args"] |= WITHOUT_COORDINATES
    return found


def newest(folder: Path) -> Path:
    """The checkpoint of most steps."""
    return max((folder / "checkpoints").glob("*step=*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2]))


class ShardedTask(SemanticSegmentationTask):
    """Shards every block over the processes, and the rest of the model."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        backbone = find_backbone(self)
        for block in backbone.blocks:
            fully_shard(block, mesh=mesh)
        for part in (backbone.encoder, self.model.neck, self.model.decoder, self.model.head):
            if any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh)

    def on_train_end(self):
        types = {type(value).__name__ for value in find_backbone(self).blocks.parameters()}
        found = {"blocks": len(find_backbone(self).blocks), "types": sorted(types)}
        Path(self.trainer.default_root_dir, f"sharded.{self.trainer.global_rank}.json").write_text(json.dumps(found))


def together(work, folder: Path, ranks: int, *args, patience: float = 60.0) -> list:
    """Call a function in several processes of one gloo group.

    Args:
        work: Called with the :class:`Processes` and ``args``; what it returns is saved by torch.
        folder: For what they return.
        ranks: Number of processes.
        *args: Arguments that can be pickled.
        patience: Seconds one waits for the others.

    Returns:
        What each returned, or the exception it raised; None for one that died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        CONTEXT.Process(target=_one_of, args=(work, str(folder / f"{rank}.pt"), rank, ranks, port, patience, args))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "still running"
    files = [folder / f"{rank}.pt" for rank in range(ranks)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _one_of(work, path, rank, ranks, port, patience, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    try:
        with Processes.of_run(timedelta(seconds=patience)) as processes:
            found = work(processes, *args)
    except Exception as err:
        found = err
    torch.save(found, path)


class Command:
    """One command, or the processes of one that trains on several devices.

    Args:
        folder: Its YAML and what it says go here.
        settings: The YAML.
        *args: Further arguments of the command.
        command: ``fit``, ``test``, ``validate`` or ``predict``.
        ranks: Number of processes.
        environment: Environment variables of all of them.
        before: Called in each of them first, with its rank.
    """

    def __init__(self, folder: Path, settings: dict, *args: str, command="fit", ranks=1, environment=None, before=None):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        arguments = [command, "--config", str(path), *args]
        if ranks > 1:
            arguments += ["--trainer.devices", str(ranks)]
            if "strategy" not in settings["trainer"]:
                arguments += ["--trainer.strategy", "ddp_find_unused_parameters_true"]
        port = str(free_port())
        self.logs = [folder / f"output.{rank}.txt" for rank in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": str(rank),
                       "WORLD_SIZE": str(ranks)} if ranks > 1 else {}  # fmt: skip
            process = CONTEXT.Process(
                target=_run, args=(rank, arguments, {**several, **(environment or {})}, str(log), str(folder), before)
            )
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = 300.0) -> list[int | None]:
        """Exit status of every process; None for one that did not end in time, which is killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        found = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.exitcode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
        return found

    def kill(self, number: int, rank: int = 0) -> None:
        """Send a signal, if the process is still there."""
        if self.processes[rank].exitcode is None:
            os.kill(self.processes[rank].pid, number)

    def output(self, rank: int = 0) -> str:
        """What a process has said."""
        log = self.logs[rank]
        return log.read_text(errors="replace") if log.exists() else ""

    def left_behind(self, seconds: float = 20.0) -> list[int]:
        """Processes that outlive the command by more than a while."""
        deadline = time.monotonic() + seconds
        while (found := [pid for process in self.processes for pid in _group(process.pid)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found


def free_port() -> int:
    """A port nobody uses now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _group(leader: int) -> list[int]:
    """Processes whose group a process leads or led."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == leader:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(entry.name)] if state != "Z" else []
        except OSError:
            continue  # has ended meanwhile
    return found


def _run(rank, arguments, environment, log, folder, before):
    os.setpgid(0, 0)
    os.environ.update(environment)
    os.chdir(folder)
    sys.stdout.flush()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = ["terratorch", *arguments]
    from terratorch.__main__ import main

    try:
        if before is not None:
            before(rank)
        main()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
        sys.exit(0 if code is None else code if isinstance(code, int) else 1)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
