"""`resnet-fast export` writes programs that compute the same as the network, or nothing."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from trained_run import CliResult, Tiny, assert_is_plain, invoke, make_image_folder, train_tiny, use_tiny

from resnet_fast import resnet18
from resnet_fast.cli import export as command
from resnet_fast.data import load_dataset
from resnet_fast.inference import ExportError, Trained, export, export_onnx, export_program, load_trained
from resnet_fast.training import Result

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

WRITERS = {"model.onnx": export_onnx, "model.pt2": export_program}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Result:
    return train_tiny(tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def exported(trained: Result, tmp_path_factory) -> tuple[CliResult, Path]:
    """What the command says, and the folder with both files."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiny(monkeypatch)
        out = tmp_path_factory.mktemp("exported") / "new"
        return invoke("export", trained.out, "--out", out), out


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny(monkeypatch)


def make_trained(model: nn.Module, image_size: int = 12) -> Trained:
    config = {"model": "resnet18", "stem": "cifar", "dataset": "digits", "data_dir": "data"}
    classes = tuple("abcdefghij")
    return Trained(
        model.eval(), classes, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), image_size, config, 1, Path("x/checkpoint.pt")
    )


def run(path: Path, images: torch.Tensor) -> torch.Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def expected(trained: Trained, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (trained.mean, trained.std))
    with torch.no_grad():
        return trained.model((images - mean) / std)


