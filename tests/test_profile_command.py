"""`resnet-fast profile` refuses wrong or interpreted kernels, and shows and writes complete results."""

import csv
import gzip
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import MethodType

import pytest
import torch
from PIL import Image
from thin_resnet import thin_resnet
from torch import nn
from torchvision.models import resnet as torchvision_resnet
from typer.testing import CliRunner, Result

from resnet_fast import cli, functional
from resnet_fast.models import resnet
from resnet_fast.models.registry import MODELS
from resnet_fast.profiling import Part, ProfileError, StepProfile, measure, profile_config, profile_steps, providers
from resnet_fast.profiling import report as reporting
from resnet_fast.profiling.categories import CATEGORIES, CONVOLUTION, NORM
from resnet_fast.profiling.check import check_first_step
from resnet_fast.profiling.picture import COLORS
from resnet_fast.profiling.providers import PROVIDERS, checked_steps, eager
from resnet_fast.profiling.recording import BETWEEN, IDLE, STEP
from resnet_fast.training import TrainConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def no_interpreter_needed(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests interpret the kernels. Here eager is profiled in the place of both, so no kernel runs."""
    if "interpreted" not in request.node.name:
        monkeypatch.setattr(measure, "refuse_interpreter", lambda: None)


def use_thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a network of three blocks in the place of ResNet-18."""
    monkeypatch.setattr(providers, "N_CLASSES", 3)
    builds = {"build": resnet, "build_plain": torchvision_resnet}
    builds = {name: lambda source=source, **options: thin_resnet(source) for name, source in builds.items()}
    monkeypatch.setitem(MODELS, "resnet18", replace(MODELS["resnet18"], **builds))


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    use_thin(monkeypatch)


def small(**settings) -> TrainConfig:
    return profile_config(**{"device": "cpu", "precision": "fp32", "batch_size": 4, "image_size": 8, **settings})


def without_residual_gradient(config: TrainConfig) -> nn.Module:
    model = eager(config)
    block = model.layer1[1]
    # A method, not a function with the layers in it, which a copy would share with its original.
    block.forward = MethodType(
        lambda self, x: (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x.detach()).relu(), block
    )
    return model


def without_running_statistics(config: TrainConfig) -> nn.Module:
    model = eager(config)
    model.bn1.momentum = 0.0
    return model


def not_a_number(config: TrainConfig) -> nn.Module:
    model = eager(config)
    model.fc.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    return model


def wrong_under_autocast(config: TrainConfig) -> nn.Module:
    """Right in fp64, and wrong in the step itself."""
    model = eager(config)
    model.layer2.register_forward_hook(lambda module, inputs, y: y if y.dtype == torch.float64 else 0.5 * y)
    return model


@pytest.mark.parametrize("wrong", [without_residual_gradient, without_running_statistics, not_a_number])
def test_a_wrong_provider_is_refused_by_its_gradients(wrong, thin):
    with pytest.raises(ProfileError, match="fused is wrong and is not profiled: in fp64 its gradients"):
        profile_steps(small(), 1, {"eager": eager, "fused": wrong})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_provider_that_is_wrong_in_its_precision_only_is_refused(precision: str, thin):
    with pytest.raises(ProfileError, match="fused is wrong and is not profiled: the error of the first step's lo"):
        profile_steps(small(precision=precision), 1, {"eager": eager, "fused": wrong_under_autocast})


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_even_of_both(loss: float):
    logits, labels = torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64)
    first = {name: (torch.tensor(loss), logits) for name in ("eager", "fused")}
    models: dict[str, nn.Module] = {"eager": nn.Linear(1, 1), "fused": nn.Linear(1, 1)}
    with pytest.raises(ProfileError, match="eager is wrong"):
        check_first_step(first, logits.double(), labels, models, small())


