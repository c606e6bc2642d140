"""Train a network from Python as `resnet-fast train` does.

from resnet_fast.training import TrainConfig, train

result = train(TrainConfig(dataset="digits"))
print(result.test_accuracy, result.out)
result = resume("runs/…")  # finishes an interrupted run
"""

from typing import TYPE_CHECKING

from resnet_fast.common.lazy import lazy_imports

__all__ = [
    "MODELS",
    "RECIPES",
    "DataError",
    "DivergedError",
    "EpochMetrics",
    "EpochProgress",
    "Muon",
    "Recipe",
    "Reporter",
    "Result",
    "ResumeError",
    "SavedRun",
    "Scores",
    "StepOutput",
    "TrainConfig",
    "TrainingStep",
    "choose_device",
    "choose_precision",
    "evaluate",
    "load_run",
    "resume",
    "train",
]

if TYPE_CHECKING:
    from resnet_fast.data import DataError
    from resnet_fast.training.config import MODELS, TrainConfig, choose_device, choose_precision
    from resnet_fast.training.divergence import DivergedError
    from resnet_fast.training.evaluation import Scores, evaluate
    from resnet_fast.training.loop import resume, train
    from resnet_fast.training.metrics import EpochMetrics, Result
    from resnet_fast.training.muon import Muon
    from resnet_fast.training.recipes import RECIPES, Recipe
    from resnet_fast.training.reporter import EpochProgress, Reporter
    from resnet_fast.training.saved_run import ResumeError, SavedRun, load_run
    from resnet_fast.training.step import StepOutput, TrainingStep
else:
    lazy_imports(__name__, __all__)
