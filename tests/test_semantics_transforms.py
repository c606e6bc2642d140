"""functional_call, parametrizations and hooks work on our modules as on torch's."""

import pytest
import torch
import torch.nn.functional as F
from thin_resnet import images, pair
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from resnet_fast import FusedBatchNorm2d, batch_norm_add_relu
from resnet_fast.models.resnet import BasicBlock


def gradients_agree(ours: nn.Module, theirs: nn.Module) -> None:
    """fp64: seven layers' sums in another order."""
    for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-10, msg=name)


def buffers_agree(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, found), expected in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)


def test_functional_call(device):
    """The tensors given are used, learn and are updated; those of the module stay as they are."""
    x = images(device, torch.float64)
    outcomes = []
    for model in pair(device, torch.float64):
        model(x)  # a module that kept its tensors from a pass before would show
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parameters = {name: (1.5 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
        buffers = {name: b + 1 for name, b in model.named_buffers()}
        y = torch.func.functional_call(model, (parameters, buffers), (x,))
        found = torch.autograd.grad(y.square().sum(), list(parameters.values()))
        outcomes.append((y.detach(), found, buffers))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, own[name]), name
    torch.testing.assert_close(*outcomes, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "transform",
    (
        lambda loss: lambda p, x: torch.func.vmap(torch.func.grad(loss), (None, 0))(p, x[:, None]),  # of each image
        lambda loss: lambda p, x: torch.func.jvp(lambda x: loss(p, x), (x,), (x,)),
    ),
    ids=("vmap of grad", "jvp"),
)
def test_transforms_of_torch_func(transform, device):
    """They take ATen by themselves, where the kernels would run."""
    x, outcomes = images(device, torch.float64), []
    for model in pair(device, torch.float64):
        model.eval()

        def loss(parameters, x, model=model):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        outcomes.append(transform(loss)(parameters, x))
    torch.testing.assert_close(*outcomes, rtol=1e-10, atol=1e-10)


def test_forward_mode_says_what_does_it(device):
    """`jvp` above takes ATen by itself; dual tensors, which no kernel knows, need it by name."""
    tensors = {"x": images(device), "weight": torch.rand(3, device=device), "residual": images(device).flip(0)}
    with forward_ad.dual_level():
        tensors["weight"] = forward_ad.make_dual(tensors["weight"], tensors["weight"].square())
        x = tensors.pop("x")
        arguments = {"running_mean": None, "running_var": None, "training": True, **tensors}
        with pytest.raises(NotImplementedError, match='forward-mode .* pass backend="aten"'):
            batch_norm_add_relu(x, **arguments)
        tangent = forward_ad.unpack_dual(batch_norm_add_relu(x, **arguments, backend="aten")).tangent
    assert tangent is not None and tangent.any()


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrize_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            parametrize.register_parametrization(module, "weight", Double())


def normalize_the_weights_of_a_convolution(model):
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    nn.utils.parametrizations.spectral_norm(model.layer2[0].conv2)


@pytest.mark.parametrize("change", (parametrize_norms, normalize_the_weights_of_a_convolution))
def test_parametrized_network(change, device):
    x = images(device, torch.float64)
    ours, theirs = pair(device, torch.float64)
    plain = ours(x)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(2)
        model.load_state_dict(pair(device, torch.float64)[0].state_dict())
        change(model)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)
    gradients_agree(ours, theirs)
    buffers_agree(ours, theirs)
    assert not torch.allclose(outputs[0], plain)


def test_parametrized_module_ends_in_relu(device):
    module = FusedBatchNorm2d(3, relu=True).to(device)
    parametrize.register_parametrization(module, "weight", Double())
    x, residual = torch.randn(2, 2, 3, 4, 4, device=device)
    expected = F.relu(2 * nn.BatchNorm2d(3).to(device)(x) + residual)
    torch.testing.assert_close(module(x, residual), expected, rtol=1e-5, atol=1e-5)  # some fp32 roundings of 4
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is FusedBatchNorm2d and torch.equal(module.weight, torch.full_like(module.weight, 2.0))


def record_norms(model, register, ending: str) -> dict[str, list]:
    """`register(module, keep)` on every batch norm so named; what `keep` got, by the norm's name and in order."""
    seen: dict[str, list] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and name.endswith(ending):
            kept = seen[name] = []
            register(module, lambda *tensors, kept=kept: kept.append([t.detach().clone() for t in tensors]))
    return seen


