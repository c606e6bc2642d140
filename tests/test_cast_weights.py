"""A step under autocast that casts its weights together is bit-identical to one that casts them one by one."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from recorded_graph import RecordedGraph
from thin_resnet import thin_resnet
from tiny_run import equal, make_dataset
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet as torchvision_resnet

from resnet_fast.data import Augmentation, Batch, Loader
from resnet_fast.models import CifarResNet, ResidualBlock, ResNetModel, resnet
from resnet_fast.ops import augment as augment_module
from resnet_fast.training import RECIPES, Recipe, TrainingStep
from resnet_fast.training.cast_weights import CastWeights
from resnet_fast.training.graph import CudaGraph

pytestmark = pytest.mark.usefixtures("one_thread", "on_aten")

BATCH, N_EPOCHS = 8, 2
CONVERSION = {torch.float32, torch.bfloat16}
PLAIN = replace(RECIPES["fast94"], batch_size=BATCH, crop=2, cutout=3)
AUGMENTATION = Augmentation((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), crop=2, padding="reflect", flip="random", cutout=3)


@pytest.fixture(autouse=True)
def same_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in for a graph sees operators alone, and cuDNN may choose another algorithm every time."""
    monkeypatch.setattr(augment_module, "choose_backend", lambda x: "aten")
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        yield


def thin(source=resnet) -> nn.Module:
    model = thin_resnet(source)
    model.maxpool = nn.Identity()  # its backward on a GPU adds in any order
    return model


def article() -> nn.Module:
    model = ResNetModel([ResidualBlock(64, 4)], 3)
    model.max_pool = nn.Identity()  # type: ignore[assignment]
    return model


def with_a_shared_weight() -> nn.Module:
    """Its gradients are added in bf16, before the one conversion."""
    model = thin()
    first, second = model.layer1
    second.conv1.weight = second.conv2.weight = first.conv2.weight
    return model


def with_frozen_and_unused_weights() -> nn.Module:
    model = thin()
    model.layer1.requires_grad_(False)
    model.unused = nn.Linear(3, 3)
    return model


def make_step(recipe: Recipe, together: bool, make: Callable[[], nn.Module], device, **settings) -> TrainingStep:
    torch.manual_seed(0)
    model = make().train().to(device)
    forward = None if together else model
    settings = {"precision": "bf16", **settings}
    step = TrainingStep(model, recipe, AUGMENTATION, n_steps=20, forward=forward, **settings)
    assert isinstance(step.forward, CastWeights) == together
    return step


def batches(device) -> list[Batch]:
    loader = Loader(make_dataset(20).train.to(device), AUGMENTATION, BATCH)
    return [batch for epoch in range(1, N_EPOCHS + 1) for batch in loader.epoch(epoch)]


def trained(step: TrainingStep, device) -> list:
    """Output, gradients and state after every step."""
    seen = []
    for batch in batches(device):
        output = [value.clone() for value in step(batch)]
        gradients = [None if p.grad is None else p.grad.clone() for p in step.model.parameters()]
        state = copy.deepcopy([step.model.state_dict(), step.state_dict(), step.averaged()])
        seen.append([output, gradients, state])
    return seen


CASES: dict[str, tuple[Recipe, Callable[[], nn.Module], dict]] = {
    "SGD, Nesterov": (PLAIN, thin, {}),
    "Adam, clipping and moving average": (replace(PLAIN, optimizer="adam", clip_norm=0.1, ema=0.5), thin, {}),
    "in two parts": (replace(PLAIN, clip_norm=0.1), thin, {"accumulate": 2}),
    "another layout": (PLAIN, lambda: thin().to(memory_format=torch.contiguous_format), {}),  # type: ignore[call-overload]
    "a shared weight": (PLAIN, with_a_shared_weight, {}),
    "frozen and unused weights": (PLAIN, with_frozen_and_unused_weights, {}),
    "torchvision's": (PLAIN, lambda: thin(torchvision_resnet), {}),
    "6n+2": (PLAIN, lambda: CifarResNet(8, 3, width=4), {}),
    "article": (PLAIN, article, {}),
    "fp16": (PLAIN, thin, {"precision": "fp16"}),
}


