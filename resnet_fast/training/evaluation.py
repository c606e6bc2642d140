"""Loss and accuracy of a network on a split, over all processes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from resnet_fast.common.checks import check_choice, check_integer, check_type
from resnet_fast.data import Augmentation, Split
from resnet_fast.evaluation.logits import DTYPES, logits_of
from resnet_fast.training.processes import Processes


class Scores(NamedTuple):
    """The scores of a network on a split.

    Args:
        loss: the mean cross entropy.
        accuracy: the share of images classified correctly, in [0, 1].
    """

    loss: float
    accuracy: float


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    augmentation: Augmentation,
    *,
    batch_size: int = 512,
    precision: str = "fp32",
    processes: Processes | None = None,
) -> Scores:
    """Return the mean loss and the accuracy over the images of all processes, not augmented, in evaluation mode.

    Args:
        model: the network, which stays in evaluation mode.
        split: the images of this process, on the model's device.
        augmentation: its mean and std normalize the images.
        batch_size: number of images computed together.
        precision: "fp32", "bf16" or "fp16".
        processes: the processes that test together; None: this one alone.

    Raises:
        ValueError: batch_size is not a positive integer, precision is unknown, or there are no parameters or images.
        TypeError: another argument has the wrong type.
    """
    check_type("model", model, nn.Module)
    check_type("split", split, Split)
    check_type("augmentation", augmentation, Augmentation)
    check_integer("batch_size", batch_size, 1, 2**32)
    check_choice("precision", precision, DTYPES)
    check_type("processes", processes, Processes, type(None))
    if next(model.parameters(), None) is None:
        raise ValueError("model must have parameters, whose device is used, got none")
    model.eval()
    if processes is not None:
        processes.share_buffers(model)
    # sum of losses, number of correct images, number of images
    totals = torch.zeros(3, dtype=torch.float64, device=next(model.parameters()).device)
    for _, labels, logits, _ in logits_of(model, split, augmentation.mean, augmentation.std, batch_size, precision):
        totals[0] += F.cross_entropy(logits, labels, reduction="sum")
        totals[1] += (logits.argmax(1) == labels).sum()
        totals[2] += len(labels)
    if processes is not None:
        totals = processes.sum(totals)
    loss, n_correct, n_images = totals.tolist()
    if n_images == 0:
        raise ValueError("split must hold at least one image, got none")
    return Scores(loss / n_images, n_correct / n_images)
