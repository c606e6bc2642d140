"""`python -m benchmarks.report` shows the CSV files, always in the same way; the committed reports are up to date."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import measured, report
from benchmarks.harness import COLUMNS
from benchmarks.predictions import beside_measured
from benchmarks.results import RESULTS, ROOT, machine_columns, write_rows

MACHINE = {
    "device": "Some GPU",
    "driver": "570.1",
    "cpu_threads": "8",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "resnet_fast": "0.1.0",
    "commit": "0123456789ab",
    "date_utc": "2026-11-25T10:00:00Z",
}
DEVICE, OTHER = "some-gpu", "other-gpu"
TABLE = """
<!-- benchmarks: some-gpu -->

| training step | provider | batch 128 | batch 512 |
| --- | --- | ---: | ---: |
| bf16 | eager, tuned | 12.3 ms, 1×, 25 % | 1,237 ms, 1×, 25 % |
|  | eager | 24.7 ms, 0.50× (0.49 – 0.51), 25 % | – |
|  | fused | 6.17 ms, 2.00× (1.90 – 2.11), 25 % | – |
| fp32 | eager, tuned | 31.0 ms, 1×, 25 % | – |

Median time of a step, speed-up over `eager, tuned` (20th – 80th percentile of paired rounds), % of floor.
`eager` is PyTorch with default settings: fp32, NCHW.

| inference | provider | batch 1 | batch 512 |
| --- | --- | ---: | ---: |
| bf16 | eager, tuned | 0.820 ms, 1×, 1,220 images/s, 25 % | 8.00 ms, 1×, 64,000 images/s, 25 % |
|  | folded | 0.410 ms, 2.00× (1.90 – 2.11), 2,439 images/s, 25 % | – |

Median time of a pass, speed-up over `eager, tuned` (20th – 80th percentile of paired rounds), images/s, % of floor.

| operation, forward and backward, bf16, channels_last | eager | fused | timm |
| --- | ---: | ---: | ---: |
| BN+ReLU, batch 128 | 1×, 25 % | 1.60× (1.20 – 3.00), 25 % | 0.75×, 25 %, 1 of 3 shapes |

Speed-up over `eager`, median over the stage shapes (least – most); median % of floor.

Some GPU, driver 570.1, torch 2.13.0, triton 3.7.1, resnet_fast 0.1.0, commit 0123456789ab, 2026-11-25;
`pytest benchmarks`; all rows are in [report.md](results/some-gpu/report.md).

<!-- /benchmarks -->
"""

Row = dict[str, str]


def step(provider: str, ms: float, speedup: float = 1, precision: str = "bf16", batch_size: int = 128, **others) -> Row:
    spread = 0 if speedup == 1 else 0.05
    values = {
        "provider": provider,
        "case": "ResNet-18, 3x3 stem",
        "direction": "step",
        "precision": precision,
        "layout": "channels_last",
        "batch_size": batch_size,
        "rounds": 40,
        **{"p20_ms": 0.9 * ms, "p50_ms": ms, "p80_ms": 1.1 * ms, "images_per_s": 1e3 * batch_size / ms},
        **{"speedup_p20": speedup - spread * speedup, "speedup_p50": speedup, "speedup_p80": speedup / (1 - spread)},
        **{"mbytes": 100.0, "gflop": 20.0, "gb_per_s": 100 / ms, "floor_ms": ms / 4, "of_floor": 0.25, "peak_mb": 33.3},
    }
    assert tuple(values) == COLUMNS
    return {name: str(value) for name, value in (values | MACHINE | others).items()}


def inference(provider: str, ms: float, speedup: float = 1, batch_size: int = 1) -> Row:
    return step(provider, ms, speedup, batch_size=batch_size, direction="forward")


def operation(provider: str, shape: str, speedup: float = 1) -> Row:
    row = step(provider, 0.5 / speedup, speedup, case=f"BN+ReLU {shape}", direction="both")
    return row | {"gflop": "0.000"}


STEPS = [
    step("eager, tuned", 12.34),
    step("eager", 24.68, 0.5, speedup_p20="0.49", speedup_p80="0.51"),
    step("fused", 6.17, 2),
    step("eager, tuned", 1236.7, batch_size=512),
    step("eager, tuned", 31, precision="fp32"),
]
INFERENCE = [
    inference("eager, tuned", 0.82),
    inference("folded", 0.41, 2),
    inference("eager, tuned", 8, batch_size=512),
]
SHAPES = {"64x32x32": 1.2, "128x16x16": 3, "256x8x8": 1.6}
OPERATIONS = [operation("eager", shape) for shape in SHAPES]
OPERATIONS += [operation("fused", shape, speedup) for shape, speedup in SHAPES.items()]
OPERATIONS += [operation("timm", "256x8x8", 0.75)]
LIMITS = {"copy_gb_per_s": "2900.00", "fp32_tflop_per_s": "390.0", "bf16_tflop_per_s": "720.0", **MACHINE}
PROFILE = [
    {"provider": provider, "category": category, "ms_per_step": ms, "precision": "bf16", "batch_size": "128"}
    for provider in ("eager", "fused")
    for category, ms in (("optimizer", "1.5"), ("optimizer", "0.75"), ("idle", "2"))
]


def write_results(place: Path) -> Path:
    """A page with a place for the device's tables, and its results, all of them."""
    (place / "results.md").write_text(f"before\n\n<!-- benchmarks: {DEVICE} -->\n<!-- /benchmarks -->\n\nafter\n")
    files = {"training_step": STEPS, "inference": INFERENCE, "op": OPERATIONS, "limits": [LIMITS], "profile": PROFILE}
    for name, rows in files.items():
        write_rows(place / "results" / DEVICE / f"{name}.csv", rows)
    (place / "results" / "no-device").mkdir()
    return place


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Results of which no report was made."""
    return write_results(tmp_path)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time."""
    pictures = report.pictures
    monkeypatch.setattr(report, "pictures", lambda folder: dict.fromkeys(pictures(folder), lambda file: None))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_results(tmp_path_factory.mktemp("drawn"))
    run(folder)
    return folder


