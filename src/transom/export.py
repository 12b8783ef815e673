"""Write a fitted model as a file that runs without transom, and prove that it is the same model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transom.errors import ExportError, SettingsError, TransomError

Format = Literal["onnx", "pt2"]
Example = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Exported:
    """A file that was written and run.

    Attributes:
        path: of the file.
        to: its format.
        difference: largest absolute difference of its outputs to the model's own.
        scale: largest absolute value among the model's outputs.
        run: calls the file with the example.
    """

    path: Path
    to: Format
    difference: float
    scale: float
    run: Callable[[], list[Tensor]] = field(repr=False)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Example,
    *,
    to: Format | None = None,
) -> Exported:
    """Export a model, fitted or not, run the file on the example and compare.

    Args:
        model: returns a tensor, or a mapping or sequence of them; put into eval mode for the
            export and back afterwards.
        path: of the file; ".onnx" and ".pt2" name the format.
        example: images (B, C, H, W), or the model's arguments by name, such as the ids and the
            padding mask of texts. The file takes these shapes; which tokens are padding may
            differ from call to call.
        to: "onnx" or "pt2" where the path does not say.

    Returns:
        What was written, with the measured difference.

    Raises:
        SettingsError: the format is not known.
        ExportError: a package is missing, the export fails, or the file gives other outputs than
            the model (then it is not kept).
        TokensError: a fitted method has no form for this input. Nothing is written then.
    """
    path = Path(path)
    to = to or {".onnx": "onnx", ".pt2": "pt2"}.get(path.suffix)  # type: ignore[assignment]
    if to not in ("onnx", "pt2"):
        raise SettingsError(f"got to={to!r} and the file {path.name!r}; expected 'onnx' or 'pt2'")
    training = model.training
    model.eval()
    part = path.with_name(f"{path.stem}.part.{to}")
    try:
        with torch.no_grad():
            expected = _flat(_called(model, example))
            write = _write_onnx if to == "onnx" else _write_pt2
            run = write(model, part, example)
            got = run()
        difference = max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))
        scale = max(float(b.abs().max()) for b in expected)
        if not difference <= 1e-3 * max(scale, 1.0):
            raise ExportError(
                f"the exported file differs from the model by {difference:.2g} (outputs reach "
                f"{scale:.2g}); it was not kept. Please report the model and the method"
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
        model.train(training)
    return Exported(path, to, difference, scale, run)


def _write_pt2(model: nn.Module, path: Path, example: Example) -> Callable[[], list[Tensor]]:
    args, kwargs = _arguments(example)
    try:
        program = torch.export.export(model, args, kwargs, strict=False)
    except TransomError:
        raise
    except Exception as error:
        raise ExportError(f"this model cannot be exported to pt2: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, str(path))
    with path.open("rb") as file:
        loaded: Any = torch.export.load(file).module()

    def run() -> list[Tensor]:
        with torch.no_grad():
            return _flat(loaded(*args, **kwargs))

    return run


def _write_onnx(model: nn.Module, path: Path, example: Example) -> Callable[[], list[Tensor]]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"exporting to ONNX needs {error.name}: pip install 'transom[export]'"
        ) from error
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    args, kwargs = _arguments(example)
    try:
        program = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, verbose=False)
    except Exception as error:
        raise ExportError(f"this model cannot be exported to ONNX: {_cause(error)}") from error
    finally:
        noisy.setLevel(level)
    assert program is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path), external_data=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = [*args, *kwargs.values()]
    feed = {i.name: x.cpu().numpy() for i, x in zip(session.get_inputs(), given, strict=True)}

    def run() -> list[Tensor]:
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return run


def _cause(error: BaseException) -> BaseException:
    """Our own refusal, where the exporter has wrapped it into a report of its own."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, TransomError):
        inner = inner.__cause__ or inner.__context__
    return inner or error


def _arguments(example: Example) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return ((example,), {}) if isinstance(example, Tensor) else ((), dict(example))


def _called(model: nn.Module, example: Example) -> Any:
    args, kwargs = _arguments(example)
    return model(*args, **kwargs)


def _flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output.detach().cpu()]
    values = output.values() if hasattr(output, "values") else output
    return [tensor for value in values if value is not None for tensor in _flat(value)]
