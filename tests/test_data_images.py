"""An image file of any kind becomes the picture that it shows, in training and predict, or a one-line error."""

import io
import os
import signal
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import COLOR, GRAY, HALF, OVER_BLACK, deep, kinds, palette, plain, png, saved, tiff
from PIL import Image

from resnet_fast.data import ImageError, images, load_folder
from resnet_fast.inference import read_image

KINDS = kinds()


def picture(height: int = 37, width: int = 53) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    channels = [rows * 255 // height, columns * 255 // width, (rows * 7 + columns * 5) % 256]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_file_of_each_kind_shows_its_color(tmp_path: Path):
    for kind in KINDS:
        image = read_image(write(tmp_path / kind.name, kind.content), 8)
        assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
        difference = (image.int() - torch.tensor(kind.color)[:, None, None]).abs().max()
        assert difference <= kind.tolerance, kind.name


@pytest.mark.parametrize("workers", [1])
def test_predict_sees_each_kind_as_training_saw_it(workers: int, tmp_path: Path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for kind in KINDS if part == "train" and name == "a" else KINDS[:1]:
                write(tmp_path / part / name / kind.name, kind.content)
            picture().save(tmp_path / part / name / "picture.png")
    train = load_folder(tmp_path, 24, workers).train
    assert len(train) == len(KINDS) + 3
    trained = torch.cat([images for images, _ in train.batches(50)])
    for image, (path, _) in zip(trained, train.images.samples, strict=True):  # type: ignore[attr-defined]
        assert torch.equal(image, read_image(path, 24)), path


MODES = {
    "RGBX": (plain("RGBX", (*COLOR, 7)), COLOR),
    "PA": (palette((*COLOR, HALF), mode="RGBA").convert("PA"), OVER_BLACK),
    "I;16B": (Image.frombytes("I;16B", (6, 4), np.full(24, GRAY * 257, ">u2").tobytes()), (GRAY,) * 3),
    "La": (plain("La", (100, HALF)), (100,) * 3),
    "RGBa": (plain("RGBa", (100, 50, 25, HALF)), (100, 50, 25)),
    "HSV": (plain().convert("HSV"), COLOR),
    "I;16N": (Image.frombytes("I;16N", (6, 4), np.full(24, GRAY * 257, "=u2").tobytes()), (GRAY,) * 3),
    "I;16L": (Image.frombytes("I;16L", (6, 4), np.full(24, GRAY * 257, "<u2").tobytes()), (GRAY,) * 3),
}


@pytest.mark.parametrize(("image", "color"), MODES.values(), ids=MODES.keys())
def test_a_mode_that_no_file_here_has(image: Image.Image, color: tuple[int, ...]):
    pixels = np.asarray(images._over_black(image))[..., :3].astype(int)
    assert abs(pixels - color).max() <= (2 if image.mode == "HSV" else 0)


def test_alpha_is_applied_before_the_image_is_resized(tmp_path: Path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0] = (0, 255, 0, 255)
    pixels[1] = (255, 0, 0, 0)  # a red that nobody sees
    path = write(tmp_path / "x.png", saved(Image.fromarray(pixels), "PNG"))
    assert read_image(path, 1)[:, 0, 0].tolist() == [0, 128, 0]


# EXIF's orientation, and how the upright picture was turned or mirrored into it.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize(
    ("kind", "orientation"), [*(("PNG", each) for each in STORED), ("TIFF", 6), ("WEBP", 7), ("JPEG", 8)]
)
def test_a_photo_is_turned_as_its_camera_was_held(orientation: int, kind: str, tmp_path: Path):
    # Blocks of 8x8 pixels are what JPEG leaves as they are.
    upright = np.kron(np.asarray(picture(3, 5)) // 64 * 64, np.ones((8, 8, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    turned = read_image(write(tmp_path / "x", saved(stored, kind, exif=exif, **options)), 32)
    expected = read_image(write(tmp_path / "y.png", saved(Image.fromarray(upright), "PNG")), 32)
    assert (turned.int() - expected.int()).abs().max() <= (4 if kind == "JPEG" else 0)


def test_a_damaged_note_of_the_orientation_costs_no_image(tmp_path: Path):
    content = saved(picture(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert torch.equal(
        read_image(write(tmp_path / "x.png", content), 32),
        read_image(write(tmp_path / "y.png", saved(picture(), "PNG")), 32),
    )


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (500, 3), (37, 53)], ids=str)
def test_any_size_becomes_that_of_the_training(size: tuple[int, int], tmp_path: Path):
    assert read_image(write(tmp_path / "x.png", saved(picture(*size), "PNG")), 32).shape == (3, 32, 32)


PNG = saved(picture(300, 300), "PNG")
BOMB = PNG[:16] + struct.pack(">II", 30_000, 30_000) + PNG[24:]
LZW = saved(picture(64, 64), "TIFF", compression="tiff_lzw")
UNREADABLE = {
    "text.png": (b"no image", "not an image in a format that Pillow reads"),
    "empty.png": (b"", "the file is empty"),
    "cut.png": (PNG[: len(PNG) // 2], "truncated"),
    "cut.jpg": (saved(picture(), "JPEG")[:-200], "truncated"),
    "bomb.png": (BOMB, "not an image|decompression bomb"),
    "damaged.tif": (LZW[:300] + bytes(500) + LZW[800:], "decoder error"),
    "negative.tiff": (
        tiff(16, struct.pack("<h", -1) * 6, sample_format=2),
        "integer pixels must be in 0 … 65535, got ",
    ),
    "deep.tiff": (saved(deep(70_000, np.int32), "TIFF"), "integer pixels must be in 0 … 65535, got "),
    "float.tiff": (saved(deep(1.5, np.float32), "TIFF"), "floating-point pixels must be in 0 … 1, got "),
    "nan.tiff": (saved(deep(np.nan, np.float32), "TIFF"), "floating-point pixels must be in 0 … 1"),
    "infinite.tiff": (saved(deep(np.inf, np.float32), "TIFF"), "floating-point pixels must be in 0 … 1"),
}


@pytest.mark.parametrize(("name", "case"), UNREADABLE.items(), ids=UNREADABLE.keys())
def test_what_cannot_be_read_is_a_one_line_error(
    name: str, case: tuple[bytes, str], tmp_path: Path, capfd: pytest.CaptureFixture, recwarn: pytest.WarningsRecorder
):
    path = write(tmp_path / name, case[0])
    with pytest.raises(ImageError, match=case[1]) as caught:
        read_image(path, 32)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "") and not recwarn.list  # neither Pillow nor libtiff speaks


def test_stderr_is_there_again_after_a_damaged_tiff(tmp_path: Path, capfd: pytest.CaptureFixture):
    with pytest.raises(ImageError):
        read_image(write(tmp_path / "x.tif", UNREADABLE["damaged.tif"][0]), 32)
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


def test_what_is_no_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    os.symlink("nowhere.png", "broken.png")
    os.symlink("loop.png", "loop.png")
    os.mkdir("folder.png")
    os.mkfifo("pipe.png")
    reasons = {
        "absent.png": "no such file",
        "broken.png": "a broken link",
        "loop.png": "Too many levels of symbolic links",
        "folder.png": r"is a folder; name the images in it, such as FOLDER/\*\.png",
        "pipe.png": "is not a regular file",
        "socket.png": "is not a regular file",
        os.devnull: "is not a regular file",
    }

    def too_late(*args: object) -> None:
        raise AssertionError("it waited for the pipe")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(5)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.png")
            for name, reason in reasons.items():
                with pytest.raises(ImageError, match=f"^{name}: {reason}$"):
                    read_image(name, 32)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_link_to_an_image_is_read(tmp_path: Path):
    os.symlink(write(tmp_path / "x.png", png(8, 2, COLOR)), tmp_path / "link.png")
    assert (read_image(tmp_path / "link.png", 4)[:, 0, 0] == torch.tensor(COLOR)).all()


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ImageError, match=r"x\.png: Permission denied$"):
        read_image(write(tmp_path / "x.png", PNG), 32)


def test_odd_metadata_are_not_spoken_of(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    content = saved(picture(), "TIFF", tiffinfo={305: "x" * 99})
    at = content.index(struct.pack("<HHI", 305, 2, 100))
    content = content[: at + 4] + struct.pack("<I", 10**6) + content[at + 8 :]  # longer than the file
    with pytest.warns(UserWarning):
        Image.open(io.BytesIO(content)).load()
    recwarn.clear()
    read_image(write(tmp_path / "x.tif", content), 32)
    assert not recwarn.list


@pytest.mark.parametrize("size", [0, 2.5], ids=str)
def test_a_wrong_size_is_named(size: object, tmp_path: Path):
    with pytest.raises(ValueError, match="^image_size must be an integer of at least 1, got"):
        read_image(write(tmp_path / "x.png", PNG), size)  # type: ignore[arg-type]
