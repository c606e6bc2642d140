"""A stand-in for training.graph.CudaGraph where there is no GPU: the operators of one run, and none of its Python.

As in a CUDA graph, recording runs nothing: whatever the recorded run changed is changed back, and what it made is
filled with NaN. A call runs the same operators on the same tensors again and puts their results where the recorded ones
are. So what only Python does (a number that was baked in, a branch, a tensor that took another's place) stays as it was
when it was recorded. A replay draws new random numbers, as a CUDA graph's does.

Not seen are kernels that are launched around the dispatcher, as Triton's are outside of an operator.
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

# What a capture refuses, because the host would wait for a result.
REFUSED = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Call(NamedTuple):
    """An operator, what it got, and what it made: tensors with a memory of their own."""

    operator: Any
    args: tuple
    kwargs: dict[str, Any]
    made: list[Tensor | None]
    grad_enabled: bool


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    """Notes every operator, and the bytes of all memory from outside before it is used first."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.outside: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.own: dict[int, torch.UntypedStorage] = {}  # which also keeps addresses from being used again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in REFUSED:
            raise RuntimeError(f"{func} waits for a result, which a recording has not")
        before = set()
        for tensor in tensors_in((args, kwargs)):
            before.add(address(tensor))
            if address(tensor) not in self.own and address(tensor) not in self.outside:
                storage = tensor.untyped_storage()
                self.outside[address(tensor)] = storage, storage.clone()
        result = func(*args, **kwargs)
        made: list[Tensor | None] = []
        for tensor in tensors_in(result):
            made.append(None if address(tensor) in before else tensor)
            if made[-1] is not None:
                self.own[address(tensor)] = tensor.untyped_storage()
        self.calls.append(Call(func, args, kwargs, made, torch.is_grad_enabled()))
        return result

    def undo(self) -> None:
        for storage, bytes_before in self.outside.values():
            storage.copy_(bytes_before)
        for storage in self.own.values():
            storage.fill_(0xFF)  # NaN in every floating type


class RecordedGraph(Generic[T]):
    """Records `run` on CPU tensors; a call replays it and returns what it returned, in the same tensors."""

    def __init__(self, run: Callable[[], T], n_warm_up: int = 3) -> None:
        for _ in range(n_warm_up):
            run()
        random_state = torch.get_rng_state()
        recorder = Recorder()
        with recorder:
            self.result = run()
        recorder.undo()
        torch.set_rng_state(random_state)
        self.calls = recorder.calls

    def __call__(self) -> T:
        # As the recorder ran them: below autograd.
        with torch._C._AutoDispatchBelowAutograd():
            for call in self.calls:
                with torch.set_grad_enabled(call.grad_enabled):
                    result = call.operator(*call.args, **call.kwargs)
                    for tensor, new in zip(call.made, tensors_in(result), strict=True):
                        if tensor is not None:
                            tensor.copy_(new)
        return self.result
