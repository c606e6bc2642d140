"""A loop of one's own computes the same with `graphed`, to the bit, and recording leaves everything as it was.

A stand-in for the CUDA graph shows it (recorded_graph.py). Each loop is written once, and `wrap` is what it does with
its step: nothing, or `graphed`.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import recorded_graph
import torch
import torch.nn.functional as F
from pages import DOCS, run_example
from recorded_graph import REFUSED, RecordedGraph
from thin_resnet import thin_resnet
from tiny_run import equal
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_map

from resnet_fast import graphed
from resnet_fast.data import Batch
from resnet_fast.models import resnet
from resnet_fast.training.graphed import Graphed
from resnet_fast.training.step_state import StepState

pytestmark = pytest.mark.usefixtures("one_thread", "on_aten")

SIZES = [8, 8, 4] * 3  # three epochs, whose last batch is a smaller one
Wrap = Callable[..., Callable[..., Any]]
Loop = Callable[[Wrap], Iterator[Any]]


class Small(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.dropout, self.fc = nn.Dropout(dropout), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.bn(self.conv(x)).relu().mean((2, 3))))


def batches(sizes: list[int] = SIZES) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        yield torch.randn(size, 3, 8, 8, generator=generator), torch.randint(3, (size,), generator=generator)


def sgd(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3, "fused": True, **settings}
    return torch.optim.SGD(model.parameters(), **settings)


def recorded(step: Callable[..., Any], *changes: Any, make_graph: Any = RecordedGraph) -> Graphed:
    return graphed(step, *changes, fallback=False, make_graph=make_graph)


def state_of(*parts: Any) -> Any:
    """Copies of what parts hold, gradients and the random state included."""
    states, grads = [], []
    for part in parts:
        states.append(part.state_dict() if hasattr(part, "state_dict") else part)
        if isinstance(part, nn.Module):
            grads.append([parameter.grad for parameter in part.parameters()])
    return copy.deepcopy([states, grads, torch.get_rng_state()])


# The loops.


def train(
    wrap: Wrap,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip: float = 0.0,
    autocast: bool = False,
    schedule: Any = None,
    sizes: list[int] = SIZES,
) -> Iterator[Any]:
    def step(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return {"loss": loss, "n_correct": (logits.argmax(1) == labels).sum()}

    step = wrap(step, model, optimizer)
    scheduler = schedule and schedule(optimizer)
    for batch in batches(sizes):
        yield step(*batch), state_of(model, optimizer)
        if scheduler:
            scheduler.step()


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    # The momentum stays: each of its values would be another kind of step.
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=len(SIZES) + 1, cycle_momentum=False)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    # In double precision the rates of one_cycle are others than in fp32.
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.5)


def with_momentum(wrap: Wrap) -> Iterator[Any]:
    model = Small()
    return train(wrap, model, sgd(model), schedule=one_cycle)


def with_dampening(wrap: Wrap) -> Iterator[Any]:
    """The first momentum is the gradient itself."""
    model = Small()
    return train(wrap, model, sgd(model, dampening=0.5, nesterov=False))


def with_adam(wrap: Wrap) -> Iterator[Any]:
    model = Small()
    return train(wrap, model, torch.optim.AdamW(model.parameters(), 2**-6, fused=True), schedule=halving)


def with_adam_and_a_tensor_as_rate(wrap: Wrap) -> Iterator[Any]:
    model = Small()
    return train(wrap, model, torch.optim.Adam(model.parameters(), torch.tensor(1e-2), fused=True), schedule=one_cycle)


def with_clipping(wrap: Wrap) -> Iterator[Any]:
    model = Small()
    return train(wrap, model, sgd(model), clip=0.1)


def with_autocast(wrap: Wrap) -> Iterator[Any]:
    model = Small()
    return train(wrap, model, sgd(model), autocast=True)


def with_autocast_around_the_call(wrap: Wrap) -> Iterator[Any]:
    model = Small()
    optimizer = sgd(model)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    step = wrap(step, model, optimizer)
    for batch in batches():
        with torch.autocast("cpu", torch.bfloat16):
            yield step(*batch), state_of(model, optimizer)


def with_dropout(wrap: Wrap) -> Iterator[Any]:
    model = Small(dropout=0.5)
    return train(wrap, model, sgd(model))


def with_the_network(wrap: Wrap) -> Iterator[Any]:
    model = thin_resnet(resnet)
    return train(wrap, model, sgd(model))


def with_rates_by_hand(wrap: Wrap) -> Iterator[Any]:
    model = Small()
    optimizer = torch.optim.SGD(
        [{"params": model.conv.parameters(), "lr": 0.5}, {"params": model.fc.parameters(), "lr": torch.tensor(0.1)}],
        momentum=0.9,
        fused=True,
    )
    for i, result in enumerate(train(wrap, model, optimizer)):
        yield result
        first, second = optimizer.param_groups
        first["lr"] = 0.5 / (i + 2)
        second["lr"].mul_(0.9)
        second["momentum"] = 0.9 if i < 4 else 0.8


def with_parts_and_a_flag(wrap: Wrap) -> Iterator[Any]:
    model = Small()
    optimizer = sgd(model)

    def step(images: Tensor, labels: Tensor, *, is_last: bool) -> Tensor:
        loss = F.cross_entropy(model(images), labels) / 2
        loss.backward()
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    step = wrap(step, model, optimizer)
    for i, batch in enumerate(batches([8] * 10)):
        yield step(*batch, is_last=i % 2 == 1), state_of(model, optimizer)


def with_parts_in_two_functions(wrap: Wrap) -> Iterator[Any]:
    """Batches of three parts: a part finds no gradients, those of the last step, or those of another recording."""
    model = Small()
    optimizer = sgd(model)

    def add(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(model(images), labels) / 3
        loss.backward()
        return loss

    def update(set_to_none: bool) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none)

    add, update = wrap(add, model), wrap(update, model, optimizer)
    for i, batch in enumerate(batches([8, 4, 8] * 6)):
        yield add(*batch), state_of(model, optimizer)
        if i % 3 == 2:
            update(i < 9)
            yield state_of(model, optimizer)


def with_the_step_before_the_gradients(wrap: Wrap) -> Iterator[Any]:
    """A step reads the gradients of the one before, and then drops them."""
    model = Small()
    optimizer = sgd(model)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.step()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    step = wrap(step, model, optimizer)
    for batch in batches():
        yield step(*batch), state_of(model, optimizer)


def with_a_scaler(wrap: Wrap) -> Iterator[Any]:
    """The scale grows, and falls at infinite gradients, with which no step is made."""
    model = Small()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss

    step = wrap(step, model, optimizer, scaler)
    scales = []
    for i, (images, labels) in enumerate(batches()):
        before = copy.deepcopy(model.fc.weight)
        yield step(images * (1e38 if i == 6 else 1), labels), state_of(model, optimizer, scaler)
        scales.append(scaler.get_scale())
        assert (i == 6) == torch.equal(before, model.fc.weight)
    assert scales[-1] > 4 and scales[6] < scales[5]


def with_an_average_inside(wrap: Wrap) -> Iterator[Any]:
    model = Small()
    optimizer, average = sgd(model), AveragedModel(model)
    update = get_ema_multi_avg_fn(0.5)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        update(list(average.module.parameters()), list(model.parameters()), None)
        return loss

    step = wrap(step, model, optimizer, average)
    for batch in batches():
        yield step(*batch), state_of(model, optimizer, average)


def with_an_average_behind(wrap: Wrap) -> Iterator[Any]:
    model = Small()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for result in train(wrap, model, sgd(model)):
        average.update_parameters(model)
        yield result, state_of(average)


def with_modes(wrap: Wrap) -> Iterator[Any]:
    """Statistics and a layer are frozen for a while, and there are evaluations."""
    model = Small(dropout=0.5)
    for i, result in enumerate(train(wrap, model, sgd(model), sizes=[8] * 16)):
        yield result
        with torch.no_grad():
            yield model.eval()(next(batches())[0])
        model.train()
        model.bn.train(i % 4 < 2)
        model.conv.weight.requires_grad_(i >= 8)


def with_moved_state(wrap: Wrap) -> Iterator[Any]:
    """Weights move to other memory, and the optimizer's state is loaded."""
    model = Small()
    optimizer = sgd(model)
    for i, result in enumerate(train(wrap, model, optimizer)):
        yield result
        if i == 4:
            model.double().float()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


