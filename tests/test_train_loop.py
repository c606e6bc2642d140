"""The loop computes the same as a plain one, restores every mode, and gives the same result twice."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from stand_in import stand_in
from torch import Tensor, nn

from resnet_fast.data import Augmentation, Batch, ImageDataset, TensorSplit, normalize
from resnet_fast.evaluation.logits import DTYPES
from resnet_fast.ops import augment as augment_module
from resnet_fast.training import (
    MODELS,
    DivergedError,
    EpochMetrics,
    Reporter,
    Result,
    TrainConfig,
    divergence,
    loop,
    prepare,
    resume,
    run_folder,
    train,
)
from resnet_fast.training.evaluation import evaluate
from resnet_fast.training.loss_scale import make_scaler
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


class Recording(TensorSplit):
    """A split that keeps what it gave, as (images, labels) that are not augmented."""

    def __init__(self, split: TensorSplit) -> None:
        super().__init__(split.images, split.labels)
        object.__setattr__(self, "given", [])

    def to(self, device: torch.device, images: str = "auto") -> "Recording":
        return self

    def planned(self, plan: Tensor, sizes: Sequence[int]) -> Iterator[Batch]:
        for batch in super().planned(plan, sizes):
            self.given.append((self.images[batch.plan[:, 0]], self.labels[batch.plan[:, 0]]))
            yield batch


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is claimed here does not depend on the kernel that augments, and an interpreted one is slow."""
    monkeypatch.setattr(augment_module, "choose_backend", lambda x: "aten")


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

    monkeypatch.setitem(MODELS, "resnet18", stand_in(make))
    monkeypatch.setattr(prepare, "load_dataset", lambda *args, **kwargs: make_dataset())
    monkeypatch.setattr(run_folder, "write_pictures", lambda *args: None)  # they take longer than an epoch
    monkeypatch.setattr(run_folder, "draw_curves", lambda *args: None)
    return made


def config_for(out: Path, **settings) -> TrainConfig:
    defaults = {"dataset": "digits", "epochs": 2, "batch_size": BATCH, "device": "cpu", "precision": "fp32"}
    return TrainConfig(**{**defaults, "out": out, **settings})


def normalization_of(dataset: ImageDataset) -> Augmentation:
    return Augmentation(dataset.mean, dataset.std)


def use_dataset(monkeypatch: pytest.MonkeyPatch, dataset: ImageDataset) -> ImageDataset:
    monkeypatch.setattr(prepare, "load_dataset", lambda *args, **kwargs: dataset)
    return dataset


