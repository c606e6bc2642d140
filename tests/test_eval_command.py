"""`resnet-fast eval` reports the same values as the training, to the bit, and writes them to a file."""

import csv
import errno
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from trained_run import assert_is_plain, invoke, make_image_folder, rewrite, train_tiny, use_tiny

from resnet_fast.cli import evaluate
from resnet_fast.data import DataError, load_dataset
from resnet_fast.evaluation import Predictions, predict_split
from resnet_fast.inference import load_trained
from resnet_fast.training import Result

FILES = ["confusion.png", "mistakes.png", "predictions.csv"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Result:
    return train_tiny(tmp_path_factory.mktemp("digits") / "run", precision="bf16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Result:
    path = tmp_path_factory.mktemp("folder")
    return train_tiny(
        path / "run", dataset="folder", data_dir=make_image_folder(path / "images"), image_size=24, batch_size=8
    )


@pytest.fixture
def pictures() -> None:
    """For a test of the pictures; in the others nothing is drawn, which would take most of the time."""


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    use_tiny(monkeypatch)
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("resnet_fast.evaluation.write_pictures", name_pictures)


def name_pictures(out: Path, found: Predictions, classes: tuple[str, ...], title: str, suffix: str) -> list[str]:
    names = [f"confusion{suffix}.png", f"mistakes{suffix}.png"]
    for name in names:
        (out / name).touch()
    return names


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_the_numbers_are_those_of_the_training_to_the_bit(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trained, seen = request.getfixturevalue(name), []

    def spy(*args, **kwargs) -> Predictions:
        seen.append(predict_split(*args, **kwargs))
        return seen[0]

    monkeypatch.setattr("resnet_fast.evaluation.predict_split", spy)
    result = invoke("eval", trained.out, "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    last = trained.history[-1]
    assert (seen[0].loss, seen[0].accuracy) == (last.test_loss, last.test_accuracy)
    assert f"accuracy     {100 * last.test_accuracy:6.2f} %" in result.stdout
    assert f"loss         {last.test_loss:6.4f}" in result.stdout


def test_it_is_plain_and_leaves_its_files_in_the_run_folder(pictures: None, digits: Result):
    before = {path.name: path.read_bytes() for path in digits.out.iterdir() if path.name not in FILES}
    result = invoke("eval", digits.out)
    assert result.exit_code == 0, result.output
    assert_is_plain(result)
    assert f"confusion.png, mistakes.png, predictions.csv: {digits.out}" in result.stdout
    after = {path.name: path.read_bytes() for path in digits.out.iterdir()}
    assert sorted(after.keys() - before.keys()) == FILES and before.items() <= after.items()
    for name in FILES[:2]:
        with Image.open(digits.out / name) as image:
            image.load()


def test_every_image_has_its_row(digits: Result, tmp_path: Path):
    result = invoke("eval", digits.out / "checkpoint.pt", "--out", tmp_path / "new" / "folder")
    rows = rows_of(tmp_path / "new" / "folder" / "predictions.csv")
    test = load_dataset("digits").test
    labels = torch.cat([labels for _, labels in test.batches(100)]).tolist()
    assert [row["index"] for row in rows] == [str(i) for i in range(360)]
    assert [row["label"] for row in rows] == [str(label) for label in labels]
    n_right = sum(row["label"] == row["prediction"] for row in rows)
    assert f"{n_right} of 360" in result.stdout
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows) and "path" not in rows[0]


def test_the_table_and_the_matrix_agree_with_the_rows(digits: Result, tmp_path: Path):
    result = invoke("eval", digits.out, "--out", tmp_path)
    rows = rows_of(tmp_path / "predictions.csv")
    lines = result.stdout.splitlines()
    matrix = lines[lines.index(next(line for line in lines if line.startswith("confusion matrix"))) + 2 :][:10]
    for i, line in enumerate(matrix):
        name, *cells = line.replace(".", "0").split()
        counts = [sum(row["label"] == name and row["prediction"] == str(j) for row in rows) for j in range(10)]
        assert name == str(i) and [int(cell) for cell in cells] == counts
        table = next(line for line in lines if re.match(rf"{i} +36 ", line))
        assert f"{100 * counts[i] / 36:.2f} %" in table


def test_images_of_a_folder_are_named_by_their_path(folder: Result, tmp_path: Path):
    invoke("eval", folder.out, "--out", tmp_path)
    for row in rows_of(tmp_path / "predictions.csv"):
        assert Path(row["path"]).is_file() and Path(row["path"]).parent.name == row["label"]


def test_mirror_images_are_asked_about_only_where_they_show_their_class(digits: Result, folder: Result, tmp_path: Path):
    line = r"with flip +\d+\.\d\d %  mean logits of each image and its mirror image"
    assert not re.search(line, invoke("eval", digits.out, "--out", tmp_path).stdout)
    assert re.search(line, invoke("eval", folder.out, "--out", tmp_path).stdout)


def test_the_user_may_have_said_that_they_do_not(folder: Result, tmp_path: Path):
    copy = tmp_path / "checkpoint.pt"
    copy.write_bytes((folder.out / "checkpoint.pt").read_bytes())
    rewrite(copy, config={**load_trained(copy).config, "flip": "none"})
    result = invoke("eval", copy)
    assert result.exit_code == 0 and "with flip" not in result.stdout


def test_what_was_held_out_is_evaluated_and_the_test_images_only_if_asked_for(tmp_path: Path):
    images = make_image_folder(tmp_path / "images")
    run = train_tiny(
        tmp_path / "run", dataset="folder", data_dir=images, image_size=16, holdout=6, batch_size=8, recipe="digits"
    )
    result = invoke("eval", run.out)
    assert "6 validation images" in result.stdout
    assert f"accuracy     {100 * run.test_accuracy:6.2f} %" in result.stdout
    assert "18 train images" in invoke("eval", run.out, "--split", "train").stdout
    before = (run.out / "predictions.csv").read_bytes()
    assert "9 test images" in invoke("eval", run.out, "--split", "test").stdout
    assert (run.out / "confusion-test.png").exists() and (run.out / "predictions.csv").read_bytes() == before


def test_nothing_held_out_is_no_validation(digits: Result):
    result = invoke("eval", digits.out, "--split", "validation")
    assert result.exit_code == 2 and "split validation needs a run with --holdout" in result.stderr


def test_training_images_get_files_of_their_own(folder: Result, tmp_path: Path):
    result = invoke("eval", folder.out, "--split", "train", "--out", tmp_path)
    assert "24 train images" in result.stdout
    names = ["confusion-train.png", "mistakes-train.png", "predictions-train.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_other_data_of_the_same_classes_may_be_named(folder: Result, tmp_path: Path):
    data = make_image_folder(tmp_path / "data", n_train=2)
    result = invoke("eval", folder.out, "--data-dir", data, "--out", tmp_path, "--batch-size", 4, "--precision", "fp32")
    assert result.exit_code == 0 and "cpu, fp32, batch 4" in result.stdout
    assert str(data) in rows_of(tmp_path / "predictions.csv")[0]["path"]


def test_data_of_other_classes_are_refused(folder: Result, tmp_path: Path):
    data = make_image_folder(tmp_path / "data", ["ape", "bee", "dog"])
    result = invoke("eval", folder.out, "--data-dir", data, "--out", tmp_path / "out")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "the network knows 3 classes, the data have 3: only the network has 'cow'; only the data" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["absent"], 2, "absent does not exist; a run folder or a checkpoint in one is needed"),
        (["RUN", "--device", "gpu"], 2, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["RUN", "--split", "val"], 2, "split must be one of test, train, validation, got 'val'"),
        (["RUN", "--batch-size", "0"], 2, "--batch-size"),
        (["BAD"], 1, "checkpoint.pt is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_named(args: list[str], code: int, message: str, digits: Result, tmp_path: Path):
    (tmp_path / "checkpoint.pt").touch()
    result = invoke("eval", *[{"RUN": digits.out, "BAD": tmp_path}.get(arg, arg) for arg in args])
    assert result.exit_code == code and message in result.stderr
    assert result.stdout == "" and "Traceback" not in result.output


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (DataError("cannot read the image x"), 1)])
def test_what_stops_it_is_said_in_a_line(
    error: BaseException, code: int, digits: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*args, **kwargs):
        raise error

    monkeypatch.setattr("resnet_fast.evaluation.predict_split", stop)
    result = invoke("eval", digits.out, "--out", tmp_path)
    assert result.exit_code == code and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_ends_it_without_a_message(digits: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write_to_closed_pipe(*args, **kwargs):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")  # as `print` does after `| head`

    monkeypatch.setattr("resnet_fast.evaluation.predict_split", write_to_closed_pipe)
    result = invoke("eval", digits.out, "--out", tmp_path)
    assert (result.exit_code, result.stderr) == (1, "")


NAMES = {
    "2 classes": ["cat", "dog"],
    "10 long names": [f"a rather long name of a class, number {i}" for i in range(10)],
    "wide characters": ["猫" * 30, "犬", "鳥"],
    "control characters": ["a\x1b[31mb", "c\nd"],
    "100 classes": [f"class {i}" for i in range(100)],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES.keys())
def test_every_line_fits_80_columns(names: list[str]):
    from rich.cells import cell_len

    n = len(names)
    labels = torch.arange(5000) % n
    predictions = torch.where(torch.arange(5000) % 7 == 0, (labels + 1) % n, labels)
    found = Predictions(0.123, labels, predictions, torch.rand(5000), labels, None)  # type: ignore[arg-type]
    trained = type("Trained", (), {"classes": tuple(names)})()
    lines = evaluate.format_evaluation(found, trained)
    assert max(map(cell_len, lines)) <= 80 and all(line.isprintable() for line in lines)
    assert ("confusion matrix" in "".join(lines)) is (n <= 10)
    table = [line for line in lines if re.search(r"\d+\.\d\d %  \S", line) and "mirror" not in line][1:]
    assert len(table) == min(n, 20) and any("20 worst of 100" in line for line in lines) is (n == 100)


def test_a_class_without_images_has_no_accuracy():
    labels = torch.tensor([0, 0, 1])
    found = Predictions(0.1, labels, torch.tensor([0, 1, 1]), torch.rand(3), None, None)  # type: ignore[arg-type]
    lines = evaluate.format_evaluation(found, type("Trained", (), {"classes": ("a", "b", "none")})())
    assert [line.split()[1:] for line in lines if line.startswith("none ")][0] == ["0", "-", "-"]
