"""`transom lab`: what papers claim, shown by small experiments and measures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from transom.errors import SettingsError
from transom.measure.chair_command import chair
from transom.options import Threads, set_threads
from transom.terminal import Progress, console

app = typer.Typer(
    help="Small experiments on a CPU that show what a paper claims, and measures of a claim.",
    no_args_is_help=True,
)
app.command()(chair)


@app.command()
def icl(
    heads: Annotated[int, typer.Option(min=1, help="Of the layer.")] = 2,
    covariates: Annotated[int, typer.Option(min=1, help="Of a task.")] = 5,
    length: Annotated[int, typer.Option(min=1, help="Examples of a prompt.")] = 40,
    steps: Annotated[int, typer.Option(min=1, help="Of each of three trainings.")] = 2500,
    seed: Annotated[int, typer.Option(help="Of weights and tasks.")] = 0,
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("transom-icl.png"),
) -> None:
    """Train attention to regress in context, read its weights, compare it with the theory."""
    from transom.papers.lens.icl_linear_regression import picture, run

    set_threads(threads)
    with Progress() as progress:
        found = run(
            heads=heads,
            d=covariates,
            length=length,
            steps=steps,
            seed=seed,
            watch=progress.steps,
        )
    columns = [f"{count} examples" for count in found.lengths]
    rows = {
        f"{heads} heads": found.error,
        "1 head": found.single,
        "linear attention": found.linear,
        "ridge (Bayes)": found.bayes,
    }
    numbers = [(name, *(f"{of[n]:.3f}" for n in found.lengths)) for name, of in rows.items()]
    _show_table("mean squared error", columns, numbers)
    seen = found.patterns
    console().print(
        f"heads: {', '.join(seen.roles())}; W_QK off its diagonal {seen.off_diagonal:.1%}, W_OV "
        f"beside the response {seen.elsewhere:.1%}, |sum of mu| / sum of |mu| {seen.sum:.1%}; "
        f"correlation with the debiased gradient step {found.agreement:.4f}",
        highlight=False,
        soft_wrap=True,
    )
    _show_picture(picture(found, out))


@app.command()
def lr_transfer(
    widths: Annotated[str, typer.Option(help="Of the networks, between commas.")] = "32,64,128,256",
    depths: Annotated[
        str | None,
        typer.Option(help="Compare these instead, such as 2,4,8,16, at the first of the widths."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of each training of the rates.")] = 60,
    watched_steps: Annotated[
        int, typer.Option(min=1, help="Of the training along which the sharpness is taken.")
    ] = 200,
    depth: Annotated[int, typer.Option(min=1, help="Residual layers.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, help="Data sets and weights to average over.")] = 2,
    seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("transom-lr-transfer.png"),
) -> None:
    """Train over widths and learning rates, and watch the sharpness: does the best rate stay?

    In muP, in NTK scaling, and with the ordinary initialisation and one learning rate for all.
    """
    from transom.papers.lens.lr_transfer import picture, sweep

    set_threads(threads)
    chosen = _numbers("--widths", widths)
    sizes = chosen if depths is None else _numbers("--depths", depths)
    with Progress() as progress:
        found = sweep(
            sizes,
            over="width" if depths is None else "depth",
            width=chosen[0],
            steps=steps,
            watched_steps=watched_steps,
            depth=depth,
            seeds=seeds,
            seed=seed,
            watch=progress.steps,
        )
    columns = [*(f"{found.over} {size}" for size in sizes), "drift", "sharpness varies"]
    rows = []
    for regime in found.losses:
        best = [f"{found.rates[found.best(regime)[size]]:g}" for size in sizes]
        varies = f"{found.variation(regime, watched_steps // 4):.0%}"
        rows.append((regime, *best, f"{found.drift(regime):g}", varies))
    _show_table("best rate", columns, rows)
    _show_picture(picture(found, out))


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise SettingsError(f"{option} is {text!r}; expected numbers such as 16,32,64") from None


def _show_table(first: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    """Print numbers on the right, with what they belong to in the first column."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def _show_picture(path: Path) -> None:
    console().print(f"picture: {path}", highlight=False, soft_wrap=True)
