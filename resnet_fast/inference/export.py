"""Export a trained network as an ONNX file or a program of torch.export.

    logits = model((images - mean) / std),    images: [N, 3, image_size, image_size], fp32, in [0, 1]

Normalization is part of the export, so that running it needs no constants; resizing is not. The program holds only ATen
operators, in evaluation mode and fp32. Before a file gets its name, the exported network is run and its logits checked:

    max |exported - fp64|  <=  4 max |eager - fp64| + 4 eps max |fp64|

This is twice the project's error budget (twice eager's own error plus one rounding of the output). A runtime folds the
batch norms into the convolutions and sums in another order, and the maximum of some thousand errors varies by itself.
"""

import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast._version import __version__
from resnet_fast.common.checks import check_integer, check_path, check_type
from resnet_fast.common.files import whole_file
from resnet_fast.inference.trained import Trained

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
N_RANDOM = 16
LABELS = "resnet_fast.json"  # the extra file in a .pt2


class ExportError(RuntimeError):
    """A network cannot be exported, or the exported network computes something else."""


class Normalized(nn.Module):
    """A network for images in [0, 1].

    Args:
        model: a network for normalized images.
        mean, std: constants per channel, to normalize with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std)


@dataclass(frozen=True)
class Checked:
    """The error of an exported network against fp64, over all images that it was checked on.

    Args:
        error, eager_error: largest error of a logit, for the exported network and for eager PyTorch in fp32.
        allowed: upper bound for `error`.
        n_images: number of images, random and real.
        n_bytes: size of the file.
    """

    error: float
    eager_error: float
    allowed: float
    n_images: int
    n_bytes: int


def export_onnx(
    trained: Trained, path: Path | str, *, batch_size: int | None = None, images: Tensor | None = None
) -> Checked:
    """Write an ONNX file with the input `images` and the output `logits`, checked by running it in onnxruntime.

    Its metadata hold classes, mean and std as JSON, and describe the input.

    Args:
        trained: the network, on any device.
        path: path of the file.
        batch_size: number of images per call; None: any number.
        images: [N, 3, image_size, image_size], uint8, to check with in addition to random ones.

    Returns:
        The errors that the check found, a `Checked`.

    Raises:
        ExportError: a package is missing, or the exported network computes something else. No file is written.
        TypeError: `trained` is not a Trained, or `images` is not a Tensor.
        ValueError: `path` is not a path, `batch_size` is not an integer of at least 1, or `images` are not as above.
        OSError: the file cannot be written.
    """
    check_type("trained", trained, Trained)
    path = check_path("path", path)
    need_onnx()
    import onnx
    import onnxruntime

    model, trials = _normalized(trained), _trial_images(trained, images)
    with _quiet():
        program = torch.onnx.export(
            model,
            (_example(trained, batch_size),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=_dynamic_shapes(batch_size),
            verbose=False,
        )
    assert program is not None  # None comes only from the older exporter
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {name: _text(value) for name, value in metadata_of(trained).items()})
    onnx.checker.check_model(proto)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])

    return _write(path, content, model, run, batch_size, trials)


def export_program(
    trained: Trained, path: Path | str, *, batch_size: int | None = None, images: Tensor | None = None
) -> Checked:
    """Write a program for `torch.export.load(path).module()`, checked by loading and running it.

    Its extra file resnet_fast.json holds classes, mean and std, and describes the input. Arguments, result and errors
    are those of `export_onnx`, but torch is the only package that it needs.
    """
    check_type("trained", trained, Trained)
    path = check_path("path", path)
    model, trials = _normalized(trained), _trial_images(trained, images)
    with _quiet():
        program = torch.export.export(
            model, (_example(trained, batch_size),), dynamic_shapes=_dynamic_shapes(batch_size)
        )
        archive = io.BytesIO()
        torch.export.save(program, archive, extra_files={LABELS: json.dumps(metadata_of(trained), indent=2)})
        content = archive.getvalue()
        loaded = torch.export.load(io.BytesIO(content)).module()
    return _write(path, content, model, loaded, batch_size, trials)


def need_onnx() -> None:
    """Raise ExportError unless the packages that `export_onnx` needs can be imported."""
    install = f"pip install {' '.join(ONNX_PACKAGES)} (or the extra 'export')"
    for name in ONNX_PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or name
            raise ExportError(f"{missing} is not installed: {install}") from error
        except ImportError as error:
            raise ExportError(f"{name} cannot be imported ({error}): {install}") from error


def metadata_of(trained: Trained) -> dict[str, Any]:
    """Return the description of an exported network, its input and its output."""
    size = trained.image_size
    return {
        "classes": list(trained.classes),
        "mean": list(trained.mean),
        "std": list(trained.std),
        "image_size": size,
        "input": f"images: float32 [N, 3, {size}, {size}], RGB, in [0, 1]; normalization is inside",
        "output": f"logits: float32 [N, {len(trained.classes)}]",
        "trained": trained.description,
        "resnet_fast": __version__,
    }


def _normalized(trained: Trained) -> nn.Module:
    # A copy on the CPU, so that the exported program neither depends on the network's device nor changes with it.
    return Normalized(copy.deepcopy(trained.model).cpu(), trained.mean, trained.std).eval().requires_grad_(False)


def _example(trained: Trained, batch_size: int | None) -> Tensor:
    if batch_size is not None:
        check_integer("batch_size", batch_size)
    # Two images stand for any number, because one would be treated as a constant.
    return torch.zeros(batch_size or 2, 3, trained.image_size, trained.image_size)


def _dynamic_shapes(batch_size: int | None) -> tuple[Mapping[int, Any]] | None:
    return ({0: torch.export.Dim("batch", min=1)},) if batch_size is None else None


def _trial_images(trained: Trained, images: Tensor | None) -> Tensor:
    size = trained.image_size
    random = torch.rand(N_RANDOM, 3, size, size, generator=torch.Generator().manual_seed(0))
    if images is None:
        return random
    check_type("images", images, Tensor)
    if images.shape[1:] != (3, size, size) or images.dtype != torch.uint8:
        raise ValueError(
            f"images must be [N, 3, {size}, {size}], torch.uint8, got {list(images.shape)}, {images.dtype}"
        )
    return torch.cat([random, images.cpu().float() / 255])


@torch.inference_mode()
def _write(
    path: Path,
    content: bytes,
    model: nn.Module,
    exported: Callable[[Tensor], Tensor],
    batch_size: int | None,
    images: Tensor,
) -> Checked:
    """Write the file if the exported network computes what the model does."""
    # If any number of images is allowed: one, then the rest at once.
    batches = [images[:1], images[1:]] if batch_size is None else list(_filled_up(images, batch_size).split(batch_size))
    expected = torch.cat([copy.deepcopy(model).double()(batch.double()) for batch in batches])
    eager = torch.cat([model(batch) for batch in batches])
    outputs = torch.cat([exported(batch) for batch in batches])
    if outputs.shape != expected.shape:
        raise ExportError(
            f"{path.name} would give {list(outputs.shape)}, not {list(expected.shape)}; nothing is written"
        )
    error, eager_error = (float((logits.double() - expected).abs().max()) for logits in (outputs, eager))
    allowed = 4 * eager_error + 4 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    if not error <= allowed:  # refuses NaN, too
        raise ExportError(
            f"{path.name} would compute something else: a logit is off by {error:.2g}, allowed {allowed:.2g}; "
            "nothing is written"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(content)
    return Checked(error, eager_error, allowed, len(images), len(content))


def _filled_up(images: Tensor, batch_size: int) -> Tensor:
    """Repeat images until they fill whole batches."""
    n_images = -(-len(images) // batch_size) * batch_size
    return images[torch.arange(n_images) % len(images)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def _quiet():
    """Silence the exporters' progress and warnings, because the result is checked."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
