"""What makes a converted model run its original forward: hooks, changes to the model, arguments, torch.fx."""

import copy

import pytest
import torch
from foreign_models import FUSED, KuangliuResNet, fused_calls, perturbed, step
from torch import fx, nn

from resnet_fast import convert

pytestmark = pytest.mark.usefixtures("on_aten")


def images(size: int = 8) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


HOOKS = {
    "forward": lambda module, hook: module.register_forward_hook(lambda *_: hook()),
    "forward pre": lambda module, hook: module.register_forward_pre_hook(lambda *_: hook()),
    "backward": lambda module, hook: module.register_full_backward_hook(lambda *_: hook()),
    "backward pre": lambda module, hook: module.register_full_backward_pre_hook(lambda *_: hook()),
}


@pytest.mark.parametrize(
    ("where", "when", "kind"),
    (
        ("layer1.0.bn1", "before", "forward"),
        ("layer2.0.conv1", "after", "forward pre"),
        ("layer1.1", "before", "backward"),
        ("layer1", "after", "backward pre"),
    ),
)
def test_hooks_see_what_they_saw(where, when, kind, monkeypatch):
    """And the blocks that they are not in stay fused."""
    theirs, ours, called = KuangliuResNet(), KuangliuResNet(), []
    ours.load_state_dict(theirs.state_dict())
    if when == "before":
        handle = HOOKS[kind](ours.get_submodule(where), lambda: called.append(1))
        convert(ours)
    else:
        convert(ours)
        handle = HOOKS[kind](ours.get_submodule(where), lambda: called.append(1))
    calls = fused_calls(ours, monkeypatch)
    found, expected = step(ours, images()), step(theirs, images())
    assert called == [1]
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert calls != FUSED and "add" in calls
    handle.remove()
    calls.clear()
    ours(images())
    assert calls == FUSED


def test_hooks_of_the_model_itself_leave_it_fused(monkeypatch):
    model, called = convert(KuangliuResNet()), []
    model.register_forward_hook(lambda *_: called.append(1))
    calls = fused_calls(model, monkeypatch)
    model(images())
    assert called == [1] and calls == FUSED


def _swap_norm(model):
    model.layer1[0].bn1 = nn.Identity()


def _drop_block(model):
    del model.layer1[1]


def _patch_forward(model):
    model.layer1[0].conv1.forward = lambda x: x * 2


@pytest.mark.parametrize("change", (_swap_norm, _drop_block, _patch_forward))
def test_a_model_that_is_changed_later_computes_what_it_is_then(change):
    theirs, ours = perturbed(KuangliuResNet()), perturbed(KuangliuResNet())
    ours.load_state_dict(theirs.state_dict())
    convert(ours)
    for model in (theirs, ours):
        torch.manual_seed(2)
        change(model.eval())
    assert torch.equal(ours(images()), theirs(images()))
    convert(ours)
    assert torch.equal(ours(images()), theirs(images()))


class Switched(nn.Module):
    """Its forward depends on attributes and globals, and takes more than it needs."""

    shift = 0

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.activation, self._scale = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), torch.relu, 1.0

    def forward(self, x, scale=1):
        return scale * self._scale * self.activation(self.bn(self.conv(x))) + self.shift + SHIFT


SHIFT = 0
CHANGES = {
    "number": lambda model, monkeypatch: setattr(model, "_scale", 2.0),
    "to a tensor": lambda model, monkeypatch: setattr(model, "_scale", torch.full((4, 1, 1), 2.0)),
    "function": lambda model, monkeypatch: setattr(model, "activation", torch.tanh),
    "class attribute": lambda model, monkeypatch: setattr(model, "shift", 3),
    "on the class": lambda model, monkeypatch: monkeypatch.setattr(Switched, "shift", 3),
    "global": lambda model, monkeypatch: monkeypatch.setitem(globals(), "SHIFT", 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_settings_that_are_changed_later_count(change, monkeypatch):
    theirs, ours = perturbed(Switched().eval()), convert(perturbed(Switched().eval()))
    ours.load_state_dict(theirs.state_dict())
    assert ours.__dict__["_fused"].holds((images(),)) and torch.equal(ours(images()), theirs(images()))
    before = theirs(images())
    for model in (theirs, ours):
        CHANGES[change](model, monkeypatch)
    assert torch.equal(ours(images()), theirs(images())) and not torch.equal(ours(images()), before)


def test_arguments_that_were_not_foreseen_count():
    model = convert(Switched().eval())
    y = model(images())
    assert torch.equal(model(images(), 3), 3 * y)
    assert torch.equal(model(x=images()), y) and torch.equal(model(images(), scale=3), 3 * y)


def test_a_forward_that_the_class_gets_later_runs_step_by_step(monkeypatch):
    model = convert(Switched().eval())
    monkeypatch.setattr(Switched, "forward", lambda self, x: self.bn(self.conv(x)))
    model.bn.register_forward_hook(lambda *_: None)
    assert torch.equal(model(images()), model.bn(model.conv(images())))


def test_a_copy_is_of_the_forward_that_the_class_has_then(monkeypatch):
    model = convert(Switched().eval())
    monkeypatch.setattr(Switched, "forward", lambda self, x: torch.relu(self.bn(self.conv(x))) * 5)
    copied = copy.deepcopy(model)
    assert copied.__dict__["_fused"].holds((images(),))
    assert torch.equal(copied(images()), torch.relu(model.bn(model.conv(images()))) * 5)


def test_torch_fx_traces_the_steps():
    model = convert(perturbed(KuangliuResNet())).eval()
    traced = fx.symbolic_trace(model)
    assert torch.equal(traced(images()), model(images()))
    assert sum(node.op == "call_module" and "bn" in str(node.target) for node in traced.graph.nodes) == 7
