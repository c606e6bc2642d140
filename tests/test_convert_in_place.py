"""`convert` changes classes and nothing else; copies stay converted; `restore` undoes it."""

import copy
import io
import pickle
import threading
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from foreign_models import (
    FUSED,
    KuangliuResNet,
    conv_norm_relu,
    fused_calls,
    perturbed,
    step,
)
from torch import nn

from resnet_fast import FusedBatchNorm2d, FusedSyncBatchNorm2d, convert, convert_sync_batchnorm, restore
from resnet_fast.conversion.convert import Converted

MODELS = {
    "kuangliu": KuangliuResNet,
    "Sequential": conv_norm_relu,
}


pytestmark = pytest.mark.usefixtures("on_aten")


def images(size: int = 8) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> list:
    """All that a model consists of: classes, attributes and their order, by identity."""
    return [
        (name, type(module), [(key, id(value)) for key, value in vars(module).items() if key != "training"])
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_buffers_keys_and_names_are_the_same_objects(name):
    model = MODELS[name]()
    before, printed = model.state_dict(keep_vars=True), repr(model)
    assert convert(model) is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[key] is before[key] for key in before)
    assert repr(model).replace("FusedBatchNorm2d", "BatchNorm2d") == printed


def test_modules_are_still_of_their_classes():
    model = convert(KuangliuResNet())
    assert isinstance(model, KuangliuResNet) and type(model).__name__ == "KuangliuResNet"
    assert all(isinstance(module, nn.Sequential) for module in (model.layer1, model.layer2))
    assert isinstance(model.layer1[:1], nn.Sequential)
    assert torch.equal(model.layer1[:1](torch.ones(1, 8, 4, 4)), model.layer1[0](torch.ones(1, 8, 4, 4)))


@pytest.mark.parametrize("name", MODELS)
def test_restore_gives_back_what_was_there(name):
    model = MODELS[name]()
    before = state(model)
    assert restore(convert(model)) is model
    assert state(model) == before


def test_restore_leaves_fused_modules_of_ones_own_alone():
    model = convert(nn.Sequential(FusedBatchNorm2d(3, relu=True), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    restore(model)
    assert type(model[0]) is FusedBatchNorm2d and model[0].relu and type(model[2]) is nn.BatchNorm2d


def test_restore_keeps_what_was_trained():
    model, trained = conv_norm_relu(), conv_norm_relu()
    trained.load_state_dict(model.state_dict())
    convert(model)
    for each in (model, trained):
        each(images()).sum().backward()
        torch.optim.SGD(each.parameters(), lr=0.1).step()
    restore(model)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), trained.state_dict().values(), strict=True)
    )


def test_converting_twice_is_converting_once():
    model = convert(KuangliuResNet())
    first = convert(model, report=True)[1]
    assert convert(model, report=True)[1] == first and not first.left
    restore(model)
    assert not any(isinstance(module, Converted) for module in model.modules())


@pytest.mark.parametrize("how", ("deepcopy", "pickle", "torch.save"))
def test_copies_are_converted_and_independent(how):
    model = convert(perturbed(KuangliuResNet())).eval()
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    x, expected = images(), model(images())
    assert type(copied) is type(model) and copied.__dict__["_fused"].holds((x,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(x), expected)
    restore(copied)
    assert torch.equal(copied(x), expected) and not isinstance(copied, Converted)


def test_a_copy_of_a_patched_model_runs_what_is_patched():
    model = convert(KuangliuResNet()).eval()
    model.layer1.forward = lambda x: x * 2
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))


def test_state_dicts_load_both_ways():
    converted, plain = convert(perturbed(KuangliuResNet())), KuangliuResNet()
    plain.load_state_dict(converted.state_dict(), strict=True)
    assert torch.equal(plain.eval()(images()), converted.eval()(images()))
    converted.load_state_dict(KuangliuResNet().state_dict(), strict=True)


def test_a_batch_norm_itself():
    norm = nn.BatchNorm2d(3, momentum=None)
    _, report = convert(norm, report=True)
    assert type(norm) is FusedBatchNorm2d and "(the model)" in str(report)
    norm(images())
    assert type(restore(norm)) is nn.BatchNorm2d and norm.num_batches_tracked == 1


class HoldsALock(KuangliuResNet):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "lock"}


