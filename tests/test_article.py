"""The article's block and network compute the same as a network written in plain PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from budget import ROUNDINGS, assert_within_budget
from fused_op import LAYOUTS
from torch import Tensor, fx, nn

from resnet_fast import FusedBatchNorm2d, convert_sync_batchnorm, functional
from resnet_fast.models import ResidualBlock, ResNetModel, article

pytestmark = pytest.mark.usefixtures("one_thread")

# The same in plain PyTorch, from the article's description, without a line of ours.


class PlainBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, is_identity: bool, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_in, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(n_in)
        self.conv2 = nn.Conv2d(n_in, n_in, 3, padding=1)
        self.conv3 = nn.Identity() if is_identity else nn.Conv2d(n_in, n_in, 1)
        self.conv4 = nn.Conv2d(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.batch_norm(self.conv1(x)))
        out = self.batch_norm(self.conv2(out)) + self.conv3(x)
        return F.relu(self.conv4(out))


class PlainModel(nn.Module):
    def __init__(self, blocks: list[tuple[int, int, bool]], n_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=1)
        self.batch_norm = nn.BatchNorm2d(64)
        self.residual_blocks = nn.Sequential(*(PlainBlock(*block, stride=2) for block in blocks))
        self.linear = nn.Linear(blocks[-1][1], n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.batch_norm(self.conv1(x))), 3, stride=2, padding=1)
        return self.linear(self.residual_blocks(x).mean((2, 3)))


TWO_BLOCKS = [(64, 12, True), (12, 8, False)]


def make_pair(blocks: list[tuple[int, int, bool]], layout: str = "channels_last") -> tuple[nn.Module, nn.Module]:
    """Ours and the plain one, with the same weights, none of them as it starts."""
    torch.manual_seed(0)
    ours = ResNetModel([ResidualBlock(*block, stride=2) for block in blocks], 10)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
        for name, buffer in ours.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.8, 1.2)
    plain = PlainModel(blocks, 10)
    plain.load_state_dict(ours.state_dict(), strict=True)
    return tuple(model.to(memory_format=LAYOUTS[layout]) for model in (ours, plain))  # type: ignore[call-overload]


def make_batch(image_size: int, layout: str = "channels_last") -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=LAYOUTS[layout]), torch.tensor([3, 1, 4, 1])


def one_step(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    logits = model(x)
    F.cross_entropy(logits, target).backward()
    found = {"logits": logits.detach(), "dx": x.grad}
    found |= {f"d {name}": parameter.grad for name, parameter in model.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


# Shapes.


@pytest.mark.parametrize(("stride", "size", "is_identity"), [(1, 256, True), (2, 128, False)])
def test_the_articles_example_of_a_block(stride: int, size: int, is_identity: bool):
    with torch.device("meta"):
        block = ResidualBlock(3, 64, is_identity, stride)
        assert block(torch.empty(32, 3, 256, 256)).shape == (32, 64, size, size)


def test_a_block_without_a_shortcut_convolution_has_none():
    assert "conv3.weight" not in ResidualBlock(4, 4).state_dict()
    assert ResidualBlock(4, 6, False).state_dict()["conv3.weight"].shape == (4, 4, 1, 1)


@pytest.mark.parametrize("image_size", [8, 33])
def test_images_of_other_sizes_are_pooled(image_size: int):
    with torch.device("meta"):
        assert article(7).eval()(torch.empty(2, 3, image_size, image_size)).shape == (2, 7)


def test_of_a_larger_map_the_mean_is_taken(on_aten):
    ours, plain = (model.eval() for model in make_pair(TWO_BLOCKS))
    x, _ = make_batch(48)
    assert ours.residual_blocks(ours.max_pool(ours.conv1(x))).shape[2:] == (3, 3)
    torch.testing.assert_close(ours(x), plain(x))


# Numbers.


def test_the_plain_network_starts_with_the_same_weights():
    models = []
    for norm_layer in (None, nn.BatchNorm2d):
        torch.manual_seed(0)
        models.append(article(norm_layer=norm_layer).state_dict())
    assert list(models[0]) == list(models[1])
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


@pytest.mark.parametrize(("layout", "training"), [("nchw", True), ("channels_last", False)])
def test_on_aten_it_is_the_plain_network_to_the_bit(layout: str, training: bool, on_aten):
    """In whatever layout the images are: that of the plain network on images in channels_last."""
    ours, plain = (model.train(training) for model in make_pair(TWO_BLOCKS))
    x, target = make_batch(24, layout)
    found = one_step(ours, x, target)
    expected = one_step(plain, x.contiguous(memory_format=torch.channels_last), target)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def bias_terms(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """For the gradient of every convolution's bias, the sum of its terms' magnitudes.

    Before a batch norm the terms cancel to 0, and what is left, ours and eager's, is roundings of them.
    """
    found: dict[str, Tensor] = {}

    def note(name: str):
        def hook(module: nn.Module, dx: tuple, dy: tuple[Tensor]) -> None:
            found[f"d {name}.bias"] = ROUNDINGS * dy[0].abs().sum((0, 2, 3))

        return hook

    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_full_backward_hook(note(name))
    one_step(model, x, target)
    return found


@pytest.mark.parametrize(("layout", "training"), [("channels_last", True), ("nchw", False)])
def test_through_the_kernels_it_is_within_the_budget(layout: str, training: bool, device, monkeypatch):
    original = functional.choose_backend
    monkeypatch.setattr(functional, "choose_backend", lambda x, requested=None: original(x, requested or "triton"))
    ours, plain = (model.to(device).train(training) for model in make_pair(TWO_BLOCKS, layout))
    x, target = (tensor.to(device) for tensor in make_batch(24, layout))
    exact_model = copy.deepcopy(plain).double()
    terms = bias_terms(exact_model, x.double(), target)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        found, exact = one_step(ours, x, target), one_step(exact_model, x.double(), target)
        expected = [
            one_step(copy.deepcopy(plain).to(memory_format=any_layout), x.contiguous(memory_format=any_layout), target)
            for any_layout in LAYOUTS.values()
        ]
    for name in found:
        if name.endswith("num_batches_tracked"):
            assert found[name] == exact[name]
        else:
            assert_within_budget(name, found[name], [e[name] for e in expected], exact[name], terms.get(name))


def test_gradients_are_those_of_finite_differences(on_aten):
    """With the projection, beside which the identity has nothing of its own."""
    torch.manual_seed(0)
    block = ResidualBlock(2, 3, is_identity=False, stride=2).double()
    assert isinstance(block.batch_norm, FusedBatchNorm2d)
    block.batch_norm.momentum = 0.0  # the same function at every call
    names = [name for name, _ in block.named_parameters()]
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    parameters = [parameter.detach().requires_grad_() for parameter in block.parameters()]
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)


# One batch norm in two places.


def test_running_statistics_take_two_batches_in_a_pass(on_aten):
    torch.manual_seed(0)
    block, x = ResidualBlock(3, 4), torch.randn(2, 3, 4, 4)
    block.batch_norm.momentum = 0.25
    outputs = []
    with torch.no_grad():
        outputs.append(block.conv1(x))
        outputs.append(block.conv2(F.relu(F.batch_norm(outputs[0], None, None, training=True))))
        block(x)
    mean, var = torch.zeros(3), torch.ones(3)
    for output in outputs:  # in this order: the second weighs more
        mean = 0.75 * mean + 0.25 * output.mean((0, 2, 3))
        var = 0.75 * var + 0.25 * output.var((0, 2, 3))
    torch.testing.assert_close(block.batch_norm.running_mean, mean)
    torch.testing.assert_close(block.batch_norm.running_var, var)
    assert block.batch_norm.num_batches_tracked == 2
    block.eval()(x)
    assert block.batch_norm.num_batches_tracked == 2


# What is fused, and what is not.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Of every fused batch norm: whether a residual was added, whether ReLU was applied."""
    seen, original = [], FusedBatchNorm2d.fused

    def fused(self, x, residual=None, *args, relu: bool, **kwargs):
        seen.append((residual is not None, relu))
        return original(self, x, residual, *args, relu=relu, **kwargs)

    monkeypatch.setattr(FusedBatchNorm2d, "fused", fused)
    return seen


