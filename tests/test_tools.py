"""docs/tools.md: tools work on a network as on torchvision's, or fail as the page says."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pages import DOCS, run_example
from safetensors.torch import load_file, load_model, save_file, save_model
from sync_worker import start
from thin_resnet import thin_resnet
from tools_worker import fsdp_step, images, step
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.fx.experimental import optimization
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim import swa_utils
from torchvision.models import resnet as torchvision_resnet

from resnet_fast import FusedBatchNorm2d
from resnet_fast.models import resnet, resnet20

pytestmark = [
    pytest.mark.usefixtures("on_aten", "one_thread"),
    pytest.mark.filterwarnings("ignore:.*FSDP.*NO_SHARD|.*ShardingStrategy", "ignore::FutureWarning"),
]


def convolutions(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d)]


def safetensors_file(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    model.load_state_dict(load_file(tmp_path / "x.safetensors"))


def safetensors_model(model, tmp_path):
    save_model(model, str(tmp_path / "x.safetensors"))
    load_model(model, str(tmp_path / "x.safetensors"))


def fsdp2(model, _):
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))


def global_pruning(model, _):
    prune.global_unstructured(convolutions(model), prune.L1Unstructured, amount=0.5)
    step(model)
    for module, name in convolutions(model):
        prune.remove(module, name)


def structured_pruning(model, _):
    prune.ln_structured(model.layer1[0].conv1, "weight", 0.5, n=2, dim=0)
    step(model)
    prune.remove(model.layer1[0].conv1, "weight")


def vectors(model, _):
    vector_to_parameters(0.9 * parameters_to_vector(model.parameters()), model.parameters())


def lbfgs(model, _):
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images()), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        return loss

    optimizer.step(closure)


def weight_average(model, _):
    averaged = swa_utils.AveragedModel(model)
    step(model)
    averaged.update_parameters(model)
    swa_utils.update_bn([images(), 2 * images()], averaged)
    model.load_state_dict(averaged.module.state_dict())


def ema_in_place(model, _):
    average = copy.deepcopy(model)
    step(model)
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 0.1)
    model.load_state_dict(average.state_dict())


def functional_call(model, _):
    doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
    torch.func.functional_call(model, doubled, (images(),)).square().sum().backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()


def normed_weights(model, _):
    parametrizations.weight_norm(model.conv1)
    parametrizations.orthogonal(model.layer1[1].conv2)
    torch.manual_seed(1)  # spectral_norm draws vectors
    parametrizations.spectral_norm(model.layer1[0].conv1)


def saved_whole(model, _):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


TOOLS = {
    "safetensors save_file": safetensors_file,
    "safetensors save_model": safetensors_model,
    "fully_shard": fsdp2,
    "FullyShardedDataParallel": lambda model, _: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "DistributedDataParallel": lambda model, _: nn.parallel.DistributedDataParallel(model),
    "prune.global_unstructured": global_pruning,
    "prune.ln_structured": structured_pruning,
    "parameters_to_vector": vectors,
    "LBFGS": lbfgs,
    "swa_utils": weight_average,
    "lerp in place": ema_in_place,
    "functional_call": functional_call,
    "parametrizations": normed_weights,
    "torch.save of the model": saved_whole,
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "share_memory": lambda model, _: model.share_memory(),
}
NEED_CONTIGUOUS = {
    "safetensors save_file": ValueError,
    "fully_shard": NotImplementedError,
    "prune.global_unstructured": RuntimeError,
    "parameters_to_vector": RuntimeError,
    "LBFGS": RuntimeError,
}


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def outcome(source, layout: torch.memory_format, tool: str, tmp_path) -> dict[str, torch.Tensor]:
    """The weights of ours or torchvision's after the tool and a step of training."""
    model = thin_resnet(source).to(memory_format=layout)
    model = TOOLS[tool](model, tmp_path) or model
    step(model)
    state = model.state_dict()
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


@pytest.mark.parametrize("tool", TOOLS)
def test_same_as_with_torchvisions_network(tool, tmp_path):
    """To the bit, images in channels_last; with weights in channels_last, some fail with torchvision's, too."""
    layout = torch.channels_last
    if tool in NEED_CONTIGUOUS:
        for source in (resnet, torchvision_resnet):
            with pytest.raises(NEED_CONTIGUOUS[tool], match="contiguous|view size is not compatible"):
                outcome(source, layout, tool, tmp_path)
        layout = torch.contiguous_format
    found, expected = (outcome(source, layout, tool, tmp_path) for source in (resnet, torchvision_resnet))
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
def test_fully_shard_on_two_processes(tmp_path):
    """Each with the same images: the step of one process, unsharded."""
    model = thin_resnet(resnet).to(memory_format=torch.contiguous_format)
    step(model)
    for found in start(fsdp_step, 2, tmp_path, False):
        for name, value in model.state_dict().items():
            assert torch.equal(found[name], value), name


def norm_and_convolution() -> tuple[nn.Conv2d, FusedBatchNorm2d]:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3), FusedBatchNorm2d(4, relu=True)
    norm(conv(torch.randn(8, 3, 8, 8)))
    return conv.eval(), norm.eval()


def test_tools_that_fold_batch_norm_themselves():
    """What fuse_conv_bn_eval and torch's converter lose of a module alone, and that fold and graph tools are right."""
    conv, norm = norm_and_convolution()
    x = torch.randn(2, 3, 8, 8)
    folded = fuse_conv_bn_eval(conv, norm)(x)
    assert folded.min() < 0
    torch.testing.assert_close(F.relu(folded), norm(conv(x)), rtol=1e-5, atol=1e-5)
    plain = copy.deepcopy(norm)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(plain)(conv(x)).min() < 0

    model = resnet20(width=4).eval()
    expected = model(x)
    torch.testing.assert_close(optimization.fuse(model)(x), expected, rtol=1e-4, atol=1e-4)  # 20 layers' roundings
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    torch.testing.assert_close(synchronized(x), expected, rtol=1e-4, atol=1e-4)
    for block in [model, *(module for module in model.modules() if isinstance(module, resnet.BasicBlock))]:
        block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_the_same_network_on_nn_batch_norm():
    """The remedy for tools that look for that class: same keys, same outputs."""
    model = resnet20(width=4).eval()
    plain = resnet20(width=4, norm_layer=nn.BatchNorm2d).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(plain(x), model(x))
    folded = optimization.fuse(plain)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_example(DOCS / "tools.md", 0)
    assert torch.equal(names["plain"].eval()(images()), names["model"].eval()(images()))
    assert (tmp_path / "resnet20.safetensors").stat().st_size > 0
    table = (DOCS / "tools.md").read_text(encoding="utf-8")
    for tool in (*NEED_CONTIGUOUS, "thop", "opacus", "fuse_conv_bn_eval", "Join"):
        assert tool.split()[-1] in table, tool


def test_the_pages_loop_under_join():
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    batches, losses = [(torch.randn(3, 2), None)] * 2, []

    def train_step(images: torch.Tensor, labels: None) -> None:
        losses.append(model(images).sum())
        losses[-1].backward()

    run_example(DOCS / "tools.md", 1, model=model, batches=batches, train_step=train_step)
    assert len(losses) == 2
