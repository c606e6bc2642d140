"""The barrier releases only a complete launch, is ready again afterwards, and never serves two launches at once."""

import weakref
from unittest import mock

import pytest
import torch
from fused_op import Case, make_operands
from interpreter import needs_interpreter
from triton.runtime.errors import InterpreterError

from resnet_fast.kernels import tiles
from resnet_fast.ops import BatchNormArgs, launch, single_read
from resnet_fast.ops.arguments import arguments_of
from resnet_fast.ops.single_read import LINE, BarrierWords

pytestmark = pytest.mark.slow

NORM = BatchNormArgs(None, None, training=True)


def image(n_images: int, n_channels: int, device: torch.device) -> torch.Tensor:
    case = Case("", (n_images, n_channels, 8, 8))
    return make_operands(case, torch.bfloat16, "channels_last", device).x


def test_many_launches_use_the_same_words(device):
    """Of other numbers of splits and of tiles of channels, one after the other."""
    sizes = [(1, 64), (4, 64), (1, 16), (2, 136)]
    x = {size: image(*size, device) for size in sizes}
    first = {size: single_read.forward(*arguments_of(x[size], NORM)).y for size in sizes}
    for size in [*sizes, *reversed(sizes), *sizes]:
        assert torch.equal(single_read.forward(*arguments_of(x[size], NORM)).y, first[size])
    of_streams = single_read.words_of(x[sizes[0]].device).of_streams
    assert of_streams and not any((words & 0x7FFFFFFF).any() for words in of_streams.values())


@needs_interpreter
def test_a_program_too_few_is_a_deadlock(device):
    """The interpreter sees it; a GPU would hang."""
    run = launch.launch_kernel

    def without_the_last(kernel, grid, options, **arguments):
        run(kernel, (grid[0] - 1,), options, **arguments | {"barrier_ptr": torch.zeros_like(arguments["barrier_ptr"])})

    with (
        mock.patch.object(launch, "launch_kernel", without_the_last),
        pytest.raises(InterpreterError, match="Deadlock"),
    ):
        single_read.forward(*arguments_of(image(8, 64, device), NORM))


@needs_interpreter
def test_a_program_that_fails_fails_the_launch(device):
    x = image(8, 64, device)
    with (
        pytest.raises(InterpreterError, match="float"),
        mock.patch.object(launch, "launch_kernel", _with("eps", "a word")),
    ):
        single_read.forward(*arguments_of(x, NORM))


def _with(name: str, value):
    run = launch.launch_kernel
    return lambda kernel, *settings, **arguments: run(kernel, *settings, **arguments | {name: value})


@pytest.mark.parametrize(
    "cut",
    (tiles.Tiles(tiles.Tile.of(64, True, 32, 64), 32, n_parts=10_000, group_parts=10_000, n_channel_tiles=1), None),
    ids=("too many", "none"),
)
def test_a_grid_that_would_not_run_at_once_is_refused(cut, device):
    x = image(2, 64, device)
    with (
        mock.patch.object(tiles, "choose_single_read_tiles", lambda *_: cut),
        mock.patch.object(launch, "launch_kernel") as run,
        pytest.raises(
            RuntimeError, match=r"must run at once.*: \d+ multiprocessors cannot hold the batch norm of 128 rows and 64"
        ),
    ):
        single_read.forward(*arguments_of(x, NORM))
    run.assert_not_called()


@pytest.mark.parametrize("n_multiprocessors", (1, 8, 114, 132, 148))
def test_no_grid_has_more_programs_than_multiprocessors(n_multiprocessors):
    for n_channels in (8, 16, 24, 64, 136, 512, 2048):
        for n_rows in (1, 31, 1000, 8192, 33_000, 131_072):
            cut = tiles.choose_single_read_tiles(n_rows, n_channels, n_multiprocessors, 32)
            if cut is not None:
                assert cut.n_programs <= n_multiprocessors
                _, _, block_m, block_c, n_tiles = cut.tile.values
                assert n_tiles <= 32
                assert cut.rows_per_part == n_tiles * block_m
                assert (cut.n_parts - 1) * cut.rows_per_part < n_rows <= cut.n_parts * cut.rows_per_part
                assert cut.n_channel_tiles * block_c >= n_channels


def test_every_recorded_launch_has_words_of_its_own(device):
    words = BarrierWords(device)
    assert words.reserve(4)
    of_stream = words.take(4)
    assert of_stream.data_ptr() == words.take(4).data_ptr()  # which follow each other
    with mock.patch.object(BarrierWords, "_is_recording", lambda self: True):
        taken = [words.take(4) for _ in range(5) if words.reserve(4)]
    addresses = {word.data_ptr() for words in (*taken, of_stream) for word in words.view(-1, 1)}
    assert len(taken) == 5 and len(addresses) == 6 * 4
    # Another alignment than in warm-up would compile another kernel, in the recording.
    assert all(words.data_ptr() % 16 == 0 for words in taken)


def test_the_launches_of_a_recording_share_words_that_are_its_own_and_no_others_get(device):
    """However many graphs a process records: nothing is taken from the block."""
    words, found = BarrierWords(device), []
    assert words.reserve(4)
    n_left = len(words.of_graphs)
    with mock.patch.object(BarrierWords, "_is_recording", lambda self: True):
        for _ in range(3):
            with words.recording(words._stream()) as own:
                assert words.reserve(len(own)) and not words.reserve(len(own) + 1)
                assert words.take(4).data_ptr() == words.take(1).data_ptr() == own.data_ptr()
            found.append(own)
        assert len(words.of_graphs) == n_left
        found.append(words.take(1))  # in a recording of somebody else
    found.append(words.of_streams[words._stream()])
    assert len({own.data_ptr() for own in found}) == 5 and not any(own.any() for own in found)
    assert all(own.data_ptr() % 16 == 0 for own in found)
    alive = weakref.ref(found[0])
    del found, own
    assert alive() is None  # the memory of a graph that is gone is free


def test_the_first_single_read_of_a_process_may_be_recorded(device):
    """Where the graph has words of its own."""
    x = image(2, 64, device)
    words = BarrierWords(x.device)
    with (
        mock.patch.dict(single_read._words, {x.device: words}),
        mock.patch.object(BarrierWords, "_is_recording", lambda self: True),
        words.recording(words._stream()),
    ):
        assert single_read.fits(x, "batch norm", "none")
        assert single_read.plan_launch(x, "batch norm", "none")[1].data_ptr() % 16 == 0


def test_a_recording_without_words_takes_two_passes(device):
    """None were allocated before it, or all have been handed out."""
    x = image(2, 64, device)
    words = BarrierWords(x.device)
    recording = mock.patch.object(BarrierWords, "_is_recording", lambda self: True)
    with (
        mock.patch.dict(single_read._words, {x.device: words}),
        mock.patch.object(single_read, "GRAPH_WORDS", 2 * LINE),
    ):
        with recording:
            assert not single_read.fits(x, "batch norm", "none")
        assert single_read.fits(x, "batch norm", "none")
        with recording:
            for _ in range(2):
                assert single_read.fits(x, "batch norm", "none")
                words.take(1)
            assert not single_read.fits(x, "batch norm", "none")
            with pytest.raises(RuntimeError, match="needs 1 words for its barrier"):
                single_read.forward(*arguments_of(x, NORM))
