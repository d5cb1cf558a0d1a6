"""Fixtures that several tests share: where the real tiles are, and small encoders."""

import ctypes
import gc
import logging
import os
import platform
from importlib.metadata import version
from pathlib import Path

import huggingface_hub.constants
import pytest
import terratorch.tasks
import torch
import yaml
from lightning.pytorch import Trainer
from rasterio._env import del_gdal_config
from terratorch.datamodules import GenericNonGeoSegmentationDataModule
from terratorch.registry import BACKBONE_REGISTRY
from terratorch.tasks import SemanticSegmentationTask

import terratorch_simpler  # noqa: F401  registers simpler_
from terratorch_simpler.demo.scenes import LAND_COVER, write_scenes
from terratorch_simpler.export import plain
from terratorch_simpler.export.outputs import outputs_of
from terratorch_simpler.logger import log
from terratorch_simpler.models.backbone import SimplerBackbone
from tests.cli_runner import DATA
from tests.families import built

# No test reaches the Hub: what tries to load from it fails at once (tests/dinov2.py asks the package index). One thread
# each: the models are tiny, and test processes that share cores would otherwise wait for each other. The environment is for
# processes that tests start.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
huggingface_hub.constants.HF_HUB_OFFLINE = True
torch.set_num_threads(1)
# Lightning and this package decide when they are imported whether what they log can be captured: here always, whatever
# pytest has set up by then.
for logger in (logging.getLogger("lightning.pytorch"), log):
    logger.propagate = True


def pytest_report_header():
    """The host that the tests run on."""
    hosts = ", ".join(f"{name} {version(name.lower())}" for name in ("TerraTorch", "torchgeo", "torch"))
    return f"host: {hosts}, Python {platform.python_version()}"


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(config, items):
    """Mark as slow what slow.txt names: ``make test`` leaves it to ``make test-all``."""
    lines = Path(__file__).with_name("slow.txt").read_text().splitlines()
    slow = {line for line in lines if not line.startswith("#")}
    names = [item.nodeid.removeprefix("tests/") for item in items]
    files, functions = ({name.partition(end)[0] for name in names} for end in ("::", "["))
    for item, name in zip(items, names, strict=True):
        if slow & {name, name.partition("[")[0], name.partition("::")[0]}:
            item.add_marker(pytest.mark.slow)
    if not any("::" in argument for argument in config.args):
        stale = {
            line for line in slow if line.partition("::")[0] in files and line.partition("[")[0] not in functions | files
        }
        if stale:
            msg = f"Found {', '.join(sorted(stale))} in tests/slow.txt, expected names of tests: remove the lines."
            raise pytest.UsageError(msg)


@pytest.fixture(autouse=True)
def gdal_options():
    """TerraTorch's command line sets options of GDAL for its whole process, which here runs other tests as well."""
    _restore_gdal_options()  # a fixture of a whole module may have run it
    yield
    _restore_gdal_options()


def _restore_gdal_options():
    # rasterio's environments leave behind, as an option of GDAL, what the environment said when they began.
    del_gdal_config("GDAL_DISABLE_READDIR_ON_OPEN")
    for name in _gdal_options():
        del os.environ[name]
    os.environ.update(GDAL_OPTIONS)


def _gdal_options():
    return {name: value for name, value in os.environ.items() if name.startswith(("GDAL_", "VSI_", "AWS_"))}


GDAL_OPTIONS = _gdal_options()
MOST_MEMORY = 4 * 2**30
"""Memory from which a test process looks for what it can return."""


@pytest.fixture(scope="module", autouse=True)
def no_encoders_of_other_modules():
    """What :mod:`tests.families` has built is gigabytes in the end."""
    yield
    built.clear()
    _return_memory()


@pytest.fixture(autouse=True)
def memory_is_returned():
    """Three processes share the memory of one machine with their subprocesses."""
    yield
    statm = Path("/proc/self/statm")
    if statm.is_file() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MOST_MEMORY:
        _return_memory()


def _return_memory():
    """Glibc keeps what was freed until it is told to trim."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture(autouse=True)
def matmul_precision_kept():
    """A command that a test runs in this process may set another precision, which would change numbers of later tests."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def shared_data():
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the folder of real tiles is not beside the repository: {folder}")
    return folder


