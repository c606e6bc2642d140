"""`resnet-fast study skip` measures, writes, draws and reports the same results."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner
from typer.testing import Result as CliResult

from resnet_fast import resnet20
from resnet_fast.cli import app
from resnet_fast.cli import study as command
from resnet_fast.data import ImageDataset, load_digits, torchvision_sets
from resnet_fast.ops import backend
from resnet_fast.study import (
    EpochRow,
    GradientRow,
    SkipStudy,
    format_table,
    format_verdict,
    full_study,
    run_study,
    small_study,
)
from resnet_fast.study.folder import read_table
from resnet_fast.study.gradients import gradient_norms
from resnet_fast.study.picture import draw
from resnet_fast.study.settings import halve
from resnet_fast.training import DivergedError
from resnet_fast.training.step import SCHEDULES

SKIP_STUDY_LOAD = SkipStudy.load
NAMES = ["plain-8", "plain-14", "ResNet-8", "ResNet-14"]


def tiny_digits() -> ImageDataset:
    digits = load_digits()
    few = torch.arange(40)
    return halve(halve(replace(digits, train=digits.train.subset(few), test=digits.test.subset(few))))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Shallow and thin networks, few images, no interpreted kernels."""

    def small(*, n_seeds: int = 1, **settings) -> SkipStudy:
        study = small_study(n_seeds=n_seeds, **{"device": "cpu", **settings})
        config = replace(study.config, batch_size=16, lr=0.02)
        return replace(study, config=config, width=2, depths=(8, 14))

    monkeypatch.setattr(command, "small_study", small)
    monkeypatch.setattr(SkipStudy, "load", lambda self: tiny_digits())
    monkeypatch.setattr(backend, "_INTERPRETED", False)


def run(*args: object) -> CliResult:
    return CliRunner().invoke(app, ["study", "skip", *map(str, args)])


def tables(out: Path) -> tuple[list[EpochRow], list[GradientRow]]:
    return read_table(out / "skip.csv", EpochRow), read_table(out / "gradients.csv", GradientRow)