def test_what_a_class_leaves_out_of_copies_stays_out():
    model = convert(HoldsALock()).eval()
    copied = copy.deepcopy(model)
    assert not hasattr(copied, "lock") and torch.equal(copied(images()), model(images()))


class Registered(nn.Module):
    """Keeps a list of its subclasses, as plugins do."""

    known: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, name: str):
        assert name not in cls.known
        cls.known.append(name)


class Plugin(Registered, name="plugin"):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.gamma = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Parameter(torch.full((), 2.0))

    def forward(self, x):
        y = torch.relu(self.bn(self.conv(x)))
        return y if self.gamma is None else y * self.gamma


def test_a_class_that_is_told_of_subclasses_hears_nothing():
    model = convert(Plugin().eval())
    assert Registered.known == ["plugin"] and model.__dict__["_fused"].holds((images(),))


def test_a_parameter_that_is_none_by_now_counts():
    model = convert(Plugin().eval())
    y = model(images())
    model.gamma = None
    assert torch.equal(model(images()), y / 2)


def test_a_report_computes_no_weights():
    """Those of a spectral norm are another each time; a lazy one has none yet."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 1)), nn.LazyConv2d(4, 1))
    before = model[0].parametrizations.weight[0]._u.clone()
    convert(model, report=True)
    assert torch.equal(model[0].parametrizations.weight[0]._u, before)


def test_a_module_of_another_class_by_now_is_not_restored():
    model = convert(KuangliuResNet())
    nn.utils.parametrize.register_parametrization(model.bn1, "weight", nn.Identity())
    for function in (restore, convert):
        with pytest.raises(ValueError, match="bn1 must have the class that convert gave it, got a Parametrized"):
            function(model)
    assert isinstance(model, Converted)
    nn.utils.parametrize.remove_parametrizations(model.bn1, "weight")
    assert type(restore(model).bn1) is nn.BatchNorm2d


# What comes after.


def test_torch_compile_takes_it_whole():
    model = convert(perturbed(conv_norm_relu()))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    found, expected = step(compiled, images()), step(model, images())
    assert torch.equal(found["y"], expected["y"])
    assert torch.equal(found["d _orig_mod.0.weight"], expected["d 0.weight"])


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("first", ("convert", "wrap"))
def test_distributed_data_parallel(first, one_process, monkeypatch):
    theirs, ours = perturbed(KuangliuResNet()), perturbed(KuangliuResNet())
    ours.load_state_dict(theirs.state_dict())
    if first == "convert":
        wrapped = nn.parallel.DistributedDataParallel(convert(ours))
    else:
        wrapped = convert(nn.parallel.DistributedDataParallel(ours))
    calls = fused_calls(ours, monkeypatch)
    found, expected = step(wrapped, images()), step(theirs, images())
    assert calls == FUSED
    assert torch.equal(found["y"], expected["y"])
    assert all(torch.equal(found[f"d module.{key[2:]}"], value) for key, value in expected.items() if key[:2] == "d ")


def test_synchronized_batch_norm_comes_after(monkeypatch):
    model = convert_sync_batchnorm(convert(perturbed(KuangliuResNet())))
    assert all(type(norm) is FusedSyncBatchNorm2d for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    calls = fused_calls(model, monkeypatch)
    model(images())
    assert calls == FUSED
    assert sum(type(norm) is nn.SyncBatchNorm for norm in restore(model).modules()) == 8


# What is refused.


def test_what_is_no_module_is_refused():
    for function in (convert, restore):
        with pytest.raises(TypeError, match="model must be an nn.Module, got dict"):
            function({})


def test_compiled_models_are_refused_and_left_alone():
    model = KuangliuResNet()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="model must be converted before torch.compile"):
        convert(torch.compile(model))
    model.layer1.compile()
    with pytest.raises(ValueError, match="layer1 must be converted before torch.compile"):
        convert(model)
    assert [type(module) for module in model.modules()] == classes


def test_the_report_fits_a_terminal():
    report = str(convert(KuangliuResNet(), report=True)[1])
    assert all(len(line) <= 80 for line in report.splitlines())
    assert report.splitlines()[0].split() == ["bn1", "BN+ReLU"]
    assert "converted 8 (" in report and report.endswith("model.to(memory_format=torch.channels_last)")
