"""A file's names are matched to the model's, despite wrappers, prefixes and different words."""

from pathlib import Path

import pytest
import torch
from foreign_nets import KuangliuNet, SixNPlusTwo, trained
from safetensors.torch import save_file
from thin_resnet import images, thin_resnet
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import resnet as torchvision_resnet

import resnet_fast
from resnet_fast.models import resnet
from resnet_fast.training.checkpoint import write_checkpoint


def ours() -> nn.Module:
    return thin_resnet(resnet)


@pytest.fixture
def source() -> nn.Module:
    return trained(thin_resnet(torchvision_resnet))


def assert_same_values(model: nn.Module, source: nn.Module) -> None:
    """In order: the names may differ."""
    assert len(model.state_dict()) == len(source.state_dict())
    for (name, value), expected in zip(model.state_dict().items(), source.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def save(path: Path, content) -> Path:
    torch.save(content, path)
    return path


def test_torchvision(source, tmp_path: Path):
    model = ours()
    done = resnet_fast.load_checkpoint(model, str(save(tmp_path / "x.pth", source.state_dict())))
    assert_same_values(model, source)
    torch.testing.assert_close(model.eval()(images("cpu")), source.eval()(images("cpu")))
    assert done == type(done)(path=tmp_path / "x.pth", n_tensors=len(source.state_dict()))
    assert str(done) == f"{tmp_path / 'x.pth'}: {len(source.state_dict())} tensors loaded"


WRAPPINGS = {
    "kuangliu": (lambda state: {"net": state, "acc": 95.1, "epoch": 3}, "net", ("acc", "epoch")),
    "akamaster": (lambda state: {"state_dict": state, "best_prec1": 92.0}, "state_dict", ("best_prec1",)),
    "reference": (lambda state: {"model": state, "best": torch.ones(1)}, "model", ("best",)),
    "model_state_dict": (lambda state: {"model_state_dict": state}, "model_state_dict", ()),
    "timm": (
        lambda state: {"state_dict": {"conv1.weight": torch.zeros(1)}, "state_dict_ema": state, "optimizer": {}},
        "state_dict_ema",
        ("state_dict", "optimizer"),
    ),
    "model_ema": (lambda state: {"model": {"x": torch.ones(1)}, "model_ema": state}, "model_ema", ("model",)),
    "nested": (lambda state: {"model": {"state_dict": state, "epoch": 1}}, "model.state_dict", ("epoch",)),
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_wrappings(name: str, source, tmp_path: Path):
    wrap, entry, ignored = WRAPPINGS[name]
    model = ours()
    done = resnet_fast.load_checkpoint(model, save(tmp_path / "x.pth", wrap(source.state_dict())))
    assert_same_values(model, source)
    assert (done.entry, done.ignored) == (entry, ignored)
    assert f"from its entry '{entry}'" in str(done) and "\n" not in str(done)


def test_an_entry_that_is_named_goes_before_the_others(source, tmp_path: Path):
    path = save(tmp_path / "x.pth", {"state_dict_ema": {"w": torch.ones(1)}, "weights": source.state_dict()})
    model = ours()
    assert resnet_fast.load_checkpoint(model, path, entry="weights").ignored == ("state_dict_ema",)
    assert_same_values(model, source)
    with pytest.raises(
        ValueError, match="no weights under entry='ema'; there are some under entry='state_dict_ema' or"
    ):
        resnet_fast.load_checkpoint(model, path, entry="ema")


def test_timm_saves_its_settings_too(source, tmp_path: Path):
    from argparse import Namespace

    content = {"state_dict": source.state_dict(), "args": Namespace(model="resnet18", lr=0.1), "arch": "resnet18"}
    model = ours()
    assert resnet_fast.load_checkpoint(model, save(tmp_path / "x.pth.tar", content)).ignored == ("args", "arch")
    assert_same_values(model, source)


def test_a_run_of_this_program(source, tmp_path: Path):
    write_checkpoint(tmp_path / "checkpoint.pt", {"model": source.state_dict(), "epoch": 3}, None)
    model = ours()
    done = resnet_fast.load_checkpoint(model, tmp_path / "checkpoint.pt")
    assert_same_values(model, source)
    assert done.entry == "model" and "epoch" in done.ignored


def test_torch_save_of_old(source, tmp_path: Path):
    torch.save(source.state_dict(), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    model = ours()
    resnet_fast.load_checkpoint(model, tmp_path / "x.pth")
    assert_same_values(model, source)


@pytest.mark.parametrize("name", ["x.safetensors", "pytorch_model.bin"])
def test_safetensors_is_known_by_its_content(name: str, source, tmp_path: Path):
    save_file({key: value.contiguous() for key, value in source.state_dict().items()}, tmp_path / name)
    model = ours()
    resnet_fast.load_checkpoint(model, tmp_path / name)
    assert_same_values(model, source)


def renamed(state: dict, rename) -> dict:
    return {rename(name): value for name, value in state.items()}


PREFIXES = {
    "DataParallel": (lambda name: f"module.{name}", ("module.",)),
    "compile": (lambda name: f"_orig_mod.{name}", ("_orig_mod.",)),
    "both": (lambda name: f"module._orig_mod.{name}", ("module.", "_orig_mod.")),
    "both, the other way": (lambda name: f"_orig_mod.module.{name}", ("_orig_mod.", "module.")),
    "inside": (lambda name: name.replace("layer1.0.", "layer1._orig_mod.0."), ("_orig_mod.",)),
    "before and inside": (lambda name: f"module.{name}".replace("layer1.", "layer1._orig_mod."), ("module.",)),
    "Lightning": (lambda name: f"model.{name}", ("model.",)),
    "Lightning, compiled": (lambda name: f"net._orig_mod.{name}", ("net.", "_orig_mod.")),
    "DDP of Lightning's": (lambda name: f"module.model.{name}", ("module.", "model.")),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_prefixes_in_the_file(case: str, source, tmp_path: Path):
    rename, stripped = PREFIXES[case]
    model = ours()
    done = resnet_fast.load_checkpoint(model, save(tmp_path / "x.pth", renamed(source.state_dict(), rename)))
    assert_same_values(model, source)
    assert set(stripped) <= set(done.stripped) and not done.added
    assert "without the prefixes" in str(done)


MODELS = {
    "DataParallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model)),
    "Lightning's": lambda model: nn.ModuleDict({"model": model}),
}


@pytest.mark.parametrize(("case", "prefix"), [("both", ""), ("Lightning's", ""), ("DataParallel", "module.")])
def test_prefixes_in_the_model(case: str, prefix: str, source, tmp_path: Path):
    model = MODELS[case](ours())
    path = save(tmp_path / "x.pth", renamed(source.state_dict(), lambda name: prefix + name))
    done = resnet_fast.load_checkpoint(model, path)
    assert_same_values(model, source)
    assert done.added or (case, prefix) == ("DataParallel", "module.")


def test_a_prefix_that_not_all_names_share_is_part_of_the_names(source, tmp_path: Path):
    state = renamed(source.state_dict(), lambda name: f"model.{name}") | {"head.weight": torch.ones(1)}
    with pytest.raises(resnet_fast.CheckpointMismatch, match="begin with 'model.'") as caught:
        resnet_fast.load_checkpoint(ours(), save(tmp_path / "x.pth", state))
    assert "head.weight" in caught.value.unexpected


def test_names_that_would_become_one_stay_two(tmp_path: Path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.module = nn.Linear(2, 2), nn.ModuleDict({"w": nn.Linear(2, 2)})

    source, model = Two(), Two()
    resnet_fast.load_checkpoint(model, save(tmp_path / "x.pth", source.state_dict()))
    assert_same_values(model, source)


def test_an_averaged_model(source, tmp_path: Path):
    """Its counter of updates is no weight, and a plain model has none."""
    path, model = save(tmp_path / "x.pth", AveragedModel(source).state_dict()), ours()
    done = resnet_fast.load_checkpoint(model, path)
    assert_same_values(model, source)
    assert done.ignored == ("n_averaged",)


WORDS = (("shortcut", "downsample"), ("linear", "fc"))


def test_kuangliu(tmp_path: Path):
    source, model = trained(KuangliuNet()), ours()
    state = renamed(source.state_dict(), lambda name: f"module.{name}")
    done = resnet_fast.load_checkpoint(model, save(tmp_path / "ckpt.pth", {"net": state, "acc": 95.0, "epoch": 199}))
    assert set(done.translated) == set(WORDS) and done.stripped == ("module.",)
    assert "shortcut read as downsample" in str(done) and "linear read as fc" in str(done)
    torch.testing.assert_close(model.eval()(images("cpu")), source.eval()(images("cpu")))


def test_torchvision_into_kuangliu(source, tmp_path: Path):
    model = KuangliuNet()
    done = resnet_fast.load_checkpoint(model, save(tmp_path / "x.pth", source.state_dict()))
    assert set(done.translated) == {words[::-1] for words in WORDS}
    torch.testing.assert_close(model.eval()(images("cpu")), source.eval()(images("cpu")))


@pytest.mark.parametrize("option", ["A", "B"])
def test_akamaster(option: str, tmp_path: Path):
    source = trained(SixNPlusTwo("shortcut" if option == "B" else None, "linear"))
    model = SixNPlusTwo("downsample" if option == "B" else None, "fc")
    state = renamed(source.state_dict(), lambda name: f"module.{name}")
    done = resnet_fast.load_checkpoint(model, save(tmp_path / "x.th", {"state_dict": state, "best_prec1": 92.6}))
    assert_same_values(model, source)
    assert set(done.translated) == set(WORDS if option == "B" else WORDS[1:])


def test_words_are_translated_where_they_stand_for_the_shortcut_alone(tmp_path: Path):
    source = nn.ModuleDict({"shortcut": nn.Linear(2, 2), "head": nn.ModuleDict({"linear": nn.Linear(2, 2)})})
    for names in ({"downsample": source["shortcut"], "head": source["head"]}, {"shortcut": source["shortcut"]}):
        with pytest.raises(resnet_fast.CheckpointMismatch):
            resnet_fast.load_checkpoint(nn.ModuleDict(names), save(tmp_path / "x.pth", source.state_dict()))
