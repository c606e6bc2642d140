"""`resnet-fast profile`: each part of a step has its category, the parts are the step, and what is wrong is refused."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import MethodType

import pytest
import torch
from PIL import Image
from torch import nn
from torch.autograd.profiler_util import EventList, FunctionEvent
from typer.testing import CliRunner

from resnet_fast import cli
from resnet_fast.profiling import Part, ProfileError, StepProfile, measure, profile_config, profile_steps
from resnet_fast.profiling import report as reporting
from resnet_fast.profiling.categories import CATEGORIES, CONVOLUTION, LAYOUT, LOSS, NORM, OPTIMIZER, OTHER, category_of
from resnet_fast.profiling.check import check_first_step
from resnet_fast.profiling.picture import COLORS
from resnet_fast.profiling.providers import PROVIDERS, checked_steps, eager
from resnet_fast.profiling.recording import BETWEEN, IDLE, STEP, exclusive_times, parts_of, record
from resnet_fast.training import TrainConfig

ROOT = Path(__file__).parents[1]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
ON_CPU, ON_GPU = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
ENGINE = "autograd::engine::evaluate_function: "


@pytest.fixture(autouse=True)
def no_interpreter_needed(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests interpret the kernels. Here eager is profiled in the place of both, so no kernel runs."""
    if "interpreted" not in request.node.name:
        monkeypatch.setattr(measure, "refuse_interpreter", lambda: None)


def small(**settings) -> TrainConfig:
    return profile_config(**{"device": "cpu", "precision": "fp32", "batch_size": 4, "image_size": 16, **settings})


@pytest.mark.parametrize(
    ("names", "category"),
    [
        (["aten::mkldnn_convolution", "aten::conv2d", STEP], CONVOLUTION),
        (["aten::convolution_backward", "ConvolutionBackward0", f"{ENGINE}ConvolutionBackward0"], CONVOLUTION),
        (["aten::cudnn_convolution", "aten::conv2d"], CONVOLUTION),
        (["aten::t", "aten::linear"], CONVOLUTION),
        (["aten::sum", f"{ENGINE}AddmmBackward0"], CONVOLUTION),
        (["aten::copy_", "aten::to", "aten::conv2d"], LAYOUT),
        (["aten::copy_", "aten::_to_copy", "aten::to", "aten::sum", "aten::mean"], LAYOUT),
        (["void cudnn::engines::nchwToNhwcKernel<...>", "aten::cudnn_convolution", "aten::conv2d"], LAYOUT),
        (["aten::native_batch_norm", "aten::batch_norm", STEP], NORM),
        (["aten::cudnn_batch_norm_backward", "CudnnBatchNormBackward0"], NORM),
        (["aten::miopen_batch_norm", "aten::batch_norm"], NORM),
        (["aten::zero_", "aten::zeros", "aten::native_batch_norm"], NORM),
        (["aten::clamp_min_", "aten::relu_", STEP], NORM),
        (["aten::threshold_backward", "ReluBackward0"], NORM),
        (["aten::add_", STEP], NORM),
        (["aten::add_", f"{ENGINE}ConvolutionBackward0"], NORM),
        (["_normalize_kernel", "resnet_fast::batch_norm_add_relu", "_BatchNormAddReLU", STEP], NORM),
        (["resnet_fast::batch_norm_add_relu_backward", "_BatchNormAddReLUBackward"], NORM),
        (["aten::view_as", "_BatchNormAddReLU", STEP], NORM),
        (["aten::copy_", "aten::_fused_sgd_", "Optimizer.step#SGD.step", STEP], OPTIMIZER),
        (["multi_tensor_apply_kernel", "aten::_fused_sgd_", "Optimizer.step#SGD.step"], OPTIMIZER),
        (["Optimizer.zero_grad#SGD.zero_grad", STEP], OPTIMIZER),
        (["aten::_log_softmax", "aten::log_softmax", "aten::cross_entropy_loss"], LOSS),
        (["aten::nll_loss_backward", "NllLossBackward0"], LOSS),
        (["aten::fill_", "aten::ones_like", STEP], LOSS),
        (["aten::sum", "aten::mean", "aten::adaptive_avg_pool2d", STEP], OTHER),
        (["aten::max_pool2d_with_indices_backward", "MaxPool2DWithIndicesBackward0"], OTHER),
        (["aten::flatten", STEP], OTHER),
        ([], OTHER),
    ],
    ids=lambda value: " < ".join(value) if isinstance(value, list) else "",
)
def test_the_innermost_name_that_says_something_decides(names: list[str], category: str):
    assert category_of(names) == category


