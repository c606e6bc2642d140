"""Use a trained network: load a run, classify image files, export it.

from resnet_fast.inference import classify, export_onnx, load_trained, read_image

trained = load_trained("runs/…")  # or a checkpoint file
trained.model, trained.classes, trained.mean, trained.std, trained.image_size
probabilities = classify(trained, read_image("photo.jpg", trained.image_size))  # [classes]
"""

from resnet_fast.data import ImageError, read_image
from resnet_fast.inference.classify import classify
from resnet_fast.inference.export import ExportError, export_onnx, export_program
from resnet_fast.inference.trained import Trained, load_trained
from resnet_fast.training.checkpoint import CheckpointError

__all__ = [
    "CheckpointError",
    "ExportError",
    "ImageError",
    "Trained",
    "classify",
    "export_onnx",
    "export_program",
    "load_trained",
    "read_image",
]