LOOPS = [value for name, value in list(globals().items()) if name.startswith("with_")]


def bits(value: Any) -> Any:
    return value.detach().clone().flatten().view(torch.uint8) if isinstance(value, Tensor) else value


def run(loop: Loop, wrap: Wrap) -> list[Any]:
    torch.manual_seed(0)
    return [tree_map(bits, seen) for seen in loop(wrap)]


class Counted(RecordedGraph):
    n_recorded = n_replayed = 0

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(run)
        Counted.n_recorded += 1

    def __call__(self) -> Any:
        Counted.n_replayed += 1
        return super().__call__()


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_recorded_loop_has_the_bits_of_one_that_is_not(loop: Loop):
    Counted.n_recorded = Counted.n_replayed = 0
    plain = run(loop, lambda step, *changes: step)
    assert equal(run(loop, lambda *parts: recorded(*parts, make_graph=Counted)), plain)
    assert Counted.n_replayed >= 3
    assert not equal(plain[0], plain[-1])


def simple_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Tensor]:
    def step(images: Tensor, labels: Tensor, *rest: Any) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


class Recording(RecordedGraph):
    """Replays nothing."""

    def __call__(self) -> Any:
        return self.result


@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.Adam(model.parameters(), fused=True)])
@pytest.mark.parametrize("zeroes", [True, False])
def test_recording_leaves_everything_as_it_was(make: Callable[[nn.Module], torch.optim.Optimizer], zeroes: bool):
    model = thin_resnet(resnet)
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    optimizer, total = make(model), torch.zeros(())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        if zeroes:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        total.add_(loss.detach())
        return loss

    step = recorded(step, model, optimizer, scaler, total, make_graph=Recording)
    first, second = batches([4, 4])
    step(*first)
    gradients = [parameter.grad for parameter in model.parameters()]
    before = state_of(model, optimizer, scaler, total)
    step(*second)
    assert step.recorded
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is gradient) != zeroes  # where they are dropped, they are those of the replay
        parameter.grad = gradient
    assert equal(state_of(model, optimizer, scaler, total), before)
    assert before[0][0]["bn1.num_batches_tracked"] == 1
    assert type(optimizer.param_groups[0]["lr"]) is float


