"""Lookahead is airbench's: every fifth step the slow weights move toward the fast ones, which are then set to them."""

from dataclasses import replace

import pytest
import torch
from test_graphed_step import AUGMENTATION, PLAIN, Small, make_split
from torch import Tensor

from resnet_fast.data import Loader
from resnet_fast.ops import augment as augment_module
from resnet_fast.training import TrainingStep

pytestmark = pytest.mark.usefixtures("one_thread")


def run(n_steps: int, lookahead: bool) -> list[dict[str, Tensor]]:
    """The model after every step; without `lookahead`, as the reference has it in its own words."""
    torch.manual_seed(0)
    model = Small().train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = TrainingStep(model, replace(PLAIN, lookahead=lookahead), AUGMENTATION, n_steps)
    slow = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [batch for epoch in range(1, 10) for batch in Loader(make_split(), AUGMENTATION, 8).epoch(epoch)]
    states = []
    for done, batch in enumerate(batches[:n_steps], start=1):
        step(batch)
        if not lookahead and (done % 5 == 0 or done == n_steps):
            decay = 0.95**5 * (done / n_steps) ** 3
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    slow[name] = decay * slow[name] + (1 - decay) * value
                    value.copy_(slow[name])
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


@pytest.mark.parametrize("n_steps", [3, 10, 13])
def test_it_is_the_formula(n_steps: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(augment_module, "choose_backend", lambda x: "aten")
    found, expected = run(n_steps, True), run(n_steps, False)
    for own, other in zip(found, expected, strict=True):
        for name, value in other.items():
            torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-5)
    assert int(found[-1]["bn.num_batches_tracked"]) == n_steps  # a counter is no average
