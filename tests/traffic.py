"""The bytes that the kernels move in ResNet-18, as counted by the ledger and by the formula of kernels/README.md."""

from collections import Counter

import numpy as np
import torch
from ledger import Launch

from benchmarks.work import Role
from resnet_fast.kernels import tiles
from resnet_fast.ops.launch import Shape, choose_tiles

BF16 = torch.empty(0, dtype=torch.bfloat16)


def count(launches: list[Launch]) -> dict[str, Counter]:
    """By kernel, the bytes of images, ReLU bits, partials and vectors that were read and written, each once."""
    kernels: dict[str, Counter] = {}
    for entry in launches:
        moved = kernels.setdefault(entry.kernel, Counter())
        for account in entry.accounts.values():
            for kind in ("read", "written"):
                moved[account.what, kind] += account.moved(kind)
    return {kernel: +moved for kernel, moved in kernels.items()}


def pivot_rows(n_rows: int, block_m: int) -> np.ndarray:
    """The rows of a group from which every split finds the pivot; of few rows some more than once."""
    n_pivot_rows = min(32, block_m // 2)
    return np.arange(n_pivot_rows) * 40503 % 65536 * n_rows >> 16


def formula(
    role: Role, n_images: int, n_channels: int, width: int, ghost: int | None = None, training: bool = True
) -> dict[str, Counter]:
    """kernels/README.md, "Bytes moved per element", for bf16 in channels_last, as `count` gives it.

    `ghost`: images per ghost batch; each group has statistics and sums of its own. Without `training` only the forward.
    """
    n_rows = n_images * width * width
    shape = Shape(n_rows, n_channels, width * width, True, (ghost or n_images) * width * width)
    bn, add = role.join == "bn", role.join != "none"  # as numbers: the operands that a join adds
    norms, writes_dz = 1 + bn, add or role.fork
    statistics = choose_tiles(shape, BF16, 1, tiles.STATISTICS_PROGRAMS)
    reduction = choose_tiles(shape, BF16, 2 + role.fork + bn, tiles.REDUCE_PROGRAMS)
    sizes = {
        "images": 2 * n_rows * n_channels,
        "bits": n_rows * n_channels // 8,
        "partials": 8 * statistics.n_parts * n_channels,  # shift and M2
        "sums": 4 * reduction.n_parts * n_channels,
        "vectors": 4 * n_channels,
        "of_groups": 4 * shape.n_groups * n_channels,
        "pivots": 4 * shape.n_groups * n_channels,
    }
    counted_as = {"sums": "partials", "pivots": "partials", "of_groups": "vectors"}

    def moved(**operands: tuple[int, int]) -> Counter:
        """Bytes, from how many operands of each size are read and written."""
        bytes_moved = Counter()
        for what, numbers in operands.items():
            for kind, n_operands in zip(("read", "written"), numbers, strict=True):
                bytes_moved[counted_as.get(what, what), kind] += sizes[what] * n_operands
        return +bytes_moved

    # Weight and bias; running statistics; mean and rstd; the parameters' gradients.
    normalize = moved(images=(1 + add, 1), bits=(0, add), vectors=(2 * norms, 0))
    if not training:
        return {"normalize_kernel": normalize + moved(vectors=(2 * norms, 2 * norms))}
    kernels = {"statistics_kernel": moved(images=(norms, 0), partials=(0, norms), pivots=(0, 2 * norms))}
    merge = moved(partials=(norms, 0), pivots=(norms, 0), vectors=(2 * norms, 2 * norms), of_groups=(0, 2 * norms))
    if shape.n_groups == 1 and statistics.n_parts <= tiles.FEW_SPLITS:
        normalize += merge
    else:
        kernels["combine_statistics_kernel"] = merge
        normalize += moved(of_groups=(2 * norms, 0))
    kernels["normalize_kernel"] = normalize

    kernels["reduce_kernel"] = moved(
        images=(2 + role.fork + bn, writes_dz),
        bits=(add, 0),
        sums=(0, 2 + bn),
        vectors=(2, 0),  # to recompute ReLU's sign; a compiled kernel that reads bits does not load them
        of_groups=(2 * norms, 0),
    )
    gradients = moved(images=(2 + bn, 1 + bn), vectors=(2 + bn, 0), of_groups=(2 * norms, 0))
    merge = moved(sums=(2 + bn, 0), vectors=(0, 2 * norms))
    if shape.n_groups == 1 and reduction.n_parts <= tiles.FEW_SPLITS:
        gradients += merge
    else:
        kernels["combine_gradients_kernel"] = merge + moved(of_groups=(0, 2 + bn))
        gradients += moved(of_groups=(2 + bn, 0))
    kernels["input_gradients_kernel"] = gradients
    return kernels


def image_bytes(kernels: dict[str, Counter]) -> int:
    """What the total of kernels/README.md counts: images and ReLU bits."""
    return sum(size for moved in kernels.values() for (what, _), size in moved.items() if what in ("images", "bits"))