def test_a_failed_recording_leaves_everything_as_it_was():
    model = Small(dropout=0.5)
    optimizer = sgd(model)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        simple_step(model, optimizer)(images, labels)
        return model.fc.bias.sum().item()

    plain, first, second = copy.deepcopy(model), *batches([4, 4])
    plain_optimizer = sgd(plain)
    for batch in (first, second):
        torch.manual_seed(1)
        simple_step(plain, plain_optimizer)(*batch)
    expected = state_of(plain, plain_optimizer)
    step = graphed(step, model, optimizer, make_graph=RecordedGraph)
    torch.manual_seed(1)
    step(*first)
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match="The step runs without a graph"):
        step(*second)
    assert equal(state_of(model, optimizer), expected)


def waits(model: Small, optimizer: Any) -> str:
    return "with item" if model.fc.bias.sum().item() else "…"  # LINE a Python branch on a tensor


def branches(model: Small, optimizer: Any) -> Any:
    if model.fc.bias.sum() > 0:  # LINE a Python branch on a tensor
        return model.fc.bias


def prints(model: Small, optimizer: Any) -> None:
    str(float(model.fc.bias.detach().sum()))  # LINE it waits for a result


def selects(model: Small, optimizer: Any) -> Tensor:
    return model.fc.bias.nonzero()  # LINE it waits for a result


