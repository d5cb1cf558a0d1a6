"""What a checkpoint holds beside the weights of the model, and what of it would be lost."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.plugins import precision
from torch import Tensor

from terratorch_simpler.errors import NotCarriedError

WEIGHTS = "state_dict"
ARGUMENTS = "hyper_parameters"
AVERAGING = ("current_model_state", "averaging_state")
"""Of Lightning's WeightAveraging, which puts the averages into state_dict; the others serve to resume."""
BOOKKEEPING = frozenset(
    {
        WEIGHTS,
        ARGUMENTS,
        *("epoch", "global_step", "pytorch-lightning_version", "loops", "callbacks", "optimizer_states", "lr_schedulers"),
        *("hparams_name", "hparams_type"),
        *("datamodule_hparams_name", "datamodule_hyper_parameters", "datamodule_hparams_type"),
        *("native_amp_scaling_state", "amp_scaling_state", *precision.__all__),
        *AVERAGING,
        # What DeepSpeed leaves in files that were put together from a folder:
        *("module", "optimizer", "lr_scheduler", "ds_config", "ds_version", "buffer_names", "param_shapes"),
        *("frozen_param_shapes", "frozen_param_fragments", "shared_params", "data_sampler", "random_ltd"),
        *("sparse_tensor_module_names", "csr_tensor_module_names", "skipped_steps", "global_steps", "global_samples"),
        *("dp_world_size", "mp_world_size"),
    }
)
"""Keys of a checkpoint that hold the weights, or that no output of the model depends on."""


def check_contents(content: Mapping[str, Any], source: object, known: Collection[str] = ()) -> None:
    """Refuse a checkpoint that holds more of the model than its weights and arguments.

    Args:
        content: The checkpoint.
        source: Where it came from, for messages.
        known: Further keys that hold nothing of the model, such as that of the datamodule.

    Raises:
        NotCarriedError: If there is a key that Lightning does not write by itself, or weights that wait to be averaged.
    """
    if unknown := sorted(str(key) for key in content.keys() - BOOKKEEPING - set(known)):
        msg = (
            f"Found {_listed(unknown)} in checkpoint {source}, expected nothing but weights, arguments and Lightning's own "
            "keys: what the task or a callback keeps there would be lost, so run the model with terratorch_simpler, or "
            "remove it from the file if no output depends on it."
        )
        raise NotCarriedError(msg)
    averaging = content.get("averaging_state")
    if isinstance(averaging, Mapping) and not int(averaging.get("n_averaged", 1)):
        msg = (
            f"Found weights in checkpoint {source} of which WeightAveraging has averaged none yet (averaging_state has "
            "n_averaged 0), expected those of the fit: give a later checkpoint, or one without that callback."
        )
        raise NotCarriedError(msg)


def check_callbacks(content: Mapping[str, Any], parameters: Collection[str], source: object) -> None:
    """Refuse averages of weights that a callback keeps aside, such as StochasticWeightAveraging once it has begun.

    Args:
        content: The checkpoint.
        parameters: Names of the parameters of the task; buffers such as running statistics may differ.
        source: Where it came from, for messages.

    Raises:
        NotCarriedError: If there are some that are not those in state_dict.
    """
    weights = {name: content[WEIGHTS][name] for name in parameters if name in content[WEIGHTS]}
    states = content.get("callbacks")
    for name, state in states.items() if isinstance(states, Mapping) else ():
        if isinstance(state, Mapping) and state.get("n_averaged") == 0:
            continue
        if any(_differ(part, weights) for part in _mappings(state)):
            msg = (
                f"Found weights in the state of callback '{name}' of checkpoint {source} that differ from those in "
                "state_dict, expected the model's in state_dict alone: save the checkpoint after the fit, when they are the "
                "model's own, or remove that state from the file to export those in state_dict."
            )
            raise NotCarriedError(msg)


def _mappings(state: object) -> Iterator[Mapping[Any, Any]]:
    if isinstance(state, Mapping):
        yield state
        for part in state.values():
            yield from _mappings(part)


def _differ(state: Mapping[Any, Any], weights: Mapping[str, Any]) -> bool:
    shared = ((value, weights.get(str(key).removeprefix("module."))) for key, value in state.items())
    return any(
        isinstance(value, Tensor) and isinstance(own, Tensor) and value.shape == own.shape and not torch.equal(value, own)
        for value, own in shared
    )


def arguments_of(task_class: type, saved: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The saved hyper_parameters that a task is built with.

    Args:
        task_class: The task.
        saved: The hyper_parameters of its checkpoint; keys that start with an underscore are those of the command line.
        source: Where they came from, for messages.

    Raises:
        NotCarriedError: If one is no argument of the task or of a class it derives from.
    """
    taken, anything, inherited = set[str](), True, set[str]()
    for one in inspect.getmro(task_class):
        if "__init__" not in vars(one):
            continue
        parameters = inspect.signature(one.__init__).parameters  # type: ignore[misc]
        if anything:  # the class passes further ones on
            taken |= set(parameters)
            anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        inherited |= set(parameters)
    if lost := sorted(key for key in saved if not key.startswith("_") and key not in inherited):
        msg = (
            f"Found {_listed(lost)} in the hyper_parameters of checkpoint {source}, expected arguments of "
            f"{task_class.__name__} only: the plain model cannot be built with it, so make it an argument of the task, or "
            "remove it from the file if no output depends on it."
        )
        raise NotCarriedError(msg)
    return {key: value for key, value in saved.items() if key in taken}


def check_names(unexpected: Collection[str], source: object) -> None:
    """Refuse tensors that no module of the task takes.

    Raises:
        NotCarriedError: If there are any.
    """
    if unexpected:
        msg = (
            f"Found {_listed(sorted(unexpected))} in the state_dict of checkpoint {source}, expected weights of the task "
            "alone: a callback or a hook has added it, so make it a part of the task, or remove it from the file if no "
            "output depends on it."
        )
        raise NotCarriedError(msg)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(f"'{name}'" for name in names[:4]) + more
