"""Weights & Biases: the settings, and one point of each curve per epoch, in addition to the usual reports.

W&B names the run after its folder, and a resumed run continues the same one. Its files are in wandb/ in the run folder.
"""

import importlib.util
import os
from collections.abc import Sequence

from resnet_fast.common.checks import one_line
from resnet_fast.training.config import TrainConfig
from resnet_fast.training.metrics import EpochMetrics
from resnet_fast.training.reporter import Reporter
from resnet_fast.training.tensorboard import tags


class WandbError(RuntimeError):
    """W&B is not installed or cannot be written to; the message says why."""


def need_wandb() -> None:
    """Raise WandbError unless W&B is installed and a user is logged in; call this before a run begins."""
    if importlib.util.find_spec("wandb") is None:
        raise WandbError("wandb is not installed: pip install wandb (or the extra 'wandb')")
    import wandb

    try:
        if wandb.setup().settings.mode == "online":
            wandb.login()
    except wandb.Error as error:
        raise WandbError(f"{one_line(error)} Or set WANDB_MODE=offline.") from None


class WeightsAndBiases(Reporter):
    """Reports to W&B and to the reporter `beside`."""

    def __init__(self, beside: Reporter, config: TrainConfig) -> None:
        import wandb

        self.beside, self.tags = beside, tags(bool(config.holdout))
        self.note, self.start, self.start_epoch, self.step = beside.note, beside.start, beside.start_epoch, beside.step
        begun = sorted((config.out / "wandb").glob("*run-*-*"))
        own = {"id": begun[-1].name.rpartition("-")[2], "resume": "allow"} if begun else {}
        given = {"name": config.out.name, "dir": config.out, "config": config.as_dict(), **own}
        self.goes_on, settings = bool(begun), wandb.Settings(silent=True, console="off")
        project = os.environ.get("WANDB_PROJECT", "resnet_fast")
        try:
            self.run = wandb.init(project=project, settings=settings, **given)
        except wandb.Error as error:
            raise WandbError(f"wandb: {one_line(error)}") from None

    def resume(self, history: Sequence[EpochMetrics]) -> None:
        for metrics in history[-1:] if self.goes_on else history:  # a killed process may not have logged the last
            self._log(metrics)
        self.beside.resume(history)

    def end_epoch(self, metrics: EpochMetrics) -> None:
        self._log(metrics)
        self.beside.end_epoch(metrics)

    def close(self, error_type: object, *_: object) -> None:
        """End the run at W&B, as failed if there was an error."""
        self.run.finish(exit_code=int(error_type is not None))

    def _log(self, metrics: EpochMetrics) -> None:
        self.run.log({tag: getattr(metrics, field) for tag, field in self.tags.items()}, step=metrics.epoch)
