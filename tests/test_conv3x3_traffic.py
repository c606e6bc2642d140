"""If convolutions compute its sums, a batch norm moves the bytes stated in kernels/README.md."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from chosen import TILES, Fused, ThreeBlocks
from interpreter import needs_interpreter
from ledger import Launch, ledger
from traffic import count, image_bytes

from benchmarks.work import BLOCK, INNER, LAST, NETWORK, PROJECTION, STEM, Role, operation_bytes
from resnet_fast.ops import choices

README = Path(__file__).parents[1] / "kernels/README.md"
BATCH = 3

pytestmark = [pytest.mark.slow, needs_interpreter]

# Every batch norm, its channels and map width; whether the convolution before it has its statistics, and whether the
# one behind it has its sums. Convolutions of stride 2 and the projection's are the library's.
THREE_BLOCKS = [
    (STEM, 16, 8, False, True),
    (INNER, 16, 8, True, True),
    (BLOCK, 16, 8, True, False),
    (INNER, 32, 4, False, True),
    (PROJECTION, 32, 4, True, True),
    (INNER, 32, 4, True, True),
    (LAST, 32, 4, True, False),
]


def bytes_per_element(role: Role, has_statistics: bool, has_sums: bool) -> float:
    """In 16-bit types, forward and backward."""
    joined, bn = role.join != "none", role.join == "bn"
    forward = operation_bytes(role.join, role.fork, "forward", 1, 2) - 2 * has_statistics
    if not has_sums:
        return forward + operation_bytes(role.join, role.fork, "backward", 1, 2)
    # In the epilogue: r x, r alias, r bits, r residual; then r dz, r x, w dx, r residual, w dresidual.
    return forward + 2 + 2 * role.fork + joined / 8 + 2 * bn + 6 + 4 * bn


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    torch.manual_seed(0)
    network = ThreeBlocks()
    x = torch.randn(BATCH, 16, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    with ledger() as launches, choices.using(Fused()):
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x)
        y.float().square().sum().backward()
    return launches


def test_a_step_moves_the_sum_of_its_operations(launches):
    expected = sum(
        bytes_per_element(role, *sums) * BATCH * n_channels * width**2
        for role, n_channels, width, *sums in THREE_BLOCKS
    )
    assert image_bytes(count(launches)) == expected


def test_every_element_of_a_result_is_written_once(launches):
    written = {"conv3x3_kernel": "y_desc", "conv3x3_data_gradient_kernel": "dz_desc"}
    found = [launch for launch in launches if launch.kernel in written]
    assert len(found) == 5 + 5
    for launch in found:
        for name, account in launch.accounts.items():
            times = account.times["written"]
            is_result = name == written[launch.kernel] or name.startswith("partial")
            assert (times == is_result).all(), (launch.kernel, name)


def test_what_a_batch_norm_needs_is_read_once(launches):
    """And the convolution's own input nine times at the most for every 16 channels of its result."""
    for launch in launches:
        if launch.kernel == "conv3x3_data_gradient_kernel":
            for name, account in launch.accounts.items():
                if account.what in ("images", "bits"):
                    assert (account.times["read"] == 1).all(), name
            n_channel_tiles = launch.accounts["dz_desc"].shape[1] // TILES.block_n
            assert launch.accounts["dout_desc"].times["read"].max() == 9 * n_channel_tiles


def test_no_pass_reads_what_the_convolution_has_summed(launches):
    kernels = Counter(launch.kernel for launch in launches)
    assert kernels["conv3x3_kernel"] == 5  # of seven batch norms and the shortcut's
    assert (kernels["statistics_kernel"], kernels["reduce_kernel"]) == (3, 2)
    for launch in launches:
        for name, account in launch.accounts.items():
            if account.what == "partials":  # written whole by one launch, read whole by whoever merges them
                is_written = account.times["written"].any()
                assert (account.times["written"] == is_written).all(), (launch.kernel, name)
                is_read = account.times["read"].reshape(account.shape) > 0
                if account.shape[-1] == 2 and not is_written:  # beside a pivot stands nothing
                    assert not is_read[0, :, 1].any()
                    is_read[0, :, 1] = True
                assert (is_read != is_written).all(), (launch.kernel, name)


def test_the_bytes_of_a_training_step():
    """Of ResNet-18, where every 3x3 convolution of stride 1 behind the stem has the sums, and where only statistics."""
    both = statistics = 0.0
    for index, (role, n_channels, width) in enumerate(NETWORK):
        n_elements = n_channels * width**2
        in_first_stage, block = n_channels == 64, (index - 1) // 2 % 2  # two blocks a stage
        # conv1 of a stage's first block has stride 2, but for the first stage.
        has_statistics = role is not STEM and not (role is INNER and block == 0 and not in_first_stage)
        has_sums = role in (STEM, INNER, PROJECTION) or (role is BLOCK and block == 0)
        both += n_elements * bytes_per_element(role, has_statistics, has_sums)
        statistics += n_elements * bytes_per_element(role, has_statistics, False)
    text = " ".join(README.read_text().split())
    assert f"{statistics:,.0f} bytes per image with the first, {512 * statistics / 1e9:.1f} GB" in text
    assert f"{both:,.0f} with both, {512 * both / 1e9:.1f} GB" in text