def test_providers_start_from_the_same_weights_and_batches(thin):
    steps = checked_steps(small(), {"a": eager, "b": eager})
    assert steps["a"]()[0].item() == steps["b"]()[0].item()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet19"}, "model must be one of resnet18"),
        ({"batch_size": 1}, "batch_size must be an integer of at least 2, got 1"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
    ],
)
def test_settings_are_those_of_training(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        small(**settings)


def part(category: str, name: str, ms: float, calls: float = 1) -> Part:
    return Part(category, "aten::add_", name, ms, calls)


def made_up(provider: str, factor: float, device: torch.device = GPU) -> StepProfile:
    long = "void at::native::(anonymous namespace)::a_kernel_with_a_very_long_name_that_does_not_fit<int>(int, float*)"
    parts = [part(category, f"{long}{i}", factor * (i + 1), 10) for i, category in enumerate(CATEGORIES)]
    parts.append(Part(IDLE if device.type == "cuda" else BETWEEN, "", "", factor, 0))
    return StepProfile(provider, tuple(parts), sum(p.ms for p in parts), 20.0, torch.profiler.profile())


def shown(profiles: list[StepProfile], config: TrainConfig, device: torch.device, capsys) -> list[str]:
    report = reporting.Report(config, 1)
    report.device = device
    report.show(profiles)
    return capsys.readouterr().out.splitlines()


def test_a_gpus_tables_fit_80_columns_and_count_launches(capsys):
    lines = shown([made_up("eager", 100.0), made_up("fused", 10.0)], small(), GPU, capsys)
    assert max(map(len, lines)) <= 80
    (norm,) = [line for line in lines if line.startswith(NORM)]
    assert norm.removeprefix(NORM).split() == ["200.0", "9.1", "20.0", "9.1", "-180.0", "10", "/", "10"]
    (total,) = [line for line in lines if line.startswith("profiled step")]
    assert "2200.0" in total and "220.0" in total and total.endswith("60 / 60")
    assert any(line.startswith(IDLE) for line in lines)


@pytest.mark.parametrize(
    ("kernel", "operator", "expected"),
    [
        ("", "aten::mm", "aten::mm"),
        ("_normalize_kernel", "resnet_fast::batch_norm_add_relu", "_normalize_kernel"),
        ("void at::native::elementwise_kernel<128, 2, x>(int, x)", "aten::add_", "elementwise_kernel (add_)"),
        ("void at::native::(anonymous namespace)::k<int>(int)", "aten::mean", "k (mean)"),
        ("sm90_xmma_fprop_nhwc_kernel", "aten::cudnn_convolution", "sm90_xmma_fprop_nhwc_kernel"),
        ("Memset (Device)", "aten::zero_", "Memset"),
    ],
)
def test_kernels_are_called_by_their_short_names(kernel: str, operator: str, expected: str):
    assert reporting.label(Part(NORM, operator, kernel, 1.0, 1)) == expected


def test_every_category_has_a_color_of_its_own():
    assert tuple(COLORS) == CATEGORIES and len(set(COLORS.values())) == len(CATEGORIES)


def run(*args: object):
    return CliRunner().invoke(cli.app, ["profile", *map(str, args)])


def test_an_occupied_folder_exits_with_2_and_is_left_alone(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("resnet_fast.profiling.profile_steps", lambda *arguments: pytest.fail("went on"))
    (tmp_path / "notes").write_text("mine")
    result = run("--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 2 and "already holds notes" in result.stderr and result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "resnet19"], "model must be one of resnet18"),
        (["--steps", "0"], "--steps"),
    ],
    ids=" ".join,
)
def test_wrong_arguments_exit_with_2_and_write_nothing(args, message: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_interpreted_kernels_are_refused(tmp_path: Path, monkeypatch):
    if torch.cuda.is_available():  # elsewhere the tests do interpret them
        monkeypatch.setattr("resnet_fast.profiling.check.is_interpreted", lambda: True)
    monkeypatch.setattr(measure, "checked_steps", lambda *arguments: pytest.fail("went on"))
    result = run("--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "interpreted kernels are not timed" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_provider_exits_with_1_and_writes_nothing(tmp_path: Path, monkeypatch, thin):
    steps = profile_steps
    wrong = {**PROVIDERS, "fused": without_running_statistics}
    monkeypatch.setattr("resnet_fast.profiling.profile_steps", lambda config, n_steps: steps(config, n_steps, wrong))
    result = run("--device", "cpu", "--batch-size", 4, "--image-size", 8, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "fused is wrong and is not profiled" in result.stderr
    assert list(tmp_path.iterdir()) == []


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_exits_with_130_and_writes_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("resnet_fast.profiling.profile_steps", interrupt)
    result = run("--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 130 and "interrupted; nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_writing_says_what_is_kept(tmp_path: Path, monkeypatch):
    profiles = [made_up("eager", 2.0, CPU), made_up("fused", 1.0, CPU)]
    monkeypatch.setattr("resnet_fast.profiling.profile_steps", lambda config, n_steps: profiles)
    monkeypatch.setattr("resnet_fast.profiling.folder._write_trace", interrupt)
    result = run("--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 130 and "keeps profile.csv, profile.png" in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"profile.csv", "profile.png"}


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_profiled(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("resnet_fast.profiling.profile_steps", lambda *arguments: pytest.fail("went on"))
    result = run("--device", "cpu", "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2 and "out must be a folder, " in result.stderr and "Traceback" not in result.output


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Result, Path]:
    """What the command says of a thin network on ATen, and its folder."""
    out = tmp_path_factory.mktemp("profile") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_thin(monkeypatch)
        monkeypatch.setattr(measure, "refuse_interpreter", lambda: None)
        monkeypatch.setattr(functional, "choose_backend", lambda x, requested=None: "aten")
        monkeypatch.setenv("FORCE_COLOR", "1")
        sizes = ("--batch-size", 2, "--image-size", 8, "--steps", 1, "--precision", "bf16")
        return run("--device", "cpu", *sizes, "--out", out), out


def test_the_command_prints_plain_tables_of_80_columns(done):
    process, out = done
    assert process.exit_code == 0 and process.stderr == "", process.output
    assert "\x1b" not in process.stdout and "\r" not in process.stdout
    lines = process.stdout.splitlines()
    assert max(len(line) for line in lines if str(out) not in line) <= 80
    for name in (*CATEGORIES, BETWEEN, "profiled step"):
        assert sum(line.startswith(name) and "::" not in line for line in lines) == 1, name
    assert any(re.match(r"(\w+) +aten::\w+ +\d", line) for line in lines), process.stdout  # the largest parts
    assert "On a CPU both run the same ATen operators; differences are noise." in lines


def test_the_command_writes_its_files_and_says_so(done):
    process, out = done
    names = {"profile.csv", "profile.png", "eager.trace.json.gz", "fused.trace.json.gz"}
    assert {path.name for path in out.iterdir()} == names
    assert str(out) in process.stdout and all(name in process.stdout for name in names)


def test_the_table_file_holds_the_parts_and_what_they_were_measured_with(done):
    rows = list(csv.DictReader(io.StringIO((done[1] / "profile.csv").read_text())))
    assert list(rows[0]) == (
        "provider category operator kernel ms_per_step calls_per_step unprofiled_step_ms "
        "device cpu_threads torch triton resnet_fast date_utc model stem image_size batch_size precision"
    ).split(" ")
    for provider in ("eager", "fused"):
        of_provider = [row for row in rows if row["provider"] == provider]
        assert {row["category"] for row in of_provider} == {*CATEGORIES, BETWEEN}
        total = sum(float(row["ms_per_step"]) for row in of_provider)
        (shown,) = [line.split() for line in done[0].stdout.splitlines() if line.startswith("profiled step")]
        assert total == pytest.approx(float(shown[2 if provider == "eager" else 4]), rel=0.01)
    assert {(row["torch"], row["batch_size"], row["kernel"]) for row in rows} == {(torch.__version__, "2", "")}


def colors_of(picture: Image.Image) -> set[tuple[int, ...]]:
    return {color for _, color in picture.convert("RGB").getcolors(maxcolors=1 << 24)}


def test_the_picture_shows_the_categories(done):
    with Image.open(done[1] / "profile.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width == 1500
        assert {tuple(bytes.fromhex(COLORS[name][1:])) for name in (CONVOLUTION, NORM)} <= colors_of(picture)


def test_the_traces_are_chrome_traces_of_the_steps(done):
    trace = json.loads(gzip.decompress((done[1] / "fused.trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert names.count(STEP) == 1 and names.count("aten::convolution_backward") == 8
