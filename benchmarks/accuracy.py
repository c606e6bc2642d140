"""`python -m benchmarks.accuracy`: accuracy and time of a recipe by backend, and with one switch changed at a time.

Every run calls `resnet_fast.training.train`. The variants alternate, seed by seed, so drift of the machine affects each
alike. The most valuable ones come first, for a call with a time limit. Each finished run adds a row to accuracy.csv and
a row per epoch to accuracy_epochs.csv. A second call measures only what is missing. The page and the pictures are made
from these files.
"""

import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes

from benchmarks.results import RESULTS, device_slug, machine_columns, read_csv, read_rows, replace_rows
from benchmarks.style import DARK, color_of, new_figure, save, tidy
from resnet_fast.common.files import whole_file
from resnet_fast.models.registry import MODELS
from resnet_fast.training import RECIPES, Result, TrainConfig, train
from resnet_fast.training.config import N_WHITENING, choose_device
from resnet_fast.training.recipes import RECIPE_FIELDS
from resnet_fast.training.repeat import Spread

# Variants by name: the settings in which each differs from the recipe.
BACKENDS: dict[str, dict[str, Any]] = {
    "fused": {"backend": "fused"},
    "eager, tuned": {"backend": "eager", "graph": False},
    "eager, tuned, graph": {"backend": "eager"},
    "compile, graph": {"backend": "compile"},
}
_FAST94, _FASTER94 = RECIPES["fast94"], RECIPES["faster94"]
ABLATIONS: dict[str, dict[str, Any]] = {
    "all that faster94 adds": {
        name: getattr(_FASTER94, name)
        for name in RECIPE_FIELDS
        if name != "epochs" and getattr(_FASTER94, name) != getattr(_FAST94, name)
    },
    "Muon": {"optimizer": "muon", "rescale_filters": True},
    "Lookahead": {"lookahead": True, "bn_momentum": 0.4},
    "batch norm biases 64 times faster": {"bn_bias_lr": 64.0},
    "identity initialization": {"dirac": True},
    "whitened stem": {"whiten": True},
    "label smoothing 0.2": {"label_smoothing": 0.2},
    "smaller images first": {"sizes": "16,24,32"},
    "average of weights, 0.995": {"ema": 0.995},
    "ghost batches of 32": {"ghost_batch_size": 32},
    "mixup 0.2": {"mixup": 0.2},
    "CutMix 1": {"cutmix": 1.0},
    "random erasing 0.25": {"random_erasing": 0.25},
    "TrivialAugment": {"trivial_augment": True},
    "zero gamma": {"zero_gamma": True},
    "no cutout": {"cutout": 0},
    "one-cycle schedule": {"schedule": "one-cycle"},
    "cosine schedule": {"schedule": "cosine"},
    "linear schedule": {"schedule": "linear"},
    "batch 128, lr 0.1": {"batch_size": 128, "lr": 0.1},
    "momentum not Nesterov's": {"nesterov": False},
    "random flip": {"flip": "random"},
    "crop sees black": {"padding": "zero"},
}
KEY = ("data", "recipe", "epochs", "variant", "seed")
EPOCH_KEY = (*KEY, "epoch")

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def run_row(result: Result, data: str, variant: str) -> dict[str, str]:
    """Return a row of accuracy.csv: the accuracy after the last epoch, and the times."""
    history, config = result.history, result.config
    # The first epoch includes compilation, capture and cuDNN's choices: it counts in train_seconds alone.
    typical = statistics.median(epoch.seconds for epoch in history[1:] or history)
    mirrored = result.mirrored_accuracy
    return {
        "data": data,
        "recipe": config.recipe,
        "epochs": str(config.epochs),
        "variant": variant,
        "seed": str(config.seed),
        "accuracy": f"{result.test_accuracy:.6g}",
        "mirrored_accuracy": "" if mirrored is None else f"{mirrored:.6g}",
        "epoch_seconds": f"{typical:.6g}",
        "images_per_second": f"{history[-1].images_per_second * history[-1].seconds / typical:.6g}",
        "train_seconds": f"{result.train_seconds:.6g}",
        "seconds": f"{result.seconds:.6g}",
        "batch_size": str(config.batch_size),
        "precision": config.precision,
        "graph": str(config.graph),
    }


