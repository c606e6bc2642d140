"""The training command's step has the same bits recorded and not. What `graphed` does for it: test_graphed.py.

Here a stand-in for the CUDA graph shows it (recorded_graph.py); test_the_stand_in_… show that it can see a fault.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from chosen import launched
from recorded_graph import RecordedGraph
from thin_resnet import thin_resnet
from tiny_run import equal
from torch import Tensor, nn

from resnet_fast import functional, graphed
from resnet_fast.data import Augmentation, Batch, Loader, TensorSplit
from resnet_fast.models import resnet
from resnet_fast.ops import augment as augment_module
from resnet_fast.ops import single_read
from resnet_fast.ops.single_read import BarrierWords
from resnet_fast.training import RECIPES, Recipe, StepOutput, TrainingStep
from resnet_fast.training import step as step_module
from resnet_fast.training.graph import CudaGraph
from resnet_fast.training.graphed import Graphed
from resnet_fast.training.optimizer import make_optimizer
from resnet_fast.training.resizing import Sizes

pytestmark = pytest.mark.usefixtures("one_thread")

N_IMAGES, BATCH, N_CLASSES = 20, 8, 3  # two batches of 8 and one of 4
PLAIN = replace(RECIPES["fast94"], batch_size=BATCH, crop=2, cutout=3, ghost_batch_size=0)
AUGMENTATION = Augmentation((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), crop=2, padding="reflect", flip="random", cutout=3)
MIXED = replace(AUGMENTATION, trivial_augment=True, random_erasing=0.5, mixup=0.4, cutmix=1.0)
N_EPOCHS = 2


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that augments is launched around the dispatcher, where the stand-in cannot see it."""
    monkeypatch.setattr(augment_module, "choose_backend", lambda x: "aten")


class Small(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.dropout, self.fc = nn.Dropout(dropout), nn.Linear(8, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.bn(self.conv(x)).relu().mean((2, 3))))


