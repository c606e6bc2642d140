"""Which steps become one operation, and which batch norms remain: by structure, with the reason in the report."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from foreign_models import Block, perturbed, step
from torch import nn

from resnet_fast import FusedBatchNorm2d, convert

pytestmark = pytest.mark.usefixtures("on_aten")


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
    ReadTwice: "more than one step reads its output (torch.nn.functional.relu, add)",
    NoReLU: "torch.nn.functional.silu reads its output",
    AddsANumber: "an addition follows, but not of another tensor",
    AddsItself: "an addition follows, but not of another tensor",
    ReadsTheStatistics: "another step reads its statistics",
    AddsToItsInput: "in place to a tensor that others may see",
    SharesTheConvolution: "its input is not from an nn.Conv2d that nothing else reads",
    ScalesWhatItAdds: "torch.add with alpha reads its output",
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
    "subclass": (lambda: Subclass(4), "Subclass, whose forward may differ"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "LazyBatchNorm2d"),
    "fused": (lambda: FusedBatchNorm2d(4, relu=True), "is fused already"),
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
    assert "BatchNormAct2d, whose forward may differ" in report.left[0].why


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