def epoch_rows(result: Result, data: str, variant: str) -> list[dict[str, str]]:
    """Return the rows of accuracy_epochs.csv: the training time up to the end of each epoch, and the accuracy there."""
    rows, seconds = [], 0.0
    for epoch in result.history:
        seconds += epoch.seconds
        config = result.config
        key = (data, config.recipe, str(config.epochs), variant, str(config.seed), str(epoch.epoch))
        measured = {"train_seconds": f"{seconds:.6g}", "accuracy": f"{epoch.test_accuracy:.6g}"}
        rows.append(dict(zip(EPOCH_KEY, key, strict=True)) | measured)
    return rows


def ablations(model: str, image_size: int) -> dict[str, dict[str, Any]]:
    """Return ABLATIONS adapted to a network and an image size: narrow stems cannot be whitened."""
    variants = {}
    for variant, settings in ABLATIONS.items():
        settings = dict(settings)
        if MODELS[model].stem_width < N_WHITENING:
            settings.pop("whiten", None)
        if "sizes" in settings:
            settings["sizes"] = f"{image_size // 2},{3 * image_size // 4},{image_size}"
        if settings:
            variants[variant] = settings
    return variants


def link_images(data_dir: Path, n_images: Mapping[str, int | None], folder: Path) -> None:
    """Fill `folder` with links to the first images of each class, `n_images` for "train" and for "test"; None: all."""
    for part, count in n_images.items():
        classes = sorted(path for path in (data_dir / part).resolve().iterdir() if path.is_dir())
        for number, path in enumerate(classes):
            (folder / part / path.name).mkdir(parents=True)
            share = None if count is None else count // len(classes) + (number < count % len(classes))
            for image in sorted(path.iterdir())[:share]:
                (folder / part / path.name / image.name).symlink_to(image)


def measure(
    variants: Mapping[str, Mapping[str, Any]],
    seeds: Iterable[int],
    base: Mapping[str, Any],
    data: str,
    out: Path,
    deadline: float = math.inf,
) -> None:
    """Train every variant with every seed, except those that have rows already, and add their rows.

    A run does not start if, taking as long as the longest one so far, it would end after `deadline` (time.monotonic()).
    """
    longest = 0.0
    columns = [*run_columns(), *machine_columns(choose_device(base.get("device", "auto")))]
    done = {tuple(row[name] for name in KEY) for row in read_rows(out / "accuracy.csv", columns)}
    for seed in seeds:
        for variant, settings in variants.items():
            with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
                config = TrainConfig(**{**base, **settings, "seed": seed, "out": Path(folder) / "run"})
                if (data, config.recipe, str(config.epochs), variant, str(seed)) in done:
                    continue
                began = time.monotonic()
                if began + longest > deadline:
                    typer.echo(f"skipped, because the time is over: {variant}, seed {seed}, and all later runs")
                    return
                machine = machine_columns(choose_device(config.device))
                result = train(config)
                longest = max(longest, time.monotonic() - began)
            row = run_row(result, data, variant)
            replace_rows(out / "accuracy_epochs.csv", epoch_rows(result, data, variant), EPOCH_KEY)
            replace_rows(out / "accuracy.csv", [row | machine], KEY)
            typer.echo(
                f"{variant}, seed {seed}: {100 * result.test_accuracy:.2f} %, "
                f"{row['epoch_seconds']} s an epoch, {result.train_seconds:.1f} s of training"
            )


def run_columns() -> list[str]:
    names = ["accuracy", "mirrored_accuracy", "epoch_seconds", "images_per_second", "train_seconds", "seconds"]
    return [*KEY, *names, "batch_size", "precision", "graph"]


def _accuracies(rows: Sequence[Mapping[str, str]], variant: str) -> dict[str, float]:
    """Return a variant's accuracy in percent by seed."""
    return {row["seed"]: 100 * float(row["accuracy"]) for row in rows if row["variant"] == variant}


def _differences(rows: Sequence[Mapping[str, str]], variant: str, base: str) -> list[float]:
    """Return, in points, how much more accurate a variant is than `base`, for each seed that both have."""
    own, others = _accuracies(rows, variant), _accuracies(rows, base)
    return [accuracy - others[seed] for seed, accuracy in own.items() if seed in others]


def _spread(values: Sequence[float], form: str) -> str:
    """Return mean ± standard deviation, or "" without values."""
    if not values:
        return ""
    mean, std = Spread.of(values)
    return f"{mean:{form}} ± {std:{form.lstrip('+')}}" if len(values) > 1 else f"{mean:{form}}"


