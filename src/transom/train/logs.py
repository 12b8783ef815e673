"""The log of a run: CSV files always, TensorBoard where it is installed."""

from __future__ import annotations

import csv
import importlib.util
import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator

logger = logging.getLogger(__name__)

STEPS = ("step", "epoch", "loss", "accuracy", "lr", "images_per_s", "seconds")
TESTS = ("step", "epoch", "loss", "accuracy", "seconds")


class Table:
    """A CSV file whose rows are on disk when they are written; a resumed run goes on with it.

    Args:
        path: of the file.
        columns: of the file; the first one counts steps.
        steps: rows of later steps are dropped, they belong to what was lost.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], steps: int) -> None:
        self.path, self.columns = path, columns
        kept = [row for row in rows(path) if int(row["step"]) <= steps] if steps else []
        part = path.with_name(f"{path.name}.part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(kept)
        part.replace(path)

    def add(self, **values: Any) -> None:
        """Append a row."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(values)


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a log; none if there is no file. A row that was cut off is left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


class Log:
    """Both tables and TensorBoard, written by the main process only.

    Args:
        accelerator: of the run.
        out: folder of the run.
        steps: made already.
    """

    def __init__(self, accelerator: Accelerator, out: Path, steps: int) -> None:
        self.accelerator = accelerator
        self.tables: dict[str, Table] = {}
        if accelerator.is_main_process:
            self.tables = {
                "train": Table(out / "steps.csv", STEPS, steps),
                "test": Table(out / "tests.csv", TESTS, steps),
            }
        if not tensorboard():
            logger.info("no TensorBoard log: pip install tensorboard")
        else:
            accelerator.init_trackers(
                "tensorboard", init_kwargs={"tensorboard": {"purge_step": steps + 1}}
            )

    def add(self, table: str, step: int, **values: Any) -> None:
        """A row of "train" or "test"."""
        if table in self.tables:
            self.tables[table].add(step=step, **values)
        curves = {f"{table}/{name}": v for name, v in values.items() if name != "epoch"}
        self.accelerator.log(curves, step=step)

    def close(self) -> None:
        """Flush TensorBoard."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def tensorboard() -> bool:
    """Whether TensorBoard is installed."""
    return importlib.util.find_spec("tensorboard") is not None
