"""`transom lab chair`: what captions in a file invent, beside what they say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from transom.measure.chair import Chair, Comparison, compare, score
from transom.measure.mentions import read_captions, read_truth
from transom.terminal import console


def chair(
    captions: Annotated[
        Path, typer.Argument(help='JSON or JSON lines: {"image_id": 1, "caption": "..."}.')
    ],
    annotations: Annotated[Path, typer.Option(help="COCO instances of the images.")],
    against: Annotated[
        Path | None, typer.Option(help="Captions of the same images to compare with: before.")
    ] = None,
    synonyms: Annotated[
        Path | None, typer.Option(help="A category a line: 'person, girl, boy'.")
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="COCO captions; what they name counts as seen.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measure objects that captions invent (CHAIR), with recall and length.

    With --against it also says whether fewer inventions are more than shorter text.
    """
    truth = read_truth(annotations, synonyms, references)
    said = read_captions(captions)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("captions", overflow="fold")
    for name in (
        "CHAIR_i",
        "CHAIR_s",
        "distinct",
        "recall",
        "words",
        "objects",
        "repeated",
        "empty",
    ):
        table.add_column(name, justify="right")
    found: Chair | Comparison
    if against is None:
        found = score(said, truth)
        rows = {captions.name: found}
    else:
        found = compare(read_captions(against), said, truth, seed=seed)
        rows = {
            f"before: {against.name}": found.before,
            f"after: {captions.name}": found.after,
            "before, at equal length": found.before_cut,
            "after, at equal length": found.after_cut,
        }
    for name, row in rows.items():
        table.add_row(name, *_cells(row))
    console(at_least=120).print(table)
    if isinstance(found, Comparison):
        for name, d in found.differences.items():
            console().print(
                f"{name}: {d.value:+.3f}, 95 % from {d.low:+.3f} to {d.high:+.3f}", highlight=False
            )
        console().print(f"[bold]{found.verdict}[/]: {found.why}", highlight=False, soft_wrap=True)
    if out is not None:
        out.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
        console().print(f"written: {out}", highlight=False, soft_wrap=True)


def _cells(row: Chair) -> list[str]:
    parts = (row.instance, row.sentence, row.distinct, row.recall)
    cells = ["–" if part is None else f"{part:.1%}" for part in parts]
    repeated = "–" if row.repeated is None else f"{row.repeated:.1%}"
    return [*cells, f"{row.length:.1f}", f"{row.objects:.2f}", repeated, str(row.empty)]
