"""A forward that cannot be proven to stay the same is left unchanged as a whole, and the report says why."""

import contextlib
import copy
import os
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_models import Block, perturbed, step
from torch import nn
from torch.utils.checkpoint import checkpoint

from resnet_fast import FusedBatchNorm2d, convert


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


@contextlib.contextmanager
def quiet():
    try:
        yield
    except Exception:
        pass


class IsQuiet(Block):
    def forward(self, x):
        y = self.steps(x)
        with quiet():
            y = y * 2 if x.shape[0] > 1 else y
        return y


class ComparesByIdentity(Block):
    def forward(self, x):
        y = self.steps(x)
        return y * 2 if y.contiguous() is y else y


class SuppressesExceptions(Block):
    def forward(self, x):
        y = self.steps(x)
        with contextlib.suppress(Exception):
            y = y * float(x.mean())
        return y


class MakesADropout(Block):
    def forward(self, x):
        return nn.Dropout(0.0)(self.steps(x))


class MakesASigmoid(Block):
    def forward(self, x):
        return nn.Sigmoid()(self.steps(x))


class KeepsAReLU(Block):
    def forward(self, x):
        self.relu = nn.ReLU()
        return self.relu(self.steps(x))


class CallsAGlobalReLU(Block):
    def forward(self, x):
        return RELU(self.steps(x))


class AsksForTracing(Block):
    def forward(self, x):
        return self.steps(x) + (1 if torch.jit.is_tracing() else 0)


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


class AsksWhetherThereIsAShape(AsksForNone):
    def forward(self, x):
        y = self.steps(x)
        other = self.auxiliary(y)
        return y + other if hasattr(other, "shape") else y


class AsksForNoneOfItsOwn(AsksForNone):
    """What an argument may be, of a function of its own."""

    def join(self, y, other):
        return y if other is None else y + other

    def forward(self, x):
        y = self.steps(x)
        return self.join(y, self.auxiliary(y))


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
SCALES, N_CALLS, RELU = {"all": 2}, 0, nn.ReLU()


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
    AsksForTheExactType: "asks for types",
    AsksForAnAttribute: "'logits', which no graph can hold",
    AsksWhetherThereIsAnAttribute: "asks for types or attributes (hasattr)",
    AsksWhetherThereIsAShape: "asks for types or attributes (hasattr)",
    AsksForGradients: "asks how it is run (is_grad_enabled)",
    CatchesExceptions: "has a try statement",
    IsQuiet: "has a try statement",
    ComparesByIdentity: "asks whether a value is None or a certain object",
    SuppressesExceptions: "catches exceptions (suppress)",
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
    MakesText: "formats a value as text",
    AsksForTheGraph: "'grad_fn', which no graph can hold",
    AsksForNone: "asks whether a value is None",
    AppliesAFunction: "runs what a graph does not show (apply)",
    SetsAnotherModulesSetting: "writes attributes of modules (momentum)",
    FreezesAndBack: "writes attributes of modules (training)",
    AsksTheEnvironment: "asks how it is run (environ)",
    GivesAnOrderedDict: "makes a OrderedDict",
    MakesAConstant: "uses a tensor that is neither its input nor a module's attribute",
    MakesADropout: "makes a Dropout",
    MakesASigmoid: "calls a Sigmoid that it does not hold",
    KeepsAReLU: "writes attributes of modules (relu)",
    CallsAGlobalReLU: "calls a ReLU that it does not hold",
    AsksForTracing: "asks how it is run (is_tracing)",
    AsksForNoneOfItsOwn: "asks whether a value is None",
    TakesAnything: "accepts any arguments",
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


# One of each reason.
REASONS = {why: case for case, why in CASES.items() if case not in (Fails, GivesAnOrderedDict)}


@pytest.mark.parametrize("case", REASONS.values(), ids=lambda case: case.__name__)
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
