"""The processes of the synchronized batch norm's tests; `start` runs several and returns their results."""

import os
import pickle
import sys
import time
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

CHANNELS = 12


def start(task, world_size: int, folder: Path, interpret: bool, *arguments, timeout: float = 120) -> list:
    """Run `task(rank, *arguments)` in `world_size` gloo processes; its results by rank (None for one that died).

    They are forked from a process that has imported torch once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    settings = (world_size, str(folder), timeout, interpret, pickle.dumps((task, arguments)))
    processes = [context.Process(target=_process, args=(rank, *settings)) for rank in range(world_size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 300
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
    files = [folder / f"{rank}.pt" for rank in range(world_size)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _process(rank: int, world_size: int, folder: str, timeout: float, interpret: bool, pickled: bytes) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"  # before a kernel is imported
    if interpret:
        import interpreter

        interpreter.mend()
    task, arguments = pickle.loads(pickled)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    result = task(rank, *arguments)
    torch.save(result, f"{folder}/{rank}.tmp")
    os.replace(f"{folder}/{rank}.tmp", f"{folder}/{rank}.pt")


class Norms(nn.Module):
    """relu(bn(x) + the join), on one class of batch norm, with parameters that hide nothing."""

    def __init__(self, norm_layer, join: str, **options) -> None:
        super().__init__()
        self.join = join
        self.norm, self.residual_norm = norm_layer(CHANNELS, **options), norm_layer(CHANNELS, **options)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1.5, 1.5, generator=generator)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if hasattr(self.norm, "fused"):
            norm = self.residual_norm if self.join == "bn" else None
            return self.norm.fused(x, None if self.join == "none" else residual, norm, relu=True)
        y = self.norm(x)
        if self.join != "none":
            y = y + (residual if self.join == "add" else self.residual_norm(residual))
        return y.relu()


def batch(n_images: int, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual, dy of the joint batch; x and residual far from the pivot of any part alone."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(n_images, CHANNELS, 3, 4, generator=generator) for _ in range(3)]
    images[0] += torch.arange(n_images)[:, None, None, None]
    formats = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
    return tuple(image.to(dtype).contiguous(memory_format=formats[layout]) for image in images)


def own_part(tensors, sizes: tuple[int, ...], rank: int):
    start = sum(sizes[:rank])
    return [tensor[start : start + sizes[rank]] for tensor in tensors]


def run_norms(module: nn.Module, x: Tensor, residual: Tensor, dy: Tensor, order: int) -> dict[str, Tensor]:
    """One step: outputs, gradients (of the first order, or of a penalty on them), parameters' gradients, buffers."""
    x, residual = x.detach().clone().requires_grad_(), residual.detach().clone().requires_grad_()
    y = module(x, residual)
    if order == 2:
        gradients = torch.autograd.grad((y * dy).sum(), (x, residual), create_graph=True, allow_unused=True)
        sum(gradient.square().sum() for gradient in gradients if gradient is not None).backward()
    else:
        y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad, "dresidual": residual.grad}
    found |= {f"d{name}": parameter.grad for name, parameter in module.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def norms_task(
    rank: int, sizes: tuple[int, ...], cases: dict[str, tuple], batches: dict[str, tuple[Tensor, ...]]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """`run_norms` of every case, and `passes` of the batches."""
    from resnet_fast import FusedSyncBatchNorm2d

    found = {}
    for name, (join, dtype, layout, order, options) in cases.items():
        module = Norms(FusedSyncBatchNorm2d, join, **options)
        module = module.double() if dtype == torch.float64 else module
        found[name] = run_norms(module, *own_part(batch(sum(sizes), dtype, layout), sizes, rank), order)
    return found, passes(rank, batches)


def passes(rank: int, batches: dict[str, tuple[Tensor, ...]]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """y and the running statistics after one pass over a batch, given for each rank."""
    from resnet_fast import FusedSyncBatchNorm2d

    found = {}
    for name, parts in batches.items():
        norm = FusedSyncBatchNorm2d(CHANNELS)
        found[name] = (norm(parts[rank]).detach(), norm.running_mean, norm.running_var)
    return found


def network() -> nn.Module:
    """The smallest network with every kind of block."""
    from resnet_fast import FusedBatchNorm2d
    from resnet_fast.models.resnet import BasicBlock

    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), FusedBatchNorm2d(16))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        FusedBatchNorm2d(8, relu=True),
        BasicBlock(8, 8, norm_layer=FusedBatchNorm2d),
        BasicBlock(8, 16, 2, downsample, norm_layer=FusedBatchNorm2d),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).double()


def train(model: nn.Module, images: Tensor, target: Tensor) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def training_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 3, 8, 8, generator=generator).double(), torch.randint(10, (8,), generator=generator)


def ddp_task(rank: int) -> tuple[list[float], dict[str, Tensor]]:
    from resnet_fast import convert_sync_batchnorm

    model = convert_sync_batchnorm(network())
    images, target = own_part(training_batch(), (4, 4), rank)
    losses = train(nn.parallel.DistributedDataParallel(model), images, target)
    return losses, model.state_dict()


def lost_process_task(rank: int, how: str) -> tuple[str, str, float]:
    """Rank 1 leaves after a common forward, or stays and does nothing: what the other one sees, and after how long.

    The one looks at the backward then, the other at the next forward.
    """
    from resnet_fast import convert_sync_batchnorm

    norm = convert_sync_batchnorm(nn.Sequential(OrderedDict(bn1=nn.BatchNorm2d(4))))
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    y = norm(x)
    if rank == 1:
        if how == "dies":
            os._exit(1)
        time.sleep(10)  # beyond the timeout, without which the other one would see no error
    started = time.monotonic()
    try:
        y.sum().backward() if how == "dies" else norm(x)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "no error", "", time.monotonic() - started
