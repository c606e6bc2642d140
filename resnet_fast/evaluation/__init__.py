"""Evaluate a network: accuracy, confusion matrix and worst mistakes, as numbers, pictures and a table.

from resnet_fast.evaluation import predict_split, write_pictures

predictions = predict_split(model, dataset.test, dataset.mean, dataset.std, batch_size=256, precision="bf16")
print(predictions.accuracy, predictions.confusion(len(dataset.classes)))
"""

from resnet_fast.evaluation.confusion import draw_confusion
from resnet_fast.evaluation.logits import autocast, logits_of
from resnet_fast.evaluation.mistakes import draw_mistakes
from resnet_fast.evaluation.outputs import image_paths, write_pictures, write_predictions
from resnet_fast.evaluation.predictions import Mistakes, Predictions, predict_split

__all__ = [
    "Mistakes",
    "Predictions",
    "autocast",
    "draw_confusion",
    "draw_mistakes",
    "image_paths",
    "logits_of",
    "predict_split",
    "write_pictures",
    "write_predictions",
]
