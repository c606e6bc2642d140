"""`python tests/depth_page.py [RUN]`: runs `resnet-fast study skip`, and writes its results to docs/.

Writes docs/skip.png, skip.csv, skip_gradients.csv and skip_config.json, and the tables of docs/depth.md.
RUN is the folder of a study that has been run already, with the commit that is checked out.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from pages import DOCS, write_tables

from benchmarks.results import commit
from resnet_fast.models import CifarResNet
from resnet_fast.study import EpochRow, Network, format_verdict
from resnet_fast.study.folder import read_table
from resnet_fast.study.report import last_epochs
from resnet_fast.training.repeat import Spread

FILES = {"skip.png": "skip.png", "skip.csv": "skip.csv", "gradients.csv": "skip_gradients.csv"}
DEPTHS = (20, 32, 44, 56, 110)


def counts() -> str:
    """The table of parameters, counted."""
    lines = [
        "| layers | option A, and plain | option B |",
        "| ---: | ---: | ---: |",
    ]
    for depth in DEPTHS:
        a, b, plain = (n_parameters(CifarResNet(depth, shortcut=shortcut)) for shortcut in ("A", "B", None))
        assert a == plain
        lines.append(f"| {depth} | {a:,} | {b:,} |")
    return "\n".join(lines)


def n_parameters(model: CifarResNet) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def result() -> str:
    """What docs/skip.csv and docs/skip_config.json hold: a table, the verdict, and how it was measured."""
    rows, config = read_table(DOCS / "skip.csv", EpochRow), json.loads((DOCS / "skip_config.json").read_text())
    networks = [Network(int(name.split("-")[1]), name.startswith("plain")) for name in config["networks"]]
    lines = ["| network | parameters | training error (%) | test error (%) |", "| --- | ---: | ---: | ---: |"]
    for network in networks:
        n = n_parameters(network.build(len(config["classes"]), config["width"]))
        last = last_epochs(rows, network.name)
        errors = [Spread.of([100 * getattr(row, f"{kind}_error") for row in last]) for kind in ("train", "test")]
        lines.append(f"| {network.name} | {n:,} | " + " | ".join(f"{e.mean:.2f} ± {e.std:.2f}" for e in errors) + " |")
    size, seeds = config["image_size"], len(config["seeds"])
    data = f"Digits of {size}x{size} pixels, {config['width']} channels, {config['epochs']} epochs"
    spread = f"after the last epoch, mean ± standard deviation of {seeds} seeds"
    setting = (
        f"{data}, SGD in batches of {config['batch_size']}, learning rate {config['lr']:g}, schedule "
        f"{config['schedule']}; {spread}; training error is the running one of the epoch."
    )
    where = (
        f"{config['device_name']}, {config['threads']} thread{'s' * (config['threads'] > 1)}, "
        f"torch {config['versions']['torch']}, commit {config['commit']}, {config['date']}; `make depth`"
    )
    return "\n".join([*lines, "", *format_verdict(rows, networks), "", *wrapped(setting), "", *wrapped(where)])


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_on_hyphens=False)


def main() -> None:
    began, measured = time.time(), commit()  # before files of the checkout are written
    with tempfile.TemporaryDirectory() as folder:
        run = Path(sys.argv[1]) if sys.argv[1:] else Path(folder) / "run"
        if not sys.argv[1:]:
            subprocess.run([sys.executable, "-m", "resnet_fast.cli", "study", "skip", "--out", run], check=True)
            print(f"{time.time() - began:.0f} s")
        for name, shown in FILES.items():
            shutil.copyfile(run / name, DOCS / shown)
        config = json.loads((run / "config.json").read_text())
        date = time.strftime("%Y-%m-%d", time.gmtime((run / "skip.csv").stat().st_mtime))
    config |= {"commit": measured, "date": date}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (DOCS / "skip_config.json").write_text(text, encoding="utf-8")
    write_tables(DOCS / "depth.md", f"{counts()}\n\n## What the skip connections do\n\n{result()}")


if __name__ == "__main__":
    main()
