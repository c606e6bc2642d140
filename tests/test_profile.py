"""Each part of a profiled step has its category, and the parts sum up to the step."""

import pytest
import torch
from torch.autograd.profiler_util import EventList, FunctionEvent

from resnet_fast.profiling import ProfileError, profile_config, profile_steps
from resnet_fast.profiling.categories import CATEGORIES, CONVOLUTION, LAYOUT, LOSS, NORM, OPTIMIZER, OTHER, category_of
from resnet_fast.profiling.providers import checked_steps, eager
from resnet_fast.profiling.recording import BETWEEN, IDLE, STEP, exclusive_times, parts_of, record
from resnet_fast.training.optimizer import make_optimizer

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ON_CPU, ON_GPU = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
ENGINE = "autograd::engine::evaluate_function: "


@pytest.mark.parametrize(
    ("names", "category"),
    [
        (["aten::mkldnn_convolution", "aten::conv2d", STEP], CONVOLUTION),
        (["aten::sum", f"{ENGINE}AddmmBackward0"], CONVOLUTION),
        (["aten::copy_", "aten::to", "aten::conv2d"], LAYOUT),
        (["void cudnn::engines::nchwToNhwcKernel<...>", "aten::cudnn_convolution", "aten::conv2d"], LAYOUT),
        (["aten::miopen_batch_norm", "aten::batch_norm"], NORM),
        (["aten::zero_", "aten::zeros", "aten::native_batch_norm"], NORM),
        (["aten::threshold_backward", "ReluBackward0"], NORM),
        (["aten::add_", f"{ENGINE}ConvolutionBackward0"], NORM),
        (["conv3x3_data_gradient_kernel", "_PairBackward"], CONVOLUTION),
        (["aten::convolution_backward", "_PairBackward", f"{ENGINE}_PairBackward"], CONVOLUTION),
        (["input_gradients_kernel", f"{ENGINE}_PairBackward"], NORM),
        (["normalize_kernel", "_Pair", STEP], NORM),
        (["_normalize_kernel", "resnet_fast::batch_norm_add_relu", "_BatchNormAddReLU", STEP], NORM),
        (["multi_tensor_apply_kernel", "aten::_fused_sgd_", "Optimizer.step#SGD.step"], OPTIMIZER),
        (["multi_tensor_apply_kernel", "aten::_amp_foreach_non_finite_check_and_unscale_", STEP], OPTIMIZER),
        (["aten::nll_loss_backward", "NllLossBackward0"], LOSS),
        (["aten::sum", "aten::mean", "aten::adaptive_avg_pool2d", STEP], OTHER),
        ([], OTHER),
    ],
    ids=lambda value: " < ".join(value) if isinstance(value, list) else "",
)
def test_the_innermost_name_that_says_something_decides(names: list[str], category: str):
    assert category_of(names) == category


@pytest.fixture(scope="module")
def recorded() -> EventList:
    """The events of two real steps on the CPU, in bf16, where there are casts."""
    config = profile_config(device="cpu", precision="bf16", batch_size=2, image_size=8)
    step = checked_steps(config, {"eager": eager, "again": eager})["eager"]
    return record(step, CPU, 2).events()


def test_a_real_step_has_something_in_every_category(recorded: EventList):
    parts, _ = parts_of(recorded, CPU, 2)
    assert {part.category for part in parts if part.ms > 0} == {*CATEGORIES, BETWEEN}


def test_little_of_a_real_step_is_other(recorded: EventList):
    parts, ms = parts_of(recorded, CPU, 2)
    assert sum(part.ms for part in parts if part.category == OTHER) < 0.05 * ms
    known = ("detach", "div", "mean", "sum", "view", "flatten", "pool", "squeeze", "expand", "fill", "empty", "zero")
    names = {part.operator for part in parts if part.category == OTHER and part.ms > 0.001 * ms}
    assert all(any(word in name for word in known) for name in names), names


def test_newton_schulz_is_the_optimizers():
    model = eager(profile_config(device="cpu", precision="fp32", optimizer="muon"))
    optimizer = make_optimizer(model, profile_config(device="cpu", precision="fp32", optimizer="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    products = [event for event in profiler.events() if event.name in ("aten::bmm", "aten::baddbmm")]
    # 3 iterations of 3 products, for 64x64x3x3, and of 128, 256 and 512: the first, the others, and the shortcut's.
    assert len({(event.time_range.start, event.name) for event in products}) == 3 * 3 * (1 + 3 * 3)
    for event in products:
        names, ancestor = [], event
        while ancestor is not None:
            names.append(ancestor.name)
            ancestor = ancestor.cpu_parent
        assert category_of(names) == OPTIMIZER


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


def test_what_runs_outside_of_the_steps_is_not_theirs():
    step, inside = FunctionEvent(0, STEP, 1, 0.0, 10.0), FunctionEvent(1, "aten::add_", 1, 2.0, 5.0)
    events = EventList([step, inside, FunctionEvent(2, "aten::copy_", 1, 20.0, 30.0)])
    events._build_tree()
    parts, ms = parts_of(events, CPU, 1)
    assert ms == 0.010 and {(part.category, part.ms) for part in parts} == {(NORM, 0.003), (BETWEEN, 0.007)}


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
        # What else the profiler shows on the GPU's time line: waiting, and annotations.
        add("Context Sync", begin + 900, begin + 1090, device_type=ON_GPU, thread=7)
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


def test_kernels_of_equal_name_and_duration_have_an_operator_each():
    events = []
    for i, name in enumerate(["aten::copy_", "aten::add_", "aten::mean"]):
        operator = FunctionEvent(i, name, 1, 2.0 * i, 2.0 * i + 1, use_device="cuda")
        operator.append_kernel("elementwise_kernel", 0, 5.0)
        kernel = FunctionEvent(i, "elementwise_kernel", 7, 10.0 * i, 10.0 * i + 5, device_type=ON_GPU)
        events += [operator, kernel]
    parts, _ = parts_of(events, GPU, 1)
    assert {(part.category, part.ms, part.calls) for part in parts} == {
        *((category, 0.005, 1) for category in (LAYOUT, NORM, OTHER)),
        (IDLE, 0.010, 0),
    }


def test_a_kernel_that_no_operator_launched_is_other():
    events = gpu_events()
    stray = FunctionEvent(999, "stray", 7, 1060.0, 1061.0, device_type=ON_GPU)
    parts, ms = parts_of([*events, stray], GPU, 2)
    assert [(p.category, p.ms, p.calls) for p in parts if p.kernel == "stray"] == [(OTHER, 0.0005, 0.5)]
    assert ms == pytest.approx(0.09)


def test_a_gpu_on_which_no_kernel_was_seen_is_an_error():
    events = [event for event in gpu_events() if event.device_type == ON_CPU]
    with pytest.raises(ProfileError, match="the profiler recorded no kernel on cuda"):
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's own events need a GPU")
def test_a_real_gpu_has_kernels_in_every_category():
    for profile in profile_steps(profile_config(device="cuda", precision="bf16", batch_size=32), 2):
        assert all(profile.ms_of(category) > 0 and profile.calls_of(category) >= 1 for category in CATEGORIES)
        assert profile.ms_of(OTHER) < 0.1 * profile.ms and profile.ms_of(IDLE) >= 0
        operators = {part.operator for part in profile.parts if part.category == NORM}
        assert ("resnet_fast::batch_norm_add_relu" in operators) == (profile.provider == "fused")