BOTH = [(False, True), (True, False)]  # BN+ReLU, BN+add
STEPS = [(False, False)] * 2


def test_a_block_runs_two_fused_operations(calls: list, on_aten):
    ResidualBlock(3, 4)(torch.randn(2, 3, 4, 4))
    assert calls == BOTH


def hook_relu(block: nn.Module) -> None:
    block.relu.register_forward_hook(lambda *args: None)


def other_activation(block: nn.Module) -> None:
    block.relu = nn.LeakyReLU(0.0)


def patch_a_convolution(block: nn.Module) -> None:
    block.conv2.forward = block.conv2.forward


@pytest.mark.parametrize("change", [hook_relu, other_activation, patch_a_convolution])
def test_what_looks_inside_makes_it_run_step_by_step(change, calls: list, on_aten):
    torch.manual_seed(0)
    block, x = ResidualBlock(3, 4, False), torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(block)(x)
    change(block)
    calls.clear()
    assert torch.equal(block(x), expected)
    assert calls == STEPS


def test_a_hook_on_one_block_leaves_the_others_fused(calls: list, on_aten):
    model = make_pair(TWO_BLOCKS)[0].eval()
    hook_relu(model.residual_blocks[0])
    model(torch.randn(1, 3, 32, 32))
    assert calls == [(False, False), *STEPS, *BOTH]  # the stem belongs to what the network sees inside


