"""Train a network from Python as `resnet-fast train` does.

from resnet_fast.training import TrainConfig, train

result = train(TrainConfig(dataset="digits", epochs=6))
print(result.test_accuracy, result.out)
result = resume("runs/…")  # goes on with a run that was stopped
"""

from resnet_fast.data import DataError
from resnet_fast.training.config import MODELS, RECIPES, TrainConfig
from resnet_fast.training.loop import DivergedError, Reporter, resume, train
from resnet_fast.training.metrics import EpochMetrics, Result
from resnet_fast.training.saved_run import ResumeError, SavedRun, load_run

__all__ = [
    "MODELS",
    "RECIPES",
    "DataError",
    "DivergedError",
    "EpochMetrics",
    "Reporter",
    "Result",
    "ResumeError",
    "SavedRun",
    "TrainConfig",
    "load_run",
    "resume",
    "train",
]
