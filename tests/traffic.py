"""The bytes that the kernels move in ResNet-18: as counted by the ledger, and by the formula of kernels/README.md."""

from collections import Counter

from ledger import Launch

from benchmarks.work import Role
from resnet_fast.kernels import tiles


def count(launches: list[Launch]) -> dict[str, Counter]:
    """By kernel, the bytes of images, ReLU bits, partials, vectors and pivots that were read and written, each once."""
    kernels: dict[str, Counter] = {}
    for entry in launches:
        moved = kernels.setdefault(entry.kernel, Counter())
        for account in entry.accounts.values():
            # Of the tensor itself the combine kernel reads three rows, for the pivot.
            is_pivot = account.what == "images" and entry.kernel == "combine_statistics_kernel"
            for kind in ("read", "written"):
                moved["pivots" if is_pivot else account.what, kind] += account.moved(kind)
    return kernels


def formula(role: Role, n_images: int, n_channels: int, width: int, ghost: int | None = None) -> dict[str, Counter]:
    """kernels/README.md, "Bytes moved per element", for channels_last, as `count` gives it.

    `ghost`: images per ghost batch; every group has vectors and a pivot of its own.
    """
    n_rows = n_images * width * width
    shape = (n_rows, n_channels, width * width, True, (ghost or n_images) * width * width)
    n_groups = -(-n_images // (ghost or n_images))
    sizes = {
        "images": 2 * n_rows * n_channels,
        "bits": n_rows * n_channels // 8,
        "partials": 4 * tiles.choose_tiles(*shape).n_splits * n_channels,
        "sums": 4 * tiles.choose_tiles(*shape, tiles.SMALL_TILE_ELEMENTS).n_splits * n_channels,
        "vectors": 4 * n_channels,
        "of_groups": 4 * n_groups * n_channels,
        "pivots": n_groups * 3 * 2 * n_channels,
    }
    counted_as = {"sums": "partials", "of_groups": "vectors"}

    def moved(**operands: tuple[int, int]) -> Counter:
        """Bytes, from how many operands of each size are read and written."""
        bytes_moved = Counter()
        for what, size in sizes.items():
            for kind, n_operands in zip(("read", "written"), operands.get(what, (0, 0)), strict=True):
                bytes_moved[counted_as.get(what, what), kind] += size * n_operands
        return bytes_moved

    bn, add = role.join == "bn", role.join != "none"  # as numbers: the operands that a join adds
    writes_dz = add or role.fork
    return {
        "statistics_kernel": moved(images=(1 + bn, 0), partials=(0, 2 + 2 * bn)),
        "combine_statistics_kernel": moved(
            partials=(2 + 2 * bn, 0),
            vectors=(2 + 2 * bn, 2 + 2 * bn),
            of_groups=(0, 2 + 2 * bn),
            pivots=(1 + bn, 0),
        ),
        "normalize_kernel": moved(
            images=(1 + add, 1), bits=(0, add), vectors=(2 + 2 * bn, 0), of_groups=(2 + 2 * bn, 0)
        ),
        "reduce_kernel": moved(
            images=(2 + role.fork + bn, writes_dz),
            bits=(add, 0),
            sums=(0, 2 + bn),
            vectors=(0 if add else 2, 0),
            of_groups=(2 + 2 * bn, 0),
        ),
        "combine_gradients_kernel": moved(sums=(2 + bn, 0), vectors=(0, 2 + 2 * bn), of_groups=(0, 2 + bn)),
        "input_gradients_kernel": moved(
            images=(2 + bn, 1 + bn), vectors=((1 if writes_dz else 2) + bn, 0), of_groups=(4 + 3 * bn, 0)
        ),
    }


def image_bytes(kernels: dict[str, Counter]) -> int:
    """What the README's total counts: images and ReLU bits."""
    return sum(size for moved in kernels.values() for (what, _), size in moved.items() if what in ("images", "bits"))
