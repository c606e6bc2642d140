"""Experiments that measure why the networks are built as they are.

from resnet_fast.study import run_study, small_study

for trained in run_study(small_study(n_seeds=1, out="runs/skip")):
    print(trained.network.name, trained.epochs[-1].train_error)
"""

from typing import TYPE_CHECKING

from resnet_fast.common.lazy import lazy_imports

__all__ = [
    "EpochRow",
    "GradientRow",
    "Network",
    "SkipStudy",
    "Trained",
    "format_table",
    "format_verdict",
    "full_study",
    "run_study",
    "small_study",
]

if TYPE_CHECKING:
    from resnet_fast.study.report import format_table, format_verdict
    from resnet_fast.study.runs import EpochRow, GradientRow, Trained, run_study
    from resnet_fast.study.settings import Network, SkipStudy, full_study, small_study
else:
    lazy_imports(__name__, __all__)
