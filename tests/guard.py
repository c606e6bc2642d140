"""Runs every launch on copies of its tensors between guard bytes, for compiled and interpreted kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fast.ops import launch

FRAME = 1 << 13  # bytes on each side: a tile of 2,048 elements of fp32; keeps pointers as aligned as torch's own
UPDATED = (
    *("running_mean_ptr", "running_var_ptr", "residual_running_mean_ptr", "residual_running_var_ptr"),
    "barrier_ptr",
)


class Framed:
    """A copy of one launch argument between guard bytes; what the launch has to write holds `fill` first."""

    def __init__(self, tensor: Tensor, fill: int) -> None:
        n_bytes = tensor.numel() * tensor.element_size()
        self.is_fresh = is_poison(tensor)
        # All bits set is NaN in every floating type: a value read beside an input shows. Beside an output and ReLU bits
        # that would be a likely value, and one written there might not show.
        self.pattern = 0xA5 if self.is_fresh or tensor.dtype == torch.uint8 else 0xFF
        self.bytes = torch.full((n_bytes + 2 * FRAME,), self.pattern, dtype=torch.uint8, device=tensor.device)
        self.inside = self.bytes[FRAME : FRAME + n_bytes]
        self.tensor = self.inside.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        if self.is_fresh:
            self.inside.fill_(fill)
        else:
            self.tensor.copy_(tensor)

    def frame_is_intact(self) -> bool:
        return bool((self.bytes[:FRAME] == self.pattern).all() and (self.bytes[-FRAME:] == self.pattern).all())


def is_poison(tensor: Tensor) -> bool:
    """Whether the tensor is as `poisoned_memory` allocates it."""
    return bool(tensor.isnan().all() if tensor.is_floating_point() else (tensor == torch.iinfo(tensor.dtype).max).all())


@contextmanager
def guarded_memory() -> Iterator[set[str]]:
    """Checks every launch inside the context: it writes nothing outside of its arguments, every byte of the fresh ones,
    and of the others the running statistics and the barrier's words alone. Gives the names of the kernels launched.

    What is left unwritten shows because a launch runs twice, on two fills, and must leave the same bytes. Needs the
    fixture `poisoned_memory`, by which fresh tensors are known.
    """
    kernels: set[str] = set()
    run = launch.launch_kernel

    def guarded(kernel, grid, *options, **arguments):
        kernels.add(kernel.__name__)
        descriptors = {name: value for name, value in arguments.items() if isinstance(value, TensorDescriptor)}
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        tensors |= {name: value.base for name, value in descriptors.items()}
        zeros, ones = ({name: Framed(value, fill) for name, value in tensors.items()} for fill in (0x00, 0xFF))
        for frames in (zeros, ones):
            framed = {name: frame.tensor for name, frame in frames.items()}
            framed |= {name: replace(of, base=framed[name]) for name, of in descriptors.items()}
            run(kernel, grid, *options, **arguments | framed)
            for name, frame in frames.items():
                assert frame.frame_is_intact(), f"{kernel.__name__} wrote outside {name}"
        for name, tensor in tensors.items():
            frame = ones[name]
            assert torch.equal(frame.inside, zeros[name].inside), f"{kernel.__name__} left part of {name} unwritten"
            if frame.is_fresh or name in UPDATED:
                tensor.copy_(frame.tensor)
            else:
                assert torch.equal(frame.tensor, tensor), f"{kernel.__name__} changed {name}"

    with mock.patch.object(launch, "launch_kernel", guarded):
        yield kernels
