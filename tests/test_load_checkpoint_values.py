"""Values get the model's types, memory format and device; doubtful values are reported."""

from pathlib import Path

import pytest
import torch
from foreign_nets import trained
from thin_resnet import thin_resnet
from torch import nn
from torchvision.models import resnet as torchvision_resnet

import resnet_fast
from resnet_fast.models import resnet


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return dict(trained(thin_resnet(torchvision_resnet)).state_dict())


def load(model: nn.Module, state: dict[str, torch.Tensor], tmp_path: Path):
    torch.save(state, tmp_path / "x.pth")
    return resnet_fast.load_checkpoint(model, tmp_path / "x.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_are_cast(dtype: torch.dtype, state, tmp_path: Path):
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    model = thin_resnet(resnet)
    done = load(model, cast, tmp_path)
    for name, value in model.state_dict().items():
        assert value.dtype == state[name].dtype and torch.equal(value, cast[name].to(value.dtype)), name
    assert done.cast == ((dtype, torch.float32),)
    assert f"{str(dtype)[6:]} cast to float32" in str(done)


class Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.zeros(2, dtype=torch.int64))


def test_whole_numbers_become_integers(tmp_path: Path):
    model = Indexed()
    done = load(model, {"index": torch.tensor([1.0, -3.0])}, tmp_path)
    assert model.index.tolist() == [1, -3] and done.cast == ((torch.float32, torch.int64),)


@pytest.mark.parametrize("values", [[1.7, 2.9], [1.0, float("nan")], [1.0, float("inf")], [1.0, 1e30]], ids=str)
def test_no_value_is_rounded_to_an_integer(values: list[float], tmp_path: Path):
    model = Indexed()
    with pytest.raises(resnet_fast.CheckpointMismatch, match="float32 with values that torch.int64 does not have"):
        load(model, {"index": torch.tensor(values)}, tmp_path)
    assert model.index.tolist() == [0, 0]


def test_no_integer_is_wrapped(tmp_path: Path):
    model = Indexed()
    model.index = model.index.to(torch.uint8)
    with pytest.raises(resnet_fast.CheckpointMismatch, match="index: torch.int64 with values that torch.uint8"):
        load(model, {"index": torch.tensor([1, 300])}, tmp_path)


def test_parameters_are_the_same_objects_in_the_same_memory(device, state, tmp_path: Path):
    model = thin_resnet(resnet).to(device)
    before = {name: (value.data_ptr(), value.stride(), value.device) for name, value in model.state_dict().items()}
    optimizer_sees = list(model.parameters())
    load(model, {name: value.contiguous() for name, value in state.items()}, tmp_path)
    for name, value in model.state_dict().items():
        assert before[name] == (value.data_ptr(), value.stride(), value.device), name
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(a is b and a.requires_grad for a, b in zip(optimizer_sees, model.parameters(), strict=True))


def test_files_from_before_the_counters(state, tmp_path: Path):
    """torchvision's oldest files have no num_batches_tracked; the model's stay."""
    model = thin_resnet(resnet)
    model.bn1.num_batches_tracked.fill_(5)
    without = {name: value for name, value in state.items() if "num_batches_tracked" not in name}
    done = load(model, without, tmp_path)
    assert torch.equal(model.bn1.weight, state["bn1.weight"]) and int(model.bn1.num_batches_tracked) == 5
    assert set(done.kept) == set(state) - set(without)
    assert f"not in the file and kept: {len(done.kept)} num_batches_tracked" in str(done)


def test_counters_that_the_model_does_not_have_are_ignored(state, tmp_path: Path):
    model = thin_resnet(resnet)
    model.bn1.num_batches_tracked = None
    assert load(model, state, tmp_path).ignored == ("bn1.num_batches_tracked",)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_loaded_and_reported(value: float, state, tmp_path: Path):
    state["bn1.weight"] = state["bn1.weight"].clone()
    state["bn1.weight"][3] = value
    model = thin_resnet(resnet)
    with pytest.warns(UserWarning, match="holds values that are not finite: bn1.weight") as caught:
        done = load(model, state, tmp_path)
    assert caught[0].filename == __file__
    assert done.not_finite == ("bn1.weight",) and "NOT FINITE: bn1.weight" in str(done)
    assert not torch.isfinite(model.bn1.weight[3])


def test_a_cast_that_overflows_is_reported(state, tmp_path: Path):
    state["fc.bias"] = torch.tensor([1.0, 70_000.0, 2.0])
    with pytest.warns(UserWarning, match="not finite: fc.bias"):
        load(thin_resnet(resnet).half(), state, tmp_path)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight


def test_a_tensor_of_two_names_needs_one_of_them(tmp_path: Path):
    """safetensors writes a tensor once."""
    model, value = Tied(), torch.randn(3, 3)
    done = load(model, {"decoder.weight": value}, tmp_path)
    assert torch.equal(model.encoder.weight, value) and model.decoder.weight is model.encoder.weight
    assert done.kept == ("encoder.weight",)
    load(model, Tied().state_dict(), tmp_path)


def test_a_tensor_of_two_names_takes_no_two_values(tmp_path: Path):
    model = Tied()
    before = model.encoder.weight.clone()
    state = {"encoder.weight": torch.ones(3, 3), "decoder.weight": torch.zeros(3, 3)}
    with pytest.raises(
        ValueError, match=r"different values for decoder\.weight and encoder\.weight, one tensor in the"
    ):
        load(model, state, tmp_path)
    assert torch.equal(model.encoder.weight, before)


def test_names_of_one_tensor_in_the_file_become_two(tmp_path: Path):
    """A file may hold views of one storage; the model's tensors stay its own."""
    shared = torch.arange(12.0)
    model = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(3, 2, bias=False)})
    load(model, {"a.weight": shared[:6].view(2, 3), "b.weight": shared[3:9].view(2, 3)}, tmp_path)
    assert model["a"].weight.tolist() == [[0, 1, 2], [3, 4, 5]] and model["b"].weight.tolist() == [[3, 4, 5], [6, 7, 8]]


def test_vectors_of_one_element_are_the_scalars_of_old(state, tmp_path: Path):
    state["bn1.num_batches_tracked"] = state["bn1.num_batches_tracked"].reshape(1)
    model = thin_resnet(resnet)
    load(model, state, tmp_path)
    assert int(model.bn1.num_batches_tracked) == 1234
