"""The state that a training step changes: find it, copy it, restore it.

    state = StepState((model, optimizer, scaler))
    snapshot = Snapshot(state)
    …                              # any number of steps
    snapshot.put_back()            # weights, buffers, gradients, optimizer, scaler and random states, bit for bit

Containers are the dictionaries that hold state, such as a module's buffers or an optimizer's state of a parameter. A
snapshot remembers which objects they hold, and copies the tensors' values.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from resnet_fast.training.random_state import random_states, restore_random_states
from resnet_fast.training.unrecordable import Unrecordable


class StepState:
    """The state of modules, optimizers, gradient scalers and single tensors.

    Args:
        objects: modules, optimizers, scalers and tensors. Their layers and parameters must not be replaced later.

    Raises:
        TypeError: an object is of another kind.
        ValueError: no object holds a tensor.
    """

    def __init__(self, objects: Sequence[Any]) -> None:
        modules: dict[nn.Module, None] = {}
        self.optimizers, self.scalers, self.single = [], [], []
        for part in objects:
            if isinstance(part, nn.Module):
                modules.update(dict.fromkeys(part.modules()))
            elif isinstance(part, torch.optim.Optimizer):
                self.optimizers.append(part)
            elif isinstance(part, GradScaler):
                self.scalers += [part] if part.is_enabled() else []
            elif isinstance(part, Tensor):
                self.single.append(part)
            else:
                rule = "changes must be modules, optimizers, gradient scalers and tensors, each an argument of its own"
                raise TypeError(f"{rule}, got {type(part).__name__}")
        self.modules = list(modules)
        self.buffers = [module._buffers for module in self.modules if module._buffers]
        self.find_parameters()
        if not self.tensors():
            raise ValueError("changes must hold at least one tensor, got none: pass the model and the optimizer")

    def find_parameters(self) -> None:
        """Find the parameters of the modules and the optimizers; an optimizer may have got new ones."""
        owned = (module._parameters.values() for module in self.modules)
        optimized = (group["params"] for group in self.groups())
        self.parameters = list(dict.fromkeys(p for p in itertools.chain(*owned, *optimized) if p is not None))

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    @property
    def is_shared(self) -> bool:
        """Whether other processes take part in the step."""
        distributed = torch.distributed
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        return several or any(isinstance(module, DistributedDataParallel) for module in self.modules)

    def groups(self) -> list[dict[str, Any]]:
        """Return the optimizers' groups of parameters."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def rated_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.groups() if "lr" in group]

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the state except gradients and learning rates."""
        found = [*self.parameters, *self.single]
        for buffers in self.buffers:
            add_tensors(buffers.values(), found)
        for optimizer in self.optimizers:
            add_tensors(optimizer.state.values(), found)
        for scaler in self.scalers:
            add_tensors((scaler._scale, scaler._growth_tracker), found)
        return found

    def addresses(self) -> list[int]:
        return [*map(Tensor.data_ptr, self.tensors())]

    def has_gradients(self) -> tuple[bool, ...]:
        return tuple([parameter.grad is not None for parameter in self.parameters])

    def settings(self) -> tuple:
        """Return the Python values that a step reads: hyperparameters, modes, and which weights are trained."""
        hyperparameters = []
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for name in optimizer.defaults:
                    if name == "capturable":  # set by make_capturable
                        continue
                    value = group.get(name)
                    if name == "lr":  # its value may change between calls, in a number or a tensor
                        value = id(value) if isinstance(value, Tensor) else None
                    hyperparameters.append(tuple(value) if isinstance(value, list) else value)
        own = [module.__dict__ for module in self.modules]
        modes = [(one["training"], one.get("momentum"), one.get("eps")) for one in own]  # batch norms have all three
        return tuple(hyperparameters), tuple(modes), tuple([weight.requires_grad for weight in self.parameters])

    def make_capturable(self) -> None:
        """Make the optimizers count their steps on the GPU."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if "capturable" not in group or group["params"][0].device.type != "cuda":
                    continue
                group["capturable"] = True
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter, {})
                    if isinstance(state.get("step"), Tensor):
                        state["step"] = state["step"].to(parameter.device)

    def containers(self) -> Iterator[tuple[str, dict]]:
        """Yield the dictionaries that hold state, with the names of their owners."""
        for module in self.modules:
            yield type(module).__name__, module._buffers
        for optimizer in self.optimizers:
            name = type(optimizer).__name__
            for container in (optimizer.state, *optimizer.state.values(), *optimizer.param_groups):
                yield name, container


