"""A network with pairs of batch norm and convolution computes the same, and launches the kernels of its table."""

import copy
import functools
from unittest import mock

import pytest
import torch
from chosen import CONVOLUTIONS, Fused, ThreeBlocks, launched
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from resnet_fast import FusedBatchNorm2d, convert_sync_batchnorm
from resnet_fast.models.registry import get_model
from resnet_fast.ops import choices, conv3x3
from resnet_fast.ops.implementations import Problem
from resnet_fast.tuning import find_problems


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return ThreeBlocks()


def images(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def step(network: nn.Module, x: Tensor, table=None, precision: str = "autocast") -> dict[str, Tensor]:
    """y, the gradients of x and of every parameter, and every buffer of a copy of the network, after one step."""
    network = copy.deepcopy(network).to(x.device)
    if precision == "own":
        network.to(x.dtype)
    x = x.detach().requires_grad_(x.requires_grad)
    with choices.using(table if table is not None else {}):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "autocast"):
            y = network(x)
        weights = torch.linspace(-1, 1, y.numel(), device=x.device).view(y.shape)
        (y.to(weights.dtype) * weights).sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d {name}": p.grad for name, p in network.named_parameters()}
    return {name: t for name, t in found.items() if t is not None} | dict(network.named_buffers())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Error against fp64 at most twice the default's, plus one rounding of bf16; as a whole, because single elements
    differ where a ReLU is near its kink.
    """
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value.is_floating_point():
            errors = [(t.double() - exact[name]).norm() / exact[name].norm() for t in (value, expected[name])]
            assert errors[0] <= 2 * errors[1] + 2**-9, (name, *errors)
        else:
            assert torch.equal(value, expected[name]), name


@pytest.fixture(scope="module")
def expected(network, device) -> dict[str, Tensor]:
    return step(network, images(device))


@pytest.fixture(scope="module")
def exact(network, device) -> dict[str, Tensor]:
    return step(copy.deepcopy(network).double(), images(device).double(), precision="own")


@pytest.fixture(scope="module")
def default_launches(network, device) -> list[str]:
    with launched() as names:
        step(network, images(device))
    return names


@pytest.fixture(scope="module")
def run_fused(network, device):
    """What a step finds, launches and asks the table, by the operations that it names."""

    @functools.cache
    def run(operations: tuple[str, ...]) -> tuple[dict[str, Tensor], list[str], list[Problem]]:
        table = Fused(operations)
        with launched() as names:
            found = step(network, images(device), table)
        return found, names, table.asked

    return run


TABLES = pytest.mark.parametrize(
    "operations",
    [pytest.param(names, marks=pytest.mark.slow) for names in (CONVOLUTIONS, *((name,) for name in CONVOLUTIONS))],
    ids=str,
)


@TABLES
def test_every_choice_computes_the_same(operations, run_fused, expected, exact):
    assert_same(run_fused(operations)[0], expected, exact)


@TABLES
def test_every_choice_launches_its_kernel_and_spares_a_pass(operations, run_fused, default_launches):
    _, names, _ = run_fused(operations)
    assert ("conv3x3_kernel" in names) == ("convolution" in operations)
    assert ("conv3x3_data_gradient_kernel" in names) == ("data gradient" in operations)
    # Of the stem, two convolutions of each block, and the shortcut's, all with a pass of their own by default: stride 2
    # and the shortcut are cuDNN's, and behind the last convolution nothing reads its batch norm's output.
    counts, by_default = (
        {name: launches.count(name) for name in ("statistics_kernel", "reduce_kernel")}
        for launches in (names, default_launches)
    )
    assert by_default == {"statistics_kernel": 8, "reduce_kernel": 7}
    assert counts["statistics_kernel"] == (3 if "convolution" in operations else 8)
    assert counts["reduce_kernel"] == (2 if "data gradient" in operations else 7)


@pytest.mark.slow
def test_what_is_chosen_for(run_fused):
    _, _, asked = run_fused(CONVOLUTIONS)
    assert asked[:2] == [
        Problem("convolution", "bf16", 3, 16, 16, 8),
        Problem("data gradient", "bf16", 3, 16, 16, 8, "none", fork=True),  # the stem's, beside a shortcut
    ]
    assert [p.operation for p in asked] == 5 * ["convolution", "data gradient"]
    of_gradients = {(p.in_channels, p.join, p.fork) for p in asked if p.operation == "data gradient"}
    assert of_gradients == {(16, "none", True), (16, "none", False), (32, "none", False), (32, "bn", True)}


@pytest.mark.slow
def test_without_entries_the_convolutions_are_modules_calls(network, device):
    with mock.patch.object(conv3x3, "forward", side_effect=AssertionError):
        calls, forward = [], nn.Conv2d.forward
        with mock.patch.object(nn.Conv2d, "forward", lambda conv, x: calls.append(conv) or forward(conv, x)):
            step(network, images(device))
    assert len(calls) == 7


@pytest.mark.slow
def test_a_network_in_fp16(network, device):
    x = images(device, torch.float16)
    exact = step(copy.deepcopy(network).double(), x.double(), precision="own")
    assert_same(*(step(network, x, table, precision="own") for table in (Fused(), None)), exact)


def test_other_types_keep_the_library(network, device):
    table = Fused()
    step(network, images(device, torch.float32), table, precision="own")
    assert table.asked == []


@pytest.mark.slow
def test_weights_that_are_views(network, device):
    """A descriptor takes none with gaps, nor at an odd address, as of parameters flattened into one."""
    own, x = copy.deepcopy(network).to(device, torch.bfloat16), images(device)
    for block in own.layer:
        weight = block.conv1.weight.data
        view = weight.repeat_interleave(2, 1).contiguous(memory_format=torch.channels_last)[:, ::2]
        block.conv1.weight = nn.Parameter(view)
        weight = block.conv2.weight.data
        flat = torch.empty(weight.numel() + 1, dtype=weight.dtype, device=device)
        block.conv2.weight = nn.Parameter(flat[1:].as_strided_(weight.shape, weight.stride(), 1).copy_(weight))
    expected, found = (step(net, x, Fused(), precision="own") for net in (network, own))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_fake_tensors_keep_the_library(network, device):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, choices.using(Fused()):
        x = mode.from_tensor(images(device).detach())
        with torch.autocast(device.type, torch.bfloat16):
            assert network(x).shape == (3, 32, 4, 4)


@pytest.mark.slow
def test_frozen_parameters_and_images_without_gradient(network, device, expected):
    frozen = copy.deepcopy(network)
    frozen.layer[0].conv2.weight.requires_grad_(False)
    frozen.bn1.requires_grad_(False)
    with launched() as names:
        found = step(frozen, images(device).requires_grad_(False), Fused())
    assert not {"dx", "d layer.0.conv2.weight", "d bn1.weight"} & found.keys()
    # Of the convolution that reads the stem's batch norm only the weight has a gradient.
    assert names.count("conv3x3_kernel") == 5 and names.count("conv3x3_data_gradient_kernel") == 4
    whole = step(network, images(device), Fused())
    for name in found:
        assert torch.equal(found[name], whole[name]), name


@pytest.mark.slow
def test_two_backwards_of_one_graph(network, device):
    network, x = copy.deepcopy(network).to(device), images(device)
    with choices.using(Fused()), torch.autocast(device.type, torch.bfloat16):
        y = network(x)
    inputs = [x, *network.parameters()]
    first, second = (torch.autograd.grad(y.sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.slow
def test_second_derivatives(network, device):
    """The gradient penalty's: by the library's convolutions, whatever the first derivatives are computed by."""

    def penalty(table) -> list[Tensor]:
        own, x = copy.deepcopy(network).to(device), images(device)
        with choices.using(table), torch.autocast(device.type, torch.bfloat16):
            y = own(x)
        (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.float().square().sum(), list(own.parameters()), allow_unused=True))

    for found, expected in zip(penalty(Fused()), penalty({}), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            # Thirteen layers, each passed four times, and each time rounded to bf16: √52 · 2⁻⁹ = 0.014, three times.
            assert (found - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.slow
def test_checkpointed_activations(network, device):
    def run(use_checkpoint: bool) -> tuple[Tensor, ...]:
        own, x = copy.deepcopy(network).to(device), images(device)
        with choices.using(Fused()), torch.autocast(device.type, torch.bfloat16):
            y = checkpoint(own, x, use_reentrant=False) if use_checkpoint else own(x)
            return torch.autograd.grad(y.float().square().sum(), [x, *own.parameters()])

    assert all(map(torch.equal, run(True), run(False)))


def biased(network: nn.Module) -> None:
    for block in network.layer:
        for conv in (block.conv1, block.conv2):
            conv.bias = nn.Parameter(torch.zeros(conv.out_channels, device=conv.weight.device))


def in_ghost_batches(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, FusedBatchNorm2d):
            module.ghost_batch_size = 2


def over_processes(network: nn.Module) -> None:
    convert_sync_batchnorm(network)


def evaluating(network: nn.Module) -> None:
    network.eval()


def with_a_frozen_norm(network: nn.Module) -> None:
    network.layer[1].bn2.eval()


def of_another_layer(network: nn.Module) -> None:
    """Whose outputs the kernels do not take."""

    class InFp32(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).float()

    for block in network.layer:
        for conv in (block.conv1, block.conv2):
            conv.__class__ = InFp32


def compiled(network: nn.Module) -> None:
    torch._dynamo.reset()
    network.compile(backend="aot_eager", fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    (biased, compiled, in_ghost_batches, over_processes, evaluating, with_a_frozen_norm, of_another_layer),
)
def test_what_keeps_the_library(change, network, device):
    own, x, table = copy.deepcopy(network).to(device), images(device), Fused()
    change(own)
    with launched() as names, choices.using(table):
        with torch.autocast(device.type, torch.bfloat16):
            y = own(x)
            with torch.no_grad():
                own(x)
        y.float().sum().backward()
    assert not table.asked and not {name for name in names if name.startswith("conv3x3")}


@pytest.mark.slow
def test_a_layer_that_changes_the_layout(network, device):
    """What a convolution in NCHW returns is no input of a pair; the pairs behind it are."""

    class InNchw(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).contiguous()

    own, x, table = copy.deepcopy(network), images(device), Fused()
    own.layer[0].conv1.__class__ = InNchw
    found, expected = step(own, x, table), step(own, x)
    assert len(table.asked) == 2 * 3
    assert_same(found, expected, step(own.double(), x.double(), precision="own"))


class Asked(Fused):
    """Has nothing for any problem."""

    def __getitem__(self, problem: Problem):
        self.asked.append(problem)
        raise KeyError(problem)


@pytest.mark.parametrize("model", ("resnet20", "plain20"))
def test_training_asks_for_the_convolutions_that_tune_measures(model, device):
    """Those of basic blocks; plain20 has none."""
    table, network = Asked(), get_model(model, stem="cifar").to(device)
    with choices.using(table), torch.autocast(device.type, torch.bfloat16):
        network(torch.randn(2, 3, 16, 16, device=device))
    tuned = find_problems(model, "cifar", [2], 16, "bf16")
    of_training, of_tune = ({p for p in found if "batch norm" not in p.operation} for found in (table.asked, tuned))
    assert of_training == of_tune and bool(of_tune) == (model == "resnet20")


def test_parameters_of_another_type_are_the_librarys_error(network, device):
    with choices.using(Fused()), pytest.raises(RuntimeError, match="type"):
        copy.deepcopy(network).to(device)(images(device))
