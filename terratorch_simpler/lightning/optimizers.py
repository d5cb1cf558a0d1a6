"""Optimizers that exist before the encoder is pruned, and then have to hold the pruned model's parameters.

With an ``optimizer:`` section, ``terratorch fit`` makes the optimizer from the parameters of the intact model when the
command line is built (``LightningCLI._add_configure_optimizers_method_to_model``), before any callback runs. Narrowed layers
keep their ``Parameter`` objects, so what is left to do is to drop the parameters of dropped blocks and to add new ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from terratorch_simpler.errors import CheckpointError
from terratorch_simpler.lightning.internals import cli_arguments_of_optimizers


@contextmanager
def updated_optimizers(module: nn.Module) -> Iterator[list[ParameterChange]]:
    """Update the existing optimizers of a module after its parameters have changed in the with block.

    Schedulers stay valid: the optimizer, its groups and their lists of parameters are changed in place.

    Args:
        module: The task.

    Yields:
        A list that holds, after the block, what has changed in each of the optimizers.
    """
    before = list(module.parameters())  # kept alive, so that no new parameter gets the id of an old one
    changes: list[ParameterChange] = []
    yield changes
    changes += [ParameterChange(optimizer, before, module) for optimizer in optimizers_of(module)]


class ParameterChange:
    """Makes one optimizer hold a module's parameters as they are now.

    A parameter that is still there stays in its group, and one that was in none stays in none. New ones join the group of
    the parameter before them in the module, or of its first one. Within a group the order becomes that of the module.

    Args:
        optimizer: The optimizer, changed in place. It has not been stepped yet.
        before: Parameters of the module when it was made.
        module: The module as it is now.
    """

    def __init__(self, optimizer: Optimizer, before: Sequence[nn.Parameter], module: nn.Module) -> None:
        """Change the groups."""
        known = {id(parameter) for parameter in before}
        places = {
            id(parameter): (number, place)
            for number, group in enumerate(optimizer.param_groups)
            for place, parameter in enumerate(group["params"])
        }
        self._sizes_before = [len(group["params"]) for group in optimizer.param_groups]
        # For every parameter that a group holds now, its place in the group before.
        self._places_before: list[list[int | None]] = [[] for _ in optimizer.param_groups]
        updated: list[list[tuple[str, nn.Parameter]]] = [[] for _ in optimizer.param_groups]
        last = next((places[id(parameter)][0] for parameter in before if id(parameter) in places), None)
        for name, parameter in module.named_parameters():
            number, place = places.get(id(parameter), (last, None))
            if number is None or (place is None and id(parameter) in known):
                continue
            updated[number].append((name, parameter))
            self._places_before[number].append(place)
            last = number
        for group, now in zip(optimizer.param_groups, updated, strict=True):
            group["params"][:] = [parameter for _, parameter in now]  # in place: L-BFGS keeps the list itself
            if "param_names" in group:
                group["param_names"] = [name for name, _ in now]

    def convert_state(self, state: dict[str, Any]) -> None:
        """Convert the state of an optimizer that still holds what was dropped, as earlier checkpoints do.

        Args:
            state: An optimizer's ``state_dict``, changed in place; left alone if it has the present number of parameters.

        Raises:
            CheckpointError: If it has neither the present number nor that before.
        """
        sizes = [len(group["params"]) for group in state["param_groups"]]
        if sizes == [len(places) for places in self._places_before]:
            return
        if sizes != self._sizes_before:
            msg = (
                f"The checkpoint's optimizer holds {sum(sizes)} tensors, expected "
                f"{sum(map(len, self._places_before))} as in the pruned model: resume with the optimizer of the fit that "
                "wrote it, or start a new fit from its weights with backbone_ckpt_path."
            )
            raise CheckpointError(msg)
        converted: dict[int, Any] = {}
        count = 0
        for group, places in zip(state["param_groups"], self._places_before, strict=True):
            old = list(group["params"])
            group["params"] = list(range(count, count + len(places)))
            for index, place in zip(group["params"], places, strict=True):
                if place is not None and old[place] in state["state"]:
                    converted[index] = state["state"][old[place]]
            count += len(places)
        state["state"] = converted


def optimizers_of(module: nn.Module) -> list[Optimizer]:
    """Optimizers that exist before ``configure_optimizers`` is called: those of the command line, and the module's own."""
    values = [*vars(module).values(), *cli_arguments_of_optimizers(module)]
    return list({id(optimizer): optimizer for optimizer in _optimizers_in(values)}.values())


def _optimizers_in(values: Iterable[Any]) -> Iterator[Optimizer]:
    for value in values:
        if isinstance(value, Optimizer):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Optimizer))
        elif isinstance(value, Mapping):
            yield from (item for item in value.values() if isinstance(item, Optimizer))


def dropped_parameters(optimizers: Iterable[Optimizer], module: nn.Module) -> int:
    """Number of tensors in optimizers that are not parameters of a module."""
    parameters = {id(parameter) for parameter in module.parameters()}
    return sum(id(value) not in parameters for one in optimizers for group in one.param_groups for value in group["params"])