@pytest.fixture
def made(tmp_path: Path, drawn: Path) -> Path:
    """Results with their report; the pictures, which take most of the time, are drawn once."""
    return shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)


def run(place: Path, *options: str, code: int = 0) -> str:
    """Run the command and return what it says."""
    paths = ("--results", str(place / "results"), "--page", str(place / "results.md"))
    done = CliRunner().invoke(report.app, [*paths, *options])
    assert done.exit_code == code, done.output
    return done.output


def contents(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_the_committed_page_and_reports_show_the_committed_results():
    page = ROOT / "docs/results.md"
    assert report.MARKER.search(page.read_text(encoding="utf-8"))
    assert report.stale(RESULTS, page) == []


def test_columns_of_the_machine_are_those_that_are_written():
    assert tuple(machine_columns(torch.device("cpu"))) == measured.MACHINE


def test_the_page_shows_the_figures_of_the_rows_and_nothing_else_changes(made: Path):
    assert (made / "results.md").read_text() == f"before\n{TABLE}\nafter\n"


def test_writing_twice_gives_the_same_bytes_and_is_not_stale(made: Path):
    first = contents(made)
    for path in first:
        if path.suffix != ".csv" and path.name != "results.md":
            path.unlink()
    run(made)
    assert contents(made) == first
    run(made, "--check")
    for path in first:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert set(image.info) == {"Data", "dpi"}
                assert min(image.size) > 200 and len(image.convert("RGB").getcolors(2**24)) > 20


def test_the_report_holds_every_row(made: Path):
    text = (made / "results" / DEVICE / "report.md").read_text()
    for cells in (
        "| ResNet-18, 3x3 stem | 128 | eager, tuned | 12.3 (11.1 – 13.6) | 1× | 8.10 | 25 % | 33.3 | 10,373 |",
        "|  |  | fused | 6.17 (5.55 – 6.79) | 2.00× (1.90 – 2.11) | 16.21 | 25 % | 33.3 | 20,746 |",
        "| ResNet-18, 3x3 stem | 1 | eager, tuned | 0.820 (0.738 – 0.902) | 1× | 121.95 | 25 % | 33.3 | 1,220 |",
        "|  |  | folded | 0.410 (0.369 – 0.451) | 2.00× (1.90 – 2.11) | 243.90 | 25 % | 33.3 | 2,439 |",
        "| BN+ReLU 256x8x8 | 128 | eager | 0.500 (0.450 – 0.550) | 1× | 200.00 | 25 % | 33.3 |",
        "|  |  | timm | 0.667 (0.600 – 0.733) | 0.75× (0.71 – 0.79) | 150.00 | 25 % | 33.3 |",
        "| optimizer | 2.25 | 2.25 |",
        "| sum | 4.25 | 4.25 |",
    ):
        assert f"\n{cells}\n" in text
    assert "copy 2900 GB/s" in text and "720 TFLOP/s in bf16" in text
    assert "<sup>" not in text
    n_settings = sum(text.count(f"| {batch_size} |") for batch_size in (1, 128, 512))
    rows = [*STEPS, *INFERENCE, *OPERATIONS]
    keys = ("case", "direction", "precision", "batch_size")
    assert n_settings == len({tuple(row[name] for name in keys) for row in rows})


CONVOLUTION = "conv3x3 64x32x32"
CUT, OTHER_CUT = ("conv3x3 128x64x64, 8 warps, 3 stages, 1 in turn", "conv3x3 64x64x64, 4 warps, 3 stages, 8 in turn")


def test_convolutions_are_compared_in_one_table_wins_and_losses(made: Path):
    """Of figures that are made up."""

    def rows(direction: str, *of_providers: tuple[str, float, float]) -> list[Row]:
        of = {"case": CONVOLUTION, "direction": direction, "gflop": "600.0"}
        return [step(name, ms, speedup, batch_size=512, **of) for name, ms, speedup in of_providers]

    before = (made / "results" / DEVICE / "report.md", made / "results.md")
    texts = [path.read_text() for path in before]
    assert "TFLOP/s |" not in texts[0] and "onvolution\n" not in texts[0]
    of_level = rows("forward", ("cudnn", 1.0, 1), (CUT, 2.0, 0.5), (OTHER_CUT, 3.0, 0.33))
    of_level += rows("data gradient with sums", ("cudnn", 1.5, 1), (CUT, 1.2, 1.25))
    of_level += rows("data gradient with sums, forked", ("cudnn", 1.5, 1))
    write_rows(made / "results" / DEVICE / "convolution.csv", of_level)
    run(made)
    text = before[0].read_text()
    lines = text.split("## Convolution\n")[1].splitlines()
    start = lines.index(
        "| direction | case | batch | cudnn, TFLOP/s | conv3x3, TFLOP/s | speed-up | provider |",
    )
    assert lines[start + 2 : start + 5] == [
        f"| forward, bf16 | {CONVOLUTION} | 512 | 600 | 300 | 0.50× (0.47 – 0.53) | {CUT} |",
        f"| data gradient with sums, bf16 | {CONVOLUTION} | 512 | 400 | 500 | 1.25× (1.19 – 1.32) | {CUT} |",
        "",
    ]
    assert f"|  |  | {OTHER_CUT} | 3.00 (2.70 – 3.30) | 0.33× (0.31 – 0.35) |" in text and "| TFLOP/s |" in text
    assert before[1].read_text() == texts[1]
    assert text.startswith(texts[0].split("## ")[0])
    run(made, "--check")


def test_rows_of_another_day_are_marked(place: Path, no_pictures: None):
    path = place / "results" / DEVICE / "training_step.csv"
    later = {"date_utc": "2026-11-26T10:00:00Z", "commit": "ba9876543210"}
    write_rows(path, [STEPS[0] | later, *STEPS[1:]])
    run(place)
    for text in ((place / "results.md").read_text(), (path.parent / "report.md").read_text()):
        assert "<sup>1</sup> Some GPU" in text and "commit 0123456789ab, 2026-11-25" in text
        assert "<sup>2</sup> Some GPU" in text and "commit ba9876543210, 2026-11-26" in text
    page = (place / "results.md").read_text()
    assert "12.3 ms, 1×, 25 %<sup>2</sup>" in page
    assert "2.00× (1.90 – 2.11), 25 %<sup>1</sup>" in page
    assert "1,237 ms, 1×, 25 %<sup>1</sup>" in page


@pytest.mark.parametrize("name", ["results.md", "report.md", "training_step.csv", "speedups.png"])
def test_check_names_what_is_stale_and_writes_nothing(made: Path, name: str):
    path = made / name if name == "results.md" else made / "results" / DEVICE / name
    if name == "speedups.png":
        path.unlink()
    else:
        path.write_text(path.read_text().replace("6.17", "6.16").replace("0.41", "0.42"))
    before = contents(made)
    found = run(made, "--check", code=1)
    stale = {
        "training_step.csv": ["results.md", "report.md", "speedups.png", "roofline.png", "step_time.png"],
        "inference.csv": ["results.md", "report.md", "speedups.png", "roofline.png"],
    }.get(name, [name])
    for other in ("results.md", "report.md", "speedups.png", "roofline.png", "step_time.png", "categories.png"):
        assert (other in found) == (other in stale)
    assert contents(made) == before


def test_pictures_are_those_of_the_data(made: Path):
    folder = made / "results" / DEVICE
    assert {path.stem for path in folder.glob("*.png")} == set(report.SOURCES)
    for name in ("limits", "profile", "op", "inference"):
        (folder / f"{name}.csv").unlink()
    write_rows(folder / "training_step.csv", STEPS[:1])  # the baseline alone has no speed-up
    assert "categories.png" in run(made, "--check", code=1)
    run(made)
    assert [path.stem for path in folder.glob("*.png")] == ["step_time"]
    text = (folder / "report.md").read_text()
    assert "(step_time.png)" in text and text.count(".png") == 1


def test_several_devices_have_their_own_tables(place: Path, no_pictures: None):
    row = step("eager, tuned", 55.5, device="Other GPU")
    write_rows(place / "results" / OTHER / "training_step.csv", [row])
    page = place / "results.md"
    page.write_text(f"<!-- benchmarks: {OTHER} -->\nold\n<!-- /benchmarks -->\n{page.read_text()}")
    run(place)
    other, ours = page.read_text().split("before")
    assert "| 55.5 ms, 1×, 25 % |" in other and "old" not in other and "12.3 ms" not in other
    assert ours == f"\n{TABLE}\nafter\n"
    assert (place / "results" / OTHER / "report.md").read_text().startswith("# Other GPU\n")


def without(column: str, rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != column} for row in rows]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (without("of_floor", without("p50_ms", STEPS)), "training_step.csv lacks the columns p50_ms, of_floor"),
        (
            [STEPS[0] | {"p50_ms": "1 s"}],
            "training_step.csv, row 1: p50_ms must be a number of at least 0, got '1 s'",
        ),
        ([STEPS[0] | {"p50_ms": "0"}], "training_step.csv, row 1: p50_ms must be above 0, got '0'"),
        ([STEPS[0] | {"commit": ""}], "training_step.csv, row 1: commit must not be empty"),
        ([*STEPS, STEPS[2]], "training_step.csv, row 6: a second row of fused, "),
    ],
    ids=["columns", "text", "zero", "empty", "twice"],
)
def test_a_file_that_is_wrong_is_named_and_nothing_written(place: Path, rows: list[Row], message: str):
    write_rows(place / "results" / DEVICE / "training_step.csv", rows)
    before = contents(place)
    assert message in run(place, code=1)
    assert contents(place) == before


