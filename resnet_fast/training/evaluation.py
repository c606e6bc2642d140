"""Loss and accuracy of a network on a split, over all processes."""

import torch
import torch.nn.functional as F
from torch import nn

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
) -> tuple[float, float]:
    """Return the mean loss and the accuracy over the images of all processes, as they are, by running statistics.

    Args:
        model: is put into evaluation mode.
        split: of this process.
        augmentation: for mean and std alone.
        config: batch size and precision.
        processes: that test together.
    """
    model.eval()
    processes.share_buffers(model)
    totals = torch.zeros(3, dtype=torch.float64, device=processes.device)  # loss, right ones, images
    # Without a backward to store for, twice the batch fits where training does.
    for images, labels in split.batches(2 * config.batch_size):
        with autocast(images.device, config.precision):
            logits = model(normalize(images, augmentation.mean, augmentation.std)).float()
        totals[0] += F.cross_entropy(logits, labels, reduction="sum")
        totals[1] += (logits.argmax(1) == labels).sum()
        totals[2] += len(labels)
    loss, n_correct, n_images = processes.sum(totals).tolist()
    return loss / n_images, n_correct / n_images