def test_torch_fx_sees_every_step(on_aten):
    model = make_pair(TWO_BLOCKS)[0].eval()
    traced = fx.symbolic_trace(model)
    leaves = [module for module in model.modules() if not list(module.children())]
    assert {str(node.target) for node in traced.graph.nodes if node.op == "call_module"} == {
        name for name, module in model.named_modules() if module in leaves
    }
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(traced(x), model(x))


def test_another_norm_runs_in_its_place(on_aten):
    block = ResidualBlock(4, 4, norm_layer=lambda n_channels: nn.GroupNorm(2, n_channels))
    assert isinstance(block.batch_norm, nn.GroupNorm)
    assert block(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)


@pytest.mark.slow
def test_it_is_one_graph_to_torch_compile(on_aten):
    torch.manual_seed(0)
    block, x = ResidualBlock(3, 4, False), torch.randn(2, 3, 4, 4)
    plain, target = copy.deepcopy(block), torch.rand(2, 4, 4, 4)
    for run in (plain, torch.compile(block, fullgraph=True, backend="aot_eager")):
        F.mse_loss(run(x), target).backward()
    for (name, parameter), other in zip(plain.named_parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, msg=name)
    assert torch.equal(block.batch_norm.running_var, plain.batch_norm.running_var)
    assert block.batch_norm.num_batches_tracked == 2


def test_synchronized_it_has_one_norm_still(on_aten):
    block = convert_sync_batchnorm(ResidualBlock(3, 4))
    assert [name for name in block.state_dict() if name.endswith("num_batches_tracked")] == [
        "batch_norm.num_batches_tracked"
    ]
    block(torch.randn(2, 3, 4, 4))
    assert block.batch_norm.num_batches_tracked == 2


# Refusals.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 4), "num_channels must be an integer of at least 1, got 0"),
        ((4, -1), "output_channels must be an integer of at least 1, got -1"),
        ((4, 4, True, 0.5), "stride must be an integer of at least 1, got 0.5"),
    ],
)
def test_a_block_of_no_size_is_refused(args: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        ResidualBlock(*args)


@pytest.mark.parametrize(
    ("blocks", "nb_classes", "message"),
    [
        ([(32, 64)], 10, r"residual_blocks\[0\].num_channels must be 64, the output channels of the stem, got 32"),
        (
            [(64, 128), (64, 64)],
            10,
            r"residual_blocks\[1\].num_channels must be 128, the output channels of residual_blocks\[0\], got 64",
        ),
        ([], 10, "residual_blocks must hold at least one block, got none"),
        ([(64, 64)], 0, "nb_classes must be an integer of at least 1, got 0"),
    ],
)
def test_blocks_that_do_not_chain_are_refused(blocks: list, nb_classes, message: str):
    with pytest.raises(ValueError, match=message):
        ResNetModel([ResidualBlock(*block) for block in blocks], nb_classes)


def test_what_is_no_block_is_refused():
    with pytest.raises(TypeError, match=r"residual_blocks\[0\] must be a ResidualBlock, got Conv2d"):
        ResNetModel([nn.Conv2d(64, 64, 1)], 10)