class Deeper(Small):
    """With a convolution behind the first, as Muon needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.further = nn.Conv2d(8, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.further(self.bn(self.conv(x)).relu()).mean((2, 3)))


MUON = replace(PLAIN, optimizer="muon", rescale_filters=True, bn_bias_lr=64.0, lookahead=True)


class Branching(Small):
    """Every second forward is another, as Python decides."""

    def __init__(self) -> None:
        super().__init__()
        self.n_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        return super().forward(x) * (1.0 if self.n_calls % 2 else 0.5)


class Waiting(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.mean().item() > 0 else 0.5)


class Streamed(TensorSplit):
    """Each batch has images of its own, as those that are read from files."""

    def planned(self, plan: Tensor, sizes):
        for batch in super().planned(plan, sizes):
            rows, own = batch.plan, batch.plan.clone()
            own[:, 0] = torch.arange(len(rows))
            yield Batch(self.images[rows[:, 0]], self.labels[rows[:, 0]], own)


def make_split(kind: type[TensorSplit] = TensorSplit, width: int = 8) -> TensorSplit:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (N_IMAGES, 3, width, width), dtype=torch.uint8, generator=generator)
    return kind(images, torch.randint(N_CLASSES, (N_IMAGES,), generator=generator))


def make_step(
    recipe: Recipe,
    graph: bool,
    make: Callable[[], nn.Module] = Small,
    device: str = "cpu",
    augmentation: Augmentation = AUGMENTATION,
    **settings,
) -> TrainingStep:
    torch.manual_seed(0)
    model = make().train().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = {"make_graph": RecordedGraph, **settings}
    return TrainingStep(model, recipe, augmentation, n_steps=3 * N_EPOCHS, graph=graph, **settings)


def state_of(step: TrainingStep) -> dict:
    state = {"model": step.model.state_dict(), "step": step.state_dict(), "averaged": step.averaged()}
    return copy.deepcopy(state) | {"random": torch.get_rng_state()}


def trained(step: TrainingStep, split: TensorSplit | None = None) -> list:
    """Two epochs; loss, number of right ones and state after every step."""
    loader = Loader(split or make_split(), step.augmentation, BATCH)
    assert loader.batch_sizes() == [8, 8, 4]
    found = []
    for epoch in range(1, N_EPOCHS + 1):
        for batch in loader.epoch(epoch):
            loss, n_correct = step(batch)
            found.append((loss.clone(), n_correct.clone(), state_of(step)))
    return found


def n_recorded(step: TrainingStep) -> int:
    assert isinstance(step.graphed, Graphed)
    return len(step.graphed.recorded)


CASES: dict[str, tuple[Recipe, dict]] = {
    "SGD, Nesterov": (PLAIN, {}),
    "biases' own rate and clipping": (replace(PLAIN, bn_bias_lr=64.0, clip_norm=0.1), {}),
    "moving average": (replace(PLAIN, ema=0.9), {}),
    "Adam and moving average": (replace(PLAIN, optimizer="adam", lr=1e-2, ema=0.5, clip_norm=0.1), {}),
    "in two parts": (PLAIN, {"accumulate": 2}),
    "bf16": (PLAIN, {"precision": "bf16"}),
    "fp16": (PLAIN, {"precision": "fp16"}),
    "fp16, clipping and moving average": (replace(PLAIN, clip_norm=0.1, ema=0.9), {"precision": "fp16"}),
    "fp16, Adam in two parts": (replace(PLAIN, optimizer="adam"), {"precision": "fp16", "accumulate": 2}),
    "dropout": (PLAIN, {"make": lambda: Small(dropout=0.5)}),
    "mixed": (replace(PLAIN, label_smoothing=0.1), {"augmentation": MIXED}),
    "mixed, bf16, in two parts": (PLAIN, {"augmentation": MIXED, "precision": "bf16", "accumulate": 2}),
    "Muon and lookahead": (MUON, {"make": Deeper}),
    "fp16, Muon and clipping": (replace(MUON, clip_norm=0.1), {"precision": "fp16", "make": Deeper}),
}


@pytest.mark.parametrize(
    ("recipe", "settings", "kind"),
    [pytest.param(*case, TensorSplit, id=name) for name, case in CASES.items()]
    + [pytest.param(PLAIN, {}, Streamed, id="streamed")],
)
def test_a_recorded_step_has_the_bits_of_one_that_is_not(recipe: Recipe, settings: dict, kind: type[TensorSplit]):
    plain, graphed = (make_step(recipe, graph, **settings) for graph in (False, True))
    torch.manual_seed(1)
    expected = trained(plain, make_split(kind))
    torch.manual_seed(1)
    assert equal(trained(graphed, make_split(kind)), expected)
    assert n_recorded(graphed) == 1  # the short batch needs none
    assert not equal(expected[0][2]["model"], expected[-1][2]["model"])


class Flags(Small):
    """Notes the size of each batch, and whether cuDNN would search."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.noted.append((len(x), torch.backends.cudnn.benchmark))
        return super().forward(x)


