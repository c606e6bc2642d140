"""Metrics of a network's predictions are right, and the pictures show them."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from resnet_fast.data import TensorSplit, normalize
from resnet_fast.evaluation import (
    Predictions,
    confusion,
    draw_confusion,
    draw_mistakes,
    mistakes,
    predict_split,
    write_pictures,
)
from resnet_fast.evaluation.confusion import shorten
from resnet_fast.evaluation.mistakes import describe_mistakes

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


class Linear(nn.Module):
    def __init__(self, n_classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3 * 8 * 8, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def make_split(n_images: int = 50, n_classes: int = 4) -> TensorSplit:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n_images, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return TensorSplit(images, torch.randint(0, n_classes, (n_images,), generator=generator))


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(normalize(images, MEAN, STD))


@pytest.mark.parametrize("batch_size", [7, 50, 64])
def test_answers_are_those_of_all_images_at_once(batch_size: int):
    model, split = Linear().train(), make_split()
    found = predict_split(model, split, MEAN, STD, batch_size=batch_size, precision="fp32", flip=True)
    logits = logits_of(model, split.images)
    assert not model.training
    assert torch.equal(found.labels, split.labels) and torch.equal(found.predictions, logits.argmax(1))
    torch.testing.assert_close(found.probabilities, logits.softmax(1).amax(1))
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, split.labels)), rel=1e-6)
    assert found.accuracy == found.n_correct / 50 == float((logits.argmax(1) == split.labels).double().mean())
    mirrored = (logits + logits_of(model, split.images.flip(3))).argmax(1)
    assert found.flipped is not None and torch.equal(found.flipped, mirrored)
    assert not torch.equal(mirrored, found.predictions)  # else the line above would hold without a flip
    assert found.flip_accuracy == float((mirrored == split.labels).double().mean())


def test_without_a_flip_there_is_no_such_accuracy():
    found = predict_split(Linear(), make_split(), MEAN, STD, batch_size=8, precision="fp32")
    assert found.flipped is None and found.flip_accuracy is None


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_in_a_low_precision_the_network_runs_under_autocast(precision: str, dtype: torch.dtype):
    found = predict_split(Linear(), make_split(), MEAN, STD, batch_size=8, precision=precision)
    with torch.autocast("cpu", dtype=dtype):
        logits = logits_of(Linear(), make_split().images)
    assert logits.dtype == dtype and found.probabilities.dtype == torch.float32
    torch.testing.assert_close(found.probabilities, logits.float().softmax(1).amax(1))


def test_the_matrix_counts_rows_of_the_true_class():
    split = make_split()
    found = predict_split(Linear(), split, MEAN, STD, batch_size=8, precision="fp32")
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for label, prediction in zip(found.labels.tolist(), found.predictions.tolist(), strict=True):
        expected[label, prediction] += 1
    assert torch.equal(found.confusion(4), expected)
    assert found.confusion(6).shape == (6, 6) and int(found.confusion(6).sum()) == 50


@pytest.mark.parametrize("count", [0, 5])
def test_the_worst_mistakes_are_kept_with_their_images(count: int):
    split = make_split()
    found = predict_split(Linear(), split, MEAN, STD, batch_size=7, precision="fp32", n_mistakes=count)
    wrong = [i for i in range(50) if found.predictions[i] != found.labels[i]]
    worst = sorted(wrong, key=lambda i: -float(found.probabilities[i]))[:count]
    assert len(wrong) > 5
    assert torch.equal(found.mistakes.images, split.images[worst])
    assert torch.equal(found.mistakes.labels, split.labels[worst])
    assert torch.equal(found.mistakes.predictions, found.predictions[worst])
    assert torch.equal(found.mistakes.probabilities, found.probabilities[worst])


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="no images"):
        predict_split(Linear(), make_split(0), MEAN, STD, batch_size=8, precision="fp32")


def pixels_of(file: io.BytesIO) -> np.ndarray:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


def texts_of(draw, module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a drawing says, in cells, titles and labels."""
    texts = []

    def savefig(figure, file, format):
        from matplotlib.text import Text

        figure.draw_without_rendering()
        texts.extend(text.get_text() for text in figure.findobj(Text) if text.get_text())

    monkeypatch.setattr(module.Figure, "savefig", savefig)
    draw(io.BytesIO())
    return texts


@pytest.mark.slow
def test_a_confusion_is_a_picture(n_classes: int = 30):
    matrix = torch.eye(n_classes, dtype=torch.int64) * 900
    matrix[0, 1] = 90
    file = io.BytesIO()
    draw_confusion(file, matrix, [f"class {i}" for i in range(n_classes)], "a title")
    pixels = pixels_of(file)
    assert 900 <= pixels.shape[0] <= 2200 and 900 <= pixels.shape[1] <= 2400
    blue, red = pixels[..., 2].astype(int), pixels[..., 0].astype(int)
    assert (blue - red > 30).any() and (red - blue > 80).any()  # what is right, and the error


@pytest.mark.parametrize(("n_classes", "fit"), [(20, True), pytest.param(100, False, marks=pytest.mark.slow)])
def test_numbers_stand_where_they_fit(n_classes: int, fit: bool, monkeypatch: pytest.MonkeyPatch):
    matrix = torch.eye(n_classes, dtype=torch.int64) * 12345
    matrix[0, 1] = 67
    names = [f"class {i}" for i in range(n_classes)]
    texts = texts_of(lambda file: draw_confusion(file, matrix, names), confusion, monkeypatch)
    assert (texts.count("12345") == n_classes) is fit and ("67" in texts) is fit
    assert "0" not in texts
    assert set(names) <= set(texts)


