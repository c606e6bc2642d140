"""`resnet-fast predict` classifies any image, and names each file that it cannot read."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.cells import cell_len
from trained_run import assert_is_plain, invoke, make_image_folder, train_tiny, use_tiny
from typer.testing import CliRunner

from resnet_fast.cli import app, predict
from resnet_fast.cli.text import fit, fit_path
from resnet_fast.inference import classify, load_trained, read_image
from resnet_fast.training import Result


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Result:
    path = tmp_path_factory.mktemp("predict")
    data = make_image_folder(path / "images", n_train=20)
    return train_tiny(path / "run", dataset="folder", data_dir=data, batch_size=8, epochs=3, lr=0.1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_tiny(monkeypatch)
    monkeypatch.chdir(tmp_path)


def image(name: str, size: tuple[int, int] = (41, 17), channel: int = 1) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(1).randint(0, 100, (*size, 3)) + 150 * np.eye(3, dtype=int)[channel]
    Image.fromarray(pixels.astype(np.uint8)).save(name)
    return name


def test_the_classes_of_each_image_come_the_most_probable_first(trained: Result):
    names = [image("a.png", channel=0), image("b.jpg", (300, 200), channel=1), image("c.webp", channel=2)]
    result = invoke("predict", trained.out, *names)
    assert result.exit_code == 0, result.output
    assert_is_plain(result)
    blocks = [result.stdout.split(name)[1].splitlines()[1:4] for name in names]
    assert [block[0].split()[0] for block in blocks] == ["ape", "bee", "cow"]
    loaded = load_trained(trained.out)
    for name, block in zip(names, blocks, strict=True):
        probabilities = classify(loaded, read_image(name, 32))
        for line, index in zip(block, probabilities.argsort(descending=True).tolist(), strict=True):
            assert line.startswith(f"  {loaded.classes[index]}  {100 * float(probabilities[index]):6.2f} %")


def test_the_bar_is_as_long_as_the_probability_in_ascii(trained: Result):
    result = invoke("predict", trained.out, image("a.png"))
    assert result.stdout.isascii()
    for line in result.stdout.splitlines()[1:]:
        assert line.count("#") == round(predict.BAR * float(line.split()[1]) / 100)


@pytest.mark.parametrize(("top", "shown"), [(1, 1), (50, 3)])
def test_top_is_cut_to_the_classes_that_there_are(top: int, shown: int, trained: Result):
    result = invoke("predict", trained.out, image("a.png"), "--top", top)
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 1 + shown


def test_files_that_cannot_be_read_are_named_after_which_the_others_are_done(trained: Result):
    Path("text.png").write_text("no image")
    Path("folder").mkdir()
    names = ["text.png", image("good.png"), "absent.png", "folder", image("last.png")]
    result = invoke("predict", trained.out, *names)
    assert result.exit_code == 1
    assert result.stdout.count("\n") == 8 and "good.png" in result.stdout and "last.png" in result.stdout
    assert result.stderr.splitlines() == [
        "resnet-fast: error: text.png: not an image in a format that Pillow reads",
        "resnet-fast: error: absent.png: no such file",
        "resnet-fast: error: folder: is a folder; name the images in it, such as FOLDER/*.png",
        "resnet-fast: 3 of 5 images could not be read",
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["absent", "x.png"], "absent does not exist"),
        (["RUN"], "IMAGE"),
        (["RUN", "x.png", "--top", "0"], "--top"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_exit_with_2(args: list[str], message: str, trained: Result):
    result = invoke("predict", *[trained.out if arg == "RUN" else arg for arg in args])
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


def test_a_damaged_checkpoint_exits_with_1(tmp_path: Path):
    Path("checkpoint.pt").write_bytes(b"PK")
    result = invoke("predict", "checkpoint.pt", "x.png")
    assert result.exit_code == 1 and "checkpoint.pt is cut short" in result.stderr


NAMES = {
    "long": tuple(f"{i}, a name of a class that is much too long for a line of eighty columns" for i in range(3)),
    "wide": ("猫" * 60, "犬", "b"),
    "control": ("a\x1b[31mb", "c\nd", "\u202e"),
}


@pytest.mark.parametrize("classes", NAMES.values(), ids=NAMES.keys())
def test_every_line_fits_80_columns_whatever_the_names_are(classes: tuple[str, ...]):
    trained = type("Trained", (), {"classes": classes})()
    path = Path("folder/" * 30 + "猫\n.png")
    lines = predict.format_prediction(path, torch.tensor([1.0, 0.0, 0.0]), trained, 5)
    assert max(map(cell_len, lines)) <= 80 and all(line.isprintable() for line in lines)
    assert len({cell_len(line.split("%")[0]) for line in lines[1:]}) == 1  # the columns are straight
    assert lines[0].startswith("folder/folder") and lines[0].endswith("猫?.png") and "..." in lines[0]


@pytest.mark.parametrize(("text", "width"), [("", 8), ("short", 8), ("x" * 200, 20), ("猫" * 40, 20), ("a猫" * 20, 21)])
def test_text_is_cut_to_its_columns(text: str, width: int):
    assert cell_len(fit(text, width)) == width
    assert cell_len(fit_path(text, width)) <= width
    assert fit_path(text, width) == text or "..." in fit_path(text, width)


def test_a_name_of_bytes_that_are_no_utf8_is_shown(trained: Result):
    name = os.fsdecode(b"caf\xe9.png")
    image("a.png")
    try:
        os.rename("a.png", name)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    result = invoke("predict", trained.out, name)
    assert result.exit_code == 0 and "caf?.png" in result.stdout


def test_a_log_that_takes_ascii_alone_gets_escapes(trained: Result):
    result = CliRunner(charset="ascii").invoke(app, ["predict", str(trained.out), image("猫.png")])
    assert result.exit_code == 0
    assert result.stdout_bytes.startswith(b"\\u732b.png\n  bee ") and b"\x1b" not in result.stdout_bytes
