"""FSDP itself, on a CPU: two processes that shard the pruned model, write checkpoints, and go on with them."""

import json

import pytest
import torch

from terratorch_simpler.models.checkpoint import read_pruned_state
from terratorch_simpler.models.state import PrunedState
from tests import cli_runner

PRUNED = {
    "depth": ({"criterion": "fixed", "drop_blocks": 7}, PrunedState((0, 1, 2, 3, 4), 12)),
    "width": ({"criterion": "fixed", "drop_blocks": 7, "width": 0.5}, PrunedState((0, 1, 2, 3, 4), 12, 0.5)),
}


@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_fit_and_resume(scenes, tmp_path, kind, pruned):
    callback, shape = PRUNED[pruned]
    config = cli_runner.fsdp_config(scenes, tmp_path, kind, callback)
    fit = cli_runner.Command(tmp_path / "fit", config, ranks=2, before=cli_runner.fsdp_on_cpu)
    assert fit.wait() == [0, 0], fit.output(0) + fit.output(1)
    first = cli_runner.newest(tmp_path)
    assert first.is_dir() == (kind == "sharded")
    assert read_pruned_state(first, None) == shape
    config["trainer"]["max_steps"] = 4
    again = cli_runner.Command(tmp_path / "again", config, "--ckpt_path", str(first), ranks=2, before=cli_runner.fsdp_on_cpu)
    assert again.wait() == [0, 0], again.output(0) + again.output(1)
    last = cli_runner.newest(tmp_path)
    assert last.stem.endswith("step=4")
    assert read_pruned_state(last, None) == shape
    if kind == "sharded":
        return
    before, after = (torch.load(path, weights_only=True) for path in (first, last))
    trained = {name for name, value in before["state_dict"].items() if not torch.equal(value, after["state_dict"][name])}
    # Positions are fixed, and so are the shape and batch norms' counts.
    fixed = {name for name in before["state_dict"] if name.endswith(("pos_embed", "_extra_state"))}
    assert trained == set(before["state_dict"]) - fixed
    [state] = after["optimizer_states"]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert len(state["state"]) == len({name for name in trained if not name.endswith(buffers)})


def test_shape_is_told_by_the_state_of_the_callback(tmp_path):
    """Earlier folders hold the widths as bits."""
    bits = torch.tensor([0.25, 0.5], dtype=torch.float64).view(torch.int64).tolist()
    state = {"kept_blocks": [0, 3], "total_blocks": 12, "kept_widths": bits}
    torch.save({"callbacks": {"SimplerCallback": state}}, tmp_path / "meta.pt")
    assert read_pruned_state(tmp_path, None) == PrunedState((0, 3), 12, 0.5, (0.25, 0.5))
    assert json.loads(json.dumps(PrunedState((0, 3), 12, 0.5).as_plain())) == {
        "kept_blocks": [0, 3],
        "total_blocks": 12,
        "kept_widths": [0.5],
    }
