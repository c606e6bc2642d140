"""benchmarks/first_predictions.py times only cases whose results are right against fp64."""

import pytest
import torch

from benchmarks import first_predictions as script

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"BATCH": 4, "WIDTH": 8, "ROUNDS": 1, "WARM_UP": 0, "N_CHECKED": 1}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "rotation", lambda size, device: 1)


def test_everything_is_right_and_timed():
    rows, wrong = script.measure(CPU, None)
    assert not wrong
    assert [(row["name"], row["variant"]) for row in rows] == [name for name, _ in script.cases()]
    assert len(rows) == 8 and all(float(row["p50_us"]) > 0 for row in rows)


@pytest.mark.parametrize("kernel", script.REDUCTIONS)
def test_a_wrong_reduction_is_not_timed(kernel, monkeypatch):
    case = script.REDUCTIONS[kernel]

    def results(inputs):
        found, exact = case.results(inputs)
        return {name: value * 1.001 for name, value in found.items()}, exact

    monkeypatch.setattr(script, "REDUCTIONS", {kernel: case._replace(results=results)})
    monkeypatch.setattr(script, "CONVOLUTIONS", {})
    monkeypatch.setattr(script, "LIMITS", {"as launched": script.LIMITS["as launched"]})
    rows, wrong = script.measure(CPU, None)
    assert not rows and len(wrong) == 1 and f"{kernel}, as launched is wrong" in wrong[0]