def test_a_study_from_end_to_end(tmp_path: Path):
    out = tmp_path / "s"
    result = run("--epochs", 2, "--seeds", 2, "--seed", 5, "--device", "cpu", "--out", out)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"skip.png", "skip.csv", "gradients.csv", "config.json"}
    assert (out / "skip.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((out / "config.json").read_text())
    expected = {"networks": NAMES, "seeds": [5, 6], "epochs": 2, "width": 2, "schedule": "one-cycle", "crop": 0}
    expected |= {"train_images": 40, "image_size": 8, "gradient_images": 40, "dataset": "digits"}
    assert {name: config[name] for name in expected} == expected
    epochs, gradients = tables(out)
    assert [(row.network, row.seed, row.epoch) for row in epochs] == [
        (name, seed, epoch) for seed in (5, 6) for name in NAMES for epoch in (1, 2)
    ]
    assert [(row.network, row.seed, row.moment, row.layer) for row in gradients] == [
        (name, seed, moment, layer)
        for seed in (5, 6)
        for name in NAMES
        for moment in ("start", "end")
        for layer in range(1, int(name.split("-")[1]))
    ]
    networks = command.small_study().networks
    lines = [*format_table(epochs, networks), *format_verdict(epochs, networks)]
    assert [line for line in lines if line not in result.stdout.splitlines()] == []
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80 and "\x1b" not in result.stdout
    # The picture shows the tables.
    figure = draw(epochs, gradients, command.small_study().networks, "title")
    for axes, name in zip(figure.axes, ("train_error", "test_error"), strict=False):
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        for network in NAMES:
            means = [
                sum(100 * getattr(r, name) for r in epochs if (r.network, r.epoch) == (network, epoch)) / 2
                for epoch in (1, 2)
            ]
            assert lines[network] == pytest.approx(means)
        assert axes.get_ylim() == (0, 100)
    norms = figure.axes[2]
    assert norms.get_yscale() == "log"
    lines = {line.get_label(): list(line.get_ydata()) for line in norms.lines}
    for network in NAMES:
        for moment in ("start", "end"):
            own = [r for r in gradients if (r.network, r.moment) == (network, moment)]
            layers = range(1, max(r.layer for r in own) + 1)
            means = [sum(r.norm for r in own if r.layer == layer) / 2 for layer in layers]
            assert lines[f"{network}, {moment}"] == pytest.approx(means)


def rows(**errors: list[float]) -> list[EpochRow]:
    """Two epochs of each network, the first of which does not count; `errors` of the last, a value for each seed."""
    return [
        EpochRow(network, seed, epoch, error if epoch == 2 else 0.5, 0.25, 1.0)
        for network, values in zip(NAMES, errors.values(), strict=True)
        for seed, error in enumerate(values)
        for epoch in (1, 2)
    ]


LOW, HIGH, NOISY = [0.01, 0.01, 0.01], [0.6, 0.62, 0.64], [0.0, 0.05, 0.01]


@pytest.mark.parametrize(
    ("plain_deep", "deep", "words", "end"),
    [
        (HIGH, LOW, ("worse than", "as well as"), "Depth hurts without skip connections, but not with them."),
        (HIGH, HIGH, ("worse than", "worse than"), "Depth hurts both with and without skip connections."),
        (
            NOISY,
            [0, 0, 0],
            ("as well as", "better than"),
            "Depth hurts neither with nor without skip connections.",
        ),
        ([0, 0, 0], HIGH, ("better than", "worse than"), "Depth hurts only with skip connections, the opposite"),
    ],
)
def test_the_verdict_follows_the_numbers(plain_deep, deep, words, end):
    networks = command.small_study().networks
    found = format_verdict(rows(plain=LOW, plain_deep=plain_deep, shallow=LOW, deep=deep), networks)
    text = " ".join(found)
    assert f"plain-14 trains {words[0]} plain-8: " in text and f"ResNet-14 trains {words[1]} ResNet-8: " in text
    assert end in text and max(map(len, found)) <= 80
    mean = sum(plain_deep) / 3
    assert f"{100 * mean:.2f} % against 1.00 % training error, a difference of {100 * mean - 1:+.2f} ± " in text


@pytest.mark.parametrize(("deep", "word"), [([0.0149] * 3, "as well as"), ([0.0151] * 3, "worse than")])
def test_a_difference_counts_from_half_a_point_on(deep, word):
    found = format_verdict(rows(plain=LOW, plain_deep=deep, shallow=LOW, deep=LOW), command.small_study().networks)
    assert f"plain-14 trains {word} plain-8: " in found[0]


def test_the_table_holds_mean_and_deviation_of_the_last_epoch():
    table = format_table(rows(a=HIGH, b=LOW, c=NOISY, d=LOW), command.small_study().networks)
    assert re.fullmatch(r"plain-8 +62\.00 ± 2\.00 +25\.00 ± 0\.00 +2\.0 s", table[1])
    assert re.fullmatch(r"ResNet-8 +2\.00 ± 2\.65 +25\.00 ± 0\.00 +2\.0 s", table[3])
    assert len({len(line) for line in table}) == 1


def test_one_seed_has_no_deviation_and_no_verdict():
    networks = command.small_study().networks
    one = rows(plain=[0.0], plain_deep=[0.643], shallow=[0.02], deep=[0.01])
    table, found = format_table(one, networks), format_verdict(one, networks)
    assert re.fullmatch(r"plain-14 +64\.30 +25\.00 +2\.0 s", table[2]) and len({len(line) for line in table}) == 1
    assert found == [
        "plain-14 has 64.30 % training error, plain-8 0.00 %: +64.30 points.",
        "ResNet-14 has 1.00 % training error, ResNet-8 2.00 %: -1.00 points.",
        "One seed shows no spread: run several seeds to tell whether depth hurts.",
    ]


@pytest.mark.slow
def test_a_study_of_one_seed_says_so(tmp_path: Path):
    result = run("--epochs", 1, "--seeds", 1, "--out", tmp_path / "s")
    assert result.exit_code == 0, result.output
    assert "(after the last epoch, one seed)\n" in result.stdout and "One seed shows no spread" in result.stdout
    assert not any(words in result.stdout for words in ("±", "deviation", "Depth hurts", "A difference counts"))


@pytest.mark.parametrize("shortcut", ("B", None))
def test_gradient_norms_are_those_of_autograd(shortcut):
    torch.manual_seed(0)
    # torch 2.13 on AVX2 corrupts the heap in the backward of a 1x1 convolution of 3 or 4 channels in channels_last.
    model = resnet20(shortcut=shortcut, width=8).eval()
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6)
    before = copy.deepcopy(model.state_dict())
    found = gradient_norms(model, images, labels)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    model.train()
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
    weights = [model.conv1.weight, *(conv.weight for block in blocks for conv in (block.conv1, block.conv2))]
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), weights)
    assert found == pytest.approx([float((gradient**2).sum() ** 0.5) for gradient in gradients], rel=1e-5)
    assert len(found) == 19


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU some of the kernels of cuDNN are not deterministic")
def test_a_seed_repeats_to_the_bit_and_others_differ():
    def results(seed: int, n_seeds: int) -> list:
        study = command.small_study(seed=seed, n_seeds=n_seeds, epochs=1)
        return [
            (one.network.name, one.seed, [replace(row, seconds=0) for row in one.epochs], one.gradients)
            for one in run_study(study)
        ]

    both, first = results(3, 2), results(3, 1)
    assert both[:4] == first
    for a, b in zip(both[:4], both[4:], strict=True):
        assert a[0] == b[0] and (a[1], b[1]) == (3, 4)
        assert [row.norm for row in a[3]] != [row.norm for row in b[3]]


