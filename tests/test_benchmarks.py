"""A benchmark does not time wrong or interpreted providers, and writes the times of the others to its rows."""

import copy
import csv
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from thin_resnet import thin_resnet
from torch import nn
from torchvision.models import resnet as torchvision_resnet

from benchmarks import (
    bench_block,
    bench_conv,
    bench_inference,
    bench_loader,
    bench_op,
    bench_step,
    conftest,
    harness,
    networks,
)
from benchmarks.bench_conv import CudnnRun
from benchmarks.bench_inference import InferenceRun
from benchmarks.bench_op import OpRun
from benchmarks.bench_step import StepRun
from benchmarks.budget import Budget, elapsed
from benchmarks.correctness import WrongProviderError
from benchmarks.harness import COLUMNS, Measured, Provider, Setting
from benchmarks.limits import Limits
from benchmarks.networks import eager_resnet18
from benchmarks.replay import ReplayClock
from benchmarks.work import NETWORK, Work, inference_work
from resnet_fast.data import normalize
from resnet_fast.models import resnet
from resnet_fast.ops import choices
from resnet_fast.ops.implementations import DEFAULTS, Choice, Problem
from resnet_fast.profiling import check as profile_check
from resnet_fast.tuning.timing import NotHiddenError, alternate

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
OP = Setting("BN+add+ReLU 8x5x5", "both", "bf16", "channels_last", 6, shape=(8, 5, 5))
CONVOLUTIONS = {
    direction: Setting("conv3x3 16x4x4", direction, "bf16", "channels_last", 10, shape=(16, 4))
    for direction in bench_conv.DIRECTIONS
}
BLOCK = Setting("BasicBlock", "both", "fp32", "channels_last", 4, shape=(8, 16, 6))
STEP = Setting("ResNet-18", "step", "fp32", "channels_last", 4)
INFERENCE = Setting("ResNet-18", "forward", "fp32", "channels_last", 4)
LOADER = Setting("8 images 3x32x32", "epoch", "fp32", "channels_last", 4)


@pytest.fixture(autouse=True)
def small_and_of_eager_alone(monkeypatch):
    """Small data; and no interpreted kernel among the providers here, so that nothing has to be refused for one."""
    monkeypatch.setattr(harness, "refuse_interpreter", lambda: None)
    monkeypatch.setattr(harness.Level, "warm_up", {"cpu": 0})
    monkeypatch.setattr(harness.gc, "collect", lambda: 0)  # of pytest's many objects
    monkeypatch.setattr(networks.NetworkLevel, "image_size", 8)
    monkeypatch.setitem(bench_loader.N_IMAGES, "cpu", 8)
    monkeypatch.setattr(bench_loader, "N_CHECKED", 4)
    monkeypatch.setattr(bench_loader, "N_WORKERS", 0)
    monkeypatch.setattr(bench_loader.LoaderLevel, "warm_up", {"cpu": 0})


@pytest.fixture
def thin(monkeypatch):
    """A network of three blocks in the place of ResNet-18."""
    monkeypatch.setattr(bench_step, "N_CLASSES", 3)
    monkeypatch.setattr(networks.providers, "eager", lambda config: thin_resnet(torchvision_resnet))
    monkeypatch.setattr(networks.providers, "fused", lambda config: thin_resnet(resnet))


def with_wrong(level: harness.Level, build, right=None) -> harness.Level:
    """The level with its baseline, a wrong provider, and a right one, which is the baseline under another name."""
    planted, baseline = copy.copy(level), level.providers[level.baseline]
    planted.providers = {level.baseline: baseline, "wrong": Provider(build), "right": right or baseline}
    return planted


def of_op(change):
    """An operation that computes `change` of eager's."""
    return lambda setting, data: OpRun(partial(change, bench_op.eager), setting, data)


def with_running_mean_alone(eager, operation, x, residual, norms):
    return eager(operation, x, residual, [norms[0]._replace(running_var=norms[0].running_var.clone()), *norms[1:]])


