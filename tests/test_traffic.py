"""Every kernel moves the bytes stated in kernels/README.md, and a training step of ResNet-18 their sum."""

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fused_op import Case, make_operands, ours, results
from interpreter import needs_interpreter
from ledger import Launch, ledger
from traffic import BF16, count, formula, image_bytes, pivot_rows

import resnet_fast
from benchmarks.bench_step import flops_per_image
from benchmarks.work import (
    BLOCK,
    INNER,
    LAST,
    NETWORK,
    PROJECTION,
    STAGES,
    STEM,
    Role,
    network_bytes,
    operation_bytes,
)
from resnet_fast.kernels import tiles
from resnet_fast.ops.launch import Shape, choose_tiles

README = Path(__file__).parents[1] / "kernels/README.md"
ROLES = (STEM, INNER, BLOCK, LAST, PROJECTION)
COMBINE_KERNELS = {"combine_statistics_kernel", "combine_gradients_kernel"}
# Images, channels and map width: several tiles and splits, the last not full; several tiles of channels; so many splits
# that the combine kernels merge them.
CASES = [*((role, 2, 24, 9) for role in ROLES), (PROJECTION, 1, 136, 3), (INNER, 9, 40, 11), (PROJECTION, 9, 40, 11)]

pytestmark = needs_interpreter


@functools.cache
def launches_of(
    role: Role, n_images: int, n_channels: int, width: int, ghost: int | None = None, training: bool = True
) -> list[Launch]:
    case = Case(role.name, (n_images, n_channels, width, width), fork=role.fork, training=training)
    operands = make_operands(case, torch.bfloat16, "channels_last", torch.device("cpu"))
    with ledger() as launches:
        results(functools.partial(ours, fork=role.fork, ghost=ghost), operands, role.join, True, "triton")
    return launches


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kernel_moves_what_the_formula_says(case):
    assert count(launches_of(*case)) == formula(*case)


def test_partial_results_are_merged_in_both_ways():
    """By the second passes, and by the combine kernels."""
    for role in (INNER, PROJECTION):
        few, many = formula(role, 2, 24, 9), formula(role, 9, 40, 11)
        assert COMBINE_KERNELS.isdisjoint(few) and many.keys() >= COMBINE_KERNELS


@pytest.mark.parametrize("role", (INNER, PROJECTION), ids=str)
def test_an_evaluation_is_one_launch(role):
    """That reads the running statistics, and stores mean and rstd for a backward."""
    forward = [launch for launch in launches_of(role, 2, 24, 9, training=False) if "gradient" not in launch.kernel]
    forward = [launch for launch in forward if launch.kernel != "reduce_kernel"]
    assert len(forward) == 1
    assert count(forward) == formula(role, 2, 24, 9, training=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_element_of_an_image_is_requested_twice_by_one_kernel(case):
    """Except the rows for the pivot of the statistics, once more by every split."""
    _, n_images, n_channels, width = case
    n_rows = n_images * width**2
    shape = Shape(n_rows, n_channels, width**2, True, n_rows)
    splits = choose_tiles(shape, BF16, 1, tiles.STATISTICS_PROGRAMS)
    pivots = splits.n_parts * np.bincount(pivot_rows(n_rows, splits.tile.block_m.value), minlength=n_rows)
    for launch in launches_of(*case):
        for name, account in launch.accounts.items():
            if account.what == "images" and launch.kernel == "statistics_kernel":
                assert (account.times["read"].reshape(n_rows, n_channels) == 1 + pivots[:, None]).all()
            elif account.what in ("images", "bits"):
                assert account.times["read"].max() <= 1, (launch.kernel, name)
            if account.what in ("images", "bits"):
                assert account.times["written"].max() <= 1, (launch.kernel, name)


@pytest.mark.parametrize("role", (INNER, PROJECTION), ids=str)
def test_ghost_batches_move_more_vectors_alone(role):
    """Of five images in groups of two, the last of one: images, bits and their bytes are those of one group."""
    launches, shape = launches_of(role, 5, 24, 5, ghost=2), (5, 24, 5)
    found = count(launches)
    assert found == formula(role, *shape, ghost=2)
    assert image_bytes(found) == image_bytes(formula(role, *shape))
    # No launch per group: as many as one group has with many splits.
    plain = launches_of(role, 9, 40, 11)
    assert [launch.kernel for launch in launches] == [launch.kernel for launch in plain]


@pytest.mark.slow
def test_a_training_step_moves_the_sum_of_its_operations():
    torch.manual_seed(0)
    model = resnet_fast.resnet18(num_classes=10, stem="cifar")
    x = torch.randn(1, 3, 32, 32).to(memory_format=torch.channels_last)
    with ledger() as launches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().sum()
        loss.backward()
    assert count(launches) == network(len(x))
    print(table(batch=512))


def network(n_images: int) -> dict[str, Counter]:
    """The formula for one training step."""
    kernels: dict[str, Counter] = {}
    for role, n_channels, width in NETWORK:
        for kernel, moved in formula(role, n_images, n_channels, width).items():
            kernels.setdefault(kernel, Counter()).update(moved)
    return kernels


def table(batch: int) -> str:
    """The bytes of one training step beside those of other designs, which kernels/README.md describes."""
    elements = Counter()
    for role, n_channels, width in NETWORK:
        elements["A" if role.join == "none" else "B"] += batch * n_channels * width**2
        elements["C"] += (role.join == "bn") * batch * n_channels * width**2
    others = {  # bytes per element, forward + backward
        "eager ATen": {"A": 10 + 16, "B": 16 + 22, "C": 6 + 10},
        "torch.compile, split statistics": {"A": 6 + 14, "B": 8 + 16, "C": 2 + 10},
        "two passes, ReLU recomputed or 1 bit, fork and bn join": {"A": 6 + 10, "B": 8.1 + 14.1, "C": 2 + 6},
    }
    rows = {name: sum(elements[key] * row[key] for key in elements) for name, row in others.items()}
    rows["resnet_fast, as counted"] = image_bytes(network(batch))
    rows["resnet_fast, with partial results and vectors"] = sum(moved.total() for moved in network(batch).values())
    title = f"\nBN, addition and ReLU in one training step of ResNet-18, bf16, batch {batch}:\n"
    return title + "\n".join(f"{name:56} {size / 1e9:5.2f} GB" for name, size in rows.items())


BACKWARD_KERNELS = {"reduce_kernel", "combine_gradients_kernel", "input_gradients_kernel"}


@pytest.mark.parametrize("role", ROLES, ids=str)
def test_the_benchmarks_count_the_same_bytes(role):
    kernels = formula(role, 8, *STAGES[1])
    backward = image_bytes({name: moved for name, moved in kernels.items() if name in BACKWARD_KERNELS})
    n_elements = 8 * STAGES[1][0] * STAGES[1][1] ** 2
    expected = {"forward": image_bytes(kernels) - backward, "backward": backward, "both": image_bytes(kernels)}
    for direction, size in expected.items():
        found = operation_bytes(role.join, role.fork, direction, n_elements, item_size=2)
        assert found == size, direction


def test_the_benchmarks_count_the_work_of_a_step():
    assert network_bytes(1, item_size=2) == image_bytes(network(1))
    assert f"{image_bytes(network(1)):,} bytes per image" in README.read_text()
    # 555,422,720 multiply-adds forward, twice as many backward, but for the gradient of the images.
    assert flops_per_image() == 2 * (3 * 555_422_720 - 64 * 27 * 32 * 32)