def test_the_full_study_is_the_papers():
    study = full_study(device="cpu")
    config = study.config
    assert [(network.name, network.depth) for network in study.networks] == [
        *(("plain-20", 20), ("plain-56", 56)),
        *(("ResNet-20", 20), ("ResNet-56", 56)),
    ]
    assert (study.width, study.depths, config.dataset) == (16, (20, 56), "cifar10")
    assert (config.optimizer, config.lr, config.momentum, config.nesterov) == ("sgd", 0.1, 0.9, False)
    assert (config.batch_size, config.weight_decay, config.precision) == (128, 1e-4, "fp32")
    # None: the data set's, 4 for CIFAR-10.
    assert (config.crop, config.padding, config.flip, config.cutout) == (None, "zero", "random", 0)
    n_steps = config.epochs * -(-50_000 // config.batch_size)
    assert 64_000 <= n_steps < 64_000 + 391
    rate = SCHEDULES[config.schedule]
    rates = [config.lr * rate(step, n_steps) for step in (0, 31_999, 32_100, 47_999, 48_100, n_steps - 1)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    off = ("label_smoothing", "clip_norm", "ema", "zero_gamma", "dirac", "whiten", "ghost_batch_size")
    off += ("trivial_augment", "random_erasing", "mixup", "cutmix")
    off += ("lookahead", "sizes")
    assert not any(getattr(config, name) for name in off)


def test_full_is_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(**settings) -> SkipStudy:
        assert full_study(**settings).width == 16
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "full_study", stop)
    assert run("--full", "--device", "cpu", "--out", tmp_path / "s").exit_code == 130


def test_full_without_network_advises_what_this_command_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(torchvision_sets, "download", refuse)
    monkeypatch.setattr(SkipStudy, "load", SKIP_STUDY_LOAD)
    result = run("--full", "--device", "cpu", "--data-dir", tmp_path / "data", "--out", tmp_path / "s")
    assert result.exit_code == 1 and list(tmp_path.iterdir()) == []
    assert result.stderr.endswith(" with --data-dir. Without --full no network is needed.\n")
    assert "--dataset" not in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--seeds", 0), "seeds must be an integer of at least 1, got 0"),
        (("--seed", 2**32 - 1, "--seeds", 2), "seed + seeds must be at most 2**32, got 4294967295 + 2"),
    ],
)
def test_bad_values_are_refused(args, message, tmp_path: Path):
    result = run(*args, "--out", tmp_path / "s")
    assert result.exit_code == 2 and result.stderr == f"resnet-fast: error: {message}\n"
    assert not (tmp_path / "s").exists()


def test_other_depths_and_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    study = command.small_study()
    with pytest.raises(ValueError, match="depths must be a smaller and a larger number, got 20 and 14"):
        replace(study, depths=(20, 14))
    with pytest.raises(ValueError, match="got 21; the nearest are 20 and 26"):
        replace(study, depths=(20, 21))
    with pytest.raises(ValueError, match="width must be an integer of at least 1, got 0"):
        replace(study, width=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a study needs a single process, got 2"):
        replace(study, width=4)


def test_a_folder_that_holds_something_is_refused(tmp_path: Path):
    (tmp_path / "notes").write_text("mine")
    result = run("--out", tmp_path)
    assert result.exit_code == 2 and "already holds notes" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize(
    ("n_done", "message"),
    [
        (0, "no network was finished, {} keeps config.json only"),
        (3, "{} keeps skip.csv and gradients.csv up to ResNet-8, seed 0: 3 of 4 runs"),
    ],
)
def test_ctrl_c_exits_with_130_and_says_what_is_kept(n_done, message, tmp_path: Path, monkeypatch):
    def interrupted(study, dataset):
        for i, trained in enumerate(run_study(study, dataset)):
            if i == n_done:
                raise KeyboardInterrupt
            yield trained

    monkeypatch.setattr("resnet_fast.study.run_study", interrupted)
    result = run("--epochs", 1, "--seeds", 1, "--out", tmp_path / "s")
    assert result.exit_code == 130
    assert result.stderr == f"resnet-fast: interrupted; {message.format(tmp_path / 's')}\n"
    if n_done:
        assert len(tables(tmp_path / "s")[0]) == n_done
    assert not (tmp_path / "s" / "skip.png").exists() and not list((tmp_path / "s").glob(".*"))


def test_a_loss_that_is_not_finite_exits_with_1(tmp_path: Path, monkeypatch):
    def diverges(study, dataset):
        raise DivergedError("the loss became nan")
        yield

    monkeypatch.setattr("resnet_fast.study.run_study", diverges)
    result = run("--out", tmp_path / "s")
    assert result.exit_code == 1 and "error: the loss became nan; no network was finished" in result.stderr


def test_halved_images_are_means_of_four():
    whole, half = load_digits(), halve(load_digits())
    x = whole.train.images.float()
    mean = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    assert (half.train.images.float() - mean).abs().max() <= 0.5
    assert half.train.size == half.test.size == (16, 16) and half.crop_padding == 1
    assert half.mean[0] == pytest.approx(half.train.images.float().mean().item() / 255, rel=1e-5)
    assert torch.equal(half.test.labels, whole.test.labels)
