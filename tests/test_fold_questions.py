"""Forwards that query their mode or check their input are folded as eager runs them; the checks remain."""

import pickle

import pytest
import torch
from foreign_models import perturbed
from torch import nn

from resnet_fast import fold_batch_norm

pytestmark = pytest.mark.usefixtures("on_aten")


def is_compiling():
    """As segmentation_models_pytorch asks."""
    try:
        return torch.compiler.is_compiling()
    except Exception:
        return False


class Decoder(nn.Module):
    """On its own it cannot be followed, since it takes a list."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def join(self, y, skip=None):
        return y if skip is None else torch.cat([y, skip], 1)

    def forward(self, features):
        *skips, head = features
        return self.conv(self.join(head, skips[0]))


class Segmentation(nn.Module):
    """Of the shape of segmentation_models_pytorch's models: a check of the input unless it is traced."""

    def __init__(self):
        super().__init__()
        self.stride = 4
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.decoder = Decoder()

    def check(self, x):
        h, w = x.shape[-2:]
        if h % self.stride != 0 or w % self.stride != 0:
            new_h = h if h % self.stride == 0 else (h // self.stride + 1) * self.stride
            raise RuntimeError(f"wrong size {h}x{w}, pad it to {new_h}; multiples of {self.stride} are taken")

    def forward(self, x):
        if not (torch.jit.is_scripting() or torch.jit.is_tracing() or is_compiling()):
            self.check(x)
        x = self.first(x)
        return self.decoder([x, self.second(x)])


class Asserts(Segmentation):
    def forward(self, x):
        y = self.first(x)
        if y.ndim != 4:  # an assert statement would be pytest's own
            raise AssertionError("images")
        return self.second(y)


class Collects(Segmentation):
    """In `tuple(... for ...)` Python itself, since 3.14, asks for the identity of tuple."""

    def forward(self, x):
        x = self.first(x)
        return self.decoder(tuple(stage(x) for stage in (nn.ReLU(), self.second)))


def folded_pair(make):
    torch.manual_seed(0)
    model = perturbed(make()).double().eval()
    return fold_batch_norm(model), model


@pytest.mark.parametrize("make", (Segmentation, Asserts, Collects))
def test_all_is_folded_and_the_same(make):
    folded, model = folded_pair(make)
    x = torch.rand(2, 3, 8, 4, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)  # fp64, folded at other roundings
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_the_check_stays():
    folded, model = folded_pair(Segmentation)
    folded = pickle.loads(pickle.dumps(folded))
    folded.graph.eliminate_dead_code()
    folded.recompile()
    for shape in ((2, 3, 6, 4), (2, 3, 4, 6)):
        x = torch.rand(shape, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="wrong size"):
            model(x)
        with pytest.raises(RuntimeError, match=r"wrong size \?x\?, pad it to .*; multiples of 4 are taken"):
            folded(x)
    folded, _ = folded_pair(Asserts)
    with pytest.raises(AssertionError, match="images"):
        folded(torch.rand(3, 8, 8, dtype=torch.float64))


def test_it_can_be_exported():
    folded, x = folded_pair(Segmentation)[0], torch.rand(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(torch.export.export(folded, (x,)).module()(x), folded(x))


class DependsOnShapes(Asserts):
    def forward(self, x):
        return self.first(x) if x.shape[2] > 4 else self.second(self.first(x))


class FailsOnStandIns(Asserts):
    """The other branch ends in an error on a stand-in, and not in eager."""

    def forward(self, x):
        y = self.first(x)
        return torch.from_numpy(y.detach().numpy()) if x.shape[2] > 4 else y


class MakesText(Asserts):
    def forward(self, x):
        y = self.first(x)
        return y * 3 if f"{y.dtype}" == "torch.float32" else y


class WrongSizeError(ValueError):
    pass


class RaisesItsOwn(Asserts):
    """An error that the folded model could not raise again."""

    def forward(self, x):
        if x.shape[2] % 4:
            raise WrongSizeError("wrong size")
        return self.first(x)


class MayBeNone(Asserts):
    """What is required may be None when the folded model is called."""

    def forward(self, x, scale):
        return self.first(x) if scale is None else self.first(x) * 2


class ReplacesAnArgument(Asserts):
    """What it asks for is another value; Python 3.13 stores both by one instruction."""

    def join(self, y, other=None):
        other, y = self.second(y), y * 2
        return y if other is None else y + other

    def forward(self, x):
        return self.join(self.first(x))


class ComparesTwo(Asserts):
    """Python 3.13 loads both by one instruction."""

    def join(self, y, other):
        return None, y is other

    def forward(self, x):
        y = self.first(x)
        return y * 2 if self.join(y, self.second(y))[1] else y


class SkipsNone(Asserts):
    """Python 3.13 stores and loads by one instruction what it asks for."""

    def forward(self, x):
        y = self.first(x)
        return torch.cat([z for z in (y, self.second(y)) if z is not None])


REASONS = {
    DependsOnShapes: "values or shapes decide what it computes",
    FailsOnStandIns: "torch.fx cannot follow its forward",
    MakesText: "formats a value as text",
    RaisesItsOwn: "raises a WrongSizeError",
    MayBeNone: "asks whether a value is None",
    ReplacesAnArgument: "asks whether a value is None",
    SkipsNone: "asks whether a value is None",
    ComparesTwo: "asks whether a value is None or a certain object",
}


@pytest.mark.parametrize("case", REASONS, ids=lambda case: case.__name__)
def test_other_questions_are_refused_with_the_reason(case):
    with pytest.raises(ValueError, match=f"model cannot be folded: .*{REASONS[case]}"):
        fold_batch_norm(case())
