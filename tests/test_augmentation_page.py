"""The example of docs/augmentation.md runs, and its loss equals that of the training step."""

import pytest
import torch
from pages import DOCS, run_example

from resnet_fast.training.step import cross_entropy


@pytest.mark.usefixtures("on_aten")
def test_the_example_computes_the_loss_of_a_step():
    names = run_example(DOCS / "augmentation.md")
    expected = cross_entropy(names["logits"], names["labels"], 0.0, names["mixture"])
    torch.testing.assert_close(names["loss"], expected)
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
