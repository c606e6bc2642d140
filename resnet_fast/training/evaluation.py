"""Loss and accuracy of a network on a split, over all processes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.data import Augmentation, Split, normalize
from resnet_fast.training.config import TrainConfig
from resnet_fast.training.processes import Processes
from resnet_fast.training.step import autocast


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    augmentation: Augmentation,
    config: TrainConfig,
    processes: Processes,
    mirror: bool = False,
) -> tuple[float, float]:
    """Return the mean loss and the accuracy over the images of all processes, as they are, by running statistics.

    Args:
        model: is put into evaluation mode.
        split: of this process.
        augmentation: for mean and std alone.
        config: batch size and precision.
        processes: that test together.
        mirror: take the mean of the logits of each image and of its mirror image ("flip TTA").
    """
    model.eval()
    processes.share_buffers(model)
    totals = torch.zeros(3, dtype=torch.float64, device=processes.device)  # loss, right ones, images
    # Without a backward to store for, twice the batch fits where training does.
    for images, labels in split.batches(2 * config.batch_size):
        logits = _logits(model, images, augmentation, config.precision)
        if mirror:
            logits = (logits + _logits(model, images.flip(-1), augmentation, config.precision)) / 2
        totals[0] += F.cross_entropy(logits, labels, reduction="sum")
        totals[1] += (logits.argmax(1) == labels).sum()
        totals[2] += len(labels)
    loss, n_correct, n_images = processes.sum(totals).tolist()
    return loss / n_images, n_correct / n_images


def _logits(model: nn.Module, images: Tensor, augmentation: Augmentation, precision: str) -> Tensor:
    with autocast(images.device, precision):
        return model(normalize(images, augmentation.mean, augmentation.std)).float()
