"""The reason given for a batch norm that is converted alone is true of the whole forward that runs it."""

import pytest
import torch
import torch.nn.functional as F
from foreign_models import perturbed, step
from torch import nn

from resnet_fast import convert

pytestmark = pytest.mark.usefixtures("on_aten")


class Nested(nn.Module):
    """Its batch norm ends a Sequential; what follows is in the forward around it, which a subclass has."""

    depth = 1

    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        for _ in range(self.depth - 1):
            self.main = nn.Sequential(self.main)


class MakesItsReLU(Nested):
    def forward(self, x):
        return nn.ReLU(inplace=True)(self.main(x) + x)


class ThreeDeep(MakesItsReLU):
    depth = 3


class AddsFromTheRight(Nested):
    def forward(self, x):
        x = x + self.main(x)
        return nn.ReLU()(x)


FUSED = (MakesItsReLU, ThreeDeep, AddsFromTheRight)


@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.__name__)
def test_what_follows_a_sequential_is_seen(case):
    torch.manual_seed(0)
    ours, theirs = perturbed(case()), perturbed(case())
    theirs.load_state_dict(ours.state_dict())
    _, report = convert(ours, report=True)
    assert [outcome.what for outcome in report.outcomes] == ["BN+add+ReLU"]
    x = torch.rand(2, 4, 5, 5)
    assert ours.__dict__["_fused"].holds((x,))
    found, expected = step(ours, x), step(theirs, x)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def _concatenates(module, x):
    return torch.cat([x, module.main(x)], 1)


def _ignores(module, x):
    module.main(x)
    return x


def _returns_and_uses(module, x):
    y = module.main(x)
    return y, F.relu(y)


def _tries(module, x):
    try:
        return F.relu(module.main(x) + x)
    finally:
        pass


def _asks_for_a_shortcut(module, x):
    return F.relu(module.main(x) + (module.shortcut(x) if hasattr(module, "shortcut") else x))


def _is_given_a_shortcut(module, x, shortcut=None):
    return F.relu(module.main(x) + (x if shortcut is None else shortcut))


def _sums(module, x):
    return F.relu(sum([module.main(x), x]))


def _names_its_input(module, x):
    return F.relu(module.main[1](input=module.main[0](x)))


REASONS = {
    "LeakyReLU": (lambda m, x: m.after(m.main(x)), "LeakyReLU reads its output"),
    "relu6": (lambda m, x: F.relu6(m.main(x)), "torch.nn.functional.relu6 reads its output"),
    "a method": (lambda m, x: m.main(x).clamp(0), ".clamp reads its output"),
    "cat": (_concatenates, "torch.cat reads its output"),
    "sum of a list": (_sums, "an addition follows, but not of another tensor"),
    "unused": (_ignores, "no step reads its output"),
    "returned": (lambda m, x: m.main(x), "model returns its output"),
    "returned and used": (_returns_and_uses, "(torch.nn.functional.relu, the caller)"),
    "keyword": (_names_its_input, "main returns its output, and no traced forward calls it"),
    "hasattr": (_asks_for_a_shortcut, "(model: its forward asks for types or attributes (hasattr))"),
    "None": (_is_given_a_shortcut, "(model: its forward asks whether a value is None or a certain object)"),
    "try": (_tries, "what follows main is not known (model: its forward has a try statement)"),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_names_what_follows(name):
    class Case(Nested):
        def __init__(self):
            super().__init__()
            self.after = nn.LeakyReLU()

        forward = REASONS[name][0]

    (outcome,) = convert(Case(), report=True)[1].outcomes
    assert outcome.what == "BN" and REASONS[name][1] in outcome.why


def test_the_module_that_cannot_be_followed_is_named():
    class Tries(Nested):
        forward = _tries

    reasons = [outcome.why for outcome in convert(nn.Sequential(Tries(), MakesItsReLU()), report=True)[1].outcomes]
    assert reasons == ["what follows 0.main is not known (0: its forward has a try statement)", ""]


def test_a_hook_of_all_modules_stays_out_of_the_graph():
    """One that is there while the model is converted, and gone afterwards."""
    model, x = MakesItsReLU().eval(), torch.rand(2, 4, 5, 5)
    expected = model(x)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: output * 2 if type(module) is nn.ReLU else None
    )
    try:
        doubled = model(x)
        assert torch.equal(convert(model)(x), doubled)
    finally:
        hook.remove()
    assert not torch.equal(doubled, expected) and torch.equal(model(x), expected)