def not_a_number(eager, operation, x, residual, norms):
    return tuple(y * float("nan") for y in eager(operation, x, residual, norms))


def block_without_shortcut(n_in, n_out, width):
    block = bench_block.eager(n_in, n_out, width)
    block.forward = lambda x: (
        F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))) + 0 * block.downsample(x)
    )
    return block


def detached_shortcut() -> nn.Module:
    model = eager_resnet18()
    block = model.layer1[1]
    conv1, bn1, conv2, bn2 = block.conv1, block.bn1, block.conv2, block.bn2
    block.forward = lambda x: (bn2(conv2(bn1(conv1(x)).relu())) + x.detach()).relu()
    return model


def without_a_mean(model: nn.Module) -> nn.Module:
    model.get_submodule("layer2.0.bn2").running_mean.zero_()
    return model


def of_convolution(change):
    """A convolution that computes `change` of cuDNN's results."""

    class Changed(CudnnRun):
        def run(self, inputs):
            return change(*super().run(inputs))

    return lambda setting, data: Changed(data)


def frozen() -> nn.Module:
    model = eager_resnet18()
    model.fc.bias.requires_grad_(False)
    return model


def not_augmented(data, batch_size, shuffle):
    images = normalize(data.images, bench_loader.MEAN, bench_loader.STD)
    return lambda: iter(zip(images.split(batch_size), data.labels.split(batch_size), strict=True))


class WithoutOptimizer(StepRun):
    def __init__(self, *args):
        super().__init__(*args)
        self.optimizer.step = lambda: None


