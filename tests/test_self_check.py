"""The self-check of `resnet-fast doctor` passes correct kernels, and names wrong ones."""

import re

import pytest
import torch
from torch import Tensor

import resnet_fast.nn
from resnet_fast import functional
from resnet_fast.doctor import diagnosis, exit_code, parity
from resnet_fast.doctor.diagnosis import check_parity
from resnet_fast.doctor.parity import run_batch_norm

CPU = torch.device("cpu")
JOINS = {"none", "add", "bn"}


@pytest.fixture
def cases_only(on_aten, monkeypatch) -> None:
    """On ATen, in fp16 (bf16 itself rounds by up to 0.4 % in each step), without the training step."""
    monkeypatch.setattr(diagnosis, "choose_precision", lambda device: "fp32")
    monkeypatch.setattr(parity, "SECONDS_BEFORE_STEP", -1.0)


def drops_the_residuals_gradient(x: Tensor, norm, residual, *rest, **options) -> Tensor:
    return run_batch_norm(x, norm, None if residual is None else residual.detach(), *rest, **options)


def keeps_the_biased_variance(x: Tensor, norm, *rest, **options) -> Tensor:
    kept, n_rows = (1 - norm.momentum) * norm.running_var, x.numel() // x.shape[1]
    y = run_batch_norm(x, norm, *rest, **options)
    # .data, because autograd has saved it.
    norm.running_var.data.copy_(kept + (norm.running_var - kept) * (n_rows - 1) / n_rows)
    return y


def one_percent_too_large(*args, **options) -> Tensor:
    return run_batch_norm(*args, **options) * 1.01


def one_value_is_nan(*args, **options) -> Tensor:
    y = run_batch_norm(*args, **options)
    return y.masked_fill((torch.arange(y.numel()) == 0).view(y.shape), float("nan"))


def lets_gradients_through_a_closed_relu(*args, relu: bool, **options) -> Tensor:
    z = run_batch_norm(*args, relu=False, **options)
    return z + (z.relu() - z).detach()


@pytest.mark.usefixtures("cases_only")
@pytest.mark.parametrize(
    ("mistake", "result", "wrong_joins"),
    [
        (drops_the_residuals_gradient, "dresidual", {"add", "bn"}),
        (keeps_the_biased_variance, "running_var", JOINS),
        (one_percent_too_large, "", JOINS),
        (one_value_is_nan, "y", JOINS),
        (lets_gradients_through_a_closed_relu, "d", JOINS),
    ],
)
def test_a_wrong_result_is_named(mistake, result: str, wrong_joins: set[str], monkeypatch):
    monkeypatch.setattr(parity, "run_batch_norm", mistake)
    total, *wrong = check_parity(CPU)
    assert total.name == "parity" and exit_code([total]) == 1 and exit_code(wrong) == 1
    line = re.compile(r"(none|add|bn) join, (?:channels_last|nchw), \w+, [\dx]+: (?:residual_)?(\w+) is off by")
    named = [line.match(finding.value).groups() for finding in wrong]
    assert {join for join, _ in named} == wrong_joins and len(named) == 2 * len(wrong_joins)
    assert all(name.startswith(result) for _, name in named)


@pytest.mark.usefixtures("cases_only")
def test_a_torch_that_computes_wrong_excuses_nothing(monkeypatch):
    """Eager's error is then as large as ours."""
    original = torch.batch_norm
    monkeypatch.setattr(torch, "batch_norm", lambda *a, **k: original(*a, **k) * 1.001)
    checks = [check for check in parity.self_check(CPU, torch.bfloat16) if "fp32" in check.case]
    assert len(checks) == 3 and all(check.share > 1 for check in checks)


@pytest.mark.usefixtures("on_aten")
def test_a_wrong_network_is_named(monkeypatch):
    find = functional.find_call

    def without_the_shortcut(*arguments):
        call = find(*arguments)
        return lambda x, norm, residual, *rest: call(x, norm, None if residual is None else 0 * residual, *rest)

    monkeypatch.setattr(resnet_fast.nn, "find_call", without_the_shortcut)
    _, finding = check_parity(CPU)
    assert not finding.ok and finding.value.startswith(f"{parity.TRAINING_STEP}: its gradient is off by")


@pytest.mark.usefixtures("cases_only")
def test_an_operation_that_raises_is_wrong(monkeypatch):
    def no_kernel(*args, **kwargs):
        raise RuntimeError("no kernel image is available\nand more lines")

    monkeypatch.setattr(parity, "run_batch_norm", no_kernel)
    total, *wrong = check_parity(CPU)
    assert exit_code([total]) == 1 and len(wrong) == 6
    assert all(finding.value.endswith(": RuntimeError: no kernel image is available") for finding in wrong)


@pytest.mark.gpu
@pytest.mark.slow
def test_the_kernels_pass_and_what_is_not_reached_in_time_is_said(device, monkeypatch):
    """Compiled on a GPU, else interpreted."""
    monkeypatch.setattr(parity, "SECONDS_FOR_CASES", 600.0)
    monkeypatch.setattr(parity, "SECONDS_BEFORE_STEP", -1.0)
    (finding,) = check_parity(device)
    assert finding.ok and finding.value.startswith("right: 6 of 7 checks") and "run it again" in finding.advice