@pytest.fixture(scope="module")
def recorded() -> EventList:
    """The events of two real steps on the CPU, in bf16, where there are casts."""
    torch.set_num_threads(1)
    config = small(precision="bf16")
    step = checked_steps(config, {"eager": eager, "again": eager})["eager"]
    return record(step, CPU, 2).events()


@pytest.mark.parametrize("category", [*CATEGORIES, BETWEEN])
def test_a_real_step_has_something_in_every_category(recorded: EventList, category: str):
    parts, _ = parts_of(recorded, CPU, 2)
    assert sum(part.ms for part in parts if part.category == category) > 0


def test_little_of_a_real_step_is_other(recorded: EventList):
    parts, ms = parts_of(recorded, CPU, 2)
    assert sum(part.ms for part in parts if part.category == OTHER) < 0.05 * ms
    known = ("detach", "div", "mean", "sum", "view", "flatten", "pool", "squeeze", "expand", "fill", "empty", "zero")
    names = {part.operator for part in parts if part.category == OTHER and part.ms > 0.001 * ms}
    assert all(any(word in name for word in known) for name in names), names


def test_a_real_steps_counts_are_those_of_resnet18(recorded: EventList):
    parts, _ = parts_of(recorded, CPU, 2)
    calls = {(part.category, part.operator): part.calls for part in parts}
    assert calls[CONVOLUTION, "aten::convolution_backward"] == calls[NORM, "aten::native_batch_norm"] == 20
    # 8 blocks, the counter of each of the 20 batch norms, and the gradients of the 8 blocks' inputs.
    assert calls[NORM, "aten::add_"] + calls.get((NORM, "aten::add"), 0) == 8 + 20 + 8
    assert calls[OPTIMIZER, "aten::_fused_sgd_"] == 1


def test_the_parts_on_a_cpu_are_the_steps_wall_time(recorded: EventList):
    parts, ms = parts_of(recorded, CPU, 2)
    walls = [event.cpu_time_total for event in recorded if event.name == STEP]
    assert len(walls) == 2
    assert sum(part.ms for part in parts) == pytest.approx(ms) == pytest.approx(sum(walls) / 2000)


def gpu_events() -> EventList:
    """Two steps, in µs, as the profiler returns them; kernels run 60 µs of each, 5 of them together."""
    events = []

    def add(name: str, start: float, end: float, **more) -> FunctionEvent:
        events.append(FunctionEvent(len(events), name, more.pop("thread", 1), start, end, use_device="cuda", **more))
        return events[-1]

    def launch(operator: FunctionEvent, name: str, start: float, end: float) -> None:
        add(name, start, end, device_type=ON_GPU, thread=7)
        operator.append_kernel(name, 0, end - start)

    for begin in (0.0, 100.0):
        add(STEP, begin, begin + 50, is_user_annotation=True)
        add("aten::conv2d", begin + 1, begin + 10)
        cast = add("aten::copy_", begin + 2, begin + 3)
        conv = add("aten::cudnn_convolution", begin + 4, begin + 9)
        norm = add("resnet_fast::batch_norm_add_relu", begin + 11, begin + 19)
        # Autograd has a thread of its own, whose events have no step above them.
        add(f"{ENGINE}ConvolutionBackward0", begin + 20, begin + 30, thread=2)
        gradient = add("aten::add_", begin + 21, begin + 22, thread=2)
        add("Optimizer.step#SGD.step", begin + 31, begin + 40, is_user_annotation=True)
        sgd = add("aten::_fused_sgd_", begin + 32, begin + 39)
        launch(cast, "elementwise_kernel", begin + 1000, begin + 1010)
        launch(conv, "void nchwToNhwcKernel<float>(int)", begin + 1010, begin + 1012)
        launch(conv, "gemm", begin + 1012, begin + 1032)
        launch(norm, "_statistics_kernel", begin + 1027, begin + 1040)
        launch(norm, "_normalize_kernel", begin + 1040, begin + 1045)
        launch(gradient, "elementwise_kernel", begin + 1050, begin + 1055)
        launch(sgd, "multi_tensor_apply_kernel", begin + 1070, begin + 1080)
        # What the profiler shows of annotations on the GPU's own time line.
        add(STEP, begin + 1000, begin + 1080, device_type=ON_GPU, thread=7, is_user_annotation=True)
        add("Optimizer.step#SGD.step", begin + 1070, begin + 1080, device_type=ON_GPU, thread=7)
    events = EventList(events, use_device="cuda")
    events._build_tree()
    return events


