"""`pytest benchmarks`: the training step of each provider, grouped so that those of one setting stand side by side.

For the ratio of the two, `python -m benchmarks.compare_steps` is the finer instrument: it alternates them.
"""

from functools import lru_cache

import pytest
import torch

from benchmarks.timing import WARM_UP
from benchmarks.training_step import (
    BATCH_SIZES,
    PRECISIONS,
    PROVIDERS,
    Setting,
    TrainingStep,
    checked_steps,
    refuse_interpreter,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = {"cpu": 10, "cuda": 100}
steps_of = lru_cache(maxsize=1)(checked_steps)  # one check for all providers, and only their models in memory


# The uppermost parameter changes fastest: the providers of one setting run one after the other.
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("batch_size", BATCH_SIZES[DEVICE.type])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_step(benchmark, precision: str, batch_size: int, provider: str) -> None:
    refuse_interpreter()
    setting = Setting(DEVICE, precision, batch_size)
    step = steps_of(setting)[provider]
    benchmark.group = f"training step: {setting}"
    benchmark.extra_info.update(provider=provider, precision=precision, batch_size=batch_size)
    loss = benchmark.pedantic(
        _finished, args=(step,), rounds=ROUNDS[DEVICE.type], warmup_rounds=WARM_UP[DEVICE.type], iterations=1
    )
    assert torch.isfinite(loss), "what was timed is no training step"


def _finished(step: TrainingStep) -> torch.Tensor:
    """Run a step to its end: a GPU is still at work when the call returns."""
    loss = step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)
    return loss
