"""The moving average follows its definition: weights and buffers after each update, without the initial ones."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from resnet_fast.training.average import Average


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def changed_in_place(model: nn.Module, n_updates: int) -> Iterator[dict[str, Tensor]]:
    """Give the model other weights and buffers, again and again; yields a copy of each."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(n_updates):
        with torch.no_grad():
            for value in model.state_dict().values():
                if value.is_floating_point():
                    value.normal_(generator=generator)
                else:
                    value.add_(1)
        yield copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("n_updates", [1, 2, 30])
def test_it_is_the_weighted_mean_of_the_definition(decay: float, n_updates: int):
    model = make_model()
    average = Average(model, decay)
    seen = []
    for state in changed_in_place(model, n_updates):
        average.update()
        seen.append(state)
    found = average.averaged(model)
    assert list(found) == list(model.state_dict())
    weights = torch.tensor([(1 - decay) * decay ** (n_updates - k) for k in range(1, n_updates + 1)]).double()
    assert float(weights.sum()) == pytest.approx(1 - decay**n_updates)
    for name, value in found.items():
        if value.is_floating_point():
            values = torch.stack([state[name].double() for state in seen], -1)
            exact = (values * weights).sum(-1) / weights.sum()
            # A rounding of the sum per update and of 1 - d in each, of values up to 4.
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_average_of_one_update_is_the_model():
    model = make_model()
    average = Average(model, 0.999)
    average.update()
    for name, value in average.averaged(model).items():
        torch.testing.assert_close(value, model.state_dict()[name])


def test_the_average_of_no_update_is_the_model():
    model = make_model()
    found = Average(model, 0.9).averaged(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.items())


def test_integer_buffers_are_copied():
    model = make_model()
    average = Average(model, 0.9)
    for _ in changed_in_place(model, 3):
        average.update()
    assert average.averaged(model)["1.num_batches_tracked"] == 3
    assert "1.num_batches_tracked" not in average.state_dict()


def test_the_model_is_left_alone():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    average = Average(model, 0.9)
    average.update()
    average.averaged(model)["0.weight"].zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_goes_on_from_its_state_to_the_same_bits():
    straight, stopped = make_model(), make_model()
    average, first = Average(straight, 0.9), Average(stopped, 0.9)
    states = changed_in_place(straight, 6)
    for _ in range(3):
        stopped.load_state_dict(next(states))
        average.update()
        first.update()
    resumed = Average(stopped, 0.9)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for state in states:
        stopped.load_state_dict(state)
        average.update()
        resumed.update()
    expected = average.averaged(straight)
    assert all(torch.equal(value, expected[name]) for name, value in resumed.averaged(stopped).items())