def allocates(model: Small, optimizer: Any) -> Tensor:
    return model.fc.bias * torch.tensor(0.5)  # LINE it allocates memory on the host


def steps_unfused(model: Small, optimizer: Any) -> None:
    torch.optim.SGD.step(OTHERS["unfused"])  # LINE reads its learning rate .* make it with fused=True


def averages(model: Small, optimizer: Any) -> None:
    OTHERS["average"].update_parameters(model)  # LINE AveragedModel counts .* after the function has returned


def scales(model: Small, optimizer: Any) -> None:
    scaler = OTHERS["scaler"]
    scaler.scale(model.fc.bias.sum()).backward()
    scaler.step(OTHERS["unfused"])  # LINE GradScaler waits .* fused=True


def schedules(model: Small, optimizer: Any) -> None:
    OTHERS["scheduler"].step()  # it changes the learning rate; call scheduler.step\(\) after it


def replaces(model: Small, optimizer: Any) -> None:
    for state in optimizer.state.values():  # it replaces momentum_buffer of SGD; keep a tensor
        state["momentum_buffer"] = state["momentum_buffer"].clone()


def counts(model: Small, optimizer: Any) -> None:
    for state in optimizer.state.values():  # it replaces n of SGD; keep a tensor
        state["n"] = state.get("n", 0) + 1


def half_scales(model: Small, optimizer: Any) -> None:
    OTHERS["scaler"].unscale_(optimizer)  # unscale_\(\), step\(\) and update\(\) must be in one function
    OTHERS["scaler"]._per_optimizer_states[id(optimizer)]["stage"] = OptState.READY


OTHERS: dict[str, Any] = {}
FAULTS = [waits, branches, prints, selects, allocates, steps_unfused, averages, scales, schedules, replaces, counts]


@pytest.mark.parametrize("fault", [*FAULTS, half_scales])
def test_an_error_names_the_line_the_reason_and_a_remedy(fault: Callable, monkeypatch: pytest.MonkeyPatch):
    # Of the host's memory the stand-in knows nothing: it takes a constant for a copy from there.
    monkeypatch.setattr(recorded_graph, "REFUSED", REFUSED | {torch.ops.aten.lift_fresh.default})
    model = Small()
    optimizer = sgd(model)
    OTHERS["unfused"] = torch.optim.SGD(model.parameters(), 0.1, foreach=False)
    OTHERS["scaler"] = scaler = torch.amp.GradScaler("cpu")
    OTHERS["average"] = AveragedModel(model)
    OTHERS["scheduler"] = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler.scale(torch.ones(()))

    def step(images: Tensor, labels: Tensor) -> None:
        simple_step(model, optimizer)(images, labels)
        fault(model, optimizer)

    step = recorded(step, model, optimizer, OTHERS["unfused"], scaler, OTHERS["average"])
    first, *rest = batches([4] * 4)
    step(*first)
    scaler.update(1.0)
    with pytest.raises(RuntimeError) as caught:
        for batch in rest:
            step(*batch)
    lines, start = inspect.getsourcelines(fault)
    number, (code, expected) = next((start + i, line.split("  # ")) for i, line in enumerate(lines) if "  # " in line)
    if expected.startswith("LINE "):
        place = re.escape(f"{__file__}:{number}, in {fault.__name__}: `{code.strip()}")
        expected = f"{place}.*{expected.removeprefix('LINE ')}"
    message = str(caught.value)
    assert re.search(expected.strip(), message), message
    assert "step is not recorded as a CUDA graph: " in message and "\n" not in message


