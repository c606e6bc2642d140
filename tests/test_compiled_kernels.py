"""docs/kernels.csv is up to date for every GPU family, and no kernel in it is slow by construction.

No GPU is needed. Most rows stand on their key, a hash of all that determines the machine code; the path most taken and
a sample of the others are compiled afresh.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import triton
from kernels_page import is_most_taken, read, tables
from pages import DOCS, shown_tables

from resnet_fast.kernels import tiles

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("kernels_page.py")
TABLE = read()
MADE_BY = next(iter(TABLE.values()))["triton"]
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx1100")
DATA_KERNELS = {"statistics_kernel", "normalize_kernel", "reduce_kernel", "input_gradients_kernel"}
# Per-channel vectors and partial results that a kernel reads and writes at the most: an access of each thread at the
# most, far fewer than a whole image would take. Of each norm the normalization reads weight, bias, the running
# statistics, and the partial results and the pivot, or mean and rstd. The statistics read the M2 of a first attempt.
VECTORS = {
    "loads": {"statistics_kernel": 1, "normalize_kernel": 16, "reduce_kernel": 4, "input_gradients_kernel": 10},
    "stores": {"statistics_kernel": 3, "normalize_kernel": 8, "reduce_kernel": 3, "input_gradients_kernel": 4},
}
COMBINE_KERNELS = {"combine_statistics_kernel", "combine_gradients_kernel"}


@pytest.fixture(scope="module")
def report() -> dict:
    """A process of its own, where nothing is interpreted."""
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows(report) -> list[dict]:
    """The sample, and the table where it is of the installed Triton."""
    return report["sample"] + (list(TABLE.values()) if triton.__version__ == MADE_BY else [])


@pytest.mark.skipif(triton.__version__ != MADE_BY, reason=f"the table was made by triton {MADE_BY}")
def test_the_table_is_current(report):
    assert not report["missing"] and not report["left over"], "the kernels have changed: run `make kernels`"
    assert [row for row in report["sample"] if row != TABLE[row["key"]]] == []


def test_the_page_shows_the_table():
    assert shown_tables(DOCS / "kernels.md") == tables(list(TABLE.values()))


def test_every_kernel_type_and_layout_is_compiled_for_every_target():
    found = {(row["kernel"], row["dtype"], row["layout"], row["target"]) for row in TABLE.values()}
    for target in TARGETS:
        for dtype in ("bf16", "fp16", "fp32", "fp64"):
            for layout in ("channels_last", "nchw"):
                assert {(kernel, dtype, layout, target) for kernel in DATA_KERNELS} <= found
    assert COMBINE_KERNELS <= {row["kernel"] for row in TABLE.values()}


def test_no_stack(rows):
    assert [row for row in rows if row["stack"] != "0"] == []


def test_registers(rows):
    """The limits of tiles.py; on CDNA they are as good, on RDNA 192 leave room for eight wavefronts of 1,536."""
    for row in rows:
        limit = tiles.MAX_REGISTERS
        if row["kernel"] in COMBINE_KERNELS or row["dtype"] == "fp64" or row["target"] in ("sm_100", "sm_120"):
            limit = tiles.ALL_REGISTERS
        elif row["kernel"] in ("statistics_kernel", "reduce_kernel") and row["layout"] == "channels_last":
            limit = tiles.MAX_REGISTERS_REDUCTION
        if row["target"] == "gfx1100":
            limit = max(limit, 192)
        assert int(row["registers"]) <= limit, row


@pytest.mark.parametrize(("kind", "images"), (("loads", "images_read"), ("stores", "images_written")))
def test_accesses_to_images_are_16_bytes_wide(kind, images, rows):
    """In channels_last: x, y, dy, dx and their kin, or as wide as a thread's share (8 bytes of a tile of 1,024 16-bit
    elements on the 256 threads of CDNA), all tiles of a step at once. Narrower are the ReLU bits, the rows for a pivot,
    vectors and partial results.
    """
    for row in rows:
        if row["kernel"] not in DATA_KERNELS or row["layout"] != "channels_last":
            continue
        width = min(128, int(row["share"]))
        accesses = {int(bits): int(count) for bits, count in (access.split("x") for access in row[kind].split())}
        wide = sum(count for bits, count in accesses.items() if bits >= width)
        assert wide >= int(row[images]) * int(row["n_tiles"]) * int(row["share"]) // width, row
        narrow = Counter({bits: count for bits, count in accesses.items() if bits < width})
        if row["join"] != "none" and row["relu"] == "True":
            del narrow[8]
        if (row["kernel"], kind) == ("statistics_kernel", "loads"):
            narrow[max(narrow, default=0)] -= 1  # the rows of the pivot are at most half a tile
        if (row["kernel"], kind) == ("normalize_kernel", "loads"):
            narrow[64] -= 16  # pairs of partial results: of each norm 32 splits by 32 channels, of 128 threads
        narrow[64 if row["dtype"] == "fp64" else 32] -= VECTORS[kind][row["kernel"]]
        assert not +narrow, row


def test_image_addresses_are_64_bits_wide(rows):
    """A batch of more than 2^31 elements must not wrap around.

    In channels_last a tile's first element is counted in 64 bits and the others from there in 32, in NCHW all of them
    in 64. Vectors of fp32 and fp64 have offsets of their own.
    """
    for row in rows:
        if row["kernel"] in DATA_KERNELS and row["layout"] == "channels_last":
            assert row["bases"] == "i64", row
        elif row["kernel"] in DATA_KERNELS:
            assert row["offsets"] == "i64" or (row["dtype"] in ("fp32", "fp64") and "i64" in row["offsets"]), row


def test_loads_are_on_their_way_together(rows):
    """Of the path most taken: at least half of a step's; the compiler puts the use of some before others' loads."""
    for row in rows:
        if row["kernel"] in DATA_KERNELS and is_most_taken(row["target"], row["dtype"], row["layout"]):
            loads = int(row["images_read"]) * int(row["n_tiles"]) * int(row["share"]) // 128
            assert int(row["in_flight"]) >= loads / 2, row


def test_matrix_products_use_matrix_instructions(rows):
    """No kernel has a product yet; test_machine_code.py shows that one without matrix instructions is seen."""
    assert [row for row in rows if int(row["dots"]) > 0 and int(row["matrix"]) == 0] == []
