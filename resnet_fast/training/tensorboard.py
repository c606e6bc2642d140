"""TensorBoard's event files: one point of each curve per epoch, and the settings.

    board = TensorBoard(out, config.as_dict(), history)   # history: the epochs done before, () for a new run
    board.write(metrics)                                  # after the epoch's checkpoint is written
    board.close()

`tensorboard --logdir runs` then shows all runs. A resumed run adds a file whose first event purges what a killed
process wrote beyond the checkpoint, so that each epoch is shown once.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resnet_fast.training.metrics import EpochMetrics

FOLDER = "tensorboard"  # in the run folder
TAGS = {
    "loss/train": "train_loss",
    "loss/test": "test_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/test": "test_accuracy",
    "lr": "lr",
    "images_per_second": "images_per_second",
}
RESULT = "test_accuracy"  # the metric in the table that compares the settings of runs


def tags(is_holdout: bool) -> dict[str, str]:
    """Return TAGS, with "val" in place of "test" if the tested images were held out of the training images."""
    return {tag.replace("test", "val") if is_holdout else tag: field for tag, field in TAGS.items()}


class TensorBoardError(RuntimeError):
    """TensorBoard is not installed; the message says how to install it."""


def need_tensorboard() -> None:
    """Raise TensorBoardError unless the package is installed; call this before a run begins."""
    if importlib.util.find_spec("tensorboard") is None:
        raise TensorBoardError("tensorboard is not installed: pip install tensorboard (or the extra 'tensorboard')")


class TensorBoard:
    """Writes the events of one run to its folder.

    Args:
        run: the run folder.
        settings: plain values, such as `TrainConfig.as_dict()`.
        history: the finished epochs. The last one is written again, because a process may have been killed between its
            checkpoint and its events. If there are no events yet, all are written.

    Raises:
        TensorBoardError: the package is not installed.
        OSError: the folder cannot be written to.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any], history: Sequence[EpochMetrics] = ()) -> None:
        need_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self.tags = tags(bool(settings.get("holdout")))
        folder = run / FOLDER
        goes_on = bool(history) and any(folder.glob("events.out.tfevents.*"))
        done = history[-1:] if goes_on else history
        first = done[0].epoch if done else 1
        # Hides the events from this step on in existing files.
        self.writer = SummaryWriter(str(folder), purge_step=first)
        if not goes_on:
            self._write_settings(settings)
        for metrics in done:
            self.write(metrics)

    def write(self, metrics: EpochMetrics) -> None:
        """Add an epoch; it is visible at once."""
        for tag, field in self.tags.items():
            self.writer.add_scalar(tag, getattr(metrics, field), metrics.epoch)
        self.writer.flush()

    def close(self) -> None:
        """Finish the file; may be called more than once."""
        self.writer.close()

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        # Indented by four, so that TensorBoard's Markdown shows the text unchanged.
        text = json.dumps(dict(settings), indent=2, ensure_ascii=False)
        self.writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), 0)
        # add_hparams would make another folder, shown as another run.
        plain = {
            name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for name, value in settings.items()
            if value is not None
        }
        assert self.writer.file_writer is not None  # until it is closed
        for summary in hparams(plain, {tag: 0.0 for tag, field in self.tags.items() if field == RESULT}):
            self.writer.file_writer.add_summary(summary, 0)
