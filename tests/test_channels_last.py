"""A network computes in channels_last from its first convolution, whatever the layout of its input and weights."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet as torchvision_resnet

from resnet_fast import fold_batch_norm
from resnet_fast.models import CifarResNet, ResidualBlock, ResNetModel, resnet
from resnet_fast.models.blocks import to_channels_last

CHANNELS_LAST = torch.channels_last
FORMATS = (CHANNELS_LAST, torch.contiguous_format)
N_IMAGES = 3
pytestmark = pytest.mark.usefixtures("on_aten", "one_thread")


def one_block_a_stage(block: type = resnet.BasicBlock, **kwargs) -> nn.Module:
    return resnet.ResNet(block, [1, 1, 1, 1], num_classes=4, **kwargs)


def of_one_channel() -> nn.Module:
    """A user's change, with which `is_contiguous` holds in both layouts."""
    network = CifarResNet(8)
    network.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
    return network


NETWORKS = {
    "imagenet stem": one_block_a_stage,
    "bottlenecks": lambda: one_block_a_stage(resnet.Bottleneck),
    "one channel": of_one_channel,
    "shortcut A": lambda: CifarResNet(8),
    "shortcut B": lambda: CifarResNet(8, shortcut="B"),
    "plain batch norm": lambda: CifarResNet(8, norm_layer=nn.BatchNorm2d),
    "article": lambda: ResNetModel([ResidualBlock(64, 64, stride=2), ResidualBlock(64, 8, False, 2)], 4),
}
# Whose results, forward and backward, are the activations and their gradients; of several, the first. Not the sums of a
# gradient's parts: where a part is a slice's (shortcut A), ATen makes it in NCHW.
LAYERS = ("convolution", "batch_norm", "relu", "threshold", "max_pool")


class Layouts(TorchDispatchMode):
    """Counts the activations and their gradients, and notes those in another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.n_maps, self.others = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        first = results[0] if isinstance(results, tuple) else results
        if isinstance(first, Tensor) and first.dim() == 4 and len(first) == N_IMAGES and first.shape[1] > 1:
            if any(layer in str(function) for layer in LAYERS):
                self.n_maps += 1
                if first.is_contiguous() or not first.is_contiguous(memory_format=CHANNELS_LAST):
                    self.others.append((str(function), tuple(first.shape), first.stride()))
        return results


def image(network: nn.Module) -> Tensor:
    """Large enough that no map is 1x1, where the layouts are one."""
    conv = network.conv1
    size = 9 if conv.stride == (1, 1) else 33
    return torch.randn(N_IMAGES, conv.in_channels, size, size, generator=torch.Generator().manual_seed(1))


def step(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = network(x)
    found = {"y": y.detach()}
    if network.training:
        y.float().square().sum().backward()
        assert all(x.grad.is_contiguous(memory_format=f) == x.is_contiguous(memory_format=f) for f in FORMATS)
        found |= {"dx": x.grad} | {name: parameter.grad for name, parameter in network.named_parameters()}
    return found


@pytest.mark.parametrize(
    ("name", "training", "precision"),
    [(name, True, "fp32") for name in NETWORKS if name != "imagenet stem"]
    + [("imagenet stem", False, "fp32"), ("shortcut A", True, "bf16")],
)
def test_every_activation_and_gradient(name, training, precision):
    """And the weights' layout changes no bit."""
    network = NETWORKS[name]().train(training)
    assert all(parameter.is_contiguous() for parameter in network.parameters())
    in_channels_last = copy.deepcopy(network).to(memory_format=CHANNELS_LAST)
    x = image(network)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with Layouts() as layouts:
            found = step(network, x)
        expected = step(in_channels_last, x.contiguous(memory_format=CHANNELS_LAST))
    assert layouts.others == []
    assert layouts.n_maps >= (30 if training else 13)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_step_by_step_and_traced():
    """A network that runs step by step, and its graph by torch.fx, compute the same bits."""
    network = NETWORKS["imagenet stem"]().eval()
    x = image(network)
    expected = network(x)
    assert torch.equal(torch.fx.symbolic_trace(network)(x), expected)
    network.layer1[0].bn1.register_forward_hook(lambda *_: None)
    with Layouts() as layouts:
        assert torch.equal(network(x), expected)
    assert layouts.others == [] and layouts.n_maps > 12


def test_folded():
    network = NETWORKS["imagenet stem"]().eval()
    with Layouts() as layouts:
        fold_batch_norm(network)(image(network))
    assert layouts.others == [] and layouts.n_maps > 8


@pytest.mark.slow
def test_compiled():
    network, layouts = CifarResNet(8).eval(), Layouts()

    def backend(graph, _):
        def run(*inputs):
            with layouts:
                return graph(*inputs)

        return run

    x = image(network)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(network, backend=backend, fullgraph=True)(x), network(x))
    assert layouts.others == [] and layouts.n_maps > 13


def test_exported():
    network = CifarResNet(8).eval()
    x = image(network)
    exported = torch.export.export(network, (x,)).module()
    with Layouts() as layouts:
        assert torch.equal(exported(x), network(x))
    assert layouts.others == [] and layouts.n_maps > 13


def test_over_a_batch_of_batches():
    network = CifarResNet(8).eval()
    batches = torch.randn(3, 2, 3, 8, 8)
    found = torch.func.vmap(network)(batches)
    torch.testing.assert_close(found, torch.stack([network(x) for x in batches]), rtol=1e-5, atol=1e-5)  # eight layers


REFUSED = {
    "3-D": torch.randn(3, 16, 16),
    "5-D": torch.randn(1, 1, 3, 16, 16),
    "None": None,
    "a list": [1.0],
    "integers": torch.ones(2, 3, 16, 16, dtype=torch.int64),
    "sparse": torch.ones(2, 3, 16, 16).to_sparse(),
    "other channels": torch.randn(2, 4, 16, 16),
}


def test_what_is_no_batch_of_images_gets_torchvisions_error():
    ours = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    theirs = torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, [1, 1, 1, 1])
    for what, x in REFUSED.items():
        errors = []
        for network in (ours, theirs):
            with pytest.raises(Exception) as error:  # noqa: B017
                network(x)
            errors.append((type(error.value), str(error.value)))
        assert errors[0] == errors[1], what


def test_nothing_is_copied_that_is_in_channels_last():
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=CHANNELS_LAST)
    assert to_channels_last(x) is x


def test_loading_keeps_the_layout():
    state = CifarResNet(8).state_dict()
    for memory_format in FORMATS:
        network = CifarResNet(8).to(memory_format=memory_format)
        network.load_state_dict({name: value.contiguous() for name, value in state.items()})
        network = copy.deepcopy(network)
        assert all(w.is_contiguous(memory_format=memory_format) for w in network.parameters() if w.dim() == 4)
