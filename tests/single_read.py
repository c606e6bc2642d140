"""Helpers for the tests of the single-read batch norm: a table that chooses it, and the kernels that a run launches."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from chosen import launched
from fused_op import Case

from resnet_fast.kernels import tiles
from resnet_fast.ops import choices, single_read
from resnet_fast.ops.implementations import DTYPES, Choice, Operation, Problem

FORWARD, BACKWARD = "single_read_forward_kernel", "single_read_backward_kernel"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N_PROGRAMS = single_read.multiprocessors(DEVICE)  # that run at once: 132 on an H200, on a CPU 4 are pretended
BLOCK_C = tiles.MAX_BLOCK_C
BLOCK_M = tiles.SINGLE_READ_WARPS * 32 * tiles.THREAD_ELEMENTS // BLOCK_C
BOTH: tuple[Operation, ...] = ("batch norm", "batch norm backward")


def entries(case: Case, dtype: torch.dtype, join: str, operations: tuple[Operation, ...] = BOTH) -> dict:
    n_images, n_channels, _, width = case.shape
    return {
        Problem(
            operation,
            DTYPES.get(dtype, "fp32"),
            n_images,
            n_channels,
            n_channels,
            width,
            join,
            case.fork and operation == "batch norm backward",
        ): Choice("single read")
        for operation in operations
    }


@contextmanager
def reading_once(case: Case, dtype: torch.dtype, join: str) -> Iterator[None]:
    """Both directions of the case read once, and nothing else is launched."""
    with choices.using(entries(case, dtype, join)), launched() as kernels:
        yield
    assert set(kernels) == {FORWARD, BACKWARD}