class Ending(RecordedGraph):
    """Ends an invalid recording as torch does, by another error."""

    def __init__(self, run: Callable[[], Any]) -> None:
        try:
            super().__init__(run)
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


def test_the_first_error_of_a_recording_is_the_reason():
    total = torch.zeros(())
    step = graphed(lambda: total.add_(total.item()), total, fallback=False, make_graph=Ending)
    step()
    with pytest.raises(
        RuntimeError, match=r"`step = graphed\(lambda: total.add_\(total.item\(\)\).*waits for a result"
    ):
        step()


@pytest.mark.filterwarnings("ignore:.*The step runs without a graph")
def test_a_failed_recording_leaves_a_scaler_as_it_was():
    """It refuses to unscale twice, and unscales itself where nobody did."""
    found = []
    for wrap in (lambda step, *changes: step, partial(graphed, make_graph=RecordedGraph)):
        torch.manual_seed(0)
        model = Small()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

        def add(images: Tensor, labels: Tensor, *parts: Any) -> None:
            model, optimizer, scaler = parts
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(images), labels)).backward()
            scaler.unscale_(optimizer)

        def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
            scaler.step(optimizer)
            scaler.update()

        first, second = wrap(add, model, optimizer, scaler), wrap(update, model, optimizer, scaler)
        for batch in batches([4] * 4):
            first(*batch, model, optimizer, scaler)
            second(optimizer, scaler)
        found.append(state_of(model, optimizer, scaler))
    assert equal(*found)
    assert "unscale_() has already been called" in first.why_not and "must be in one function" in second.why_not


def test_on_a_cpu_it_runs_as_it_is_and_says_so_once():
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = graphed(simple_step(model, optimizer), model, optimizer)
    with pytest.warns(RuntimeWarning) as caught:
        for batch in batches([4] * 3):
            loss = step(*batch)
    (warning,) = caught
    reason = "step is not recorded as a CUDA graph: a graph needs a model on a CUDA device, got cpu"
    reason = f"simple_step.<locals>.{reason}"
    assert str(warning.message) == f"{reason}. The step runs without a graph." and warning.filename == __file__
    assert step.why_not == reason and not loss.requires_grad
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        graphed(simple_step(model, optimizer), model, optimizer, fallback=False)(*batch)


def test_with_several_processes_it_runs_as_it_is(monkeypatch: pytest.MonkeyPatch):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(Small())
        bare = model.module
    finally:
        torch.distributed.destroy_process_group()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: model is None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert StepState([model]).is_shared and not StepState([bare]).is_shared
    model = None
    optimizer = sgd(bare)
    step = graphed(simple_step(bare, optimizer), bare, optimizer, make_graph=RecordedGraph)
    with pytest.warns(RuntimeWarning, match="several processes exchange their gradients") as caught:
        for batch in batches([4] * 3):
            step(*batch)
    assert len(caught) == 1 and not step.recorded


def test_calls_that_are_never_two_of_a_kind_are_pointed_out_once():
    model = Small()
    optimizer = sgd(model)
    step = recorded(simple_step(model, optimizer), model, optimizer)
    with pytest.warns(RuntimeWarning, match="16 calls of .*step in a row differs in its arguments") as caught:
        for i, batch in enumerate(batches([4] * 40)):
            step(*batch, i)
    assert len(caught) == 1 and not step.recorded
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=50)
    step = recorded(simple_step(model, optimizer), model, optimizer)
    with pytest.warns(RuntimeWarning, match="differs in a hyperparameter"):
        for batch in batches([4] * 20):
            step(*batch)
            scheduler.step()


def test_values_of_python_are_told_apart_with_their_types():
    total = torch.zeros(())
    step = recorded(lambda x, factor: total.copy_(x * factor) / 2, total)
    for factor in (1, True, 1.0, None, "1", (1, 1.0)) * 3:
        if isinstance(factor, int | float):
            assert float(step(torch.tensor(3), factor)) == 1.5
    assert len(step.recorded) == 3