CASES = {
    "op, running variance": (bench_op.LEVEL, OP, of_op(with_running_mean_alone)),
    "op, NaN": (bench_op.LEVEL, OP, of_op(not_a_number)),
    "convolution, no sums": (
        bench_conv.LEVEL,
        CONVOLUTIONS["data gradient with sums"],
        of_convolution(lambda dz, dweight, dbias: (dz, dweight, 0 * dbias)),
    ),
    "block, no shortcut": (bench_block.LEVEL, BLOCK, partial(bench_block.BlockRun, block_without_shortcut)),
    "step, detached shortcut": (bench_step.LEVEL, STEP, partial(StepRun, detached_shortcut)),
    "inference, mean": (
        bench_inference.LEVEL,
        INFERENCE,
        partial(InferenceRun, eager_resnet18, prepare=without_a_mean),
    ),
    "step, no optimizer": (bench_step.LEVEL, STEP, partial(WithoutOptimizer, eager_resnet18)),
    "loader, no crops": (bench_loader.LEVEL, LOADER, partial(bench_loader.LoaderRun, not_augmented)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_provider_is_refused_and_the_others_are_timed(case, thin):
    level, setting, build = CASES[case]
    planted = with_wrong(level, build)
    measured = harness.measure(planted, setting, CPU, ["wrong", "right"], rounds=1)
    assert measured.times.keys() == {level.baseline, "right"}
    (error,) = measured.refused.values()
    assert isinstance(error, WrongProviderError) and str(error).startswith("wrong is wrong and is not timed")


def test_without_the_baseline_nothing_is_timed():
    level = with_wrong(bench_op.LEVEL, None)
    level.providers = {"wrong": Provider(of_op(not_a_number)), "right": level.providers["right"]}
    measured = harness.measure(level, OP, CPU, ["wrong", "right"], rounds=1)
    assert not measured.times and measured.refused.keys() == {"wrong", "right"}
    assert not harness.rows(level, OP, measured, Limits(1.0, {"bf16": 1.0}), {})


def test_a_loss_that_is_not_finite_is_no_training_step(monkeypatch, thin):
    monkeypatch.setattr(bench_step, "LEARNING_RATE", 1e6)
    error = harness.measure(bench_step.LEVEL, STEP, CPU, [], rounds=4).refused["eager, tuned"]
    assert "the loss must be finite after the timed steps" in str(error)


def test_a_step_in_fp16_passes_its_check_and_its_loss_is_scaled(monkeypatch, thin):
    monkeypatch.setattr(networks, "CudaGraph", Graph)
    level, setting = copy.copy(bench_step.LEVEL), replace(STEP, precision="fp16", batch_size=16)
    level.providers = {
        **{name: level.providers[name] for name in ("eager, tuned", "fused")},
        "graph": Provider(partial(StepRun, eager_resnet18, graph=True)),
    }
    runs = []
    monkeypatch.setattr(StepRun, "finish", lambda self, finish=StepRun.finish: finish(self) or runs.append(self))
    measured = harness.measure(level, setting, CPU, ["fused", "graph"], rounds=2)
    assert measured.times.keys() == level.providers.keys(), measured.refused
    states = [run.scaler.state_dict() for run in runs]
    # A check, a call before the clock, two rounds and the end; the warm-up of the graph has been undone.
    assert [state["_growth_tracker"] for state in states] == [5] * 3
    assert {state["scale"] for state in states} == {65536}


def test_a_step_that_is_skipped_in_fp16_is_not_timed(thin):
    class Overflowing(StepRun):
        def finish(self):
            self.scale = 2.0**60
            self.scaler.update(self.scale)
            super().finish()

    level = with_wrong(bench_step.LEVEL, partial(Overflowing, eager_resnet18))
    measured = harness.measure(level, replace(STEP, precision="fp16"), CPU, ["wrong"], rounds=1)
    assert "gradients overflowed in fp16, so a timed step was skipped" in str(measured.refused["wrong"])


def test_the_loader_of_ours_passes_its_check():
    measured = harness.measure(bench_loader.LEVEL, LOADER, CPU, ["on device"], rounds=1)
    assert measured.times.keys() == {"torchvision", "on device"}, measured.refused


@pytest.mark.parametrize("change", (lambda labels: labels[1:], lambda labels: labels), ids=("one lost", "in order"))
def test_an_epoch_is_a_shuffle_of_all_images(change):
    data = bench_loader.LEVEL.problem(LOADER, CPU).data
    run = bench_loader.LoaderRun(lambda *_: lambda: iter([(None, change(data.labels))]), LOADER, data)
    with pytest.raises(RuntimeError, match="an epoch must be a shuffle of the 8 images"):
        run.finish()


def test_what_fails_at_the_end_is_not_timed(monkeypatch):
    class Failing(OpRun):
        def finish(self):
            raise RuntimeError("no")

    level = with_wrong(bench_op.LEVEL, partial(Failing, bench_op.eager))
    measured = harness.measure(level, OP, CPU, ["wrong", "right"], rounds=1)
    assert measured.times.keys() == {"eager", "right"} and measured.refused.keys() == {"wrong"}


def test_a_provider_whose_launches_cannot_be_hidden_costs_the_others_nothing(monkeypatch):
    def one_is_not(calls, device, rounds, warm_up, hide_launches, refused):
        refused["fused, apart"] = NotHiddenError("launches took longer")
        return alternate({name: calls[name] for name in ("eager", "fused")}, device, rounds, warm_up)

    monkeypatch.setattr(harness, "alternate", one_is_not)
    for seconds in (None, 60):
        measured = harness.measure(bench_op.LEVEL, OP, CPU, ["fused, apart", "fused"], rounds=1, seconds=seconds)
        assert measured.times.keys() == {"eager", "fused"} and measured.refused.keys() == {"fused, apart"}


def test_a_setting_that_fails_is_told_to_every_provider_and_not_tried_again(monkeypatch):
    monkeypatch.setattr(bench_op.OpLevel, "problem", lambda *_: [][0])
    measured = harness.measure(bench_op.LEVEL, OP, CPU, ["fused"], rounds=2)
    assert measured.refused.keys() == {"eager", "fused"} and not measured.times
    assert "in measure" in measured.refused["fused"].__notes__[0]  # where it came from


def test_no_provider_reads_what_the_one_before_has_read():
    data = bench_op.LEVEL.problem(OP, CPU).data
    runs = [OpRun(bench_op.eager, OP, data) for _ in range(3)]
    seen = []
    for run in runs:
        run._prepared = lambda inputs: lambda: seen.append(id(inputs))
    alternate({str(i): run for i, run in enumerate(runs)}, CPU, rounds=4, warm_up=0)
    assert all(len(set(seen[i : i + len(data.sets)])) == len(data.sets) for i in range(9))


@pytest.mark.parametrize(
    ("name", "direction"),
    (("BN+ReLU", "forward"), ("BN+BN+add+ReLU", "backward"), ("BN+add+ReLU, forked", "both")),
)
def test_every_operation_of_ours_passes_its_check(name, direction):
    setting = Setting(f"{name} 8x2x2", direction, "fp32", "channels_last", 2, shape=(8, 2, 2))
    measured = harness.measure(bench_op.LEVEL, setting, CPU, ["fused", "fused, apart"], rounds=1)
    assert measured.times.keys() == {"eager", "fused", "fused, apart"}, measured.refused


@pytest.mark.parametrize("direction", ("forward with statistics", "data gradient with sums, forked"))
def test_a_convolution_of_ours_passes_its_check(direction):
    setting = CONVOLUTIONS[direction]
    name = next(reversed(bench_conv.candidates(setting)))
    level = copy.copy(bench_conv.LEVEL)
    level.providers = {"cudnn": level.providers["cudnn"], name: Provider(partial(bench_conv.build_conv3x3, name))}
    measured = harness.measure(level, setting, CPU, [name], rounds=1)
    assert measured.times.keys() == {"cudnn", name}, measured.refused


def test_the_convolutions_are_those_of_resnet18_in_every_way_of_cutting():
    level = bench_conv.LEVEL
    settings = list(level.settings(torch.device("cuda"), quick=False))
    assert len(set(settings)) == 2 * 4 * 3 * 4 and len(list(level.settings(torch.device("cuda"), quick=True))) == 4 * 4
    for setting in settings:
        baseline, *names = level.providers_of(setting)
        assert baseline == level.baseline and len(names) == len(set(bench_conv.candidates(setting).values())) >= 2
        assert level.providers.keys() >= set(names)


def test_what_a_convolution_multiplies_and_moves():
    setting = Setting("conv3x3 64x32x32", "", "bf16", "channels_last", 128, shape=(64, 32))
    works = {direction: bench_conv.LEVEL.work(replace(setting, direction=direction)) for direction in CONVOLUTIONS}
    n_elements, weight = 128 * 64 * 32 * 32, 9 * 64 * 64
    assert {work.flops for work in works.values()} == {2 * 9 * 64 * n_elements}
    images = {name: (work.bytes / 2 - weight) / n_elements for name, work in works.items()}
    assert images.pop("data gradient with sums") == 3  # dy, x, dz
    assert images.pop("data gradient with sums, forked") == 4 + 1 / 16  # the shortcut's gradient and ReLU's bits
    assert set(images.values()) == {2}


def test_convolutions_on_a_cpu_are_skipped_with_the_reason():
    reasons = {provider.why_not(CONVOLUTIONS["forward"], CPU) for provider in bench_conv.LEVEL.providers.values()}
    assert reasons == {"compiled Triton kernels and cuDNN need CUDA"}


CHOOSING = Setting("BN+add+ReLU, forked 8x4x4", "both", "bf16", "channels_last", 4, shape=(8, 4, 4))


def choosing(name: str) -> harness.Level:
    """The operation with a provider that chooses, which is left out on a CPU."""
    level = copy.copy(bench_op.LEVEL)
    level.providers = {"eager": level.providers["eager"], name: level.providers[name]}
    return level


@pytest.mark.parametrize("name", ("fused, two passes reversed", "fused, single read"))
def test_a_choice_that_does_not_run_is_not_timed(name, monkeypatch):
    monkeypatch.setattr(choices, "choose", lambda problem, device: DEFAULTS[problem.operation])
    measured = harness.measure(choosing(name), CHOOSING, CPU, [name], rounds=1)
    assert measured.times.keys() == {"eager"}
    assert "forward and backward must both run as chosen, got 0" in str(measured.refused[name])


@pytest.mark.parametrize("name", ("fused, two passes reversed", "fused, single read"))
def test_there_are_choices_for_16_bits_in_channels_last_on_a_gpu(name):
    why_not, cuda = bench_op.LEVEL.providers[name].why_not, torch.device("cuda")
    assert why_not(CHOOSING, CPU) == "runs only on CUDA"
    for other in ({"precision": "fp32"}, {"layout": "NCHW"}):
        assert why_not(replace(CHOOSING, **other), cuda) == "choices need a 16-bit type and channels_last"


ENTRY = {Problem("batch norm", "bf16", 6, 8, 8, 5, "add"): Choice("two passes, reversed")}


def test_a_table_counts_for_its_provider_alone_and_has_to_be_looked_up():
    found = {}

    class Looking(OpRun):
        def __init__(self, name, *args):
            super().__init__(bench_op.eager, *args)
            self.name = name

        def _forward(self, inputs):
            found[self.name] = choices.choose(next(iter(ENTRY)), CPU).implementation
            return super()._forward(inputs)

    level = with_wrong(bench_op.LEVEL, None)
    level.providers = {name: Provider(partial(Looking, name)) for name in ("baseline", "plain")}
    level.providers["chosen"] = Provider(partial(Looking, "chosen"), entries=lambda *_: ENTRY)
    level.providers["deaf"] = Provider(partial(OpRun, bench_op.eager), entries=lambda *_: ENTRY)
    with choices.using(dict.fromkeys(ENTRY, Choice("single read"))):  # what has been tuned on this machine
        measured = harness.measure(level, OP, CPU, list(level.providers), rounds=1)
    assert found == {"baseline": "two passes", "plain": "two passes", "chosen": "two passes, reversed"}
    assert measured.times.keys() == found.keys()
    assert "deaf looks up none of its 1 entries" in str(measured.refused["deaf"])


@pytest.mark.parametrize("name", ("fused, chosen", "fused, chosen, graph"))
def test_the_step_runs_as_chosen_where_it_was_tuned(name):
    provider, cuda = bench_step.LEVEL.providers[name], torch.device("cuda")
    problem = Problem("convolution", "bf16", STEP.batch_size, 64, 64, 32)
    other, step = problem._replace(n_images=2 * STEP.batch_size), replace(STEP, precision="bf16")
    assert provider.why_not(step, CPU) == "runs only on CUDA"
    assert provider.why_not(STEP, cuda) == "there are no choices in fp32"
    with choices.using({other: Choice("cudnn")}):
        reason = provider.why_not(step, cuda)
    assert reason == "not tuned: run resnet-fast tune --batch-size 4 --precision bf16"
    with choices.using({problem: Choice("cudnn"), other: Choice("cudnn")}):
        assert provider.why_not(step, cuda) is None and provider.entries(step, cuda) == {problem: Choice("cudnn")}


def test_a_block_of_ours_passes_its_check():
    measured = harness.measure(bench_block.LEVEL, BLOCK, CPU, ["fused"], rounds=1)
    assert measured.times.keys() == {"eager", "fused"}, measured.refused


def test_inference_of_ours_passes_its_check(thin):
    setting = replace(INFERENCE, batch_size=1)
    measured = harness.measure(bench_inference.LEVEL, setting, CPU, ["eager", "fused", "folded"], rounds=1)
    assert measured.times.keys() == {"eager, tuned", "eager", "fused", "folded"}, measured.refused


class Graph:
    """A stand-in for the CUDA graph where there is no CUDA, which runs what is recorded instead of replaying it."""

    def __init__(self, call):
        for _ in range(4):
            self.result = call()
        self.call = call

    def __call__(self):
        return self.call()


class DeafGraph(Graph):
    def __call__(self):
        return self.result


def test_a_recorded_pass_reads_the_images_that_it_is_given(monkeypatch, thin):
    level = with_wrong(bench_inference.LEVEL, partial(InferenceRun, eager_resnet18, graph=True))
    for graph, times in ((Graph, {"eager, tuned", "wrong"}), (DeafGraph, {"eager, tuned"})):
        monkeypatch.setattr(networks, "CudaGraph", graph)
        assert harness.measure(level, INFERENCE, CPU, ["wrong"], rounds=1).times.keys() == times


def test_a_recorded_step_starts_from_the_initial_weights(monkeypatch, thin):
    monkeypatch.setattr(networks, "CudaGraph", Graph)
    graphed = Provider(partial(StepRun, eager_resnet18, graph=True))
    level = with_wrong(bench_step.LEVEL, partial(StepRun, frozen, graph=True), graphed)
    measured = harness.measure(level, STEP, CPU, ["wrong", "right"], rounds=1)
    assert "right" in measured.times and "wrong" in measured.refused


def test_rows_hold_times_ratios_and_floors():
    measured = Measured({"eager": [2.0, 4.0, 6.0], "fused": [1.0, 4.0, 2.0]}, {}, {})
    limits = Limits(copy=1e9, matrix={"bf16": 1e12})
    level = copy.copy(bench_op.LEVEL)
    level.work = lambda setting: Work(bytes=1e6, flops=5e8)
    eager, fused = harness.rows(level, OP, measured, limits, {"device": "d"})
    assert tuple(fused) == (*COLUMNS, "device")
    assert (fused["p50_ms"], fused["images_per_s"]) == ("2.0000", "3000.0")
    assert eager["speedup_p50"] == "1.0000"
    assert fused["speedup_p50"] == "2.0000"  # the median of 2, 1 and 3, not the ratio of the medians
    assert (fused["mbytes"], fused["gflop"], fused["gb_per_s"]) == ("1.000", "0.500", "0.50")
    assert (fused["floor_ms"], fused["of_floor"]) == ("1.5000", "0.7500")


def test_the_floor_of_inference_counts_every_layer_once():
    one, nine = (inference_work(eager_resnet18, n_images, item_size=2) for n_images in (1, 9))
    assert (one.flops, nine.flops) == (2 * 555_422_720, 9 * 2 * 555_422_720)
    outputs = [n_channels * width**2 for _, n_channels, width in NETWORK]
    joins = [size for (role, *_), size in zip(NETWORK, outputs, strict=True) if role.join != "none"]
    # What the next convolution reads, and what the projections read and write; then pooling and the linear layer.
    activations = 3 * 32**2 + 2 * sum(outputs) + 65_536 + 32_768 + 16_384 + 32_768 + 16_384 + 8_192
    activations += sum(joins) + 512 + 512 + 10
    weights = sum(p.numel() for p in eager_resnet18().parameters() if p.dim() > 1)
    assert one.bytes == 2 * (weights + activations)
    assert nine.bytes == 2 * (weights + 9 * activations)


@pytest.mark.slow
def test_pytest_benchmarks_writes_what_it_measured(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["--quick", "--rounds", "2", "--results", str(tmp_path), "--device", "cpu", "-k", "512x4x4 and fused"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout, done.stderr)
    (limits,) = csv.DictReader(next(tmp_path.glob("*/limits.csv")).read_text().splitlines())
    assert float(limits["copy_gb_per_s"]) > 0 and float(limits["fp32_tflop_per_s"]) > 0
    text = next(tmp_path.glob("*/op.csv")).read_text()
    assert str(ROOT) not in text and str(tmp_path) not in text
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["provider"] for row in rows] == 3 * ["eager", "fused"]
    for row in rows:
        assert {name for name, value in row.items() if not value} <= {"driver", "triton", "peak_mb"}
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert f"{float(row['p50_ms']):.3f}" in done.stdout
    assert "s] 1 of 3: op: BN+ReLU 512x4x4" in done.stdout  # what runs
    assert 'op, "fused, two passes reversed", "fused, single read": runs only on CUDA' in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
        ({"numprocesses": 2}, "benchmarks run in one process"),
        ({"results": ROOT / "setup.py"}, "--results must be a folder, got the file .*setup.py"),
        ({}, "interpreted kernels are not timed"),
    ),
    ids=str,
)
def test_what_cannot_be_measured_is_refused_at_the_start(options, message, monkeypatch):
    monkeypatch.setattr(profile_check, "is_interpreted", lambda: not options)
    defaults = {"benchmark_columns": None, "quick": False, "rounds": None, "device": "cpu", "results": None}
    config = SimpleNamespace(option=SimpleNamespace(**defaults | options), stash=pytest.Stash())
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure(cast(pytest.Config, config))


