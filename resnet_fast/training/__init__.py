"""Train a network from Python as `resnet-fast train` does.

from resnet_fast.training import TrainConfig, train

result = train(TrainConfig(dataset="digits", epochs=6))
print(result.test_accuracy, result.out)
"""

from resnet_fast.data import DataError
from resnet_fast.training.config import MODELS, RECIPES, TrainConfig
from resnet_fast.training.loop import DivergedError, Reporter, train
from resnet_fast.training.metrics import EpochMetrics, Result

__all__ = [
    "MODELS",
    "RECIPES",
    "DataError",
    "DivergedError",
    "EpochMetrics",
    "Reporter",
    "Result",
    "TrainConfig",
    "train",
]