def test_arguments_may_be_nested_and_stay_as_they_are():
    total = torch.zeros(4)

    def run(batch: Batch, *, weights: dict[str, list[Tensor]]) -> tuple[Batch, dict[str, Tensor]]:
        total.add_(batch.images.sum() * weights["all"][0])
        return batch._replace(images=batch.images * 2), {"total": total}

    step = recorded(run, total)
    expected, seen = torch.zeros(4), []
    for i in range(4):
        batch, weights = Batch(torch.full((2,), i), torch.ones(2), torch.ones(2)), {"all": [torch.arange(4.0)]}
        before = copy.deepcopy((batch, weights))
        seen.append(step(batch, weights=weights))
        expected += 2 * i * torch.arange(4.0)
        assert equal([*seen[-1]], [batch._replace(images=batch.images * 2), {"total": expected}])
        assert equal(list(before), [batch, weights])
    assert isinstance(seen[-1][0], Batch) and seen[-1][0].images is seen[-2][0].images  # the next call overwrites it


def test_the_images_of_a_resident_batch_are_read_where_they_are():
    images, labels, total = torch.arange(10), torch.arange(10), torch.zeros(3, dtype=torch.int64)
    step = recorded(lambda batch: total.copy_(batch.images[batch.plan]) + batch.labels[batch.plan], total)
    for i in range(4):
        images.add_(1)
        plan = torch.arange(3) + i
        assert equal(step(Batch(images, labels, plan, is_resident=True)), images[plan] + labels[plan])
    (graph,) = step.recorded.values()
    assert [tensor.shape for tensor in graph.arguments] == [(3,)]
    other = images.flip(0)
    assert equal(step(Batch(other, labels, plan, is_resident=True)), other[plan] + labels[plan])


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        (torch.ones(2, requires_grad=True), "arguments must not require a gradient"),
        ({1}, r"arguments must be tensors, numbers, .* got \{1\}"),
        (torch.ones(2, device="meta"), "tensor arguments must be on cpu, got one on meta"),
    ],
)
def test_an_argument_that_cannot_be_copied_is_named(argument: Any, reason: str):
    total = torch.zeros(2)
    step = graphed(lambda x: total.add_(1), total, make_graph=RecordedGraph)
    with pytest.warns(RuntimeWarning, match=reason):
        for _ in range(3):
            step(argument)
    assert total.tolist() == [3, 3]


def test_the_page():
    with pytest.warns(RuntimeWarning, match="got cpu") if not torch.cuda.is_available() else nullcontext():
        names = run_example(DOCS / "own-loop.md", 1)  # the first is that of test_examples.py
    assert names["model"].bn1.num_batches_tracked == 3
    for remedy in ("fused=True", "GradScaler", "AveragedModel", "scheduler.step()", "torch.where"):
        assert remedy in (DOCS / "own-loop.md").read_text(encoding="utf-8")


