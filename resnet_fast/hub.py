"""Networks on the Hugging Face Hub, through huggingface_hub's own mixin; needs the extra `hub`.

    HubModel.from_run("runs/…").push_to_hub("me/resnet18-cifar10")
    model = HubModel.from_pretrained("me/resnet18-cifar10")

HubModel wraps a network, because the mixin saves constructor arguments as JSON, which cannot hold the blocks and norm
layers of the networks' own classes. So the networks can also be imported without huggingface_hub.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from resnet_fast.checkpoints import load_checkpoint
from resnet_fast.common.checks import few, one_line, shown
from resnet_fast.inference import load_trained
from resnet_fast.models import get_model
from resnet_fast.training.network import find_head
from resnet_fast.training.paths import CHECKPOINT
from resnet_fast.training.schema import RULES

try:
    from huggingface_hub import PyTorchModelHubMixin
except ModuleNotFoundError as error:
    if error.name != "huggingface_hub":
        raise
    message = "huggingface_hub is not installed: pip install huggingface_hub safetensors (or the extra 'hub')"
    raise ModuleNotFoundError(message, name=error.name) from None

CARD = """---
{{ card_data }}
---

A network of resnet_fast. `config.json` holds its name, its classes, its image size, and the mean and std that normalize
images in [0, 1].

```python
from resnet_fast.hub import HubModel

model = HubModel.from_pretrained("{{ repo_id | default("…", true) }}")
logits = model(images)  # [N, 3, H, W], normalized
```
"""


class HubModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="resnet_fast",
    pipeline_tag="image-classification",
    tags=["resnet"],
    model_card_template=CARD,
):
    """A network by its name, with `save_pretrained`, `push_to_hub` and `from_pretrained` of huggingface_hub's mixin.

    model.safetensors holds the weights under the network's own names, prefixed with "model.". `load_checkpoint` and
    `resnet-fast train --weights` read this file, too.

    Args:
        name: one of `list_models()`.
        classes: the name of each logit, if known.
        mean, std: per channel, of images in [0, 1], to normalize with, if known.
        image_size: height and width of the training images in pixels, if known.
        kwargs: those of `get_model`, such as `num_classes` and `stem`; all except `norm_layer` are saved.

    Input [N, 3, H, W], normalized; output [N, num_classes]. The network itself is `.model`.

    Raises:
        ValueError: the network is unknown, or the number of `classes` differs from its number of logits.
        TypeError: the network does not accept a keyword.
    """

    def __init__(
        self,
        name: str,
        *,
        classes: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.model = get_model(name, **kwargs)
        n_logits = find_head(self.model)[1].out_features
        if classes is not None and len(classes) != n_logits:
            raise ValueError(f"classes must have one name for each of {n_logits} logits, got {len(classes)}")
        self.classes, self.mean, self.std = (None if x is None else tuple(x) for x in (classes, mean, std))
        self.image_size = image_size

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    @classmethod
    def from_run(cls, run: Path | str) -> Self:
        """Return the network of a run folder or a checkpoint, in evaluation mode.

        Raises:
            ValueError, CheckpointError: as for `load_trained`.
        """
        trained = load_trained(run)
        model = cls(
            trained.config["model"],
            classes=trained.classes,
            mean=trained.mean,
            std=trained.std,
            image_size=trained.image_size,
            num_classes=len(trained.classes),
            stem=trained.config["stem"],
        )
        model.model.load_state_dict(trained.model.state_dict())
        return model.eval()

    def save_pretrained(self, save_directory: Path | str, **kwargs: Any) -> str | None:
        """Write config.json, model.safetensors and README.md, as the mixin does.

        Raises:
            ValueError: the folder is a run folder, whose config.json would be lost.
        """
        if (Path(save_directory) / CHECKPOINT).exists():
            raise ValueError(
                f"save_directory must not be a run folder, whose config.json would be lost, got {save_directory}"
            )
        return super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Path | str, **kwargs: Any) -> Self:
        """Load the network of a folder or a repository, in evaluation mode; keywords as for the mixin.

        Raises:
            ValueError: config.json or the weights are damaged, belong to something else, or are not finite.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            if isinstance(error, AttributeError) and error.name != "items":  # .items() of what is no JSON object
                raise
            raise ValueError(
                f"{pretrained_model_name_or_path}/config.json must hold a JSON object, as HubModel writes it: "
                f"{one_line(error)}"
            ) from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, strict: bool = True, **kwargs: Any) -> Self:
        """Refuse what the mixin would accept: a repository of something else, or one with missing weights."""
        if "name" not in kwargs:
            raise ValueError(f"{model_id} must have a config.json with a network's name, as HubModel writes it")
        for name in ("classes", "mean", "std", "image_size"):
            follows, rule = RULES[name]
            value = kwargs.get(name)
            if value is not None and not follows(list(value) if isinstance(value, tuple) else value):
                raise ValueError(f"{name} in {model_id}/config.json must be {rule}, got {shown(value)}")
        return super()._from_pretrained(model_id=model_id, strict=strict, **kwargs)

    @classmethod
    def _load_as_safetensor(cls, model: Self, model_file: str, map_location: str, strict: bool) -> Self:
        """Load the weights with `load_checkpoint`, whose errors name the file."""
        if not strict:
            return super()._load_as_safetensor(model, model_file, map_location, strict)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that are not finite, refused below
            loaded = load_checkpoint(model, model_file)
        if loaded.not_finite:
            raise ValueError(f"{model_file} holds values that are not finite: {few(loaded.not_finite, 3)}")
        return model.to(map_location).eval()