@pytest.mark.parametrize(("recipe", "make", "settings"), CASES.values(), ids=CASES)
def test_steps_have_the_bits_of_autocasts_own_casts(recipe: Recipe, make, settings: dict, device):
    alone, together = (trained(make_step(recipe, each, make, device, **settings), device) for each in (False, True))
    assert equal(together, alone)
    assert not equal(together[0][2], together[-1][2])


def test_recorded_steps_have_them_too(device):
    recipe, make_graph = replace(PLAIN, ema=0.5), CudaGraph if device.type == "cuda" else RecordedGraph
    alone = trained(make_step(recipe, False, thin, device), device)
    recorded = trained(make_step(recipe, True, thin, device, graph=True, make_graph=make_graph), device)
    assert equal([[output, state] for output, _, state in recorded], [[output, state] for output, _, state in alone])


def test_a_resumed_step_has_them_too(device):
    straight, stopped, resumed = (make_step(PLAIN, together, thin, device) for together in (False, True, True))
    for batch in batches(device)[:2]:
        straight(batch)
        stopped(batch)
    resumed.model.load_state_dict(stopped.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    for batch in batches(device)[2:]:
        straight(batch)
        resumed(batch)
    assert equal(resumed.model.state_dict(), straight.model.state_dict())


class Casts(TorchDispatchMode):
    """Counts the operators that convert between fp32 and bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_foreach_copy_" or (name == "_to_copy" and {result.dtype, args[0].dtype} == CONVERSION):
            self.counts[name] += 1
        return result


def test_all_weights_take_one_launch_forward_and_one_backward(device):
    counts = []
    for together in (False, True):
        step = make_step(PLAIN, together, thin, device)
        with Casts() as casts:
            step(batches(device)[0])
        counts.append(casts.counts)
    n_weights = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in thin().modules()) + 1  # and a bias
    others = counts[1]["_to_copy"]
    assert others == 3  # the images, the logits, and their gradient
    assert counts[0] == {"_to_copy": 2 * n_weights + others}
    assert counts[1] == {"_foreach_copy_": 2, "_to_copy": others}


def test_copies_have_the_strides_of_their_weights(device):
    """Else the multi-tensor copy would take a launch for each."""
    for shadow in CastWeights(thin().to(device), torch.bfloat16).shadows:
        assert shadow.copy.stride() == shadow.weight.stride() and shadow.copy.dtype == torch.bfloat16


def test_the_model_is_as_it_was_after_a_step_and_after_an_error(device):
    step = make_step(PLAIN, True, thin, device)
    before = dict(step.model.named_parameters())
    step(batches(device)[0])
    step.model.avgpool = nn.AdaptiveAvgPool2d(2)  # the linear layer refuses four pixels of 16 channels
    with pytest.raises(RuntimeError):
        step(batches(device)[1])
    after = dict(step.model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_hooks_of_parameters_see_gradients_in_fp32(device):
    step, seen = make_step(PLAIN, True, thin, device), []
    step.model.conv1.weight.register_hook(lambda gradient: seen.append(gradient.dtype))
    step.model.conv1.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.dtype))
    step(batches(device)[0])
    assert seen == [torch.float32, torch.float32]


def test_hooks_of_modules_see_weights_in_fp32(device):
    step, seen = make_step(PLAIN, True, thin, device), []
    step.model.register_forward_hook(lambda module, *_: seen.append(module.conv1.weight.dtype))
    step(batches(device)[0])
    step.model.layer1[0].register_forward_hook(lambda module, *_: seen.append(module.conv1.weight.dtype))
    step(batches(device)[0])
    assert seen == [torch.float32] * 3


def test_layers_of_somebody_else_keep_autocasts_own_casts():
    class Head(nn.Module):
        """Computes in fp32, with a weight in fp32."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                return self.fc(x.float())

    model = thin().train()
    model.fc = Head()
    step = TrainingStep(model, PLAIN, AUGMENTATION, n_steps=20, precision="bf16")
    assert step.forward is model
    step(batches(torch.device("cpu"))[0])