class Value(NamedTuple):
    tensor: Tensor
    value: Tensor


class Snapshot:
    """The current state, with random states and gradients; as a context manager, it restores the state at the end."""

    def __init__(self, state: StepState) -> None:
        self.state = state
        self.contents = [(owner, container, dict(container)) for owner, container in state.containers()]
        self.scaled = [{key: dict(one) for key, one in s._per_optimizer_states.items()} for s in state.scalers]
        self.gradients = [parameter.grad for parameter in state.parameters]
        self.addresses = [*map(Tensor.data_ptr, state.parameters)]
        tensors = [*state.tensors(), *(gradient for gradient in self.gradients if gradient is not None)]
        add_tensors([group["lr"] for group in state.rated_groups()], tensors)
        unique = {id(tensor): tensor for tensor in tensors}
        self.values = [Value(tensor, tensor.detach().clone()) for tensor in unique.values()]
        self.rates: list[Value] = []
        self.random = random_states(state.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.put_back()

    @torch.no_grad()
    def put_back(self) -> None:
        for _, container, content in self.contents:
            container.clear()
            container.update(content)
        for scaler, scaled in zip(self.state.scalers, self.scaled, strict=True):
            scaler._per_optimizer_states.clear()
            scaler._per_optimizer_states.update(scaled)
        for tensor, value in self.values:
            tensor.copy_(value)
        for parameter, gradient in zip(self.state.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        restore_random_states(self.random, self.state.device)

    def make_rates_tensors(self) -> list[Tensor]:
        """Make every learning rate a tensor on the device, and return these tensors."""
        for group in self.state.rated_groups():
            rate = group["lr"]
            if not isinstance(rate, Tensor) or rate.device != self.state.device:
                rate = torch.tensor(float(rate), dtype=torch.float32, device=self.state.device)
            group["lr"] = rate
            self.rates.append(Value(rate, rate.clone()))
        return [rate.tensor for rate in self.rates]

    def has_new_state(self) -> bool:
        return any(content.keys() < container.keys() for _, container, content in self.contents)

    def check_nothing_is_replaced(self) -> None:
        """Raise Unrecordable if Python replaced something, which a replay does not repeat."""
        for group, (rate, value) in zip(self.state.rated_groups(), self.rates, strict=True):
            if group["lr"] is not rate or not torch.equal(rate, value):
                raise Unrecordable("it changes the learning rate; call scheduler.step() after it")
        if any(self.scaled) or any(scaler._per_optimizer_states for scaler in self.state.scalers):
            raise Unrecordable("the gradient scaler's unscale_(), step() and update() must be in one function")
        if self.addresses != [*map(Tensor.data_ptr, self.state.parameters)]:
            raise Unrecordable("it moves a weight to other memory, as param.data = ... does; use param.data.copy_(...)")
        for owner, container, content in self.contents:
            for name, value in content.items():
                if name != "lr" and not _is_same(container.get(name), value):
                    what = name if isinstance(name, str) else "state"
                    raise Unrecordable(f"it replaces {what} of {owner}; keep a tensor there, and change it in place")


def add_tensors(values: Iterable[Any], found: list[Tensor]) -> None:
    """Append the tensors among the values, and in nested dicts, lists and tuples, to `found`."""
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            add_tensors(value.values(), found)
        elif isinstance(value, list | tuple):
            add_tensors(value, found)


def _is_same(value: Any, before: Any) -> bool:
    """Return whether these are the same tensors, or equal values; of dictionaries, which are containers, the keys."""
    if isinstance(value, Tensor) or isinstance(before, Tensor):
        return value is before
    if isinstance(value, dict) and isinstance(before, dict):
        return value.keys() == before.keys()
    if isinstance(value, list | tuple) and isinstance(before, list | tuple):
        return len(value) == len(before) and all(map(_is_same, value, before))
    return value is before or bool(value == before)
