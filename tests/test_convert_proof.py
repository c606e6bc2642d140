"""What cannot be proven to stay the same is left alone, as a whole, and the report says why."""

import copy
import os
import random
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_models import perturbed, step
from torch import nn
from torch.utils.checkpoint import checkpoint

from resnet_fast import FusedBatchNorm2d, convert


class Block(nn.Module):
    """relu(bn(conv(x))), and whatever a subclass does beside it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)

    def steps(self, x):
        return F.relu(self.bn(self.conv(x)))

    def forward(self, x):
        return self.steps(x)


class BranchesOnTheMode(Block):
    def forward(self, x):
        return self.steps(x) if self.training else self.steps(x) + 1


class BranchesOnValues(Block):
    def forward(self, x):
        return self.steps(x) if x.sum() > 0 else self.steps(x) + 1


class BranchesOnShapes(Block):
    def forward(self, x):
        return self.steps(x) if x.shape[2] > 4 else self.steps(x) + 1


class BranchesOnTypes(Block):
    def forward(self, x):
        y = self.steps(x)
        return y if isinstance(y, torch.Tensor) else y + 1


class MatchesTypes(Block):
    def forward(self, x):
        match self.steps(x):
            case torch.Tensor() as y:
                return y
            case y:
                return y + 1


class SwitchesGradientsOff(Block):
    def forward(self, x):
        with torch.no_grad():
            y = self.steps(x)
        return y + x


class SwitchesGradientsOn(Block):
    def forward(self, x):
        with torch.enable_grad():
            return self.steps(x)


class SwitchesAutocastOff(Block):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.steps(x.float())


class SwitchesAutocastOn(Block):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.steps(x)


class Checkpoints(Block):
    def forward(self, x):
        return checkpoint(self.steps, x, use_reentrant=False)


class CheckpointsReentrantly(Block):
    def forward(self, x):
        return checkpoint(self.steps, x, use_reentrant=True)


class DrawsFromTorch(Block):
    def forward(self, x):
        return self.steps(x) if float(torch.rand(())) < 2 else x


class DrawsFromPython(Block):
    def forward(self, x):
        return self.steps(x) if random.random() < 2 else x


class DrawsFromNumpy(Block):
    def forward(self, x):
        return self.steps(x) if np.random.rand() < 2 else x


class Remembers(Block):
    def forward(self, x):
        self.last = self.steps(x)
        return self.last


class Collects(Block):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(1)
        return self.steps(x)


class Counts(Block):
    n_calls = 0

    def forward(self, x):
        self.n_calls += 1
        return self.steps(x)


class WritesAGlobal(Block):
    def forward(self, x):
        global N_CALLS
        N_CALLS = 1
        return self.steps(x)


class ReadsAGlobalThatMayChange(Block):
    def forward(self, x):
        return self.steps(x) * SCALES["all"]


class ReadsAnAttributeThatMayChange(Block):
    def __init__(self):
        super().__init__()
        self.scales = {"all": 2}

    def forward(self, x):
        return self.steps(x) * self.scales["all"]


class ReadsAPropertyThatMayChange(ReadsAnAttributeThatMayChange):
    @property
    def scale(self):
        return self.scales["all"]

    def forward(self, x):
        return self.steps(x) * self.scale


class HoldsATensor(Block):
    def __init__(self):
        super().__init__()
        self.count = torch.zeros(())

    def forward(self, x):
        self.count.add_(1)
        return self.steps(x)


class DrawsFromItsOwn(Block):
    def __init__(self):
        super().__init__()
        self.generator = random.Random(0)

    def forward(self, x):
        return self.steps(x) if self.generator.random() < 2 else x


class ReadsAnotherModulesMode(Block):
    def forward(self, x):
        return self.steps(x) if not self.training or self.bn.training else self.steps(x) + 1


class AsksForGradients(Block):
    def forward(self, x):
        return self.steps(x) + (1 if self.other.bias.requires_grad and torch.is_grad_enabled() else 0)


class AsksForTheExactType(Block):
    def forward(self, x):
        y = self.steps(x)
        return y if type(y) is torch.Tensor else y + 1


class AsksForAnAttribute(Block):
    def forward(self, x):
        return getattr(self.steps(x), "logits", x)


class AsksWhetherThereIsAnAttribute(Block):
    def forward(self, x):
        y = self.steps(x)
        return y.logits if hasattr(y, "logits") else y


class CatchesExceptions(Block):
    def forward(self, x):
        try:
            return self.steps(x) * float(x.mean())
        except Exception:
            return self.steps(x)


class Prints(Block):
    def forward(self, x):
        print("forward", end="")
        return self.steps(x)


class SetsData(Block):
    def forward(self, x):
        y = self.steps(x)
        y.data = y.data * 2
        return y


class LooksAValueUp(Block):
    def forward(self, x):
        return self.steps(x) * {5: 2.0}.get(x.shape[2], 1.0)


class LooksAnAttributeUp(Block):
    def forward(self, x):
        y = self.steps(x)
        return y * 3 if y.dtype in {torch.float32} else y


class MakesText(Block):
    def forward(self, x):
        y = self.steps(x)
        return y * 3 if f"{y.dtype}" == "torch.float32" else y


class AsksForTheGraph(Block):
    def forward(self, x):
        y = self.steps(x)
        return y * 2 if y.grad_fn is None else y


class MayBeNone(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.inner(x) if self.training else None


class AsksForNone(Block):
    def __init__(self):
        super().__init__()
        self.auxiliary = MayBeNone()

    def forward(self, x):
        y = self.steps(x)
        other = self.auxiliary(y)
        return y if other is None else y + other


class Reverses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, dy):
        return -dy


class AppliesAFunction(Block):
    def forward(self, x):
        return self.steps(Reverses.apply(x))


class SetsAnotherModulesSetting(Block):
    def forward(self, x):
        momentum, self.bn.momentum = self.bn.momentum, 0.7
        y = self.steps(x)
        self.bn.momentum = momentum
        return y


class FreezesAndBack(Block):
    def forward(self, x):
        self.bn.eval()
        y = self.steps(x)
        self.bn.train(self.other.training)
        return y


class GivesAnOrderedDict(Block):
    def forward(self, x):
        return OrderedDict(y=self.steps(x))


class AsksTheEnvironment(Block):
    def forward(self, x):
        return self.steps(x) * float(os.environ.get("SCALE", "1"))


def _with_a_variable_around():
    scale = [2]

    class ReadsAVariableAround(Block):
        def forward(self, x):
            return self.steps(x) * scale[0]

    return ReadsAVariableAround


ReadsAVariableAround = _with_a_variable_around()
SCALES, N_CALLS = {"all": 2}, 0


class MakesAConstant(Block):
    def forward(self, x):
        return self.steps(x) + torch.ones(1, 4, 1, 1) * 2


class TakesAnything(Block):
    def forward(self, *inputs):
        return self.steps(inputs[0])


class Fails(Block):
    def forward(self, x):
        return self.steps(torch.from_numpy(x))


CASES = {
    BranchesOnTheMode: "depends on the mode",
    ReadsAnotherModulesMode: "depends on the mode",
    BranchesOnValues: "control flow",
    BranchesOnShapes: "control flow",
    BranchesOnTypes: "type of an intermediate",
    MatchesTypes: "type of an intermediate",
    AsksForTheExactType: "asks for the types",
    AsksForAnAttribute: "'logits', which not every tensor has",
    AsksWhetherThereIsAnAttribute: "asks for the types or attributes",
    AsksForGradients: "asks how it is run (is_grad_enabled)",
    CatchesExceptions: "catches exceptions",
    Prints: "prints or reads",
    SwitchesGradientsOff: "switches gradients",
    SwitchesGradientsOn: "switches gradients",
    SwitchesAutocastOff: "switches gradients, autocast",
    SwitchesAutocastOn: "switches gradients, autocast",
    Checkpoints: "checkpointing",
    CheckpointsReentrantly: "checkpointing",
    DrawsFromTorch: "random numbers",
    DrawsFromPython: "random numbers",
    DrawsFromNumpy: "random numbers",
    DrawsFromItsOwn: "draws random numbers from generator",
    Remembers: "writes attributes",
    Counts: "writes attributes",
    Collects: "reads seen, which may change unseen (list)",
    ReadsAnAttributeThatMayChange: "reads scales, which may change unseen (dict)",
    ReadsAPropertyThatMayChange: "reads scales, which may change unseen (dict)",
    ReadsAGlobalThatMayChange: "reads SCALES, which may change unseen (dict)",
    ReadsAVariableAround: "reads scale, a variable of the function around it",
    WritesAGlobal: "writes global variables",
    HoldsATensor: "reads count, a tensor that is neither parameter nor buffer",
    SetsData: "sets data of a value",
    LooksAValueUp: "looks for a value in a set or dict",
    LooksAnAttributeUp: "looks for a value in a set or dict",
    MakesText: "makes text of a value",
    AsksForTheGraph: "'grad_fn', which not every tensor has",
    AsksForNone: "asks whether a value is None",
    AppliesAFunction: "runs what a graph does not show (apply)",
    SetsAnotherModulesSetting: "writes attributes of modules (momentum)",
    FreezesAndBack: "writes attributes of modules (training)",
    AsksTheEnvironment: "asks how it is run (environ)",
    GivesAnOrderedDict: "makes a OrderedDict",
    MakesAConstant: "writes attributes of modules",
    TakesAnything: "takes any arguments",
    Fails: "cannot follow",
}


pytestmark = pytest.mark.usefixtures("on_aten")


def state(model: nn.Module) -> dict:
    """Everything of a module that a forward might change."""
    values = {name: value.copy() if isinstance(value, dict | list) else value for name, value in vars(model).items()}
    tensors = {name: value.clone() for name, value in vars(model).items() if isinstance(value, torch.Tensor)}
    return {**values, "tensors": {name: value.tolist() for name, value in tensors.items()}}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_forward_that_torch_fx_gets_wrong_stays(case, capsys):
    """The batch norm alone is a fused one, which needs no proof; the forward around it is the model's own, and has
    left nothing behind: attributes, lists, modes, random states, switches, output.
    """
    model = case()
    model.conv.eval()
    before, modes = state(model), [module.training for module in model.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    switches = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    model, report = convert(model, report=True)
    (outcome,) = report.outcomes
    assert CASES[case] in outcome.why
    assert outcome.what == "BN" and type(model.bn) is FusedBatchNorm2d and type(model) is case
    assert state(model) == before and N_CALLS == 0
    assert [module.training for module in model.modules()] == modes
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")) == switches
    assert not capsys.readouterr().out


class Around(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.conv, self.bn, self.block = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), block

    def forward(self, x):
        return self.block(F.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in (Fails, GivesAnOrderedDict)], ids=lambda case: case.__name__
)
def test_the_model_around_it_is_fused_and_calls_it_as_it_is(case):
    torch.manual_seed(0)
    theirs = perturbed(Around(case()))
    ours, report = convert(copy.deepcopy(theirs), report=True)
    assert [outcome.what for outcome in report.outcomes] == ["BN+ReLU", "BN"]
    x = torch.rand(2, 3, 5, 5)
    assert ours.__dict__["_fused"].holds((x,))
    for training in (True, False):
        found, expected = step(ours.train(training), x), step(theirs.train(training), x)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


class ReadTwice(Block):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) + y


class NoReLU(Block):
    def forward(self, x):
        return F.silu(self.bn(self.conv(x)))


class AddsANumber(Block):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + 1)


class AddsItself(Block):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y + y)


class ReadsTheStatistics(Block):
    def forward(self, x):
        y = self.bn(self.conv(x))
        statistics = self.bn.running_mean[:, None, None] * 10
        return F.relu(y + x) + statistics


class AddsToItsInput(Block):
    def forward(self, x):
        y = x * 1
        z = y.view_as(y)
        z += self.bn(self.conv(x))
        return F.relu(z) + y


class KeepsWhatItAddsTo(Block):
    def forward(self, x):
        y = z = x + 0
        y += F.relu(self.bn(self.conv(x)))
        return y + z


class SharesTheConvolution(Block):
    def forward(self, x):
        y = self.conv(x)
        return F.relu(self.bn(y) + y)


class ScalesWhatItAdds(Block):
    def forward(self, x):
        return F.relu(torch.add(self.bn(self.conv(x)), x, alpha=2))


ALONE = {
    ReadTwice: "more than one step reads",
    NoReLU: "neither ReLU nor an addition",
    AddsANumber: "no other tensor",
    AddsItself: "no other tensor",
    ReadsTheStatistics: "another step reads its statistics",
    AddsToItsInput: "in place to another tensor",
    SharesTheConvolution: "not that of a convolution alone",
    ScalesWhatItAdds: "neither ReLU nor an addition",
}


@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.__name__)
def test_steps_that_are_no_single_operation(case):
    torch.manual_seed(0)
    ours, theirs = perturbed(case()), perturbed(case())
    theirs.load_state_dict(ours.state_dict())
    _, report = convert(ours, report=True)
    (outcome,) = report.outcomes
    assert outcome.what == "BN" and ALONE[case] in outcome.why
    x = torch.rand(2, 4, 5, 5)
    found, expected = step(ours, x), step(theirs, x)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_is_changed_in_place_is_seen_under_its_other_names():
    torch.manual_seed(0)
    model = KeepsWhatItAddsTo().eval()
    x = torch.rand(2, 4, 5, 5)
    with torch.no_grad():
        expected = model(x)
        assert convert(model, report=True)[1].outcomes[0].what == "BN+ReLU"
        assert torch.equal(model(x), expected)


class Subclass(nn.BatchNorm2d):
    pass


def _patched() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(4)
    norm.forward = partial(nn.BatchNorm2d.forward, norm)
    return norm


LEFT = {
    "1-D": (lambda: nn.BatchNorm1d(4), "nn.BatchNorm1d"),
    "3-D": (lambda: nn.BatchNorm3d(4), "nn.BatchNorm3d"),
    "synchronized": (lambda: nn.SyncBatchNorm(4), "convert_sync_batchnorm"),
    "subclass": (lambda: Subclass(4), "Subclass, whose forward may be another"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "LazyBatchNorm2d"),
    "fused": (lambda: FusedBatchNorm2d(4, relu=True), "is a fused one"),
    "patched": (_patched, "patched forward"),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_norms_are_left_and_named(name):
    make, why = LEFT[name]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), make(), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    before = type(model[1])
    _, report = convert(model, report=True)
    assert [(outcome.name, outcome.status) for outcome in report.outcomes] == [("1", "left"), ("4", "converted")]
    assert why in report.left[0].why and type(model[1]) is before


def test_timms_own_norm_is_left_and_named():
    from timm.layers import BatchNormAct2d

    _, report = convert(nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4)), report=True)
    assert "BatchNormAct2d, whose forward may be another" in report.left[0].why


class UsesItsNormTwice(Block):
    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        return F.relu(self.bn(self.other(y)) + x)


def test_a_norm_that_is_called_twice_is_left():
    model, report = convert(UsesItsNormTwice(), report=True)
    assert report.left[0].why == "is called 2 times in one forward"
    assert type(model.bn) is nn.BatchNorm2d and type(model) is UsesItsNormTwice


def test_shared_blocks_are_left():
    """A module under two names: its norms are called twice in a forward of the whole, and left everywhere."""
    block = Block()
    model, report = convert(nn.Sequential(block, block, Block()), report=True)
    assert [(outcome.name, outcome.status) for outcome in report.outcomes] == [("0.bn", "left"), ("2.bn", "converted")]
    assert type(model[0]) is Block and model[0] is model[1] and type(model[0].bn) is nn.BatchNorm2d


def test_a_shared_relu_is_no_shared_norm():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), relu, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), relu)
    assert [outcome.what for outcome in convert(model, report=True)[1].outcomes] == ["BN+ReLU"] * 2