@pytest.mark.parametrize("before", [False, True])
def test_cudnn_searches_for_full_batches_alone_and_the_flag_comes_back(before: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    step = make_step(PLAIN, False, Flags)
    trained(step)
    assert noted(step) == [(8, True), (8, True), (4, False)] * N_EPOCHS
    assert torch.backends.cudnn.benchmark is before
    with pytest.raises(RuntimeError, match="loss"), pytest.MonkeyPatch.context() as broken:
        broken.setattr(step_module, "forward_loss", lambda *args: fail("loss"))
        step(next(iter(Loader(make_split(), AUGMENTATION, BATCH).epoch(1))))
    assert torch.backends.cudnn.benchmark is before


def noted(step: TrainingStep) -> list[tuple[int, bool]]:
    assert isinstance(step.model, Flags)
    return step.model.noted


def fail(message: str) -> None:
    raise RuntimeError(message)


@pytest.mark.parametrize("of", ["torch", "cuDNN"])
def test_cudnn_does_not_search_where_it_must_be_deterministic(of: str, monkeypatch: pytest.MonkeyPatch):
    if of == "torch":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    else:
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    step = make_step(PLAIN, False, Flags)
    trained(step)
    assert not any(searches for _, searches in noted(step))


def test_a_smaller_batch_is_recorded_where_it_stays():
    plain, graphed = (make_step(PLAIN, graph) for graph in (False, True))
    for size, n_graphs in ((8, 1), (4, 2)):
        for batch in Loader(make_split(), AUGMENTATION, size).epoch(1):
            assert equal(list(graphed(batch)), list(plain(batch)))
        assert n_recorded(graphed) == n_graphs
    assert equal(state_of(graphed), state_of(plain))


def test_the_batches_of_the_caller_stay_as_they_are():
    step = make_step(PLAIN, graph=True)
    batches = list(Loader(make_split(Streamed), AUGMENTATION, BATCH).epoch(1))
    before = copy.deepcopy(batches)
    for batch in batches:
        step(batch)
    assert equal(batches, before)


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, ON_GPU])])
def test_each_size_is_recorded_once(device: str):
    """On a GPU the three graphs share their memory, which must not show."""
    recipe, n_epochs = replace(PLAIN, sizes="8,10,12"), 6
    small = make_split()
    split = TensorSplit(torch.nn.functional.pad(small.images, (2, 2, 2, 2)), small.labels).to(torch.device(device))
    settings = {"make_graph": CudaGraph} if device == "cuda" else {}
    plain, graphed = (make_step(recipe, graph, device=device, **settings) for graph in (False, True))
    for step in (plain, graphed):
        step.sizes = Sizes(recipe.sizes, 3 * n_epochs)
        step.n_steps = 3 * n_epochs
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        for epoch in range(1, n_epochs + 1):
            for batch in Loader(split, AUGMENTATION, BATCH).epoch(epoch):
                assert equal(list(graphed(batch)), list(plain(batch)))
                assert equal(state_of(graphed), state_of(plain))
    assert n_recorded(graphed) == 3


def test_another_split_on_the_device_is_recorded_anew():
    plain, graphed = (make_step(PLAIN, graph) for graph in (False, True))
    first = make_split()
    splits = first, TensorSplit(first.images.flip(0), first.labels)
    for split in (*splits, *splits):
        for batch in Loader(split, AUGMENTATION, BATCH).epoch(1):
            assert equal(list(graphed(batch)), list(plain(batch)))
    assert equal(state_of(graphed), state_of(plain))


def test_adam_goes_on_where_it_was_not_begun():
    step = make_step(replace(PLAIN, optimizer="adam"), graph=False)
    state = step.state_dict()
    state["optimizer"]["param_groups"][0]["capturable"] = True  # as a GPU saves it
    step.load_state_dict(state)
    assert not step.optimizer.param_groups[0]["capturable"]


@pytest.mark.parametrize("settings", [{"world_size": 2}, {"make_graph": CudaGraph}], ids=["two processes", "a CPU"])
def test_a_graph_that_cannot_be_is_refused(settings: dict):
    with pytest.raises(ValueError, match="graph needs a (single process|model on a CUDA device)"):
        make_step(PLAIN, graph=True, **settings)


def test_a_step_trains_after_an_evaluation():
    step = make_step(PLAIN, graph=False)
    step.model.eval()
    step(next(iter(Loader(make_split(), AUGMENTATION, BATCH).epoch(1))))
    assert step.model.training


@pytest.mark.parametrize(
    "recipe",
    [replace(PLAIN, bn_bias_lr=64.0, ema=0.9, label_smoothing=0.2), replace(RECIPES["faster94"], batch_size=BATCH)],
    ids=["average", "faster94"],
)
def test_the_network_itself(recipe: Recipe, on_aten: None):
    """Of ATen's operators: of Triton's kernels only those of an operator would be seen, and slowly."""
    plain, graphed = (make_step(recipe, graph, lambda: thin_resnet(resnet)) for graph in (False, True))
    loader = Loader(make_split(), AUGMENTATION, BATCH)
    for batch in loader.epoch(1):
        outputs = [[value.clone() for value in step(batch)] for step in (plain, graphed)]
        assert equal(*outputs)
    assert equal(state_of(graphed), state_of(plain))


