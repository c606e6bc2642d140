"""A fused network counts its batches in one launch, with the same counters as nn.BatchNorm2d at every step."""

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from thin_resnet import images, pair, thin_resnet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from resnet_fast import FusedBatchNorm2d
from resnet_fast.models import CifarResNet, ResidualBlock, ResNetModel, resnet

pytestmark = pytest.mark.usefixtures("on_aten")

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet": lambda: thin_resnet(resnet),
    "6n+2": lambda: CifarResNet(8, 3, width=4),
    "plain": lambda: CifarResNet(8, 3, shortcut=None, width=4),
    "article": lambda: ResNetModel([ResidualBlock(64, 4)], 3),
}


class Operators(TorchDispatchMode):
    """Counts the operators that change a tensor of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = args[0][0] if args and isinstance(args[0], list) else args[0] if args else None
        if func._schema.is_mutable and isinstance(first, Tensor) and first.dtype == torch.int64:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counters(model: nn.Module) -> dict[str, int]:
    return {name: int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")}


def count_by_hooks(model: nn.Module) -> None:
    """Hooks make every step run by itself."""
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_one_launch_counts_what_steps_count(make: Callable[[], nn.Module], device):
    fused, steps = make().to(device), make().to(device)
    count_by_hooks(steps)
    with Operators() as operators:
        fused(images(device))
    steps(images(device))
    assert counters(fused) == counters(steps) and all(counters(fused).values())
    assert operators.counts == {"_foreach_add_": 1}


def test_a_norm_that_runs_twice_counts_twice(device):
    model = NETWORKS["article"]().to(device)
    model(images(device))
    assert list(counters(model).values()) == [1, 2]


@pytest.mark.parametrize("training", [True, False])
def test_norms_that_are_frozen_or_track_nothing_do_not_count(training: bool, device):
    model = thin_resnet(resnet).to(device).train(training)
    model.layer1[0].bn2.eval()
    model.bn1.track_running_stats = False
    model(images(device))
    found = counters(model)
    assert found.pop("layer1.0.bn2.num_batches_tracked") == found.pop("bn1.num_batches_tracked") == 0
    assert set(found.values()) == {int(training)}


def test_a_cumulative_average_uses_its_counter(device):
    """Also of a norm that runs twice, and beside norms that have a momentum."""
    norm = functools.partial(FusedBatchNorm2d, momentum=None)
    fused, steps = (ResNetModel([ResidualBlock(64, 4, norm_layer=norm)], 3).to(device) for _ in range(2))
    steps.load_state_dict(fused.state_dict())
    count_by_hooks(steps)
    for i in range(2):
        for model in (fused, steps):
            model(images(device) + i)
    assert counters(fused) == counters(steps)
    assert list(counters(fused).values()) == [2, 4]
    torch.testing.assert_close(dict(fused.named_buffers()), dict(steps.named_buffers()))


def test_ghost_batches_are_counted_each(device):
    model = thin_resnet(resnet).to(device)
    model.bn1.ghost_batch_size = 2
    model(images(device))
    found = counters(model)
    assert found.pop("bn1.num_batches_tracked") == 2 and set(found.values()) == {1}


def test_norms_before_an_error_have_counted(device):
    for model in pair(device):
        model.layer2[0].conv2 = nn.Conv2d(16, 17, 3, device=device)  # the norm behind it refuses 17 channels
        with pytest.raises(RuntimeError):
            model(images(device))
        found = counters(model)
        before = [name for name, count in found.items() if count]
        assert before == [name for name in found if "layer2" not in name] + ["layer2.0.bn1.num_batches_tracked"]
        model.bn1(torch.ones(2, 8, 2, 2, device=device))  # by itself, it counts at once
        assert counters(model)["bn1.num_batches_tracked"] == 2


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpointed_network_counts_as_torchs(use_reentrant: bool, device):
    """Not reentrant, the second forward ends by an error as soon as it has what the backward needs."""
    found = []
    for model in pair(device):
        x = images(device).requires_grad_()
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
        found.append(counters(model))
    assert found[0] == found[1] and set(found[0].values()) == {2}


def test_a_network_inside_another_counts_at_its_own_end(device):
    outer, inner = (thin_resnet(resnet).to(device) for _ in range(2))
    seen = []

    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inner(images(device))
            seen.append(set(counters(inner).values()))
            return x

    outer.maxpool = Pool()
    outer(images(device))
    assert seen == [{1}] and set(counters(outer).values()) == {1}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's pooling
def test_models_that_run_as_one_by_vmap_count_each(device):
    models = [thin_resnet(resnet).to(device) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(models)

    def run(parameters, buffers, x):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    torch.vmap(run, in_dims=(0, 0, None))(parameters, buffers, images(device))
    assert buffers["bn1.num_batches_tracked"].tolist() == [1, 1]


def test_torch_compile_takes_it_as_one_graph(device):
    model = thin_resnet(resnet).to(device)
    torch.compile(model, fullgraph=True, backend="aot_eager")(images(device))
    assert set(counters(model).values()) == {1}