def test_kernels_belong_to_the_operator_that_launched_them():
    parts, _ = parts_of(gpu_events(), GPU, 2)
    found = {(part.category, part.kernel): (part.operator, pytest.approx(part.ms), part.calls) for part in parts}
    assert found == {
        (LAYOUT, "elementwise_kernel"): ("aten::copy_", 0.010, 1),
        (LAYOUT, "void nchwToNhwcKernel<float>(int)"): ("aten::cudnn_convolution", 0.002, 1),
        (CONVOLUTION, "gemm"): ("aten::cudnn_convolution", 0.020, 1),
        (NORM, "_statistics_kernel"): ("resnet_fast::batch_norm_add_relu", 0.008, 1),  # 5 of 13 µs are gemm's
        (NORM, "_normalize_kernel"): ("resnet_fast::batch_norm_add_relu", 0.005, 1),
        (NORM, "elementwise_kernel"): ("aten::add_", 0.005, 1),
        (OPTIMIZER, "multi_tensor_apply_kernel"): ("aten::_fused_sgd_", 0.010, 1),
        (IDLE, ""): ("", (180 - 120) / 2000, 0),
    }


def test_the_parts_on_a_gpu_are_the_span_of_its_kernels():
    parts, ms = parts_of(gpu_events(), GPU, 2)
    assert ms == pytest.approx((1180 - 1000) / 2000) == pytest.approx(sum(part.ms for part in parts))


def test_a_kernel_that_no_operator_launched_is_other():
    events = gpu_events()
    stray = FunctionEvent(999, "stray", 7, 1060.0, 1061.0, device_type=ON_GPU)
    parts, ms = parts_of([*events, stray], GPU, 2)
    assert [(p.category, p.ms, p.calls) for p in parts if p.kernel == "stray"] == [(OTHER, 0.0005, 0.5)]
    assert ms == pytest.approx(0.09)


def test_a_gpu_on_which_no_kernel_was_seen_is_an_error():
    events = [event for event in gpu_events() if event.device_type == ON_CPU]
    with pytest.raises(ProfileError, match="the profiler saw no kernel on cuda"):
        parts_of(events, GPU, 2)


@pytest.mark.parametrize(
    ("spans", "times"),
    [
        ([(0, 2), (3, 5)], [2, 2]),
        ([(0, 2), (2, 5)], [2, 3]),
        ([(0, 4), (3, 5)], [4, 1]),
        ([(3, 5), (0, 4)], [1, 4]),
        ([(0, 9), (1, 2), (3, 4)], [9, 0, 0]),
        ([(0, 9), (1, 2), (8, 10)], [9, 0, 1]),
        ([(1, 2), (1, 2)], [1, 0]),
        ([], []),
    ],
    ids=["apart", "touching", "overlapping", "not in order", "inside", "inside, then over", "equal", "none"],
)
def test_overlapping_kernels_are_not_counted_twice(spans: list[tuple[float, float]], times: list[float]):
    assert exclusive_times(spans) == times


def without_residual_gradient(config: TrainConfig) -> nn.Module:
    model = eager(config)
    block = model.layer2[1]
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
    model.layer4.register_forward_hook(lambda module, inputs, y: y if y.dtype == torch.float64 else 0.5 * y)
    return model


@pytest.mark.parametrize("wrong", [without_residual_gradient, without_running_statistics, not_a_number])
def test_a_wrong_provider_is_refused_by_its_gradients(wrong):
    with pytest.raises(ProfileError, match="fused is wrong and is not profiled: in fp64 its gradients"):
        profile_steps(small(), 1, {"eager": eager, "fused": wrong})


def test_a_provider_that_is_wrong_in_its_precision_only_is_refused():
    with pytest.raises(ProfileError, match="fused is wrong and is not profiled: the error of the first step's lo"):
        profile_steps(small(precision="bf16"), 1, {"eager": eager, "fused": wrong_under_autocast})


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_even_of_both(loss: float):
    logits, labels = torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64)
    first = {name: (torch.tensor(loss), logits) for name in ("eager", "fused")}
    models: dict[str, nn.Module] = {"eager": nn.Linear(1, 1), "fused": nn.Linear(1, 1)}
    with pytest.raises(ProfileError, match="eager is wrong"):
        check_first_step(first, logits.double(), labels, models, small())


def test_providers_start_from_the_same_weights_and_batches():
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


