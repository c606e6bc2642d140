"""Why a function cannot be recorded as a CUDA graph: the line at which recording failed, a reason and a remedy."""

import re
import traceback
from pathlib import Path

import torch

from resnet_fast.common.checks import one_line

LIBRARY = Path(traceback.__file__).resolve().parent
PACKAGES = [Path(path).resolve() for path in (torch.__path__[0], Path(__file__).parents[1])]

# By the file of torch in which recording failed (IN_TORCH), or a pattern of the failing line (IN_LINE): reason, remedy.
IN_TORCH = {
    "torch/optim/swa_utils.py": (
        "AveragedModel counts its updates on the host",
        "update the average after the function has returned, or with get_ema_multi_avg_fn() inside of it",
    ),
    "torch/amp/grad_scaler.py": (
        "GradScaler waits for the gradients, to skip a step in Python, if the optimizer cannot skip it itself",
        "make the optimizer with fused=True",
    ),
    "torch/optim/": (
        "the optimizer reads its learning rate or counts its steps on the host",
        "make it with fused=True or capturable=True, or use an optimizer that has one of these",
    ),
}
IN_LINE = {
    r"^\s*(if|elif|while|assert)\b|\sif\s.+\selse\s": (
        "it is a Python branch on a tensor, which waits for its value, and a replay always takes the same branch",
        "compute both sides and choose with torch.where, or branch outside of the function",
    ),
    r"\btensor\(|as_tensor\(|from_numpy\(|\.to\(|\.cuda\(|\.pin_memory\(": (
        "it allocates memory on the host, or copies from there",
        "make the tensor beforehand, on the device, and pass it or close over it",
    ),
    r"": (
        "it waits for a result, as .item(), .tolist(), .cpu(), float(), print() and masks of unknown size do",
        "keep the value as a tensor, return it, and read it outside of the function",
    ),
}
WAITS = ("synchroniz", "captur", "waits for a result")  # in messages of CUDA, and of the tests' stand-in


class Unrecordable(Exception):
    """A replay would not repeat something that no operator refuses while recording; the message is the reason."""


def why_unrecordable(error: Exception, outside: BaseException | None) -> str:
    """Return in one line what could not be recorded, where, and what to do.

    Args:
        error: the error raised while the function was recorded.
        outside: the error that was being handled when recording began, if any.
    """
    if isinstance(error, Unrecordable):
        return str(error)
    while (
        isinstance(error.__context__, Exception) and error.__context__ is not outside
    ):  # ending an invalid recording raises another error
        error = error.__context__
    frames = traceback.extract_tb(error.__traceback__)
    message = f"{type(error).__name__}: {one_line(error)}"
    # The training command's step has no line outside of this library.
    own = [f for f in frames if not _is_in(f, PACKAGES)] or [f for f in frames if not _is_in(f, PACKAGES[:1])]
    if not own:
        return message
    line = own[-1].line or ""
    where = f"{own[-1].filename}:{own[-1].lineno}, in {own[-1].name}: `{line.strip()}`"
    if not any(word in str(error) for word in WAITS):
        return f"{where}: {message}"
    inner = frames[frames.index(own[-1]) + 1 :]
    files = " ".join(Path(frame.filename).as_posix() for frame in inner)
    for part, (why, remedy) in IN_TORCH.items():
        if part in files:
            return f"{where}: {why}; {remedy} ({message})"
    why, remedy = next(reason for pattern, reason in IN_LINE.items() if re.search(pattern, line))
    return f"{where}: {why}; {remedy} ({message})"


def _is_in(frame: traceback.FrameSummary, packages: list[Path]) -> bool:
    """Return whether the frame belongs to these packages, Python's library, or a mode that intercepts torch."""
    path = Path(frame.filename).resolve()
    is_mode = frame.name in ("__torch_dispatch__", "__torch_function__")
    return is_mode or path.parent == LIBRARY or any(package in path.parents for package in packages)
