"""Fine-tuning: frozen stages keep every value, the body has its own learning rate, and the rest is unchanged."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pages import DOCS, run_example
from recorded_graph import RecordedGraph
from stand_in import stand_in
from thin_resnet import thin_resnet
from tiny_run import config_for, equal, make_dataset, same_bits, stop, use_tiny
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from resnet_fast.data import Augmentation, Batch, Loader
from resnet_fast.models import resnet
from resnet_fast.models.registry import MODELS
from resnet_fast.ops import augment
from resnet_fast.training import RECIPES, TrainingStep, network, resume, train
from resnet_fast.training.network import freeze
from resnet_fast.training.schema import fill_in

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES = ("layer1", "layer2", "layer3", "layer4")
FROZEN = "stem,layer1"
RECIPE = replace(
    RECIPES["baseline"], batch_size=8, lr=0.05, schedule="constant", momentum=0.9, weight_decay=1e-2, body_lr=0.1
)
AS_THEY_ARE = Augmentation((0.5,) * 3, (0.2,) * 3, crop=0, padding="zero", flip="none", cutout=0)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "choose_backend", lambda x: "aten")


def batches() -> Iterator[Batch]:
    loader = Loader(make_dataset().train, AS_THEY_ARE, RECIPE.batch_size)
    for epoch in (1, 2):
        yield from loader.epoch(epoch)


def make_step(recipe=RECIPE, **settings) -> TrainingStep:
    model = thin_resnet(resnet)
    freeze(model, FROZEN, STAGES)
    return TrainingStep(model, recipe, AS_THEY_ARE, n_steps=12, **settings)


def is_frozen(name: str) -> bool:
    return name.startswith(("conv1", "bn1", "layer1"))


def tuned_by_hand(model: nn.Module) -> nn.Module:
    """torchvision's network, and SGD with momentum as its formula says."""
    trained = {name: p for name, p in model.named_parameters() if not is_frozen(name)}
    velocity = {name: torch.zeros_like(p) for name, p in trained.items()}
    for batch in batches():
        model.train()
        for name, module in model.named_modules():
            if is_frozen(name):
                module.eval()
        images, labels = batch.augmented(AS_THEY_ARE)
        loss = -model(images).log_softmax(1)[range(len(labels)), labels].mean()
        gradients = torch.autograd.grad(loss, list(trained.values()))
        with torch.no_grad():
            for (name, weight), gradient in zip(trained.items(), gradients, strict=True):
                velocity[name].mul_(0.9).add_(gradient + 1e-2 * weight)
                weight -= 0.05 * (1.0 if name.startswith("fc") else 0.1) * velocity[name]
    return model


def test_the_weights_are_those_of_the_formula(either_backend: str):
    step = make_step()
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    for batch in batches():
        step.model.train()  # as anybody's loop does before an epoch
        step(batch)
    expected = tuned_by_hand(thin_resnet(torchvision_resnet)).state_dict()
    for name, value in step.model.state_dict().items():
        if is_frozen(name):
            assert torch.equal(value, before[name]), name
        else:
            assert not torch.equal(value, before[name]), name
            # Rounded at every step as it comes; the first step alone moves the head by 1e-3.
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.usefixtures("on_aten")
@pytest.mark.parametrize(
    "recipe", [RECIPE, replace(RECIPE, optimizer="adam", bn_bias_lr=4.0, ema=0.5)], ids=["SGD", "Adam and average"]
)
def test_a_recorded_step_has_the_bits_of_one_that_is_not(recipe):
    steps = [make_step(recipe), make_step(recipe, graph=True, make_graph=RecordedGraph)]
    for batch in batches():
        first, second = (list(step(batch)) for step in steps)
        assert equal(first, second)
    first, second = ({**step.state_dict(), "model": step.model.state_dict()} for step in steps)
    assert equal(first, second) and steps[1].graphed.recorded


def test_each_group_has_its_rate_and_decay():
    model = thin_resnet(resnet)
    optimizer = TrainingStep(model, replace(RECIPE, bn_bias_lr=4.0), AS_THEY_ARE, n_steps=12).optimizer
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        is_norm = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d)
        scale = 4.0 if is_norm and name.endswith("bias") else 1.0
        assert found[id(parameter)] == (scale * (1.0 if "fc" in name else 0.1), 1e-2 / scale), name


