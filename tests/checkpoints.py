"""What checkpoints say of a pruned encoder, in the present form and in the earlier one."""

import json

import torch

from terratorch_simpler.models.state import EXTRA_KEY, state_in


def said(value):
    """The JSON in an extra state."""
    return json.loads(bytes(value.tolist()))


def extra(**changes):
    """An extra state with what is given, right or wrong."""
    return torch.tensor(list(json.dumps(changes).encode()), dtype=torch.uint8)


def changed(state, **changes):
    """Weights whose extra state says something else; None takes a key away."""
    key = next(name for name in state if name.rpartition(".")[2] == EXTRA_KEY)
    values = {**said(state[key]), **changes}
    return {**state, key: extra(**{name: value for name, value in values.items() if value is not None})}


def bits(*widths):
    """Widths as they were written earlier."""
    return torch.tensor(widths, dtype=torch.float64).view(torch.int64)


def as_buffers(state):
    """Weights as they were written earlier, with buffers in the place of the extra state."""
    found = {}
    for name, value in state.items():
        prefix, _, key = name.rpartition(".")
        if key != EXTRA_KEY:
            found[name] = value
            continue
        for what, content in said(value).items():
            tensor = bits(*content) if what == "kept_widths" else torch.tensor(content)
            found[f"{prefix}.{what}" if prefix else what] = tensor
    return found


def kept_in(state) -> tuple[int, ...]:
    """Kept blocks that the weights of a model tell."""
    return state_in(state, "test").kept
