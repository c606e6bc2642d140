"""The self-check of `resnet-fast doctor` passes what is right, and names what is wrong."""

import re
from functools import partial

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import resnet_fast.nn
from resnet_fast import batch_norm_add_relu, functional
from resnet_fast.cli import app
from resnet_fast.doctor import parity
from resnet_fast.doctor.diagnosis import check_parity

CPU = torch.device("cpu")


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


def joined(output: str) -> str:
    """Wrapped lines, as one."""
    return " ".join(output.split())


def drops_the_residuals_gradient(x: Tensor, *norm, residual: Tensor | None, residual_norm) -> Tensor:
    residual = None if residual is None else residual.detach()
    return batch_norm_add_relu(x, *norm, residual=residual, residual_norm=residual_norm)


def keeps_the_biased_variance(x: Tensor, running_mean, running_var, *rest, **joins) -> Tensor:
    old, n_rows = running_var.clone(), x.numel() // x.shape[1]
    y = batch_norm_add_relu(x, running_mean, running_var, *rest, **joins)
    kept = (1 - 0.3) * old  # the momentum of parity.make_operands
    # .data, because autograd has saved it.
    running_var.data.copy_(kept + (running_var - kept) * (n_rows - 1) / n_rows)
    return y


def one_percent_too_large(x: Tensor, *norm, **joins) -> Tensor:
    return batch_norm_add_relu(x, *norm, **joins) * 1.01


def lets_gradients_through_a_closed_relu(x: Tensor, *norm, **joins) -> Tensor:
    z = batch_norm_add_relu(x, *norm, relu=False, **joins)
    return z + (z.relu() - z).detach()


JOINS = {"none", "add", "bn"}


def share(case: parity.Case, device: torch.device = CPU) -> float:
    return parity.check(case, partial(parity.case_errors, case, device)).share


@pytest.mark.usefixtures("on_aten")
@pytest.mark.parametrize(
    ("mistake", "result", "wrong_joins"),
    [
        (drops_the_residuals_gradient, "dresidual", {"add", "bn"}),
        (keeps_the_biased_variance, "running_var", JOINS),
        (lets_gradients_through_a_closed_relu, "d", JOINS),
    ],
)
def test_a_wrong_result_is_named_and_exits_with_1(mistake, result: str, wrong_joins: set[str], monkeypatch):
    monkeypatch.setattr(parity, "batch_norm_add_relu", mistake)
    done = invoke("--device", "cpu")
    assert done.exit_code == 1
    named = re.findall(r"(none|add|bn) join, (?:channels_last|nchw), \w+, [\dx]+: (\w+) is off by", joined(done.stdout))
    assert {join for join, _ in named} == wrong_joins and len(named) == 2 * len(wrong_joins)
    assert all(name.removeprefix("residual_").startswith(result) for _, name in named)
    assert "FAIL  parity" in done.stdout and "Something is wrong: parity." in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.usefixtures("on_aten")
def test_one_percent_shows(monkeypatch):
    monkeypatch.setattr(parity, "batch_norm_add_relu", one_percent_too_large)
    for case in parity.cases(torch.float16):  # bf16 itself rounds by up to 0.4 % in each step
        assert share(case) > 1, case


@pytest.mark.usefixtures("on_aten")
def test_a_torch_that_computes_wrong_excuses_nothing(monkeypatch):
    """Eager's error is then as large as ours."""
    original = torch.nn.functional.batch_norm
    monkeypatch.setattr(torch.nn.functional, "batch_norm", lambda *a, **k: original(*a, **k) * 1.001)
    for case in parity.cases(torch.bfloat16):
        if case.dtype == torch.float32:
            assert share(case) > 1, case


@pytest.mark.usefixtures("on_aten")
def test_a_wrong_network_is_named(monkeypatch):
    def without_the_shortcut(x, norm, residual, *rest, **options):
        return functional.run(x, norm, None if residual is None else 0 * residual, *rest, **options)

    assert parity.check(parity.TRAINING_STEP, partial(parity.step_errors, CPU)).share <= 1
    monkeypatch.setattr(resnet_fast.nn, "run", without_the_shortcut)
    (finding,) = [f for f in check_parity(CPU) if not f.name]
    assert not finding.ok and finding.value.startswith(parity.TRAINING_STEP)


@pytest.mark.usefixtures("on_aten")
def test_an_operation_that_raises_is_a_failure_that_leaves_the_other_lines(monkeypatch):
    def no_kernel(*args, **kwargs):
        raise RuntimeError("no kernel image is available\nand more lines")

    monkeypatch.setattr(parity, "batch_norm_add_relu", no_kernel)
    done = invoke("--device", "cpu")
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert joined(done.stdout).count("RuntimeError: no kernel image is available") == 6
    assert "and more lines" not in done.stdout and "ok    Python" in done.stdout


def test_the_kernels_pass(device):
    """Compiled on a GPU, else interpreted; one of each join is enough, as other tests hold the kernels to more."""
    for case in {case.join: case for case in parity.cases(torch.float16)}.values():
        assert share(case, device) <= 1, case


@pytest.mark.usefixtures("on_aten")
def test_what_is_not_reached_in_time_is_said(monkeypatch):
    monkeypatch.setattr(parity, "SECONDS_BEFORE_STEP", -1.0)
    (finding,) = check_parity(CPU)
    assert finding.ok and "6 of 7 checks" in finding.value and "run again" in finding.advice
