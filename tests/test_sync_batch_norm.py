"""FusedSyncBatchNorm2d: several processes compute the same as one on their joint batch."""

import copy
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from sync_worker import (
    CHANNELS,
    Norms,
    batch,
    ddp_task,
    lost_process_task,
    network,
    norms_task,
    run_norms,
    start,
    train,
    training_batch,
)
from torch import nn

import resnet_fast
from resnet_fast import FusedBatchNorm2d, FusedSyncBatchNorm2d, convert_sync_batchnorm

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

# join, type, layout, order of the derivative, options of the batch norm
CASES = {
    "none": ("none", torch.float64, "channels_last", 1, {}),
    "bn": ("bn", torch.float64, "channels_last", 1, {}),
    "add, second derivatives": ("add", torch.float64, "channels_last", 2, {}),
    "bn, second derivatives": ("bn", torch.float64, "channels_last", 2, {}),
    "add, nchw": ("add", torch.float64, "nchw", 1, {}),
    "fp32": ("bn", torch.float32, "channels_last", 1, {}),
    "bf16": ("bn", torch.bfloat16, "channels_last", 1, {}),
    "cumulative, no affine": ("bn", torch.float64, "channels_last", 1, {"momentum": None, "affine": False}),
    "no running statistics": ("none", torch.float64, "channels_last", 1, {"track_running_stats": False}),
}
# Images of each process; one has none.
RUNS = {"kernels": ((3, 0, 2), tuple(CASES)), "aten": ((5, 2), ("bn", "add, second derivatives", "bf16"))}
NO_ROWS = torch.empty(0, CHANNELS, 1, 1)
HUGE = 1e25 * torch.randn(4, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(0))


def skip_where_compiled(backend: str) -> None:
    if backend == "kernels" and torch.cuda.is_available():
        pytest.skip("CPU tensors run on the kernels in the interpreter alone, and here they are compiled")


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    """What each process of a run found, by backend."""

    @functools.cache
    def run(backend: str) -> list[tuple[dict, dict]]:
        skip_where_compiled(backend)
        sizes, names = RUNS[backend]
        cases = {name: CASES[name] for name in names}
        others = [NO_ROWS] * (len(sizes) - 1)
        batches = {"no rows": [NO_ROWS, *others], "one row": [torch.ones(1, CHANNELS, 1, 1), *others]}
        batches["huge"] = HUGE.tensor_split(len(sizes))
        found = start(
            norms_task, len(sizes), tmp_path_factory.mktemp("sync"), backend == "kernels", sizes, cases, batches
        )
        assert None not in found
        return found

    return run


def one_process(case: str, sizes: tuple[int, ...], dtype: torch.dtype | None = None):
    join, own_dtype, layout, order, options = CASES[case]
    module = Norms(nn.BatchNorm2d, join, **options)
    module = module.double() if (dtype or own_dtype) == torch.float64 else module
    tensors = (tensor.to(dtype or own_dtype) for tensor in batch(sum(sizes), own_dtype, layout))
    return run_norms(module, *tensors, order)


@pytest.mark.parametrize(("backend", "case"), [(backend, case) for backend in RUNS for case in RUNS[backend][1]])
def test_equals_one_process_on_the_joint_batch(backend, case, by_rank):
    sizes, ranks = RUNS[backend][0], [found for found, _ in by_rank(backend)]
    expected = one_process(case, sizes)
    exact = one_process(case, sizes, torch.float64)
    dtype = CASES[case][1]
    for name in expected:
        parts = [found[case][name] for found in ranks if name in found[case]]
        if not parts:  # a gradient that nothing depends on: torch has zeros
            assert not expected[name].any(), name
            continue
        if name in ("y", "dx", "dresidual"):
            joint = torch.cat(parts)
        elif name.startswith("d"):  # each process has the gradient of its own images
            joint = sum(part.double() for part in parts).to(parts[0].dtype)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between processes"
            joint = parts[0]
        if name.endswith("num_batches_tracked") or dtype == torch.float64:
            # fp64, sums in another order: 2^12 roundings
            torch.testing.assert_close(joint, expected[name], rtol=1e-12, atol=1e-12, msg=name)
        else:
            # Every process rounds its own sums, which may be larger than the joint one.
            images = batch(sum(sizes), torch.float64, "nchw")
            added = sum(image.abs().mean((0, 2, 3)) for image in images) if name.endswith("mean") else exact[name].abs()
            assert_within_budget(name, joint, expected[name], exact[name], added)