@pytest.mark.parametrize("recipe", [replace(PLAIN, ema=0.9), MUON], ids=["average", "Muon and lookahead"])
def test_a_resumed_step_goes_on(recipe: Recipe):
    straight, stopped, resumed = (make_step(recipe, graph=True, make=Deeper) for _ in range(3))
    batches = [batch for epoch in (1, 2) for batch in Loader(make_split(), AUGMENTATION, BATCH).epoch(epoch)]
    for batch in batches[:3]:
        straight(batch)
        stopped(batch)
    for _ in range(2):  # a graph from before
        resumed(batches[0])
    resumed.model.load_state_dict(stopped.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    for batch in batches[3:]:
        straight(batch)
        resumed(batch)
    assert equal(state_of(resumed), state_of(straight))


# The stand-in sees what it is there to see.


def bake_in_rate(step: TrainingStep) -> None:
    """The learning rate becomes a Python number, which a graph would keep."""
    run = step.optimizer.step

    def with_a_number() -> None:
        rates = [group["lr"] for group in step.optimizer.param_groups]
        for group in step.optimizer.param_groups:
            group["lr"] = step.lr * group["lr_scale"]
        run()
        for group, rate in zip(step.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    step.optimizer.step = with_a_number  # type: ignore[method-assign]


def test_the_stand_in_shows_a_fault_of_the_step():
    plain, graphed = (make_step(PLAIN, graph) for graph in (False, True))
    for step in (plain, graphed):
        bake_in_rate(step)
    expected = trained(plain)
    assert equal(expected, trained(make_step(PLAIN, graph=False)))  # where nothing is recorded it is no fault
    assert not equal(trained(graphed), expected)


def test_the_stand_in_shows_a_branch_of_the_network():
    plain, graphed = (make_step(PLAIN, graph, Branching) for graph in (False, True))
    assert not equal(trained(graphed), trained(plain))


def test_the_stand_in_refuses_to_wait():
    step = make_step(PLAIN, True, Waiting)
    with pytest.raises(RuntimeError, match=r"test_graphed_step.py:\d+, in forward: `return .*item.* a Python branch"):
        trained(step)


def test_the_stand_in_runs_nothing_while_it_records():
    total, n_runs = torch.zeros(()), 0

    def run() -> Tensor:
        nonlocal n_runs
        n_runs += 1
        return total.add_(1) * 2

    graph = RecordedGraph(run, n_warm_up=3)
    assert (n_runs, float(total)) == (4, 3) and graph.result.isnan()
    for expected in (4, 5):
        assert float(graph()) == 2 * expected and float(total) == expected
    assert n_runs == 4


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize(("recipe", "settings"), CASES.values(), ids=CASES)
def test_a_cuda_graph_has_the_bits_of_the_step(recipe: Recipe, settings: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # with the kernel that augments
    split, found = make_split().to(torch.device("cuda")), []
    for graph in (False, True):
        step = make_step(recipe, graph, make_graph=CudaGraph, device="cuda", **settings)
        torch.manual_seed(1)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
            found.append(trained(step, split))
    assert equal(*found)


# The kernels of the two passes; combine kernels are for many splits.
FUSED_KERNELS = {"statistics_kernel", "normalize_kernel", "reduce_kernel", "input_gradients_kernel"}
NETWORK_CASES = {
    "SGD": PLAIN,
    "Adam": replace(PLAIN, optimizer="adam", lr=1e-2),
    "moving average": replace(PLAIN, ema=0.9),
}


def assert_network_has_the_bits(run: Callable[[bool], list], monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` tells of every step, of two sizes of batches, recorded or not; it launches the fused kernels."""
    monkeypatch.setattr(functional, "_calls", {})  # so that launches are not replays of another test's
    with launched() as kernels, torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        plain, recorded = run(False), run(True)
    assert equal(recorded, plain) and set(kernels) >= FUSED_KERNELS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("recipe", NETWORK_CASES.values(), ids=NETWORK_CASES)
def test_a_cuda_graph_of_the_network_in_bf16(recipe: Recipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    split = make_split(width=32).to(torch.device("cuda"))

    def run(graph: bool) -> list:
        make = functools.partial(resnet.resnet18, num_classes=N_CLASSES, stem="cifar")
        step = make_step(recipe, graph, make, "cuda", make_graph=CudaGraph, precision="bf16")
        found = trained(step, split)
        assert not graph or len(step.graphed.recorded) == 2
        return found

    assert_network_has_the_bits(run, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_of_the_network_in_fp16(monkeypatch: pytest.MonkeyPatch):
    """In a loop of one's own, with a gradient scaler."""
    monkeypatch.undo()
    network = functools.partial(resnet.resnet18, num_classes=N_CLASSES, stem="cifar")
    assert_network_has_the_bits(lambda graph: fp16_loop(graph, network, "cuda", CudaGraph), monkeypatch)


def fp16_loop(graph: bool, network: Callable[[], nn.Module], device: str, make_graph) -> list:
    torch.manual_seed(0)
    model = network().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    run = graphed(step, model, optimizer, scaler, fallback=False, make_graph=make_graph) if graph else step
    found = []
    for size in [8, 8, 8, 4, 4, 4, 8]:
        images, labels = torch.randn(size, 3, 32, 32).to(device), torch.randint(N_CLASSES, (size,)).to(device)
        loss = run(images, labels)
        found.append([loss.clone(), copy.deepcopy([model.state_dict(), optimizer.state_dict(), scaler.state_dict()])])
    assert not isinstance(run, Graphed) or len(run.recorded) == 2
    return found


class Streams:
    """In the place of torch.cuda: notes which stream is the current one when something happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.captured = [mock.Mock(name="the caller's")], []
        monkeypatch.setattr(torch.cuda, "Stream", lambda: mock.Mock(name="a new one"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current[-1])
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        for name in ("CUDAGraph", "get_sync_debug_mode", "set_sync_debug_mode"):
            monkeypatch.setattr(torch.cuda, name, mock.Mock())
        words = BarrierWords(torch.device("cpu"))
        monkeypatch.setattr(single_read, "words_of", lambda device: words)
        self.words = words.of_recordings

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()

    @contextmanager
    def graph(self, graph: object, stream: object = None, **_: object) -> Iterator[None]:
        self.captured.append(stream)
        with self.stream(stream):
            yield


def test_a_graph_is_recorded_on_the_stream_of_its_warm_up(monkeypatch: pytest.MonkeyPatch):
    """Which belongs to the current device. Torch's own belongs to the device of the process's first recording."""
    streams, ran_on = Streams(monkeypatch), []
    for _ in range(2):
        CudaGraph(lambda: ran_on.append(streams.current[-1]), n_warm_up=2)
    assert len(streams.captured) == 2 and None not in streams.captured
    assert ran_on == [stream for stream in streams.captured for _ in range(3)] and len(set(ran_on)) == 2


def test_a_graph_has_barrier_words_of_its_own_and_keeps_them(monkeypatch: pytest.MonkeyPatch):
    streams, seen = Streams(monkeypatch), []
    graphs = [CudaGraph(lambda: seen.append(dict(streams.words)), n_warm_up=1) for _ in range(2)]
    for graph, stream, in_warm_up, in_recording in zip(graphs, streams.captured, seen[::2], seen[1::2], strict=True):
        assert in_warm_up == {} and list(in_recording) == [stream.cuda_stream]
        assert in_recording[stream.cuda_stream] is graph.barrier_words
    assert graphs[0].barrier_words is not graphs[1].barrier_words and not streams.words


def test_the_optimizer_of_a_step_has_rates_that_a_graph_reads():
    for recipe in RECIPES.values():
        groups = make_optimizer(Deeper(), recipe).param_groups
        assert all(torch.is_tensor(group["lr"]) for group in groups)


def test_the_output_is_that_of_the_last_step():
    step = make_step(PLAIN, graph=True)
    batch = next(iter(Loader(make_split(), AUGMENTATION, BATCH).epoch(1)))
    _, second, third = (step(batch) for _ in range(3))
    assert isinstance(second, StepOutput) and second.loss is third.loss


@pytest.mark.parametrize("graph", (False, True))
def test_a_step_goes_with_its_last_reference(graph):
    """Without waiting for the garbage collector: it holds the model's memory, and a GPU's."""
    step = make_step(PLAIN, graph)
    alive = weakref.ref(step)
    del step
    assert alive() is None
