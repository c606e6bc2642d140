"""The second pass from the last tile to the first is bit-identical, and runs if the table names it."""

from functools import partial

import pytest
import torch
from fused_op import Case, make_operands, ours, results

from resnet_fast.ops import choices, launch
from resnet_fast.ops.implementations import Choice, Problem

CASE = Case("several tiles", (3, 24, 9, 9), fork=True)


@pytest.mark.parametrize("join", ("none", "bn"))
def test_reversed(join, device, monkeypatch):
    operands = make_operands(CASE, torch.bfloat16, "channels_last", device)
    problem = Problem("batch norm", "bf16", 3, 24, 24, 9, join)
    of_backward = problem._replace(operation="batch norm backward", fork=True)
    table = dict.fromkeys((problem, of_backward), Choice("two passes, reversed"))
    seen, run = [], launch.launch_kernel
    monkeypatch.setattr(
        launch, "launch_kernel", lambda kernel, *a, **k: seen.append(k.get("REVERSED")) or run(kernel, *a, **k)
    )
    operation = partial(ours, fork=True)
    expected = results(operation, operands, join, True, "triton")
    assert True not in seen
    with choices.using(table):
        found = results(operation, operands, join, True, "triton")
    assert seen.count(True) == 2  # one forward, one backward
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
