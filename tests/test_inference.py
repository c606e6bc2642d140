"""A checkpoint alone gives the network back, and an image file becomes what the network was trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trained_run import rewrite, train_tiny, use_tiny

from resnet_fast.data import load_dataset, load_folder
from resnet_fast.inference import CheckpointError, ImageError, classify, load_trained, read_image
from resnet_fast.training import Result


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Result:
    return train_tiny(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture
def run(trained: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run folder, which a test may spoil."""
    use_tiny(monkeypatch)
    for name in ("config.json", "checkpoint.pt"):
        (tmp_path / name).write_bytes((trained.out / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", ["", "checkpoint.pt"], ids=("run folder", "checkpoint"))
def test_the_network_that_was_trained_comes_back(name: str, run: Path, trained: Result):
    loaded, dataset = load_trained(run / name), load_dataset("digits")
    assert not loaded.model.training
    for key, value in trained.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key
    assert loaded.classes == dataset.classes
    assert loaded.mean == pytest.approx(dataset.mean) and loaded.std == pytest.approx(dataset.std)
    assert (loaded.image_size, loaded.epoch, loaded.config["seed"]) == (32, 1, 0)
    assert loaded.path == run / "checkpoint.pt"


def test_a_checkpoint_needs_no_run_folder(run: Path, tmp_path: Path):
    alone = tmp_path / "elsewhere" / "weights.pt"
    alone.parent.mkdir()
    (run / "checkpoint.pt").rename(alone)
    assert load_trained(str(alone)).epoch == 1


@pytest.mark.parametrize("name", ["absent", "file.pt"])
def test_what_is_not_there_is_named(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"{name} does not exist; a run folder or a checkpoint"):
        load_trained(tmp_path / name)


def test_a_folder_of_something_else_is_no_run_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="is no run folder: neither checkpoint.pt nor config.json is there"):
        load_trained(tmp_path)


def test_a_run_without_a_finished_epoch_says_so(run: Path):
    (run / "checkpoint.pt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is missing: no epoch of that run was finished"):
        load_trained(run)


def test_a_flipped_bit_is_seen_and_the_checkpoint_before_is_offered(run: Path):
    data = bytearray((run / "checkpoint.pt").read_bytes())
    (run / "checkpoint-previous.pt").write_bytes(data)
    data[len(data) // 2] ^= 1
    (run / "checkpoint.pt").write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"is damaged: its SHA-256 .*checkpoint-previous\.pt is of the epoch before"
    ):
        load_trained(run)
    assert load_trained(run / "checkpoint-previous.pt").epoch == 1
    (run / "checkpoint-previous.pt").unlink()
    with pytest.raises(CheckpointError, match="written with it$"):
        load_trained(run)


def test_a_file_of_another_program_is_refused(run: Path):
    torch.save({"model": {}}, run / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="of another program or of an older version"):
        load_trained(run)


@pytest.mark.parametrize("name", ["mean", "std", "image_size"])
def test_a_checkpoint_of_an_earlier_version_says_what_it_lacks(name: str, run: Path):
    rewrite(run / "checkpoint.pt", **{name: None})
    with pytest.raises(CheckpointError, match=f"checkpoint.pt holds no {name}: it is of an earlier version"):
        load_trained(run)


def test_weights_that_do_not_fit_are_refused(run: Path):
    rewrite(run / "checkpoint.pt", classes=["a", "b"])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt does not fit resnet18 \(cifar stem\): .*fc.weight"):
        load_trained(run)


def test_an_unknown_network_is_refused(run: Path):
    config = torch.load(run / "checkpoint.pt", weights_only=True)["config"]
    rewrite(run / "checkpoint.pt", config={**config, "model": "resnet19"})
    with pytest.raises(CheckpointError, match="of the network 'resnet19', which this version does not have"):
        load_trained(run)


def test_probabilities_are_those_of_the_split(run: Path, trained: Result):
    loaded, dataset = load_trained(run), load_dataset("digits")
    probabilities = classify(loaded, dataset.test.images[5])  # type: ignore[attr-defined]
    assert probabilities.shape == (10,) and float(probabilities.sum()) == pytest.approx(1)
    with torch.no_grad():
        images = dataset.test.images[5:6].float() / 255  # type: ignore[attr-defined]
        mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
        expected = trained.model((images - mean) / std)[0].softmax(0)
    torch.testing.assert_close(probabilities, expected)


def picture(height: int = 37, width: int = 53) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows * 7 + columns * 5) % 256], -1).astype(np.uint8)


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def test_an_image_is_read_as_the_data_set_of_a_folder_reads_it(tmp_path: Path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            saved(tmp_path / part / name / "0.png", Image.fromarray(picture()))
    images, _ = next(iter(load_folder(tmp_path, 24).test.batches(1)))
    assert torch.equal(read_image(tmp_path / "test" / "a" / "0.png", 24), images[0])


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (500, 3), (37, 53)], ids=str)
def test_any_size_becomes_that_of_the_training(size: tuple[int, int], tmp_path: Path):
    image = read_image(saved(tmp_path / "x.png", Image.fromarray(picture(*size))), 32)
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8


