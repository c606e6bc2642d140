"""The error budget: how far a result may be from the exact one."""

import torch
from torch import Tensor

from resnet_fast.ops.arguments import accumulation_type

# What random values may take of the roundings of their terms. N1 and B2 to B4 round a term up to 30 times (S1 2 and its
# sums, S2 3 and its sums, 1/sqrt 4, N1 4, B2 3 and its sums, B4 6). Independent errors add up as the square root of
# their number, 5.5; the largest of the thousands that are looked at is half as large again.
ROUNDINGS = 8


def assert_within_budget(
    name: str,
    ours: Tensor,
    eager: Tensor | list[Tensor],
    exact: Tensor,
    added: Tensor | None = None,
    exact_of_eager: Tensor | list[Tensor] | None = None,
) -> None:
    """Error against fp64 <= 2 x eager's own error in this type + one rounding of the type, in maximum and in L2 norm.

    `ours` and `eager` are of one type; `exact` is computed in fp64 from the same, already rounded, inputs; where eager
    has another one (ReLU's gradient jumps at 0) it is `exact_of_eager`. Of several `eager` results, each with an
    `exact_of_eager` if these are a list, the least exact one tells eager's error (another layout adds up in another
    order). `added`, for a result that is a sum, holds the sum of its terms' magnitudes and allows one fp32 (fp64 for
    fp64) rounding of that: ATen on a CPU adds up in fp64, next to which fp32 has an error of its own; the kernels, like
    ATen on a GPU, add up in fp32.
    """
    eagers = [eager] if isinstance(eager, Tensor) else eager
    exacts = exact_of_eager if isinstance(exact_of_eager, list) else [exact_of_eager] * len(eagers)
    for eager in eagers:
        assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, eager has {eager.dtype}"
        assert ours.shape == eager.shape == exact.shape, f"{name}: shape {ours.shape}, eager has {eager.shape}"
    finfo = torch.finfo(ours.dtype)
    for order in (float("inf"), 2):

        def norm(tensor: Tensor, order: float = order) -> float:
            return torch.linalg.vector_norm(tensor.detach().double(), order).item()

        pairs = zip(eagers, exacts, strict=True)
        allowed = 2 * max(norm(eager.double() - (exact if its is None else its)) for eager, its in pairs)
        allowed += norm((exact.abs() * (finfo.eps / 2)).clamp(min=finfo.smallest_normal * finfo.eps / 2))
        if added is not None:
            allowed += torch.finfo(accumulation_type(ours)).eps / 2 * norm(added)
        error = norm(ours.double() - exact)
        assert error <= allowed, f"{name}: error {error:.3e} (norm {order}), budget {allowed:.3e}"
