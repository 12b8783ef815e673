"""What a run shows: a bar on a terminal, a line for each epoch elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from transom.train.loop import Moment


class Bar:
    """A context manager that is handed to :func:`transom.train.train` as `watch`.

    Args:
        console: where it is shown.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("reading data", total=None, numbers="")

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def __call__(self, now: Moment) -> None:
        numbers = (
            f"loss {now.loss:.3f}  accuracy {now.accuracy:.1f} %  {now.images_per_s:.0f} images/s  "
            f"{_clock(now.eta_s)} left"
        )
        epoch = min(now.epoch + (now.test is None), now.epochs)
        self.bar.update(
            self.task,
            completed=now.step,
            total=now.steps,
            description=f"epoch {epoch}/{now.epochs}",
            numbers=numbers,
        )
        if now.test is not None:
            self.console.print(
                f"epoch {now.epoch}/{now.epochs}  test {now.test:.2f} %  {numbers}",
                highlight=False,
            )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
