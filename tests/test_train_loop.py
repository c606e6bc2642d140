"""The loop does what a plain one does, leaves no mode behind, and gives the same result twice."""

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.data import ImageDataset, TensorSplit, normalize
from resnet_fast.training import MODELS, DivergedError, EpochMetrics, Result, TrainConfig, loop, train
from resnet_fast.training.step import training_step

# isort: split
import torchvision

N_TRAIN, N_TEST, BATCH = 41, 19, 8  # 41 = 5·8 + 1: the last batch of training is left out


class Tiny(nn.Module):
    """A network with batch norm that notes what it is called with."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)
        self.calls: list[tuple[bool, Tensor]] = []
        self.dtypes: set[torch.dtype] = set()
        self.nan_at = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, x.detach().clone()))
        y = self.conv(x)
        self.dtypes.add(y.dtype)
        logits = self.fc(self.bn(y).relu().mean((2, 3)))
        n_training = sum(training for training, _ in self.calls)
        return logits * float("nan") if self.training and n_training == self.nan_at else logits


class Recording:
    """A split that keeps the batches it gave."""

    def __init__(self, split: TensorSplit) -> None:
        self.split, self.given = split, []

    def __len__(self) -> int:
        return len(self.split)

    def to(self, device: torch.device) -> "Recording":
        return self

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.split.batches(batch_size, generator):
            self.given.append(batch)
            yield batch


def make_dataset(padding: int = 0, flip: bool = False) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> TensorSplit:
        images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
        return TensorSplit(images, torch.randint(0, 3, (count,), generator=generator))

    train_split, test_split = Recording(split(N_TRAIN)), split(N_TEST)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    return ImageDataset("tiny", ("a", "b", "c"), train_split, test_split, mean, std, padding, flip)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[Tiny]:
    """Put Tiny in place of resnet18 and a small data set in place of digits; the models that were made."""
    made = []

    def make(*, num_classes: int, stem: str) -> Tiny:
        made.append(Tiny(num_classes))
        return made[-1]

    monkeypatch.setitem(MODELS, "resnet18", make)
    monkeypatch.setattr(loop, "load_dataset", lambda *args, **kwargs: make_dataset())
    return made


def config_for(out: Path, **settings) -> TrainConfig:
    defaults = {"dataset": "digits", "epochs": 2, "batch_size": BATCH, "device": "cpu", "precision": "fp32"}
    return TrainConfig(**{**defaults, "out": out, **settings})


def use_dataset(monkeypatch: pytest.MonkeyPatch, dataset: ImageDataset) -> ImageDataset:
    monkeypatch.setattr(loop, "load_dataset", lambda *args, **kwargs: dataset)
    return dataset


def test_weights_are_those_of_a_plain_torch_loop(tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = use_dataset(monkeypatch, make_dataset())
    result = train(config_for(tmp_path / "run", lr=0.1, seed=3))

    torch.manual_seed(3)
    model = Tiny(3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False)
    assert len(dataset.train.given) == 10
    for step, (images, labels) in enumerate(dataset.train.given):
        optimizer.zero_grad()
        F.cross_entropy(model(normalize(images, dataset.mean, dataset.std)), labels).backward()
        optimizer.step()
        if step < 9:
            schedule.step()
    for name, value in model.state_dict().items():
        # The fused optimizer and the schedule round differently in the last bits.
        torch.testing.assert_close(result.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_each_epoch_trains_in_training_mode_and_tests_in_evaluation_mode(tiny: list[Tiny], tmp_path: Path):
    train(config_for(tmp_path / "run", epochs=3))
    modes = [training for training, _ in tiny[0].calls]
    assert modes == ([True] * 5 + [False] * 2) * 3


def test_the_test_images_are_normalized_but_not_augmented(
    tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = use_dataset(monkeypatch, make_dataset(padding=2, flip=True))
    train(config_for(tmp_path / "run"))
    seen = torch.cat([x for training, x in tiny[0].calls if not training][:2])
    assert torch.equal(seen, normalize(dataset.test.images, dataset.mean, dataset.std))
    trained = torch.cat([x for training, x in tiny[0].calls if training][:5])
    given = torch.cat([images for images, _ in dataset.train.given[:5]])
    same = (trained == normalize(given, dataset.mean, dataset.std)).flatten(1).all(1)
    assert same.sum() < 10  # of 40; 1 in 50 by chance


def test_flip_can_be_decided_by_the_user(tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = use_dataset(monkeypatch, make_dataset(flip=True))
    train(config_for(tmp_path / "run", flip=False, epochs=1))
    trained = torch.cat([x for training, x in tiny[0].calls if training])
    given = torch.cat([images for images, _ in dataset.train.given])
    assert torch.equal(trained, normalize(given, dataset.mean, dataset.std))


def test_evaluation_leaves_the_model_as_it_is(tiny: list[Tiny]):
    model, dataset = Tiny(3), make_dataset()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loop.evaluate(model, dataset.test, dataset, config_for(Path("unused")))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_metrics_are_means_over_images(tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = use_dataset(monkeypatch, make_dataset())
    dataset = use_dataset(monkeypatch, replace(dataset, train=Recording(TensorSplit(*_first(dataset.train.split, 20)))))
    result = train(config_for(tmp_path / "run", lr=1e-12, weight_decay=0, epochs=1))  # weights stand still
    # batches of 8, 8 and 4: a mean of batch means would be another number
    losses, correct = [], 0
    model = result.model.train()
    for images, labels in dataset.train.given:
        logits = model(normalize(images, dataset.mean, dataset.std))
        losses.append(F.cross_entropy(logits, labels, reduction="sum").item())
        correct += (logits.argmax(1) == labels).sum().item()
    metrics = result.history[0]
    assert metrics.train_loss == pytest.approx(sum(losses) / 20, rel=1e-5)
    assert metrics.train_accuracy == correct / 20
    assert metrics.images_per_second == pytest.approx(20 / metrics.seconds)


def _first(split: TensorSplit, count: int) -> tuple[Tensor, Tensor]:
    return split.images[:count], split.labels[:count]


def test_the_test_metrics_are_those_of_the_saved_weights(tiny: list[Tiny], tmp_path: Path):
    result = train(config_for(tmp_path / "run"))
    model, dataset = Tiny(3), make_dataset()
    model.load_state_dict(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"])
    logits = model.eval()(normalize(dataset.test.images, dataset.mean, dataset.std))
    assert result.history[-1].test_loss == pytest.approx(F.cross_entropy(logits, dataset.test.labels).item(), rel=1e-5)
    assert result.test_accuracy == (logits.argmax(1) == dataset.test.labels).double().mean()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_bits(
    precision: str, tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    results = []
    for name, seed, noise in (("a", 1, 10), ("b", 1, 20), ("c", 2, 10)):
        use_dataset(monkeypatch, make_dataset(padding=2, flip=True))
        torch.manual_seed(noise)  # whatever the caller did before
        results.append(train(config_for(tmp_path / name, seed=seed, precision=precision)))
    weights = [torch.cat([p.flatten() for p in result.model.parameters()]) for result in results]
    metrics = [[replace(m, seconds=0, images_per_second=0) for m in result.history] for result in results]
    assert torch.equal(weights[0], weights[1]) and metrics[0] == metrics[1]
    assert not torch.equal(weights[0], weights[2]) and metrics[0] != metrics[2]


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_of_the_convolutions_and_never_of_the_weights(
    precision: str, dtype: torch.dtype, tiny: list[Tiny], tmp_path: Path
):
    train(config_for(tmp_path / "run", precision=precision, epochs=1))
    assert tiny[0].dtypes == {dtype}
    assert {p.dtype for p in tiny[0].parameters()} == {torch.float32}
    assert {x.dtype for _, x in tiny[0].calls} == {torch.float32}


def test_a_loss_that_is_not_finite_stops_and_keeps_the_epochs_before(
    tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make = MODELS["resnet18"]

    def make_bad(**kwargs) -> Tiny:
        model = make(**kwargs)
        model.nan_at = 5 + 3
        return model

    monkeypatch.setitem(MODELS, "resnet18", make_bad)
    with pytest.raises(DivergedError, match="loss became nan at epoch 2, step 3; suspects: the learning rate, 0.00"):
        train(config_for(tmp_path / "run", lr=0.01, epochs=3))
    with open(tmp_path / "run" / "metrics.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1"]
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 1
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_loss_that_is_not_finite_names_the_first_layer_that_is_not():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten())
    nn.init.constant_(model[2].weight, 1e38)  # its output overflows, the layer before is as it should be
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    images, labels = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    loss, _ = training_step(model, optimizer, images, labels, "fp32")
    with pytest.raises(DivergedError) as caught:
        loop.check_is_finite(loss[None], 2, model, 0.25)
    assert str(caught.value) == (
        "the loss became nan at epoch 2, step 1; suspects: the learning rate, 0.25 there (try a smaller --lr); "
        "2 of 4 running statistics are not finite, first 3.running_mean; 8 of 8 weights are not finite, first 0.weight"
    )


def test_an_occupied_run_folder_stops_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")

    def load(*args, **kwargs):
        raise AssertionError("the data set was loaded")

    monkeypatch.setattr(loop, "load_dataset", load)
    with pytest.raises(FileExistsError, match="already holds notes.txt"):
        train(config_for(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_nothing_is_written_when_the_data_is_missing(tmp_path: Path):
    with pytest.raises(RuntimeError, match="does not exist"):
        train(config_for(tmp_path / "run", dataset="folder", data_dir=tmp_path / "absent"))
    assert not (tmp_path / "run").exists()


def test_the_result_is_the_last_epoch_and_not_the_best():
    epochs = [EpochMetrics(i, 0.1, 1, 0.5, 1, accuracy, 2, 10) for i, accuracy in ((1, 0.9), (2, 0.7))]
    result = Result(TrainConfig(dataset="digits"), tuple(epochs), nn.Identity(), 5)
    assert result.test_accuracy == 0.7
    assert result.images_per_second == 10 and result.train_seconds == 4


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tiny: list[Tiny], tmp_path: Path):
    """The checkpoint holds everything: model, optimizer with momentum, schedule, and the generator."""
    config = config_for(tmp_path / "run", epochs=2)
    dataset, silent = make_dataset(), loop.Reporter()

    def parts() -> tuple:
        generator = loop.seed_everything(config.seed)
        model = Tiny(3)
        optimizer = loop.make_optimizer(model, config)
        return model, dataset, optimizer, loop.make_scheduler(optimizer, config, 5), generator

    straight = parts()
    loop.train_epoch(*straight, config, 1, silent)
    model, _, optimizer, scheduler, generator = straight
    saved = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({name: part.state_dict() for name, part in saved.items()}, tmp_path / "half.pt")
    random_state = generator.get_state()
    loop.train_epoch(*straight, config, 2, silent)

    half = torch.load(tmp_path / "half.pt", weights_only=True)
    resumed = parts()
    resumed[0].load_state_dict(half["model"])
    resumed[2].load_state_dict(half["optimizer"])
    resumed[3].load_state_dict(half["scheduler"])
    resumed[4].set_state(random_state)
    loop.train_epoch(*resumed, config, 2, silent)
    for name, value in model.state_dict().items():
        assert torch.equal(resumed[0].state_dict()[name], value), name


def test_a_real_checkpoint_loads_into_torchvisions_resnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_dataset(monkeypatch, replace(make_dataset(), train=TensorSplit(*_first(make_dataset().train.split, 8))))
    result = train(config_for(tmp_path / "run", stem="imagenet", epochs=1, batch_size=4))
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    model = torchvision.models.resnet18(num_classes=3)
    model.load_state_dict(checkpoint["model"], strict=True)
    assert checkpoint["config"]["stem"] == "imagenet" and checkpoint["classes"] == ["a", "b", "c"]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Same network and weights; only the order of fp32 sums may differ over 18 layers.
        torch.testing.assert_close(model.eval()(images), result.model(images), rtol=1e-3, atol=1e-3)