@pytest.mark.parametrize("backend", RUNS)
def test_few_rows_and_huge_values(backend, by_rank):
    ranks = [found for _, found in by_rank(backend)]
    for _, running_mean, running_var in (found[name] for found in ranks for name in ("no rows", "one row")):
        assert torch.equal(running_mean, torch.zeros(CHANNELS)) and torch.equal(running_var, torch.ones(CHANNELS))
    assert torch.equal(ranks[0]["one row"][0], torch.zeros(1, CHANNELS, 1, 1))
    exact = F.batch_norm(HUGE.double(), None, None, training=True)
    y = torch.cat([found["huge"][0] for found in ranks]).double()
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)  # a hundred fp32 roundings; without a rescue y is 0


def test_distributed_data_parallel_trains_as_one_process(on_aten, tmp_path):
    trained = start(ddp_task, 2, tmp_path, False)
    model = network()
    losses = train(model, *training_batch())
    state = model.state_dict()
    assert losses[-1] < losses[0]
    torch.testing.assert_close([sum(pair) / 2 for pair in zip(*(found[0] for found in trained), strict=True)], losses)
    for _, found in trained:
        for name in state:  # two steps in fp64, sums in another order
            torch.testing.assert_close(found[name], state[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("how", ("dies", "hangs"))
def test_a_lost_process_is_an_error_within_the_timeout(how, tmp_path):
    error, message, seconds = start(lost_process_task, 2, tmp_path, False, how, timeout=5)[0]
    assert error in ("RuntimeError", "DistBackendError", "DistNetworkError"), (error, message)
    assert message.startswith("bn1 FusedSyncBatchNorm2d(4) needs every process of its group"), message
    assert "throw_on_early_termination=True" in message
    assert seconds < 15  # the timeout is 5


def test_one_process_is_plain_batch_norm():
    """Without a process group, and in evaluation mode."""
    ours, theirs = FusedSyncBatchNorm2d(6), FusedBatchNorm2d(6)
    x = torch.randn(3, 6, 4, 4)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert list(ours.state_dict()) == list(nn.SyncBatchNorm(6).state_dict())


def test_conversion_keeps_everything_but_the_class():
    model = resnet_fast.resnet18(num_classes=10, stem="cifar")
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    calls = []
    model.layer1[0].bn1.register_forward_hook(lambda *_: calls.append(1))
    converted = convert_sync_batchnorm(model.eval())
    assert converted is model
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 20 and all(type(norm) is FusedSyncBatchNorm2d and not norm.training for norm in norms)
    model(torch.randn(1, 3, 8, 8))
    assert calls
    assert copy.deepcopy(model).layer4[1].bn2.process_group is None


def test_conversion_keeps_relu_and_shared_modules():
    shared = FusedBatchNorm2d(4, relu=True)
    model = convert_sync_batchnorm(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.BatchNorm1d(4)}))
    assert model["a"] is model["b"][0] and model["a"].relu
    assert type(model["c"]) is nn.SyncBatchNorm
    assert type(convert_sync_batchnorm(nn.BatchNorm2d(4))) is FusedSyncBatchNorm2d


def test_conversion_refuses_what_it_does_not_know():
    class Special(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(nn.BatchNorm2d(4), Special(4))
    with pytest.raises(TypeError, match="1 must be a batch norm of torch or resnet_fast, got .*Special"):
        convert_sync_batchnorm(model)
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup or None, got 'world'"):
        convert_sync_batchnorm(model[0], "world")
    for module in (None, "model", nn.BatchNorm2d):
        with pytest.raises(TypeError, match=re.escape(f"module must be an nn.Module, got {module!r}")):
            convert_sync_batchnorm(module)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_converted_model_still_fuses(monkeypatch):
    """A block whose norms are all synchronized fuses; one with a mixture runs step by step."""
    block = network()[3]
    convert_sync_batchnorm(block)
    assert block.can_fuse()
    group = object()
    monkeypatch.setattr(block.bn2, "group", lambda: group)
    assert not block.can_fuse()


def test_norms_that_are_synchronized_differently_are_refused(monkeypatch):
    group = object()
    norm, other = FusedSyncBatchNorm2d(4), FusedBatchNorm2d(4)
    monkeypatch.setattr(norm, "group", lambda: group)
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError, match="synchronized over the same processes"):
        norm.fused(x, x, other, relu=True)
