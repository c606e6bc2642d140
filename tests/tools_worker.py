"""A training step, and the processes of the test of `fully_shard`."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

from resnet_fast.models import resnet


def images() -> torch.Tensor:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    F.cross_entropy(model(images()), torch.tensor([0, 1, 2, 0])).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def fsdp_step(rank: int) -> dict[str, torch.Tensor]:
    from thin_resnet import thin_resnet

    model = thin_resnet(resnet).to(memory_format=torch.contiguous_format)
    mesh = dist.init_device_mesh("cpu", (2,))
    for block in model.layer1:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model)
    state = model.state_dict()
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