BEGIN, END = f"<!-- benchmarks: {DEVICE} -->\n", "<!-- /benchmarks -->\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a\n{BEGIN}", f"'<!-- benchmarks: {DEVICE} -->' has no '<!-- /benchmarks -->' after it"),
        (f"a\n{BEGIN}{BEGIN}{END}", "results.md, line 3: "),
        (f"a\n{END}", "results.md, line 2: '<!-- /benchmarks -->', but"),
        (f"<!-- benchmarks: new-gpu -->\n{END}", f"results.md, line 1: no results of 'new-gpu'; there are {DEVICE}"),
    ],
    ids=["no end", "two begins", "no begin", "unknown device"],
)
def test_a_marker_that_is_wrong_is_named_and_nothing_written(place: Path, text: str, message: str):
    (place / "results.md").write_text(text)
    before = contents(place)
    assert message in run(place, code=1)
    assert contents(place) == before


def test_arguments_that_are_wrong(place: Path):
    run(place, "--results", str(place / "nowhere"), code=2)
    run(place, "--page", str(place / "nowhere"), code=2)
    assert "must hold a folder with one of" in run(place, "--results", str(place / "results" / "no-device"), code=1)


def test_rows_without_work_or_memory_have_no_such_columns(place: Path, no_pictures: None):
    empty = dict.fromkeys(("mbytes", "gflop", "gb_per_s", "floor_ms", "of_floor", "peak_mb", "driver"), "")
    folder = place / "results" / OTHER
    rows = [step(name, 100.0, case="2048 images") | empty for name in ("torchvision", "on device")]
    write_rows(folder / "loader.csv", rows)
    run(place)
    lines = (folder / "report.md").read_text().splitlines()
    assert lines[0] == "# Some GPU, 8 threads"
    assert "| case | batch | provider | ms | speed-up | images/s |" in lines


@pytest.mark.parametrize(("content", "message"), ((b"", "op.csv has no rows"), (b"\xe7\x00", "op.csv must be UTF-8")))
def test_a_file_that_is_no_table_is_named(place: Path, content: bytes, message: str):
    (place / "results" / DEVICE / "op.csv").write_bytes(content)
    assert message in run(place, code=1)


def test_a_known_gpu_has_predictions_beside_its_measurements():
    origin = measured.Origin("2026-11-25", "0123456789ab", "NVIDIA H200", "570.1", "8", "2.13.0", "3.7.1", "0.1.0")
    times = measured.Spread(0.05, 0.05, 0.05)
    row = measured.Measurement(
        "fused", "BN+ReLU 64x32x32", "both", "bf16", "channels_last", 128, times, 1.0, times, *(None,) * 5, origin
    )
    lines = beside_measured([row, replace(row, provider="eager"), replace(row, case="BN+add+ReLU 64x32x32")])
    assert len(lines) == 6 and lines[-1].startswith("| BN+ReLU 64x32x32 | 128 | 50.0 | ")
    assert beside_measured([replace(row, origin=origin._replace(device="Some GPU"))]) == []