@pytest.fixture
def build():
    """Build a small randomly initialised backbone from a seed."""

    def build_backbone(name: str = "simpler_prithvi_eo_v2_tiny_tl", seed: int = 0, **kwargs) -> SimplerBackbone:
        torch.manual_seed(seed)
        return BACKBONE_REGISTRY.build(name, **{"pretrained": "ckpt_path" in kwargs, **kwargs}).eval()

    return build_backbone


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder of generated scenes: 48 to train on, 4 to validate, 4 to test, 64 px, some with nodata corners."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, {"train": 48, "val": 4, "test": 4}, size=64, merged=LAND_COVER)
    return folder


@pytest.fixture
def datamodule(scenes):
    """TerraTorch's generic datamodule on the scenes."""

    def make(**kwargs):
        splits = {
            f"{split}_{key}": scenes / folder
            for split in ("train", "val", "test")
            for key, folder in (("data_root", "images"), ("label_data_root", "masks"), ("split", f"splits/{split}.txt"))
        }
        return GenericNonGeoSegmentationDataModule(**{**DATA, **splits, **kwargs})

    return make


@pytest.fixture
def task():
    """A segmentation task around a small randomly initialised backbone."""

    def make(backbone: str = "simpler_prithvi_eo_v2_tiny_tl", seed: int = 0, indices=(2, 5, 8, 11), **model_args):
        torch.manual_seed(seed)
        arguments = {
            "backbone": backbone,
            "necks": [
                {"name": "SelectIndices", "indices": list(indices)},
                {"name": "ReshapeTokensToImage"},
                {"name": "LearnedInterpolateToPyramidal"},
            ],
            "decoder": "UNetDecoder",
            "decoder_channels": [16, 8, 8, 4],
            "num_classes": 6,
        }
        return SemanticSegmentationTask(
            model_factory="EncoderDecoderFactory", model_args={**arguments, **model_args}, ignore_index=-1
        )

    return make


@pytest.fixture
def trainer(tmp_path):
    """A quiet one-epoch trainer on the CPU."""

    def make(*callbacks, **kwargs) -> Trainer:
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "default_root_dir": tmp_path,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        return Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})

    return make


@pytest.fixture
def as_nobody(tmp_path):
    """Drops the right to read everything, if this process has it, until the test is over."""
    user = os.geteuid()
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if parent.owner() == Path.home().owner() and parent != Path("/tmp"):
            parent.chmod(0o755)

    def become_nobody():
        if user == 0:
            os.seteuid(65534)

    yield become_nobody
    os.seteuid(user)


@pytest.fixture
def trained(tmp_path, trainer):
    """A checkpoint of a cut task with all weights changed, and the task."""

    def make(kept=range(5), task=SemanticSegmentationTask, factory="EncoderDecoderFactory", class_names=None, **model_args):
        torch.manual_seed(0)
        names = {} if class_names is None else {"class_names": class_names}
        built = task(model_factory=factory, model_args=model_args, **names)
        backbone = next(part for part in built.modules() if isinstance(part, SimplerBackbone))
        if kept is not None:
            backbone.prune_depth(kept)
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        saver = trainer()
        saver.strategy.connect(built)
        built.trainer = saver
        saver.save_checkpoint(tmp_path / "fit.ckpt")
        config = {
            "trainer": {"max_epochs": 1, "callbacks": [{"class_path": "terratorch_simpler.SimplerCallback"}]},
            "model": {"class_path": f"terratorch.tasks.{task.__name__}"},
        }
        return built.eval(), config, tmp_path / "fit.ckpt"

    return make


@pytest.fixture
def in_process(monkeypatch):
    """Try the plain model in this process: as strict, and ten times as fast."""

    def attempt(config, checkpoint, images):
        settings = yaml.safe_load(config.read_text())["model"]
        task = getattr(terratorch.tasks, settings["class_path"].rpartition(".")[2])(**settings["init_args"])
        assert not any(isinstance(part, SimplerBackbone) for part in task.modules())
        untrained = outputs_of(task.eval(), images)
        task.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"], strict=True)
        return outputs_of(task, images), untrained

    monkeypatch.setattr(plain, "_outputs_without_us", attempt)