def test_an_error_of_the_step_is_its_own():
    model = Small()
    step = recorded(simple_step(model, sgd(model)), model)
    with pytest.raises(RuntimeError, match="expected input.*to have 3 channels"):
        step(torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_recording_leaves_everything_as_it_was(interruption: type[BaseException]):
    model = Small()
    optimizer, n_calls = sgd(model), 0

    def step(*batch: Tensor) -> None:
        nonlocal n_calls
        n_calls += 1
        simple_step(model, optimizer)(*batch)
        if n_calls == 3:
            raise interruption

    step = recorded(step, model, optimizer)
    first, second = batches([4, 4])
    step(*first)
    before = state_of(model, optimizer)
    with pytest.raises(interruption):
        step(*second)
    assert equal(state_of(model, optimizer), before)


@pytest.mark.parametrize(
    "changes", [(), (nn.Identity(),), (torch.optim.lr_scheduler.LRScheduler,), (None,), ("model",)]
)
def test_what_a_step_changes_has_to_be_state(changes: tuple):
    with pytest.raises((TypeError, ValueError), match="^changes must "):
        graphed(print, *changes)


def test_the_step_has_to_be_a_function():
    with pytest.raises(TypeError, match="step must be callable, got NoneType"):
        graphed(None, Small())  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_computes_what_the_loop_does():
    found = []
    for wrap in (lambda step, *changes: step, lambda *parts: graphed(*parts, fallback=False)):
        torch.manual_seed(0)
        model = Small(dropout=0.5).cuda()
        optimizer = sgd(model, lr=torch.tensor(0.1, device="cuda"))
        step = wrap(simple_step(model, optimizer), model, optimizer)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
            for images, labels in batches():
                found.append([tree_map(bits, [step(images.cuda(), labels.cuda()), model.state_dict()])])
    half = len(found) // 2
    assert equal(found[:half], found[half:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_adam_becomes_capturable():
    """Also with state from before, whose steps were counted on the host."""
    model = Small().cuda()
    optimizer = torch.optim.Adam(model.parameters())
    simple_step(model, optimizer)(*[tensor.cuda() for tensor in next(batches())])
    step = graphed(simple_step(model, optimizer), model, optimizer, fallback=False)
    for images, labels in batches([8] * 4):
        step(images.cuda(), labels.cuda())
    assert step.recorded and float(optimizer.state[model.fc.bias]["step"]) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("fault", [waits, branches, prints, selects])
def test_a_line_that_waits_for_the_gpu_is_named(fault: Callable):
    model = Small(dropout=0.5).cuda()
    optimizer = sgd(model)

    def step(images: Tensor, labels: Tensor) -> None:
        simple_step(model, optimizer)(images, labels)
        fault(model, optimizer)

    step = graphed(step, model, optimizer)
    with pytest.warns(RuntimeWarning, match=f"test_graphed.py:.* in {fault.__name__}: .*waits for") as caught:
        for images, labels in batches([4] * 4):
            step(images.cuda(), labels.cuda())
    assert len(caught) == 1


def test_modules_and_optimizers_may_be_arguments():
    found = []
    for wrap in (lambda step, *changes: step, recorded):
        torch.manual_seed(0)
        model = Small()
        optimizer = sgd(model)

        def train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        step = wrap(train, model, optimizer)
        for batch in batches([4] * 4):
            step(model, optimizer, *batch)
        found.append(state_of(model, optimizer))
    assert equal(*found)


def test_new_memory_of_a_weight_is_named():
    model = Small()

    def train(images: Tensor) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data * 0.5

    step = graphed(train, model, make_graph=RecordedGraph)
    with pytest.warns(RuntimeWarning, match=r"moves a weight to other memory.*param\.data\.copy_"):
        for _ in range(3):
            step(torch.zeros(1))


def test_a_momentum_of_a_batch_norm_is_part_of_a_kind():
    found = []
    for wrap in (lambda step, *changes: step, recorded):
        norm = nn.BatchNorm2d(2)
        step = wrap(norm, norm)
        for momentum in (0.1, 0.1, 0.1, 0.5, 0.5, 0.5):
            norm.momentum = momentum
            step(torch.arange(16.0).view(2, 2, 2, 2))
        found.append(norm.running_mean.clone())
    assert torch.equal(*found)


def test_recordings_are_bounded(monkeypatch):
    monkeypatch.setattr("resnet_fast.training.graphed.MOST_RECORDINGS", 2)
    total = torch.zeros(())
    step = recorded(lambda x: total.add_(x.sum()), total)
    for n in (1, 1, 2, 2, 3, 3, 1, 2):
        step(torch.ones(n))
    assert len(step.recorded) == 2 and total == 15
