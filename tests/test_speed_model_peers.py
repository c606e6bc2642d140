"""Eager's and torch.compile's kernels in the speed model: names, number, and bytes."""

from collections import Counter

import pytest

from benchmarks.speed_model.capture import Kernel, Launch
from benchmarks.speed_model.eager import eager_rows, operation_kernels
from benchmarks.speed_model.gpus import GPUS
from benchmarks.speed_model.inductor import compile_rows, group_of, run_capture, work_of
from benchmarks.speed_model.peers import read_totals
from benchmarks.speed_model.rows import add_up
from benchmarks.work import NETWORK, network_bytes, operation_bytes

H200 = GPUS["h200"]


def total_bytes(rows) -> float:
    return sum(row.launches * row.bytes for row in rows if row.group == "batch norm")


@pytest.mark.parametrize(
    ("join", "fork", "n_bytes"),
    [("none", False, 10 + 16), ("none", True, 10 + 22), ("add", False, 16 + 16), ("bn", True, 16 + 22 + 6 + 10)],
)
def test_eager_moves_these_bytes_per_element(join, fork, n_bytes):
    kernels = operation_kernels(join, fork)
    assert sum(2 * (kernel.reads + kernel.writes) for kernel in kernels) == n_bytes


def test_eager_moves_more_than_the_fused_operations():
    for role, n_channels, width in NETWORK:
        eager = sum(2 * (kernel.reads + kernel.writes) for kernel in operation_kernels(role.join, role.fork))
        assert eager > operation_bytes(role.join, role.fork, "both", 1, 2), (role, n_channels, width)
    assert total_bytes(eager_rows(H200, 512)) == pytest.approx(9.57e9, rel=1e-3)
    assert network_bytes(512, 2) == pytest.approx(5.71e9, rel=1e-3)


def test_eager_launches():
    totals = add_up(eager_rows(H200, 128))
    # 7 kernels and a counter for each of 20 norms, 17 ReLUs in both directions, 8 additions, 8 forks
    assert totals.launches == 20 * 8 + 2 * 17 + 8 + 8
    assert totals.rest_launches == 47


# At 512 Inductor takes three steps, not two, for one more stage's statistics.
@pytest.mark.parametrize(("batch_size", "launches"), [(128, 164), (512, 169)])
def test_predicted_rows_of_the_h200(batch_size, launches):
    totals = read_totals("h200", "bf16", batch_size)
    assert {provider: own.launches for provider, own in totals.items()} == {"eager": 210, "compile": launches}
    assert totals["eager"] == pytest.approx(add_up(eager_rows(H200, batch_size)), rel=0.01)
    assert totals["compile"].predicted_us < totals["eager"].predicted_us
    assert read_totals("h200", "bf16", 1) == {}


@pytest.mark.parametrize(
    ("kernel", "tensor", "group"),
    [
        ("triton_red_fused__native_batch_norm_legit_functional_2", (8388608, 2), "batch norm"),
        ("triton_poi_fused_add_threshold_backward_34", (8388608, 2), "batch norm"),
        ("triton_poi_fused_add_copy__35", (1, 8), "counter"),
        ("triton_poi_fused__to_copy_6", (36864, 4), "cast"),
        ("triton_red_fused__to_copy_sum_view_37", (1280, 2), "rest"),
    ],
)
def test_group(kernel, tensor, group):
    assert group_of(Launch(kernel, {"in_ptr0": tensor}, {"xnumel": tensor[0]})) == group


def test_work_of_a_reduction():
    signature = {"in_ptr0": "*bf16", "in_ptr1": "*fp32", "out_ptr0": "*fp32", "xnumel": "i32", "r0_numel": "i32"}
    launch = Launch("r", {"in_ptr0": (2**20, 2), "in_ptr1": (64, 4), "out_ptr0": (8192, 4)}, {})
    launch = launch._replace(sizes={"xnumel": 8192, "r0_numel": 128})
    work = work_of(launch, Kernel("", signature, []), {"XBLOCK": 64, "R0_BLOCK": 8}, H200)
    (image,) = work.image_parameters
    assert (work.grid, work.image_bytes) == (128, 2**21)
    assert work.program_reads == {image: 64 * 128 * 2}


@pytest.mark.parametrize(
    ("source", "n_bytes"), [("tl.load(in_out_ptr0 + x0)", 6), ("tl.store(in_out_ptr0 + x0, y)", 4)]
)
def test_work_of_an_update_in_place(source, n_bytes):
    kernel = Kernel(source, {"in_out_ptr0": "*bf16", "in_ptr0": "*bf16", "xnumel": "i32"}, [])
    launch = Launch("p", {"in_out_ptr0": (1000, 2), "in_ptr0": (1000, 2)}, {"xnumel": 1000})
    work = work_of(launch, kernel, {"XBLOCK": 512}, H200)
    assert (work.grid, work.image_bytes, work.program_reads) == (2, 1000 * n_bytes, {})


def test_missing_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler: install g\+\+ or set CXX"):
        run_capture("capture", "h200", 128, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "precision", "norm"), [("h200", "bf16", "native"), ("t4", "fp16", "cudnn")])
def test_operators_that_eager_dispatches(gpu, precision, norm):
    counts = run_capture("count_operations", gpu, 128, precision)
    rows = Counter()
    for row in eager_rows(GPUS[gpu], 128):
        rows[row.kernel.split(",")[0]] += row.launches
    assert counts[f"aten.{norm}_batch_norm.default"] == rows["batch_norm_transform_input_channels_last_kernel"] == 20
    assert counts[f"aten.{norm}_batch_norm_backward.default"] == 20
    assert counts["aten.add_.Tensor"] == rows["add_ (residual)"] + rows["add_ (num_batches_tracked)"]
    assert counts["aten.relu_.default"] == rows["relu_"]
    assert counts["aten.threshold_backward.default"] == rows["threshold_backward"]
    assert counts["aten.add.Tensor"] == rows["add (gradients of a fork)"]
    assert counts["aten._to_copy.default"] == rows["_to_copy"]


@pytest.mark.slow
def test_kernels_that_inductor_generates():
    captured = run_capture("capture", "h200", 128, "bf16", network="small")
    groups = Counter(group_of(launch) for launch in captured.launches)
    assert groups.pop("batch norm") >= 5  # the forward reads x twice, the backward three times
    # casts: images, weights, the bias, and the weights' gradients; rest: the pool's backward, the bias's gradient
    assert groups == {"counter": 1, "cast": 4 + 2, "rest": 2 + 1}
    assert "native_batch_norm" in captured.launches[2].kernel
    rows = compile_rows(captured, H200)
    assert sum(row.launches for row in rows) == len(captured.launches)
    assert total_bytes(rows) > 8 * 128 * 64 * 32 * 32  # x is read twice at least, dy and dx
