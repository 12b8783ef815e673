"""`transom look`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

import transom
from transom.errors import SettingsError
from transom.options import Threads, parse_methods, set_threads
from transom.terminal import console


def look(
    images: Annotated[
        list[str], typer.Argument(help="Pictures, or the word demo for the demo's photographs.")
    ],
    model: Annotated[
        str, typer.Option(help="As in compare, or demo for the demo's vision transformer.")
    ],
    lens: Annotated[
        str,
        typer.Option(
            help="attention, rollout, fates, heads, sinks, concepts or tree; several with commas."
        ),
    ] = "attention",
    method: Annotated[
        str | None,
        typer.Option(help="Fit it first, with settings if you like: 'tome:r=8'. Fates need one."),
    ] = None,
    concepts: Annotated[int, typer.Option(min=2, help="Number of concepts.")] = 8,
    layer: Annotated[
        int, typer.Option(help="Whose embeddings concepts explain; -1 is the last.")
    ] = -2,
    basis: Annotated[
        list[str] | None,
        typer.Option(help="Pictures that concepts are fitted to, or demo; else those given."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="safetensors file, or a checkpoint of tensors only.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option(help="Download the weights that go with the model's name.")
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Of weights that are random, of patterns and of concepts.")
    ] = 0,
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures and page.")] = Path("transom-look"),
) -> None:
    """See where a model looks, where its tokens go, what its heads do, which concepts it sees.

    Writes PNGs and one self-contained page LENS.html to --out, and prints the essentials.
    """
    from transom.lens.look import LENSES
    from transom.lens.look import look as run

    wanted = [name.strip() for name in lens.split(",")]
    if unknown := [name for name in wanted if name not in LENSES]:
        raise SettingsError(f"there is no lens {unknown[0]!r}; lenses are {list(LENSES)}")
    set_threads(threads)
    built = _create(model, weights, pretrained, seed)
    for entry in parse_methods(method) or []:
        slug, settings = (entry, {}) if isinstance(entry, str) else entry
        transom.apply(built, slug, **settings)
    for name in wanted:
        seen = run(
            built,
            _pictures(images),
            name,  # type: ignore[arg-type]
            concepts=concepts,
            layer=layer,
            basis=None if basis is None else _pictures(basis),
            seed=seed,
        )
        page = seen.save(out, f"{model}: {name}")
        for line in seen.summary:
            console().print(line, highlight=False, soft_wrap=True)
        console().print(f"page: {page}", highlight=False, soft_wrap=True)


def _pictures(given: list[str]) -> str | list[str]:
    return "demo" if given == ["demo"] else given


def _create(name: str, weights: Path | None, pretrained: bool, seed: int) -> nn.Module:
    from transom.measure.models import create

    if name != "demo":
        return create(name, weights=weights, pretrained=pretrained, seed=seed)
    if weights is not None or pretrained:
        raise SettingsError("the demo's model has its weights; leave --weights and --pretrained")
    from transom.demo.saliency import load_saliency_model

    return load_saliency_model().backbone.eval()
