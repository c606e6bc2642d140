"""A checkpoint alone suffices to restore the network."""

from pathlib import Path

import pytest
import torch
from trained_run import rewrite, train_tiny, use_tiny

from resnet_fast.data import load_dataset
from resnet_fast.inference import CheckpointError, classify, load_trained
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
    loaded, dataset = load_trained(run / name), load_dataset("digits", image_size=12)
    assert not loaded.model.training
    for key, value in trained.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key
    assert loaded.classes == dataset.classes
    assert loaded.mean == pytest.approx(dataset.mean) and loaded.std == pytest.approx(dataset.std)
    assert (loaded.image_size, loaded.epoch, loaded.config["seed"]) == (12, 1, 0)
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
    with pytest.raises(ValueError, match="is not a run folder: neither checkpoint.pt nor config.json is there"):
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
        CheckpointError, match=r"is damaged: its SHA-256 .*checkpoint-previous\.pt holds the epoch before"
    ):
        load_trained(run)
    assert load_trained(run / "checkpoint-previous.pt").epoch == 1
    (run / "checkpoint-previous.pt").unlink()
    with pytest.raises(CheckpointError, match="stored in it$"):
        load_trained(run)


def test_a_file_of_another_program_is_refused(run: Path):
    torch.save({"model": {}}, run / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="another program or an older version wrote it"):
        load_trained(run)


@pytest.mark.parametrize("name", ["mean", "std", "image_size"])
def test_a_checkpoint_of_an_earlier_version_says_what_it_lacks(name: str, run: Path):
    rewrite(run / "checkpoint.pt", **{name: None})
    with pytest.raises(
        CheckpointError, match=f"checkpoint.pt holds no {name}: an earlier version of this program wrote it"
    ):
        load_trained(run)


def test_weights_that_do_not_fit_are_refused(run: Path):
    rewrite(run / "checkpoint.pt", classes=["a", "b"])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt does not fit resnet18 \(cifar stem\): .*fc.weight"):
        load_trained(run)


def test_an_unknown_network_is_refused(run: Path):
    config = torch.load(run / "checkpoint.pt", weights_only=True)["config"]
    rewrite(run / "checkpoint.pt", config={**config, "model": "resnet19"})
    with pytest.raises(CheckpointError, match="holds the network 'resnet19', which this version does not have"):
        load_trained(run)


def test_probabilities_are_those_of_the_split(run: Path, trained: Result):
    loaded, dataset = load_trained(run), load_dataset("digits", image_size=12)
    probabilities = classify(loaded, dataset.test.images[5])  # type: ignore[attr-defined]
    assert probabilities.shape == (10,) and float(probabilities.sum()) == pytest.approx(1)
    with torch.no_grad():
        images = dataset.test.images[5:6].float() / 255  # type: ignore[attr-defined]
        mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
        expected = trained.model((images - mean) / std)[0].softmax(0)
    torch.testing.assert_close(probabilities, expected)