def test_parameters_are_in_the_order_of_all_checkpoints():
    """An optimizer's state names them by their number."""
    model = thin_resnet(resnet)
    parameters = list(model.parameters())
    biases = [module.bias for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    others = [parameter for parameter in parameters if all(parameter is not bias for bias in biases)]
    for bias_lr, expected in ((1.0, parameters), (4.0, others + biases)):
        recipe = replace(RECIPE, bn_bias_lr=bias_lr, body_lr=1.0)
        groups = TrainingStep(model, recipe, AS_THEY_ARE, n_steps=12).optimizer.param_groups
        assert [id(parameter) for group in groups for parameter in group["params"]] == list(map(id, expected))


def test_a_network_without_a_last_layer_has_no_body():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"must have an nn.Linear as its last layer, Sequential has none"):
        TrainingStep(model, RECIPE, AS_THEY_ARE, n_steps=1)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20", "plain20", "article"])
def test_the_stages_and_the_head_are_the_whole_network(name: str):
    stages = MODELS[name].stages
    with torch.device("meta"):
        model = MODELS[name].make(3, MODELS[name].stems[0])
    seen: set[str] = set()
    for stage in ("stem", *stages):
        freeze(model, stage, stages)
        frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
        assert frozen > seen
        seen = frozen
    rest = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert [key.partition(".")[2] for key in rest] == ["weight", "bias"]


class TestRun:
    """Through the command's own path: `train`, its checkpoint, and `resume`."""

    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch: pytest.MonkeyPatch, on_aten: None) -> None:
        use_tiny(monkeypatch.setattr)
        thin = stand_in(lambda *, num_classes, stem: thin_resnet(resnet))
        monkeypatch.setattr(network, "MODELS", {"resnet18": thin})

    @pytest.fixture
    def weights(self, tmp_path: Path) -> Path:
        model = thin_resnet(resnet)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer += 0.3
        model.fc.bias.data.fill_(5.0)
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        return tmp_path / "weights.pt"

    def state(self, out: Path) -> dict[str, Tensor]:
        return torch.load(out / "checkpoint.pt", weights_only=True)["model"]

    def test_frozen_stages_keep_every_value(self, weights: Path, tmp_path: Path):
        settings = {"weights": weights, "lr": 0.05, "freeze": "layer2,stem,layer1"}
        out = train(config_for(tmp_path / "run", **settings)).out
        theirs = torch.load(weights, weights_only=True)
        for name, value in self.state(out).items():
            assert torch.equal(value, theirs[name]) == (not name.startswith("fc")), name

    def test_a_run_resumes_to_the_same_bits(self, weights: Path, tmp_path: Path):
        settings = {"weights": weights, "freeze": FROZEN, "body_lr": 0.1, "new_head": True}
        straight = train(config_for(tmp_path / "straight", **settings))
        stopped = stop(tmp_path / "stopped", 2, 1, **settings)
        weights.unlink()
        assert resume(stopped).config.freeze == FROZEN
        assert same_bits(straight.out, stopped)

    def test_the_pages_examples(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        names = run_example(DOCS / "fine_tuning.md")
        first, tuned = (names[name].model.state_dict() for name in ("first", "tuned"))
        assert torch.equal(tuned["layer1.0.conv1.weight"], first["layer1.0.conv1.weight"])
        assert not names["model"].bn1.training

    def test_a_new_head_is_that_of_the_seed(self, weights: Path, tmp_path: Path):
        still = {"lr": 1e-30, "weight_decay": 0.0, "epochs": 1}
        out = train(config_for(tmp_path / "run", weights=weights, new_head=True, **still)).out
        state, fresh, theirs = self.state(out), thin_resnet(resnet), torch.load(weights, weights_only=True)
        assert torch.equal(state["fc.bias"], fresh.fc.bias)
        assert torch.equal(state["layer2.0.conv1.weight"], theirs["layer2.0.conv1.weight"])
        kept = train(config_for(tmp_path / "kept", weights=weights, **still)).out
        assert torch.equal(self.state(kept)["fc.bias"], theirs["fc.bias"])


def test_runs_of_before_froze_nothing():
    filled = fill_in({})
    assert (filled["freeze"], filled["body_lr"], filled["new_head"]) == ("", 1.0, False)
