"""Predict every image of a split, in one pass.

probability = softmax(logits)[prediction]    prediction = the class of the largest logit
flipped     = the class of the largest of (logits of the image + logits of its mirror image) / 2
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.data import Split
from resnet_fast.evaluation.logits import logits_of


@dataclass(frozen=True)
class Mistakes:
    """The wrong predictions with the highest probability, the worst first.

    Args:
        images: [K, 3, H, W], uint8.
        labels, predictions: [K], int64; they differ everywhere.
        probabilities: [K], fp32, of the prediction.
    """

    images: Tensor
    labels: Tensor
    predictions: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Predictions:
    """The predictions for all images of a split, in its order, on the CPU.

    Args:
        loss: mean cross entropy.
        labels, predictions: [N], int64.
        probabilities: [N], fp32, of the prediction.
        flipped: [N], int64, predictions from the mean logits of each image and its mirror image; None without flip.
        mistakes: the worst predictions, with their images.
    """

    loss: float
    labels: Tensor
    predictions: Tensor
    probabilities: Tensor
    flipped: Tensor | None
    mistakes: Mistakes

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_correct(self) -> int:
        return int((self.predictions == self.labels).sum())

    @property
    def accuracy(self) -> float:
        return self.n_correct / len(self)

    @property
    def flip_accuracy(self) -> float | None:
        return None if self.flipped is None else int((self.flipped == self.labels).sum()) / len(self)

    def confusion(self, n_classes: int) -> Tensor:
        """Return [n_classes, n_classes], int64: how many images of the row's class were taken for the column's."""
        cells = torch.bincount(self.labels * n_classes + self.predictions, minlength=n_classes**2)
        return cells.reshape(n_classes, n_classes)


@torch.inference_mode()
def predict_split(
    model: nn.Module,
    split: Split,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    batch_size: int,
    precision: str,
    flip: bool = False,
    n_mistakes: int = 25,
) -> Predictions:
    """Predict every image of `split`, without augmentation; leave the network in evaluation mode.

    With twice the batch size of the training, on the same device, loss and accuracy are bit-identical to those that the
    training reported, because the batches, the operations and their order are the same.

    Args:
        model: maps normalized images to logits, [N, classes].
        split: the images, on the model's device.
        mean, std: per channel, of images in [0, 1].
        batch_size: images per batch.
        precision: "fp32", or "bf16" or "fp16" for autocast.
        flip: also predict from each image and its mirror image together.
        n_mistakes: maximum number of wrong predictions kept with their images.

    Raises:
        ValueError: the split has no images.
    """
    if len(split) == 0:
        raise ValueError("the split has no images")
    model.eval()
    total_loss = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    parts: list[tuple[Tensor, ...]] = []
    mistakes: Mistakes | None = None
    batches = logits_of(model, split, tuple(mean), tuple(std), batch_size, precision, flip)
    for images, labels, logits, mirrored in batches:
        total_loss += F.cross_entropy(logits, labels, reduction="sum")
        part = (labels, logits.argmax(1), logits.softmax(1).amax(1))
        parts.append(part if mirrored is None else (*part, ((logits + mirrored) / 2).argmax(1)))
        mistakes = _keep_worst(mistakes, Mistakes(images, *part), n_mistakes)
    assert mistakes is not None  # there was a batch
    labels, predictions, probabilities, *flipped = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    loss = float(total_loss) / len(labels)
    return Predictions(loss, labels, predictions, probabilities, flipped[0] if flipped else None, mistakes)


def _keep_worst(before: Mistakes | None, batch: Mistakes, count: int) -> Mistakes:
    """Return the worst mistakes so far and of a batch; those of equal probability keep their order."""
    wrong = batch.predictions != batch.labels
    new = [tensor[wrong].cpu() for tensor in (batch.images, batch.labels, batch.predictions, batch.probabilities)]
    if before is not None:
        old = (before.images, before.labels, before.predictions, before.probabilities)
        new = [torch.cat(pair) for pair in zip(old, new, strict=True)]
    order = new[3].sort(descending=True, stable=True).indices[:count]
    return Mistakes(*(tensor[order] for tensor in new))