HOOKS = {
    "forward": lambda module, keep: module.register_forward_hook(lambda m, args, out: keep(*args, out)),
    "forward pre": lambda module, keep: module.register_forward_pre_hook(lambda m, args: keep(*args)),
    "full backward": lambda module, keep: module.register_full_backward_hook(lambda m, dx, dy: keep(*dx, *dy)),
    "full backward pre": lambda module, keep: module.register_full_backward_pre_hook(lambda m, dy: keep(*dy)),
}


def without_inplace(model):
    """A full backward hook forbids an in-place ReLU behind the module."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_the_norms_of_a_network(hook, on_aten, device):
    seen, models = [], pair(device, torch.float64)
    for model in models:
        without_inplace(model)
        # A full backward hook on bn2 is refused: see the next test.
        seen.append(record_norms(model, HOOKS[hook], "bn1" if "backward" in hook else ""))
        model(images(device, torch.float64)).square().sum().backward()
    assert seen[0].keys() == seen[1].keys()
    assert len(seen[0]) == (4 if "backward" in hook else 8)
    assert all(len(kept) == 1 for kept in seen[0].values())
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-10, atol=1e-10)
    gradients_agree(*models)


@pytest.mark.parametrize("hook", ("forward", "full backward", "patched forward"))
def test_what_is_around_a_whole_network_leaves_it_fused(hook, on_aten, device, monkeypatch):
    """It sees input and output alone. Accelerate puts a forward on the network, for autocast."""
    forks, fused_forward = [], BasicBlock.fused_forward

    def noted(block, x, shortcut, fork=False):
        forks.append(fork)
        return fused_forward(block, x, shortcut, fork)

    monkeypatch.setattr(BasicBlock, "fused_forward", noted)
    seen, models = [], pair(device, torch.float64)
    for model in models:
        kept = []

        def keep(*tensors, kept=kept):
            kept.extend(t.detach().clone() for t in tensors)

        if hook == "patched forward":
            forward = model.forward
            model.forward = lambda x, forward=forward, keep=keep: (y := forward(x), keep(x, y))[0]
        else:
            HOOKS[hook](model, keep)
        model(images(device, torch.float64).requires_grad_()).square().sum().backward()
        seen.append(kept)
    assert forks == [True, True, False]  # every output but the last has two consumers
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-10, atol=1e-10)
    gradients_agree(*models)


def test_a_full_backward_hook_where_the_residual_is_added_in_place_is_refused(on_aten, device):
    """torchvision's network refuses it, so ours does: the block runs torchvision's own steps."""
    for model in pair(device):
        model.layer1[0].bn2.register_full_backward_hook(lambda module, dx, dy: None)
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
            model(images(device))


def test_a_forward_hook_may_replace_the_output(on_aten, device):
    outputs = []
    for model in pair(device, torch.float64):
        model.layer1[0].bn1.register_forward_hook(lambda module, args, out: 2 * out)
        model.layer1[1].bn2.register_forward_pre_hook(lambda module, args: (args[0] ** 3,))
        outputs.append(model(images(device, torch.float64)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)


def test_hooks_of_a_module_see_the_residual(device):
    """A pre hook gets every argument; full backward hooks get the gradient of each."""
    module = FusedBatchNorm2d(3, relu=True).to(device)
    x, residual = torch.randn(2, 2, 3, 4, 4, device=device)
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append(len(args)))
    module.register_full_backward_hook(lambda m, gradients, _: seen.append([g.clone() for g in gradients]))
    leaves = [x.requires_grad_(), residual.requires_grad_()]
    module(*leaves).square().sum().backward()
    assert seen[0] == 2
    assert torch.equal(seen[1][0], x.grad) and torch.equal(seen[1][1], residual.grad)


def test_a_tensor_hook_sees_the_whole_gradient(on_aten, device):
    seen = []
    for model in pair(device, torch.float64):
        kept = []
        handle = model.layer1.register_forward_hook(
            lambda module, args, out, kept=kept: out.register_hook(lambda g, kept=kept: kept.append(g.clone())) and None
        )
        model(images(device, torch.float64)).square().sum().backward()
        handle.remove()
        seen.append(kept)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-10, atol=1e-10)
