"""Tune a GPU by measurement: find a network's problems, time their candidates, and choose the fastest correct one.

problems = find_problems("resnet18", "cifar", [512], 32, "bf16")
outcome = measure(problems[0], candidates, torch.device("cuda"))
outcome.measured.choice
"""

from typing import TYPE_CHECKING

from resnet_fast.common.lazy import lazy_imports

__all__ = ["Candidate", "Outcome", "Prepared", "find_problems", "measure", "why_not"]

if TYPE_CHECKING:
    from resnet_fast.tuning.measurement import Candidate, Outcome, Prepared, measure, why_not
    from resnet_fast.tuning.problems import find_problems
else:
    lazy_imports(__name__, __all__)