@pytest.mark.parametrize(
    ("name", "mode"),
    [("x.png", "RGBA"), ("x.webp", "RGB"), ("x.bmp", "RGB"), ("x.tiff", "RGB"), ("x.jpg", "CMYK"), ("x.ppm", "RGB")],
)
def test_formats_and_modes_give_the_same_picture(name: str, mode: str, tmp_path: Path):
    options = {"lossless": True} if name == "x.webp" else {"quality": 98} if name == "x.jpg" else {}
    image = read_image(saved(tmp_path / name, Image.fromarray(picture()).convert(mode), **options), 32)
    expected = read_image(saved(tmp_path / "rgb.png", Image.fromarray(picture())), 32)
    distance = (image.float() - expected.float()).abs().mean()
    assert distance <= (8 if name == "x.jpg" else 0)  # JPEG loses some


def test_gray_images_get_three_equal_channels(tmp_path: Path):
    image = read_image(saved(tmp_path / "x.png", Image.fromarray(picture()).convert("L")), 32)
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2]) and image.float().std() > 10


def test_a_palette_with_transparency_keeps_its_colors(tmp_path: Path):
    image = Image.fromarray(picture()).quantize(64)
    plain = read_image(saved(tmp_path / "plain.png", image), 32)
    assert torch.equal(read_image(saved(tmp_path / "x.png", image, transparency=bytes(64)), 32), plain)


def test_16_bit_gray_is_scaled_and_not_cut_off(tmp_path: Path):
    gray = np.asarray(Image.fromarray(picture()).convert("L"))
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    expected = read_image(saved(tmp_path / "8.png", Image.fromarray(gray)), 32)
    assert torch.equal(read_image(saved(tmp_path / "16.png", deep), 32), expected)


def test_a_photo_taken_on_its_side_is_turned(tmp_path: Path):
    pixels = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    turned = read_image(saved(tmp_path / "x.png", Image.fromarray(np.rot90(pixels).copy()), exif=exif), 32)
    assert torch.equal(turned, read_image(saved(tmp_path / "y.png", Image.fromarray(pixels)), 32))


def test_of_several_images_the_first_is_taken(tmp_path: Path):
    frames = [Image.fromarray(np.full((9, 9, 3), value, dtype=np.uint8)) for value in (10, 200)]
    path = saved(tmp_path / "x.gif", frames[0], save_all=True, append_images=frames[1:])
    assert (read_image(path, 32) == 10).all()


def test_what_cannot_be_read_is_an_error_with_a_reason(tmp_path: Path):
    (tmp_path / "text.png").write_text("no image")
    whole = saved(tmp_path / "whole.png", Image.fromarray(picture(300, 300))).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    saved(tmp_path / "float.tiff", Image.fromarray(np.ones((5, 5), dtype=np.float32)))
    saved(tmp_path / "deep.tiff", Image.fromarray(np.full((5, 5), 70_000, dtype=np.int32)))
    for name, reason in {
        "absent.png": "no such file",
        ".": "is a folder; name the images in it",
        "text.png": "no image in a format that Pillow reads",
        "empty.png": "no image in a format that Pillow reads",
        "cut.png": "truncated",
        "float.tiff": "floating-point",
        "deep.tiff": "32-bit",
    }.items():
        with pytest.raises(ImageError, match=reason):
            read_image(tmp_path / name, 32)


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    (tmp_path / "x.png").touch()
    with pytest.raises(ImageError, match="^Permission denied$"):
        read_image(tmp_path / "x.png", 32)