def test_both_files_compute_what_the_network_does_on_any_number_of_images(trained: Result, exported):
    result, out = exported
    assert result.exit_code == 0, result.output
    assert_is_plain(result)
    assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "model.pt2"]
    assert f"model.onnx, model.pt2: {out}" in result.stdout and "16 real ones" in result.stdout
    loaded, test = load_trained(trained.out), load_dataset("digits", image_size=12).test
    images, _ = next(iter(test.batches(50)))
    for path in out.iterdir():
        for n_images in (1, 50):
            x = images[:n_images].float() / 255
            # Roundings of fp32, of logits below 100: the budget itself is held by the export.
            torch.testing.assert_close(run(path, x), expected(loaded, x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_whole_resnet18_is_exported_in_aten_operators(name: str, tmp_path: Path, on_aten: None):
    torch.manual_seed(0)
    loaded = make_trained(resnet18(num_classes=10, stem="cifar"))
    for module in loaded.model.modules():  # statistics that are not those of a network that has seen nothing
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    checked = WRITERS[name](loaded, tmp_path / name, images=torch.randint(0, 256, (3, 3, 12, 12), dtype=torch.uint8))
    assert 0 < checked.error <= checked.allowed and checked.n_images == export.N_RANDOM + 3
    assert checked.n_bytes == (tmp_path / name).stat().st_size > 4e7  # the weights are inside
    if name == "model.pt2":
        nodes = torch.export.load(tmp_path / name).graph.nodes
        operators = {str(node.target) for node in nodes if node.op == "call_function"}
        assert operators and all(operator.startswith("aten.") for operator in operators)
    else:
        proto = onnx.load(tmp_path / name)
        assert {node.domain for node in proto.graph.node} == {""} and not proto.functions
    x = torch.rand(5, 3, 12, 12)
    torch.testing.assert_close(run(tmp_path / name, x), expected(loaded, x), rtol=1e-4, atol=1e-4)


def test_what_the_logits_mean_is_in_the_files(trained: Result, exported):
    _, out = exported
    proto = onnx.load(out / "model.onnx")
    described = {entry.key: entry.value for entry in proto.metadata_props}
    extra = {"resnet_fast.json": ""}
    torch.export.load(out / "model.pt2", extra_files=extra)
    loaded, other = load_trained(trained.out), json.loads(extra["resnet_fast.json"])
    assert json.loads(described["classes"]) == other["classes"] == list(loaded.classes)
    assert json.loads(described["mean"]) == other["mean"] == list(loaded.mean)
    assert json.loads(described["std"]) == other["std"] == list(loaded.std)
    assert "float32 [N, 3, 12, 12], RGB, in [0, 1]; normalization is inside" in described["input"] == other["input"]
    shapes = [
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*proto.graph.input, *proto.graph.output)
    ]
    assert shapes == [["batch", 3, 12, 12], ["batch", 10]]
    assert [v.name for v in (*proto.graph.input, *proto.graph.output)] == ["images", "logits"]


def test_a_batch_size_may_be_fixed(trained: Result, tmp_path: Path):
    batch_size = 1
    result = invoke("export", trained.out, "--out", tmp_path, "--batch-size", batch_size)
    assert result.exit_code == 0 and f"float32 [{batch_size}, 3, 12, 12]" in result.stdout
    dims = onnx.load(tmp_path / "model.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [batch_size, 3, 12, 12]
    for name in WRITERS:
        assert run(tmp_path / name, torch.rand(batch_size, 3, 12, 12)).shape == (batch_size, 10)


def test_one_format_writes_one_file_into_the_run_folder(trained: Result, tmp_path: Path):
    (tmp_path / "checkpoint.pt").write_bytes((trained.out / "checkpoint.pt").read_bytes())
    assert invoke("export", tmp_path, "--format", "torch").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "model.pt2"]


@pytest.mark.parametrize("name", WRITERS)
def test_what_computes_something_else_is_not_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As if an exporter mistook a constant."""
    loaded = make_trained(Tiny(10))

    class Mistaken(export.Normalized):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) + (1e-3 if torch.compiler.is_exporting() else 0)

    monkeypatch.setattr(export, "Normalized", Mistaken)
    (tmp_path / name).write_bytes(b"before")
    with pytest.raises(ExportError, match=f"{name} would compute something else: a logit is off by 0.001, allowed"):
        WRITERS[name](loaded, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_a_network_that_gives_nan_is_not_written(tmp_path: Path):
    model = Tiny(10)
    nn.init.constant_(model.fc.weight, float("nan"))
    with pytest.raises(ExportError, match="off by nan"):
        export_program(make_trained(model), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_extra(trained: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = export.ONNX_PACKAGES[-1]
    monkeypatch.setitem(sys.modules, package, None)
    result = invoke("export", trained.out, "--out", tmp_path / "out")
    assert result.exit_code == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    install = f"pip install {' '.join(export.ONNX_PACKAGES)} (or the extra 'export'); --format torch needs no"
    assert f"{package} is not installed: {install}" in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_the_data_it_is_checked_on_random_images_and_says_so(tmp_path: Path):
    data = make_image_folder(tmp_path / "images")
    run_folder = train_tiny(tmp_path / "run", dataset="folder", data_dir=data, image_size=24, batch_size=8).out
    data.rename(tmp_path / "elsewhere")
    result = invoke("export", run_folder, "--format", "torch")
    assert result.exit_code == 0 and "no real ones (data missing" in result.stdout
    result = invoke("export", run_folder, "--format", "torch", "--data-dir", tmp_path / "elsewhere")
    assert "and 9 real ones" in result.stdout


def test_nothing_is_downloaded_for_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = make_trained(Tiny(10))
    loaded.config.update(dataset="cifar10", data_dir=str(tmp_path))
    monkeypatch.setattr("resnet_fast.data.load_dataset", lambda *args, **kwargs: pytest.fail("it would download"))
    assert command.real_images(loaded, None) is None


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["absent"], 2, "absent does not exist"),
        (["RUN", "--format", "tflite"], 2, "format must be one of onnx, torch, both, got 'tflite'"),
        (["RUN", "--batch-size", "0"], 2, "--batch-size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_named(args: list[str], code: int, message: str, trained: Result):
    result = invoke("export", *[trained.out if arg == "RUN" else arg for arg in args])
    assert result.exit_code == code and message in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, ValueError, "batch_size must be an integer of at least 1, got 2.5"),
        ({"images": [[0]]}, TypeError, "images must be of type Tensor, got list"),
        (
            {"images": torch.zeros(2, 3, 8, 12, dtype=torch.uint8)},
            ValueError,
            "images must be [N, 3, 12, 12], torch.uint8, got [2, 3, 8, 12], torch.uint8",
        ),
        (
            {"images": torch.zeros(2, 3, 12, 12)},
            ValueError,
            "images must be [N, 3, 12, 12], torch.uint8, got [2, 3, 12, 12], torch.float32",
        ),
    ],
    ids=["no images", "half an image", "a list", "another size", "floats"],
)
@pytest.mark.parametrize("name", WRITERS)
def test_wrong_values_are_named_and_nothing_is_written(name: str, options, error, message, tmp_path: Path):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        WRITERS[name](make_trained(Tiny(10)), tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []
