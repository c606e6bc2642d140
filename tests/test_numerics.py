"""Our error is never more than twice eager's, and smaller where eager's formula cancels or overflows.

From |mean| = 0 to 1e5 std, from 2 rows to 2^20, and in named corners. numerics.py says what is measured and in which
units, docs/numerics.md shows the figures.
"""

from dataclasses import replace

import pytest
import torch
from numerics import CORNERS, DTYPES, MEANS, RESULTS, ROWS, allowances, errors

SMALL = tuple(case for case in ROWS if case.value <= 2**10)
FP32 = [(case, case.dtypes[0]) for case in (*MEANS[::3], SMALL[0], SMALL[2], *CORNERS)]
BF16 = [(case, "bf16") for case in (MEANS[2], CORNERS[0], CORNERS[2])]
EVERY = [(case, dtype) for case in MEANS + SMALL + CORNERS for dtype in case.dtypes]
CANCELLING = [(case, "fp32", "channels_last") for case in MEANS if case.value in (10, 1e3, 1e5)] + [
    (case, dtype, layout)
    for case in CORNERS
    if case.name == "constant 1000.1"
    for dtype, layout in (("fp32", "nchw"), ("bf16", "channels_last"))
]


def check(case, dtype, device):
    ours, eager = (errors(case, DTYPES[dtype], provider, device) for provider in ("ours", "eager"))
    allowed = allowances(case, DTYPES[dtype], device)
    for name in RESULTS:
        for norm in ("max", "rms"):
            error, budget = getattr(ours[name], norm), 2 * getattr(eager[name], norm) + getattr(allowed[name], norm)
            assert error <= budget, f"{name}: {norm} error {error:.3e}, budget {budget:.3e}"


@pytest.mark.parametrize(
    ("case", "dtype"),
    FP32 + BF16 + [pytest.param(*more, marks=pytest.mark.slow) for more in EVERY if more not in FP32 + BF16],
    ids=str,
)
def test_error_is_within_twice_eagers(case, dtype, device):
    check(case, dtype, device)


@pytest.mark.slow
def test_many_rows(device):
    check(next(case for case in ROWS if case.value == 2**16), "fp32", device)


@pytest.mark.parametrize(("case", "dtype", "layout"), CANCELLING, ids=str)
def test_y_is_four_times_as_exact_where_eager_cancels(case, dtype, layout, device):
    """Eager on the CPU computes x·alpha + (bias - mean·alpha). Its CUDA kernels do not."""
    case = replace(case, layout=layout)
    ours = errors(case, DTYPES[dtype], "ours", device)["y"]
    eager = errors(case, DTYPES[dtype], "eager", torch.device("cpu"))["y"]
    assert ours.rms <= eager.rms / 4


@pytest.mark.parametrize("case", CORNERS, ids=str)
def test_corners_whatever_eager_does(case, device):
    """Eager's error is no measure where it is infinite: 16 budgets without it, for the growth of rounding in sums."""
    dtype = case.dtypes[0]
    ours, allowed = errors(case, DTYPES[dtype], "ours", device), allowances(case, DTYPES[dtype], device)
    for name in RESULTS:
        assert ours[name].max <= 16 * allowed[name].max
