"""Folders as users have them: which files are images, which are left out, and the messages about them."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from resnet_fast.data import DataError, load_folder
from resnet_fast.data.listing import image_endings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part in ("train", "test"):
        for level, name in enumerate(("cat", "dog")):
            for i in range(2):
                put(tmp_path / part / name / f"{i}.png", 50 + 100 * level + 9 * i)
    return tmp_path


def put(path: Path, level: int = 77) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level, level // 2, 255 - level)).save(path, "PNG")
    return path


def names(split) -> list[str]:
    return [f"{Path(path).parent.name}/{Path(path).name}" for path, _ in split.images.samples]


ORDINARY = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]


def test_an_ordinary_folder_has_nothing_to_say(root: Path):
    dataset = load_folder(root, 8)
    assert names(dataset.train) == names(dataset.test) == ORDINARY
    assert dataset.classes == ("cat", "dog") and dataset.notes == ()
    assert [label for _, label in dataset.train.images.samples] == [0, 0, 1, 1]  # type: ignore[attr-defined]


def test_the_order_is_that_of_torchvision(root: Path):
    datasets = pytest.importorskip("torchvision.datasets")
    for name in ("cat/b/2.png", "cat/b-c/3.png", "cat/b/d/4.png", "cat/B.png", "cat/a.png", "Z/1.png", "ähre/1.png"):
        put(root / "train" / name)
        put(root / "test" / name)
    reference, dataset = datasets.ImageFolder(str(root / "train")), load_folder(root, 8)
    assert list(dataset.classes) == reference.classes
    assert dataset.train.images.samples == reference.samples  # type: ignore[attr-defined]


@pytest.mark.parametrize("ending", ["gif", "JPG", "Tiff"])
def test_every_ending_of_pillow_counts_in_any_case(ending: str, root: Path):
    put(root / "train" / "cat" / f"x.{ending}")
    assert f"cat/x.{ending}" in names(load_folder(root, 8).train)


def test_an_ending_that_pillow_only_writes_is_no_image():
    assert ".pdf" not in image_endings() and {".png", ".jpg", ".webp"} <= image_endings()


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/0.png",
        "__MACOSX/0.png",
        "cat/._0.png",
        "cat/.DS_Store",
        "cat/Thumbs.db",
        ".DS_Store",
    ],
)
def test_what_hides_is_no_image_and_no_class(name: str, root: Path):
    put(root / "train" / name)
    dataset = load_folder(root, 8)
    assert names(dataset.train) == ORDINARY and dataset.classes == ("cat", "dog") and dataset.notes == ()


def test_files_left_out_are_counted_and_named(root: Path):
    for name in ("train/cat/notes.txt", "train/dog/x", "test/dog/x.csv", "test/beside.png"):
        put(root / name)
    dataset = load_folder(root, 8)
    assert names(dataset.train) == names(dataset.test) == ORDINARY
    assert dataset.notes == (
        "3 of 12 files left out, without an image's extension: train/cat/notes.txt; train/dog/x; test/dog/x.csv",
        "1 of 12 files left out, not in a class folder: test/beside.png",
    )


def test_of_many_files_the_first_twenty_are_named(root: Path):
    for i in range(23):
        put(root / "train" / "cat" / f"{i:02}.txt")
    (note,) = load_folder(root, 8).notes
    assert note.endswith("; train/cat/19.txt and 3 more") and note.count(".txt") == 20


@pytest.mark.parametrize("target", [".", ".."], ids=str)
def test_links_that_loop_end(target: str, root: Path):
    os.symlink(target, root / "train" / "cat" / "loop")
    train = load_folder(root, 8).train
    assert set(ORDINARY) <= set(names(train)) and len(train) <= 10


def test_a_link_to_itself_is_a_file_without_an_ending(root: Path):
    os.symlink("loop", root / "train" / "cat" / "loop")
    assert load_folder(root, 8).notes == ("1 of 9 files left out, without an image's extension: train/cat/loop",)


def test_many_links_to_one_folder_are_followed_once(root: Path):
    chain = [root / "links" / str(i) for i in range(30)]  # 2^30 paths
    for i, folder in enumerate(chain):
        folder.mkdir(parents=True)
        for name in ("one", "two"):
            os.symlink(chain[i + 1] if i + 1 < len(chain) else root / "train" / "dog", folder / name)
    os.symlink(chain[0], root / "train" / "cat" / "more")
    assert len(load_folder(root, 8).train) == 6


def test_a_link_to_a_class_elsewhere_is_followed(root: Path):
    for part in ("train", "test"):
        (root / part / "cat").rename(root / f"cats-{part}")
        os.symlink(root / f"cats-{part}", root / part / "cat")
    assert names(load_folder(root, 8).train) == ORDINARY


BAD = {"train/cat/bad.png": b"no image", "test/dog/empty.png": b"", "train/dog/cut.jpg": b"\xff\xd8\xff\xe0\0\x10JF"}


@pytest.fixture
def damaged(root: Path) -> Path:
    for name, content in BAD.items():
        (root / name).write_bytes(content)
    os.mkfifo(root / "train" / "dog" / "pipe.png")
    return root


@pytest.mark.parametrize("workers", [2])
def test_all_unreadable_images_are_named_at_once(workers: int, damaged: Path):
    with pytest.raises(DataError) as caught:
        load_folder(damaged, 8, workers)
    message = str(caught.value)
    assert message.startswith("4 of 12 images cannot be read (--skip-unreadable leaves them out): ")
    for name in (*BAD, "train/dog/pipe.png"):
        assert f"{damaged / name}: " in message
    assert "\n" not in message and "Traceback" not in message


def test_of_many_unreadable_images_twenty_are_named(root: Path):
    for i in range(33):
        (root / "train" / "cat" / f"x{i:02}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^33 of 41 images .*x19\.png: [^;]* and 13 more$"):
        load_folder(root, 8)


@pytest.mark.parametrize("workers", [1])
def test_an_image_that_is_lost_later_is_named(workers: int, root: Path):
    dataset = load_folder(root, 8, workers)
    for name in ("train/cat/1.png", "test/dog/0.png"):
        (root / name).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^2 of 8 images .*train/cat/1\.png: .*test/dog/0\.png: "):
        list(dataset.train.to(torch.device("cpu"), "stream").batches(2))


@pytest.mark.parametrize("workers", [0])
def test_unreadable_images_may_be_skipped(workers: int, damaged: Path):
    dataset = load_folder(damaged, 8, workers, skip_unreadable=True)
    assert names(dataset.train) == names(dataset.test) == ORDINARY
    (note,) = dataset.notes
    assert note.startswith("4 of 12 images left out, unreadable: train/cat/bad.png: not an image in a format")
    images, labels = next(dataset.train.batches(9))
    assert len(images) == 4 and labels.tolist() == [0, 0, 1, 1]


def test_skipping_changes_nothing_where_all_can_be_read(root: Path):
    skipped, plain = load_folder(root, 8, skip_unreadable=True), load_folder(root, 8)
    assert skipped.train.images == plain.train.images and skipped.notes == ()  # type: ignore[attr-defined]
    assert (skipped.mean, skipped.std) == (plain.mean, plain.std)


def test_a_class_without_a_readable_image_is_named(root: Path):
    for i in range(2):
        (root / "test" / "dog" / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"no image can be read in dog/ of .*test: .*0\.png: not an image in a format"):
        load_folder(root, 8, skip_unreadable=True)


CLASSES = {
    "owl/": r"owl/ \(no visible files\)",
    "owl/.DS_Store": r"owl/ \(no visible files\)",
    "owl/notes.txt": r"owl/ \(1 files, none with an image's extension\)",
}


@pytest.mark.parametrize(("name", "reason"), CLASSES.items(), ids=CLASSES.keys())
def test_a_class_without_an_image_is_named_with_the_reason(name: str, reason: str, root: Path):
    path = root / "train" / name
    path.mkdir(parents=True) if name.endswith("/") else put(path)
    with pytest.raises(DataError, match=f"no images to use in .*train: {reason}; expected"):
        load_folder(root, 8)


def test_images_without_class_folders_are_no_classes(tmp_path: Path):
    for part in ("train", "test"):
        put(tmp_path / part / "0.png")
    with pytest.raises(DataError, match="no images to use in .*train: no class folder; expected"):
        load_folder(tmp_path, 8)


def test_a_class_whose_name_is_not_utf8_is_refused_by_name(root: Path):
    try:
        os.mkdir(os.fsencode(root) + b"/train/caf\xe9")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    with pytest.raises(DataError, match=r"the name of the class folder .*/train/caf\\xe9 is not UTF-8; rename it"):
        load_folder(root, 8)


def test_images_that_show_nothing_give_a_warning(root: Path):
    for path in root.glob("train/*/*.png"):
        Image.new("RGB", (8, 8), (7, int(path.stem) * 99, 7)).save(path)
    (note,) = load_folder(root, 8).notes
    assert note.startswith("the training images hardly vary in red, blue: ")


@pytest.mark.parametrize("name", ["val", "Test"])
def test_another_name_for_test_is_named(name: str, root: Path):
    (root / "test").rename(root / name)
    with pytest.raises(DataError, match=f"has no test/; rename {name}/ to test/; expected"):
        load_folder(root, 8)


def test_the_folders_that_are_there_are_named(root: Path):
    (root / "train").rename(root / "set")
    (root / "test").rename(root / "more")
    with pytest.raises(DataError, match="has no train/ and no test/, only more/, set/; expected"):
        load_folder(root, 8)


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_part_named_as_the_folder_points_above(name: str, root: Path):
    with pytest.raises(DataError, match=f"the folder above has it: use --data-dir {root};"):
        load_folder(root / name, 8)


@pytest.mark.parametrize("name", ["file", "file/below/further"])
def test_a_file_is_called_a_file(name: str, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"^{tmp_path}/file must be a folder of data, but is a file$"):
        load_folder(tmp_path / name, 8)


def test_a_part_that_is_a_file_is_called_a_file(root: Path):
    (root / "test").rename(root / "other")
    (root / "test").touch()
    with pytest.raises(DataError, match="/test must be a folder of data, but is a file"):
        load_folder(root, 8)


@pytest.mark.parametrize(("name", "value"), [("image_size", 0), ("image_size", 2.5), ("workers", -1)])
def test_a_wrong_number_is_named(name: str, value: float, root: Path):
    with pytest.raises(ValueError, match=f"^{name} must be an integer of at least [01], got {value}"):
        load_folder(root, **{name: value})  # type: ignore[arg-type]