def test_rounds_are_left_out_if_there_is_little_time_then_the_setting(monkeypatch):
    now = 0.0

    class OneSecond(OpRun):
        def __call__(self):
            nonlocal now
            now += 1

    def rounds(seconds):
        return len(harness.measure(level, OP, CPU, [], 40, seconds).times.get("eager", ()))

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now)
    level = copy.copy(bench_op.LEVEL)
    level.providers = {"eager": Provider(partial(OneSecond, bench_op.eager))}
    assert [rounds(seconds) for seconds in (100, 10, 3, 2)] == [40, 8, harness.MIN_ROUNDS, 0]


def test_a_setting_starts_if_the_time_left_is_as_long_as_its_level_has_needed():
    budget = Budget(elapsed() + 60)
    assert budget.share("op") == pytest.approx(20, abs=5)
    budget.note("step", 70)
    assert budget.share("step") is None and budget.share("op")
    assert Budget(0).share("op") is None


@pytest.mark.parametrize(("found", "precision"), (({"avx2": True}, "fp32"), ({"amx_bf16": True}, "bf16")))
def test_a_quick_run_leaves_out_bf16_that_the_processor_emulates(found, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    for level in (bench_step.LEVEL, bench_inference.LEVEL, bench_block.LEVEL, bench_op.LEVEL):
        assert {setting.precision for setting in level.settings(CPU, quick=True)} == {precision}
        assert "bf16" in {setting.precision for setting in level.settings(CPU, quick=False)}


@pytest.mark.parametrize(
    ("capability", "precisions", "quick"),
    (
        ((9, 0), ["bf16", "fp16", "fp32"], "bf16"),
        ((7, 5), ["fp16", "fp32"], "fp16"),
        ((6, 1), ["fp16", "fp32"], "fp32"),
    ),
    ids=("H200", "T4", "GTX 1080"),
)
def test_a_gpu_is_measured_in_fp16_and_not_where_it_emulates(capability, precisions, quick, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for level in (bench_step.LEVEL, bench_inference.LEVEL, bench_block.LEVEL, bench_op.LEVEL):
        settings = list(level.settings(torch.device("cuda"), quick=False))
        assert list(dict.fromkeys(setting.precision for setting in settings)) == precisions
        assert {setting.precision for setting in level.settings(torch.device("cuda"), quick=True)} == {quick}


def test_the_clock_tells_the_recorded_times():
    clock = ReplayClock()

    class Benchmark:
        def pedantic(self, target, rounds, iterations):
            self.seconds = [-(clock() - clock()) for _ in range(rounds)]

    benchmark = Benchmark()
    clock.replay(benchmark, [1.0, 5.0, 2.0])
    assert benchmark.seconds == pytest.approx([1e-3, 5e-3, 2e-3])


def test_order_turns_round_every_round():
    calls = []
    runs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = alternate(runs, torch.device("cpu"), rounds=3, warm_up=1)
    assert "".join(calls) == "abbaabba"
    assert [len(values) for values in times.values()] == [3, 3]
