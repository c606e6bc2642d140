"""Cases of memory safety, and a kernel that can be wrong; `python tests/memory_cases.py DEVICE` runs the cases."""

import itertools
import sys
from functools import partial

import torch
import triton
import triton.language as tl
from fused_op import CORNERS, LAYOUTS, Case, make_operands, ours, results

from resnet_fast.ops import launch

CASES = (
    *CORNERS,
    Case("a split of one row", (1, 32, 5, 13)),
    Case("several tiles of channels", (1, 136, 3, 3)),
    Case("ghost batches, the last of one image", (5, 20, 5, 7), ghost=2),
)


@triton.jit
def shifted_copy_kernel(x_ptr, y_ptr, n_elements, READ_SHIFT: tl.constexpr, WRITE_SHIFT: tl.constexpr):
    """y[i + WRITE_SHIFT] = x[i + READ_SHIFT] for i < n_elements: wrong where a shift is not 0."""
    offs = tl.arange(0, 16)
    mask = offs < n_elements
    x = tl.load(x_ptr + READ_SHIFT + offs, mask=mask, other=0.0)
    tl.store(y_ptr + WRITE_SHIFT + offs, x, mask=mask)


def copy(x, y, n_elements=10, read_shift=0, write_shift=0):
    launch.launch_kernel(
        shifted_copy_kernel,
        (1,),
        x_ptr=x,
        y_ptr=y,
        n_elements=n_elements,
        READ_SHIFT=read_shift,
        WRITE_SHIFT=write_shift,
    )


if __name__ == "__main__":
    device = torch.device(sys.argv[1])
    if "--wrong" in sys.argv:
        copy(torch.rand(10, device=device), torch.zeros(10, device=device), write_shift=1 << 20)
    for case, join, layout in itertools.product(CASES, ("none", "add", "bn"), LAYOUTS):
        found = results(
            partial(ours, ghost=case.ghost), make_operands(case, torch.bfloat16, layout, device), join, True, "triton"
        )
        assert all(result.isfinite().all() for result in found.values()), (case, join, layout)
