"""A network is saved for and loaded from the Hugging Face Hub by huggingface_hub's mixin, without network access."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import DOCS, run_example
from safetensors.torch import load_file, save_file
from trained_run import invoke, train_tiny, use_tiny

from resnet_fast import CheckpointMismatch, load_checkpoint, resnet20
from resnet_fast.inference import load_trained
from resnet_fast.training import TrainConfig
from resnet_fast.training.weights import load_weights

hub_mixin = pytest.importorskip("huggingface_hub.hub_mixin")
hub = pytest.importorskip("resnet_fast.hub")

pytestmark = pytest.mark.usefixtures("on_aten")
DESCRIPTION = {"classes": ["ape", "bee", "cow"], "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3, "image_size": 16}


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return hub.HubModel("resnet20", num_classes=3, width=4, **DESCRIPTION).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("runs") / "run").out


@pytest.fixture
def pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a repository goes that is pushed."""

    class Api:
        def __init__(self, token: str | None) -> None:
            pass

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool):
            assert private is True and exist_ok
            self.repo_id = repo_id
            return self

        def upload_folder(self, folder_path: Path, **kwargs: object) -> str:
            shutil.copytree(folder_path, tmp_path / "pushed")
            return f"https://hub/{self.repo_id}"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    return tmp_path / "pushed"


def test_a_network_is_the_same_after_a_folder(model: torch.nn.Module, tmp_path: Path):
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    again = hub.HubModel.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), model(x)) and not again.training
    for name, value in DESCRIPTION.items():
        assert getattr(again, name) == (tuple(value) if isinstance(value, list) else value)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        **DESCRIPTION, "name": "resnet20", "num_classes": 3, "width": 4
    }  # fmt: skip


def test_the_pages_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The checkout stands in for its archive on GitHub, which test_hubconf.py tests."""
    monkeypatch.chdir(tmp_path)
    Path("path/to/a").mkdir(parents=True)
    Path("path/to/a/checkout").symlink_to(DOCS.parent)
    load = torch.hub.load
    monkeypatch.setattr(
        torch.hub, "load", lambda repo, *args, **kwargs: load(str(DOCS.parent), *args, **kwargs | {"source": "local"})
    )
    names = run_example(DOCS / "hubs.md")
    assert torch.equal(names["logits"], names["model"].eval()(torch.zeros(1, 3, 32, 32)))


def test_the_file_is_one_that_load_checkpoint_and_training_take(model: torch.nn.Module, tmp_path: Path):
    model.save_pretrained(tmp_path)
    bare, tuned = (resnet20(n, width=4) for n in (3, 5))
    load_checkpoint(bare, tmp_path / "model.safetensors")
    assert torch.equal(bare.fc.weight, model.model.fc.weight)
    path = TrainConfig(weights=tmp_path, model="resnet20", device="cpu").weights
    assert str(load_weights(tuned, path, "resnet20")).endswith("new last layer: 3 classes there, 5 here")
    assert torch.equal(tuned.conv1.weight, model.model.conv1.weight)


def test_the_folder_of_a_run_is_left_alone(model: torch.nn.Module, run: Path):
    before = (run / "config.json").read_bytes()
    with pytest.raises(
        ValueError, match="save_directory must not be a run folder, whose config.json would be lost, got"
    ):
        model.save_pretrained(run)
    assert (run / "config.json").read_bytes() == before and not (run / "model.safetensors").exists()


def test_weights_that_are_missing_are_not_passed_over(model: torch.nn.Module, tmp_path: Path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.fc.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"model.safetensors does not fit the model[^$]*fc.bias"):
        hub.HubModel.from_pretrained(tmp_path)


def test_damaged_weights_are_refused_and_the_file_is_named(model: torch.nn.Module, tmp_path: Path):
    torch.nn.init.constant_(model.model.conv1.weight, float("nan"))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=f"^{path} holds values that are not finite: model.conv1.weight$"):
        hub.HubModel.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"^{path} is damaged, cut short or not a safetensors file"):
        hub.HubModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_config_is_named(text: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json must hold a JSON object, as HubModel writes it"):
        hub.HubModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "resnet18"}, "must have a config.json with a network's name, as HubModel writes it"),
        ({"name": "resnt18"}, "model must be one of .*, got 'resnt18'; did you mean resnet18"),
        (
            {"name": "resnet20", "num_classes": 3, "classes": ["a"]},
            "classes must have one name for each of 3 logits, got 1",
        ),
        ({"name": "resnet20", "mean": "x"}, "mean in .*/config.json must be 3 numbers in 0 … 1, got 'x'"),
        ({"name": "resnet20", "mean": [1]}, r"mean in .*/config.json must be 3 numbers in 0 … 1, got \[1\]"),
        (
            {"name": "resnet20", "image_size": "big"},
            "image_size in .*/config.json must be an integer in 8 .*, got 'big'",
        ),
    ],
    ids=["of another library", "unknown", "classes", "mean", "short mean", "image size"],
)
def test_a_repository_of_something_else_is_refused(config: dict, message: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        hub.HubModel.from_pretrained(tmp_path)


def test_a_run_is_pushed_by_the_command(run: Path, pushed: Path, monkeypatch: pytest.MonkeyPatch):
    use_tiny(monkeypatch)
    done = invoke("push", run, "me/digits", "--private")
    assert (done.exit_code, done.stdout) == (0, "https://hub/me/digits\n"), done.output
    trained, again = load_trained(run), hub.HubModel.from_pretrained(pushed)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert (again.classes, again.mean, again.std) == (trained.classes, trained.mean, trained.std)
    assert 'HubModel.from_pretrained("me/digits")' in (pushed / "README.md").read_text()


@pytest.mark.parametrize(
    ("repo_id", "code", "message"),
    [("me/my/model", 2, "'me/my/model'"), ("me/model", 1, "me/model was not written: no way")],
    ids=["wrong name", "no way there"],
)
def test_what_cannot_be_pushed_is_told(repo_id, code, message, run, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no way")

    use_tiny(monkeypatch)
    monkeypatch.setattr(hub_mixin.HfApi, "create_repo", fail)
    done = invoke("push", run, repo_id)
    assert done.exit_code == code and message in done.stderr and done.stderr.count("\n") == 1


def test_without_the_package_the_extra_is_named():
    script = "import sys; sys.modules['huggingface_hub'] = None; import resnet_fast; resnet_fast.hub"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    message = "huggingface_hub is not installed: pip install huggingface_hub safetensors (or the extra 'hub')"
    assert done.stderr.endswith(f"{message}\n")