def test_weights_are_those_of_a_plain_torch_loop(tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = use_dataset(monkeypatch, make_dataset())
    result = train(config_for(tmp_path / "run", lr=0.1, schedule="one-cycle", seed=3))
    assert result.mirrored_accuracy is None  # a mirror image is another digit

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
    assert modes == ([True] * 5 + [False] * 2) * 3 + [False] * 2  # at the end for the pictures


def test_the_test_images_are_normalized_but_not_augmented(
    tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = use_dataset(monkeypatch, make_dataset(padding=2, flip=True))
    train(config_for(tmp_path / "run", flip="random"))
    seen = torch.cat([x for training, x in tiny[0].calls if not training][:2])
    assert torch.equal(seen, normalize(dataset.test.images, dataset.mean, dataset.std))
    trained = torch.cat([x for training, x in tiny[0].calls if training][:5])
    given = torch.cat([images for images, _ in dataset.train.given[:5]])
    same = (trained == normalize(given, dataset.mean, dataset.std)).flatten(1).all(1)
    assert same.sum() < 10  # of 40; 1 in 50 by chance


def test_flip_can_be_decided_by_the_user(tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = use_dataset(monkeypatch, make_dataset(flip=True))
    train(config_for(tmp_path / "run", recipe="baseline", flip="none", epochs=1))
    trained = torch.cat([x for training, x in tiny[0].calls if training])
    given = torch.cat([images for images, _ in dataset.train.given])
    assert torch.equal(trained, normalize(given, dataset.mean, dataset.std))


def test_evaluation_leaves_the_model_as_it_is(tiny: list[Tiny]):
    model, dataset = Tiny(3), make_dataset()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, dataset.test, normalization_of(dataset))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_metrics_are_means_over_images(tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = use_dataset(monkeypatch, make_dataset())
    dataset = use_dataset(monkeypatch, replace(dataset, train=Recording(TensorSplit(*_first(dataset.train, 20)))))
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


def test_a_mirrored_accuracy_is_that_of_the_mean_of_both_logits(
    tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = use_dataset(monkeypatch, make_dataset(flip=True))
    result = train(config_for(tmp_path / "run", lr=1.0, flip="random"))
    images = normalize(dataset.test.images, dataset.mean, dataset.std)
    with torch.no_grad():
        logits = result.model(images) + result.model(images.flip(-1))
    assert result.mirrored_accuracy == (logits.argmax(1) == dataset.test.labels).double().mean()


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
        results.append(train(config_for(tmp_path / name, seed=seed, precision=precision, flip="random")))
    weights = [torch.cat([p.flatten() for p in result.model.parameters()]) for result in results]
    metrics = [[replace(m, seconds=0, images_per_second=0) for m in result.history] for result in results]
    assert torch.equal(weights[0], weights[1]) and metrics[0] == metrics[1]
    assert not torch.equal(weights[0], weights[2]) and metrics[0] != metrics[2]


@pytest.mark.parametrize(("precision", "dtype"), DTYPES.items())
def test_precision_is_of_the_convolutions_and_never_of_the_weights(
    precision: str, dtype: torch.dtype, tiny: list[Tiny], tmp_path: Path
):
    train(config_for(tmp_path / "run", precision=precision, epochs=1))
    assert tiny[0].dtypes == {dtype}
    assert {p.dtype for p in tiny[0].parameters()} == {torch.float32}
    # What the step augments is rounded once, to what the first convolution reads; evaluation leaves that to autocast.
    assert {x.dtype for training, x in tiny[0].calls if training} == {dtype}
    assert {x.dtype for training, x in tiny[0].calls if not training} == {torch.float32}


def test_a_loss_that_is_not_finite_stops_and_keeps_the_epochs_before(
    tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make = MODELS["resnet18"].build

    def make_bad(**kwargs) -> Tiny:
        model = make(**kwargs)
        model.nan_at = 5 + 3
        return model

    monkeypatch.setitem(MODELS, "resnet18", stand_in(make_bad))
    with pytest.raises(DivergedError, match="loss became nan at epoch 2, step 3; suspects: the learning rate, 0.00"):
        train(config_for(tmp_path / "run", lr=0.01, epochs=3))
    with open(tmp_path / "run" / "metrics.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1"]
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 1
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_loss_that_is_not_finite_names_the_first_layer_that_is_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten())
    nn.init.constant_(model[2].weight, 3e38)  # its output overflows, the layer before is as it should be
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    images, labels = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    loss, _ = training_step(model, optimizer, images, labels, "fp32", make_scaler("fp32", images.device))
    with pytest.raises(DivergedError) as caught:
        divergence.check_is_finite(loss[None], 2, 0, model, 0.25, "fp32")
    assert str(caught.value) == (
        "the loss became nan at epoch 2, step 1; suspects: the learning rate, 0.25 there (try a smaller --lr); "
        "2 of 4 running statistics are not finite, first 3.running_mean; 8 of 8 weights are not finite, first 0.weight"
    )


def test_the_result_is_the_last_epoch_and_not_the_best():
    epochs = [EpochMetrics(i, 0.1, 1, 0.5, 1, accuracy, 2, 10) for i, accuracy in ((1, 0.9), (2, 0.7))]
    result = Result(TrainConfig(dataset="digits"), tuple(epochs), nn.Identity(), 5)
    assert result.test_accuracy == 0.7
    assert result.images_per_second == 10 and result.train_seconds == 4


class Poisoned(TensorSplit):
    """A split of which the number of images may be asked, and nothing else."""

    def __init__(self, split: TensorSplit) -> None:
        super().__init__(split.images, split.labels)

    def to(self, device: torch.device, images: str = "auto") -> "Poisoned":
        raise AssertionError("the images were moved")

    def subset(self, indices: Tensor) -> "Poisoned":
        raise AssertionError("a part of the images was taken")

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        raise AssertionError("the images were read")

    def planned(self, plan: Tensor, sizes: Sequence[int]) -> Iterator[Batch]:
        raise AssertionError("the images were read")


def test_a_holdout_leaves_the_test_images_alone(tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = make_dataset()
    dataset = use_dataset(monkeypatch, replace(dataset, train=dataset.train, test=Poisoned(dataset.test)))
    result = train(config_for(tmp_path / "run", holdout=12))
    held_out = dataset.hold_out(12).test
    model = Tiny(3)
    model.load_state_dict(result.model.state_dict())
    logits = model.eval()(normalize(held_out.images, dataset.mean, dataset.std))
    assert result.test_accuracy == (logits.argmax(1) == held_out.labels).double().mean()
    assert result.history[-1].test_loss == pytest.approx(F.cross_entropy(logits, held_out.labels).item(), rel=1e-5)
    trained = torch.cat([x for training, x in tiny[0].calls if training])
    seen = {image.numpy().tobytes() for image in trained}
    # 29 images, of which 5 times 8 are 3 batches and a rest of 5 that is trained on, too.
    assert len(seen) == N_TRAIN - 12
    assert not seen & {image.numpy().tobytes() for image in normalize(held_out.images, dataset.mean, dataset.std)}


class Clock:
    """A clock by which each training epoch takes `epoch_seconds`, and all else nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, epoch_seconds: float) -> None:
        self.now = 0.0
        train_epoch = loop.train_epoch

        def timed(*args):
            self.now += epoch_seconds
            return train_epoch(*args)

        monkeypatch.setattr(loop, "train_epoch", timed)
        monkeypatch.setattr(loop.time, "perf_counter", lambda: self.now)


@pytest.mark.parametrize(
    ("budget", "n_epochs"),
    [
        pytest.param(0, 6, id="no budget"),
        pytest.param(1, 1, id="less than an epoch"),
        pytest.param(29, 2, id="almost three epochs"),
        pytest.param(30, 3, id="three epochs"),
    ],
)
def test_a_time_budget_ends_a_run_before_an_epoch_that_would_exceed_it(
    budget: float, n_epochs: int, tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Clock(monkeypatch, epoch_seconds=10)
    drawn = []
    monkeypatch.setattr(run_folder, "draw_curves", lambda file, history, *rest: drawn.append(len(history)))
    result = train(config_for(tmp_path / "run", epochs=6, time_budget=budget))
    assert len(result.history) == drawn[-1] == n_epochs
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] == n_epochs


def test_a_run_whose_time_was_spent_goes_on_to_the_weights_that_it_would_have_had(
    tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    use_dataset(monkeypatch, make_dataset(padding=2))
    straight = train(config_for(tmp_path / "straight", epochs=5))
    Clock(monkeypatch, epoch_seconds=10)
    done = [len(train(config_for(tmp_path / "run", epochs=5, time_budget=25)).history)]
    done.append(len(resume(tmp_path / "run").history))  # a budget of its own
    done.append(len(resume(tmp_path / "run", time_budget=1).history))  # an epoch at least
    assert done == [2, 4, 5]
    result = resume(tmp_path / "run")
    for name, value in straight.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], value), name


@pytest.mark.parametrize("before", [(False, False), (True, True)], ids=["off", "warns"])
def test_torchs_settings_come_back_after_a_deterministic_run(
    before: tuple[bool, bool], tiny: list[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which is set for good, and taken back here
    fill = torch.utils.deterministic.fill_uninitialized_memory
    during = []

    def settings() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    class Look(Reporter):
        def start_epoch(self, epoch: int, n_steps: int) -> None:
            during.append((settings(), torch.utils.deterministic.fill_uninitialized_memory))
            if epoch == 2:
                raise KeyboardInterrupt  # they come back however a run ends

    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config_for(tmp_path / "run", deterministic=True), Look())
        assert settings() == before and torch.utils.deterministic.fill_uninitialized_memory == fill
    finally:
        torch.use_deterministic_algorithms(False)
    assert during == [((True, False), False)] * 2


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_saved_weights_are_the_tested_ones(ema: float, tiny: list[Tiny], tmp_path: Path):
    """The average where there is one; the weights that training goes on from are beside it."""
    result = train(config_for(tmp_path / "run", ema=ema))
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(value, checkpoint["model"][name]) for name, value in result.model.state_dict().items())
    trained = checkpoint["trained_model"]
    assert (trained is None) == (ema == 0)
    if trained is not None:
        assert not torch.equal(trained["fc.weight"], checkpoint["model"]["fc.weight"])


@pytest.mark.usefixtures("on_aten")
def test_a_real_checkpoint_loads_into_torchvisions_resnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_folder, "write_pictures", lambda *args: None)
    monkeypatch.setattr(run_folder, "draw_curves", lambda *args: None)
    use_dataset(monkeypatch, replace(make_dataset(), train=TensorSplit(*_first(make_dataset().train, 8))))
    result = train(config_for(tmp_path / "run", stem="imagenet", epochs=1, batch_size=4))
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    model = torchvision.models.resnet18(num_classes=3)
    model.load_state_dict(checkpoint["model"], strict=True)
    assert checkpoint["config"]["stem"] == "imagenet" and checkpoint["classes"] == ["a", "b", "c"]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Same network and weights; only the order of fp32 sums may differ over 18 layers.
        torch.testing.assert_close(model.eval()(images), result.model(images), rtol=1e-3, atol=1e-3)