def test_an_error_shows_however_rare_its_class_is(monkeypatch: pytest.MonkeyPatch):
    """Of 10 and of 10,000 images a tenth is wrong: the same color."""
    matrix = torch.tensor([[9000, 1000, 0], [0, 9, 1], [0, 0, 0]])
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda axes, pixels, **rest: drawn.append(pixels))
    draw_confusion(io.BytesIO(), matrix, ["many", "few", "none"])
    (pixels,) = drawn
    assert np.array_equal(pixels[0, 1], pixels[1, 2]) and np.array_equal(pixels[0, 0], pixels[1, 1])
    luminance = pixels[..., :3] @ [0.2126, 0.7152, 0.0722]
    assert luminance[0, 1] < luminance[0, 0] < 1  # what is right is paler than a tenth that is wrong
    assert np.array_equal(pixels[2], np.ones((3, 4)))  # a class without images


def test_names_of_any_kind_are_drawn():
    names = ["a$b$", "x" * 200, "two\nlines", "猫", ""]
    draw_confusion(io.BytesIO(), torch.ones(5, 5, dtype=torch.int64), names, "$title")
    labels = torch.arange(5)
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    draw_mistakes(io.BytesIO(), images, labels, labels.roll(1), torch.rand(5), names)
    assert shorten("x" * 200, 10) == "xxxxxxxxx…" and shorten("two\nlines", 10) == "two?lines"


def test_a_matrix_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"matrix must have shape \(3, 3\), got \(2, 2\)"):
        draw_confusion(io.BytesIO(), torch.zeros(2, 2, dtype=torch.int64), ["a", "b", "c"])


def test_the_grid_shows_the_most_confident_mistakes_first(monkeypatch: pytest.MonkeyPatch):
    labels, predictions = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    probabilities = torch.tensor([0.5, 0.99, 0.75, 0.9999])
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)

    def draw(file, n=25):
        draw_mistakes(file, images, labels, predictions, probabilities, ["ant", "bee", "cow"], n)

    texts = texts_of(draw, mistakes, monkeypatch)
    assert [text for text in texts if "\n" in text] == [
        "ant\n→ cow, > 99.9 %",
        "cow\n→ ant, 75.0 %",
        "ant\n→ bee, 50.0 %",
    ]
    assert any(text.startswith("All 3 mistakes in 4 images") for text in texts)
    texts = texts_of(lambda file: draw(file, 1), mistakes, monkeypatch)
    assert [text for text in texts if "\n" in text] == ["ant\n→ cow, > 99.9 %"]
    assert any(text.startswith("The 1 most confident of 3 mistakes in 4 images") for text in texts)


@pytest.mark.parametrize("count", [0, 6])
def test_any_number_of_mistakes_is_a_picture(count: int):
    labels = torch.zeros(30, dtype=torch.int64)
    predictions = labels.clone()
    predictions[:count] = 1
    images = torch.full((30, 3, 8, 8), 77, dtype=torch.uint8)
    images[:, 0] = 200
    file = io.BytesIO()
    draw_mistakes(file, images, labels, predictions, torch.full((30,), 0.5), ["a", "b"])
    assert (pixels_of(file) == [200, 77, 77]).all(-1).any() == (count > 0)


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ((0, 0, 10_000), "No mistake in 10,000 images"),
        ((1, 1, 9), "The only mistake in 9 images: true → predicted, probability"),
        ((25, 1234, 10_000), "The 25 most confident of 1,234 mistakes in 10,000 images: true → predicted, probability"),
    ],
)
def test_the_title_says_how_many(counts: tuple[int, int, int], text: str):
    assert describe_mistakes(*counts) == text


def test_pixels_are_not_smoothed():
    """An image of two colors is drawn in these two colors alone."""
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    images[:, 0, :, ::2] = 255
    file = io.BytesIO()
    draw_mistakes(file, images, torch.tensor([0]), torch.tensor([1]), torch.tensor([0.5]), ["a", "b"])
    pixels = pixels_of(file)
    rows = pixels[(pixels == [255, 0, 0]).all(-1).any(1)]
    reddish = rows[(rows[..., 0] > rows[..., 1])]
    assert len(reddish) and (reddish == [255, 0, 0]).all()


def found_by(model: nn.Module, split: TensorSplit) -> Predictions:
    return predict_split(model, split, MEAN, STD, batch_size=16, precision="fp32")


def test_both_pictures_are_written_whole(tmp_path: Path):
    found = found_by(Linear(), make_split())
    names = write_pictures(tmp_path, found, list("abcd"), "network on data")
    assert sorted(path.name for path in tmp_path.iterdir()) == names == ["confusion.png", "mistakes.png"]
    assert len(found) == 50
    for path in tmp_path.iterdir():
        pixels_of(io.BytesIO(path.read_bytes()))


def test_a_network_without_a_mistake_is_said_to_make_none(tmp_path: Path):
    model, split = Linear(), make_split()
    right = TensorSplit(split.images, logits_of(model, split.images).argmax(1))
    found = found_by(model, right)
    assert found.accuracy == 1 and len(found.mistakes.labels) == 0
    write_pictures(tmp_path, found, list("abcd"))
    pixels_of(io.BytesIO((tmp_path / "mistakes.png").read_bytes()))