def test_an_occupied_folder_exits_with_2_and_is_left_alone(tmp_path: Path):
    (tmp_path / "notes").write_text("mine")
    result = run("--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 2 and "already holds notes" in result.stderr and result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "resnet19"], "model must be one of resnet18"),
        (["--image-size", "7"], "image_size must be an integer of at least 8, got 7"),
        (["--steps", "0"], "--steps"),
        (["--precision", "fp8"], "precision must be one of auto, fp32, bf16, got 'fp8'"),
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
        monkeypatch.setattr("resnet_fast.profiling.check.why_not_triton", lambda device: None)
    result = run("--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "interpreted kernels are not profiled" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_provider_exits_with_1_and_writes_nothing(tmp_path: Path, monkeypatch):
    steps = profile_steps
    wrong = {**PROVIDERS, "fused": without_running_statistics}
    monkeypatch.setattr(cli, "profile_steps", lambda config, n_steps: steps(config, n_steps, wrong))
    result = run("--device", "cpu", "--batch-size", 4, "--image-size", 16, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "fused is wrong and is not profiled" in result.stderr
    assert list(tmp_path.iterdir()) == []


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_exits_with_130_and_writes_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cli, "profile_steps", interrupt)
    result = run("--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 130 and "interrupted; nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_writing_says_what_is_kept(tmp_path: Path, monkeypatch):
    profiles = [made_up("eager", 2.0, CPU), made_up("fused", 1.0, CPU)]
    monkeypatch.setattr(cli, "profile_steps", lambda config, n_steps: profiles)
    monkeypatch.setattr("resnet_fast.profiling.folder._write_trace", interrupt)
    result = run("--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 130 and "keeps profile.csv, profile.png" in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"profile.csv", "profile.png"}


def test_a_folder_that_cannot_be_made_exits_with_1(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("")
    profiles = [made_up("eager", 2.0, CPU), made_up("fused", 1.0, CPU)]
    monkeypatch.setattr(cli, "profile_steps", lambda config, n_steps: profiles)
    result = run("--device", "cpu", "--out", tmp_path / "file" / "out")
    assert result.exit_code == 1 and "error: " in result.stderr and "Traceback" not in result.output


# A process of its own, without the interpreter in which tests without a GPU run the kernels.
COMMAND = "import torch; torch.set_num_threads(1); from resnet_fast.cli import app; app()"


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    out = tmp_path_factory.mktemp("profile") / "out"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "FORCE_COLOR": "1"}
    args = ["profile", "--device", "cpu", "--batch-size", "4", "--image-size", "16", "--steps", "1", "--out", str(out)]
    return subprocess.run([sys.executable, "-c", COMMAND, *args], env=env, capture_output=True, text=True), out


def test_the_command_prints_plain_tables_of_80_columns(done):
    process, out = done
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert "\x1b" not in process.stdout and "\r" not in process.stdout
    lines = process.stdout.splitlines()
    assert max(len(line) for line in lines if str(out) not in line) <= 80
    for name in (*CATEGORIES, BETWEEN, "profiled step"):
        assert sum(line.startswith(name) for line in lines) == 1, name
    assert any(line.startswith("conv   aten::convolution_backward ") for line in lines)
    assert "On a CPU both run the same ATen operators: no gain is to be expected." in lines


def test_the_command_writes_its_files_and_says_so(done):
    process, out = done
    names = {"profile.csv", "profile.png", "eager.trace.json.gz", "fused.trace.json.gz"}
    assert {path.name for path in out.iterdir()} == names
    assert str(out) in process.stdout and all(name in process.stdout for name in names)


def test_the_table_file_holds_the_parts_and_what_they_were_measured_with(done):
    rows = list(csv.DictReader(io.StringIO((done[1] / "profile.csv").read_text())))
    assert list(rows[0]) == (
        "provider category operator kernel ms_per_step calls_per_step unprofiled_step_ms "
        "device cpu_threads torch triton model stem image_size batch_size precision"
    ).split(" ")
    for provider in ("eager", "fused"):
        of_provider = [row for row in rows if row["provider"] == provider]
        assert {row["category"] for row in of_provider} == {*CATEGORIES, BETWEEN}
        total = sum(float(row["ms_per_step"]) for row in of_provider)
        (shown,) = [line.split() for line in done[0].stdout.splitlines() if line.startswith("profiled step")]
        assert total == pytest.approx(float(shown[2 if provider == "eager" else 4]), rel=0.01)
    assert {(row["torch"], row["batch_size"], row["kernel"]) for row in rows} == {(torch.__version__, "4", "")}


def colors_of(picture: Image.Image) -> set[tuple[int, ...]]:
    return {color for _, color in picture.convert("RGB").getcolors(maxcolors=1 << 24)}


def test_the_picture_shows_the_categories(done):
    with Image.open(done[1] / "profile.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width == 1500
        assert {tuple(bytes.fromhex(COLORS[name][1:])) for name in (CONVOLUTION, NORM)} <= colors_of(picture)


@pytest.mark.parametrize("provider", ["eager", "fused"])
def test_the_traces_are_chrome_traces_of_the_steps(done, provider: str):
    trace = json.loads(gzip.decompress((done[1] / f"{provider}.trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert names.count(STEP) == 1 and names.count("aten::convolution_backward") == 20