def _values(rows: Sequence[Mapping[str, str]], column: str, scale: float = 1) -> list[float]:
    return [scale * float(row[column]) for row in rows if row[column]]


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a table: each variant's mean ± standard deviation over its seeds, and its difference from the first."""
    lines = [
        "| variant | seeds | accuracy (%) | difference | flip TTA (%) | s per epoch | images/s | s of training |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for variant in variants:
        own = [row for row in rows if row["variant"] == variant]
        differences = _differences(rows, variant, variants[0]) if variant != variants[0] else []
        cells = [
            variant,
            str(len(own)),
            _spread(_values(own, "accuracy", 100), ".2f"),
            _spread(differences, "+.2f"),
            _spread(_values(own, "mirrored_accuracy", 100), ".2f"),
            _spread(_values(own, "epoch_seconds"), ",.3f"),
            _spread(_values(own, "images_per_second"), ",.0f"),
            _spread(_values(own, "train_seconds"), ",.1f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_page(out: Path) -> None:
    """Make accuracy.md from the rows in `out`, and pictures of its first table: of backends, if it has
    several (accuracy.png), and of switches, if it has any (switches.png).
    """
    runs = read_csv(out / "accuracy.csv")
    epochs = read_csv(out / "accuracy_epochs.csv")
    text = ["# Accuracy and time", ""]
    groups = list(dict.fromkeys((row["data"], row["recipe"], row["epochs"]) for row in runs))
    for group in groups:
        data, recipe, n_epochs = group
        own = [row for row in runs if (row["data"], row["recipe"], row["epochs"]) == group]
        text += [f"## {recipe}, {n_epochs} epochs, {data}", "", *table(own), ""]
        machines = dict.fromkeys(
            f"{row['device']}, torch {row['torch']}, triton {row['triton'] or 'none'}, commit {row['commit']}, "
            f"{row['date_utc'][:10]}"
            for row in own
        )
        text += [*(f"{machine}; `python -m benchmarks.accuracy`." for machine in machines), ""]
    text += [
        "Accuracy after the last epoch, mean ± standard deviation over seeds. Difference: from the first row, by seed. "
        "Seconds per epoch: the median without the first epoch, input included, evaluation and files excluded.",
    ]
    own = [row for row in runs if (row["data"], row["recipe"], row["epochs"]) == groups[0]]
    variants = {row["variant"] for row in own}
    if len(variants & BACKENDS.keys()) > 1:
        _save(out / "accuracy.png", lambda file: draw(file, epochs, groups[0]))
        text += ["", "![Test error by seconds of training, for each backend](accuracy.png)"]
    if variants & ABLATIONS.keys():
        _save(out / "switches.png", lambda file: draw_switches(file, own))
        text += ["", "![Accuracy gained or lost by each switch](switches.png)"]
    with whole_file(out / "accuracy.md") as file:
        file.write(("\n".join(text) + "\n").encode())


def _save(path: Path, draw_into: Callable[[io.BytesIO], None]) -> None:
    picture = io.BytesIO()
    draw_into(picture)
    with whole_file(path) as file:
        file.write(picture.getvalue())


def draw_switches(file: io.BytesIO, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a PNG: how much more accurate the recipe is with each switch; a dot per seed and a bar for the mean."""
    base, *variants = dict.fromkeys(row["variant"] for row in rows if row["variant"] not in list(BACKENDS)[1:])
    gains = {variant: _differences(rows, variant, base) for variant in variants}
    gains = {variant: gain for variant, gain in gains.items() if gain}
    order = sorted(gains, key=lambda variant: statistics.mean(gains[variant]), reverse=True)
    accuracies = list(_accuracies(rows, base).values())
    first = rows[0]
    figure = new_figure(8, 1.3 + 0.25 * len(order), f"{first['data']}, {first['epochs']} epochs: one switch at a time")
    axes: Axes = figure.subplots()
    for place, variant in enumerate(order):
        axes.barh(place, statistics.mean(gains[variant]), color="#f5c3ab", height=0.7)
        axes.plot(gains[variant], [place] * len(gains[variant]), "o", color=color_of("fused"), markersize=3.5)
    mean, std = Spread.of(accuracies)
    axes.axvspan(-std, std, color="#e5e7eb", zorder=0)
    axes.axvline(0, color=DARK, linewidth=0.8)
    axes.set_yticks(range(len(order)), order, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlabel(
        f"points of test accuracy above {first['recipe']}'s {mean:.1f} ± {std:.1f} % (gray); bar: mean, dots: seeds",
        fontsize=9,
    )
    tidy(axes, "x")
    save(figure, file, "accuracy.csv")


def draw(file: io.BytesIO, epochs: Sequence[Mapping[str, str]], group: tuple[str, str, str]) -> None:
    """Write a PNG: test error by seconds of training for each backend; thin lines: seeds, thick: their mean."""
    data, recipe, n_epochs = group
    figure = new_figure(9, 4.6, f"{recipe}, {n_epochs} epochs, {data}: test error by seconds of training")
    axes: Axes = figure.subplots()
    for variant in BACKENDS:
        own = [r for r in epochs if (r["data"], r["recipe"], r["epochs"], r["variant"]) == (*group, variant)]
        seeds = list(dict.fromkeys(row["seed"] for row in own))
        lines = [_line([row for row in own if row["seed"] == seed]) for seed in seeds]
        for seconds, errors in lines:
            axes.plot(seconds, errors, color=color_of(variant), linewidth=0.8, alpha=0.5)
        if lines:
            times, error_rows = zip(*lines, strict=True)
            seconds, errors = ([statistics.mean(at) for at in zip(*axis, strict=True)] for axis in (times, error_rows))
            axes.plot(seconds, errors, color=color_of(variant), linewidth=2.2, label=variant)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g} %" if f"{value:e}"[0] in "25" else "")
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training, input included")
    axes.set_ylabel("test error")
    axes.legend(frameon=False)
    tidy(axes, "both")
    save(figure, file, "accuracy_epochs.csv")


def _line(rows: Sequence[Mapping[str, str]]) -> tuple[list[float], list[float]]:
    half_an_image = 0.005  # percent of 10,000 images: an error of 0 needs a place on a logarithmic axis
    errors = [max(100 * (1 - float(row["accuracy"])), half_an_image) for row in rows]
    return [float(row["train_seconds"]) for row in rows], errors


@app.command()
def main(
    data: Annotated[str, typer.Option(help="Name of the images in the tables, for example 'CIFAR-10 (JPEG copy)'.")],
    dataset: Annotated[str, typer.Option(help="As for resnet-fast train.")] = "cifar10",
    data_dir: Annotated[Path, typer.Option(help="As for resnet-fast train.")] = Path("data"),
    recipe: Annotated[str, typer.Option(help="As for resnet-fast train.")] = "fast94",
    epochs: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    seeds: Annotated[int, typer.Option(min=0, help="Number of seeds for each backend; 0: none.")] = 5,
    ablation_seeds: Annotated[int, typer.Option(min=0, help="Number of seeds for each switch; 0: none.")] = 3,
    model: Annotated[str, typer.Option(help="As for resnet-fast train.")] = "resnet18",
    batch_size: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    image_size: Annotated[int, typer.Option(help="As for resnet-fast train.")] = 32,
    train_images: Annotated[
        int | None, typer.Option(min=10, help="Folders only: train on this many images, the first of each class.")
    ] = None,
    test_images: Annotated[
        int | None, typer.Option(min=10, help="Folders only: test on this many images, the first of each class.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Start no run that would end later; 0: no limit.")] = 0,
    device: Annotated[str, typer.Option(help="As for resnet-fast train.")] = "auto",
    results: Annotated[Path, typer.Option(help="The folder that holds a folder for each device.")] = RESULTS,
) -> None:
    """Measure accuracy and time of a recipe for each backend and each switch; write CSV files, a page and pictures."""
    chosen = choose_device(device)
    base = {"dataset": dataset, "data_dir": data_dir, "recipe": recipe, "epochs": epochs, "device": device}
    base |= {"model": model, "batch_size": batch_size, "image_size": image_size}
    out = results / device_slug(chosen)
    backends = BACKENDS if chosen.type == "cuda" else {k: v for k, v in BACKENDS.items() if not k.endswith("graph")}
    deadline = time.monotonic() + 60 * minutes if minutes else math.inf
    with tempfile.TemporaryDirectory(prefix="accuracy-images-") as folder:
        if train_images is not None or test_images is not None:
            if dataset != "folder":
                raise typer.BadParameter(f"--train-images and --test-images are for --dataset folder, got {dataset}")
            link_images(data_dir, {"train": train_images, "test": test_images}, Path(folder))
            base["data_dir"] = Path(folder)
        variants = {"fused": {}} | ablations(model, image_size)
        measure(variants, range(ablation_seeds), base, data, out, deadline)
        measure(backends, range(seeds), base, data, out, deadline)
    write_page(out)
    typer.echo(f"{out / 'accuracy.md'}")


if __name__ == "__main__":
    app()
