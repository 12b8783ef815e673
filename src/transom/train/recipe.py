"""A recipe: everything that decides what a training run computes, as one YAML file.

Sections are dataclasses; the names of their fields are the keys. A key that is not known is an
error which names the nearest one, so a misspelt setting is never ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transom.errors import SettingsError
from transom.settings import check

_FIELDS = "__dataclass_fields__"

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class ModelPart:
    """Which model is trained.

    Attributes:
        name: of a timm model, of weights that ship with transom ("transom/cifar10-vit"), or the
            folder or hub name of a Hugging Face model.
        args: for ``timm.create_model``: img_size, patch_size, depth, num_classes, ...
        weights: file to start from.
        pretrained: start from the weights that go with the name.
        mean: of the channels, pixels scaled to [0, 1]; the model's own by default.
        std: of the channels.
        crop_pct: part of the resized test picture that its crop keeps; the model's own by default.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    pretrained: bool = False
    mean: Triple | None = None
    std: Triple | None = None
    crop_pct: float | None = None


@dataclass(frozen=True)
class DataPart:
    """What it is trained and judged on.

    Attributes:
        train: a folder with one sub-folder a class, a parquet file, a folder written by
            ``datasets.save_to_disk``, "hub:NAME:SPLIT" for a data set of the Hugging Face hub,
            "digits" (scikit-learn) or "textiles" (package conformal-clip-data).
        test: likewise; None holds out a part of `train`.
        holdout: part of every class of `train` that is held out if there is no `test`.
        train_limit: use at most so many training images, taken at even distances.
        test_limit: likewise.
    """

    train: str
    test: str | None = None
    holdout: float = 0.2
    train_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        check(self, "recipe, data")
        if not 0 < self.holdout < 1:
            raise SettingsError(
                f"data.holdout is {self.holdout:g}; expected a part between 0 and 1"
            )


@dataclass(frozen=True)
class AugmentPart:
    """What happens to training images; all of it is timm's.

    Attributes:
        scale: area of the random crop as a part of the picture, smallest and largest; None
            resizes and crops like the test images.
        ratio: width to height of the random crop, smallest and largest.
        hflip: probability of a mirror image.
        color_jitter: strength; 0 for none.
        auto: policy such as "rand-m9-mstd0.5-inc1"; None for none.
        erase: probability of random erasing.
        mixup: alpha; 0 for none.
        cutmix: alpha; 0 for none.
        mix_prob: probability that a batch is mixed, when mixup or cutmix is on.
        smoothing: label smoothing.
    """

    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (0.75, 4 / 3)
    hflip: float = 0.0
    color_jitter: float = 0.0
    auto: str | None = None
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check(self, "recipe, augment")
        for name in ("hflip", "erase", "mix_prob", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(
                    f"augment.{name} is {getattr(self, name):g}; expected a number from 0 to 1"
                )


@dataclass(frozen=True)
class MethodPart:
    """The method that is fitted before training.

    Attributes:
        name: slug.
        settings: hyperparameters.
        training: options of what the method adds to training, see ``Method.training``.
        where: blocks it is restricted to.
        restore: as in ``transom.apply``.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    where: tuple[int, ...] | None = None
    restore: Literal["never", "end", "every"] | None = None


@dataclass(frozen=True)
class DistilPart:
    """Distillation from the plain host, as it is before training and without the method.

    The loss becomes (1 - weight) · loss + weight · T² · KL(teacher / T ‖ student / T).

    Attributes:
        weight: of the teacher.
        temperature: T.
    """

    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check(self, "recipe, distil")
        if not (0 <= self.weight <= 1 and self.temperature > 0):
            raise SettingsError(
                f"distil has weight {self.weight:g} and temperature {self.temperature:g}; expected "
                "a weight from 0 to 1 and a temperature above 0"
            )


@dataclass(frozen=True)
class OptimPart:
    """Optimizer and learning rate.

    Attributes:
        name: of timm's: "adamw", "sgd", "muon", ...
        lr: at the end of the warm-up.
        weight_decay: not applied to biases, norms and what the model excludes.
        betas: of Adam-like optimizers.
        layer_decay: factor of the learning rate from each block to the one below; None for none.
        clip: largest norm of the gradient; None for no limit.
        warmup_epochs: during which the rate rises linearly.
        warmup_lr: where it rises from.
        min_lr: where the cosine ends.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    layer_decay: float | None = None
    clip: float | None = None
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6

    def __post_init__(self) -> None:
        check(self, "recipe, optim")
        if self.lr <= 0 or self.weight_decay < 0 or self.warmup_epochs < 0:
            raise SettingsError(
                f"optim has lr {self.lr:g}, weight_decay {self.weight_decay:g} and warmup_epochs "
                f"{self.warmup_epochs:g}; expected a positive rate and nothing negative"
            )


@dataclass(frozen=True)
class Recipe:
    """A whole training run.

    Attributes:
        model: section.
        data: section.
        augment: section.
        optim: section.
        method: section; None trains the plain model.
        distil: section; None for no teacher.
        objective: what is minimised.
        epochs: passes over the training images.
        batch_size: images of one process between two backward passes.
        accumulate: backward passes of one step of the optimizer.
        precision: "fp32", or automatic mixed precision in "bf16" or "fp16".
        compile: run the model through torch.compile.
        ema: decay of the moving average of the weights, which is then what is judged and
            written; None for none.
        seed: of weights, order, augmentation and dropout.
        workers: processes that read images; 0 reads in the training process.
        device: "auto" lets accelerate choose, "cpu" insists.
        checkpoint_steps: a checkpoint every so many steps, besides one an epoch.
        log_steps: a row of the log every so many steps.
    """

    model: ModelPart
    data: DataPart
    augment: AugmentPart = AugmentPart()
    optim: OptimPart = OptimPart()
    method: MethodPart | None = None
    distil: DistilPart | None = None
    objective: Literal["classify"] = "classify"
    epochs: int = 1
    batch_size: int = 128
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    ema: float | None = None
    seed: int = 0
    workers: int = 0
    device: Literal["auto", "cpu"] = "auto"
    checkpoint_steps: int | None = None
    log_steps: int = 10

    def __post_init__(self) -> None:
        check(self, "recipe")
        for name in ("epochs", "batch_size", "accumulate", "checkpoint_steps", "log_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} is {value}; expected an integer of at least 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise SettingsError(f"ema is {self.ema:g}; expected a decay between 0 and 1")
        mixes = self.augment.mixup > 0 or self.augment.cutmix > 0
        if mixes and self.batch_size % 2:
            raise SettingsError(
                f"batch_size is {self.batch_size}; mixup and cutmix pair images, expected an even "
                "number"
            )

    def plain(self) -> dict[str, Any]:
        """The recipe as plain values, as it is written beside the results."""
        return {
            key: value
            for key, value in _plain(dataclasses.asdict(self)).items()
            if value is not None or key not in ("method", "distil")
        }

    def differences(self, other: Recipe) -> list[str]:
        """Dotted keys in which two recipes differ."""
        mine, theirs = dict(_leaves(self.plain())), dict(_leaves(other.plain()))
        keys = sorted(mine.keys() | theirs.keys())
        return [key for key in keys if mine.get(key) != theirs.get(key)]


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file and changes as typed.

    ``extends: other.yaml`` at the top of a file names a recipe beside it that it changes; only one
    level deep, so that two files show everything that holds.

    Args:
        path: of the file.
        changes: "key=value" with dots between sections, for example "optim.lr=3e-4".

    Raises:
        SettingsError: the file or the one it extends is missing or no YAML, a key is unknown, or a
            value is wrong.
    """
    content = _content(path)
    other = content.pop("extends", None)
    if other is not None:
        base = _content(path.parent / str(other))
        if "extends" in base:
            raise SettingsError(
                f"{str(path)!r} extends {other!r}, which extends another recipe; write what holds "
                "into one of the two"
            )
        content = _merged(base, content)
    for change in changes:
        key, equals, value = change.partition("=")
        if not (key and equals):
            raise SettingsError(f"{change!r}: expected key=value, for example optim.lr=3e-4")
        _set(content, key.split("."), _yaml(value, change))
    return parse_recipe(content)


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values.

    Raises:
        SettingsError: a key is unknown or missing, or a value is wrong.
    """
    recipe: Recipe = _section(Recipe, content, "")
    return recipe


def _content(path: Path) -> dict[str, Any]:
    try:
        content = _yaml(path.read_text(encoding="utf-8"), str(path))
    except (FileNotFoundError, IsADirectoryError):
        raise SettingsError(f"there is no recipe {str(path)!r}; give a YAML file") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{str(path)!r} holds no recipe; expected sections such as 'model:'")
    return content


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Sections of `changes` over those of `base`, key by key."""
    merged = dict(base)
    for key, value in changes.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _merged(below, value)
        merged[key] = value
    return merged


def _yaml(text: str, where: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise SettingsError(
            "recipes need the package pyyaml: pip install 'transom[train]'"
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{where!r} cannot be read as YAML: {error}") from None


def _set(content: dict[str, Any], keys: list[str], value: Any) -> None:
    for i, key in enumerate(keys[:-1]):
        if content.get(key) is None:
            content[key] = {}
        if not isinstance(content[key], dict):
            raise SettingsError(f"{'.'.join(keys[: i + 1])!r} is no section of the recipe")
        content = content[key]
    content[keys[-1]] = value


def _section(cls: type[Any], content: Any, path: str) -> Any:
    if not isinstance(content, Mapping):
        raise SettingsError(f"{path.rstrip('.')!r} is {content!r}; expected a section with keys")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in content:
        if key not in fields:
            raise SettingsError(
                f"the recipe has an unknown key {path + str(key)!r}{_nearest(path, str(key))}; "
                f"{'its section' if path else 'it'} may have {list(fields)}"
            )
    values = {}
    for name, value in content.items():
        inner = _dataclass(hints[name])
        if inner is not None and value is not None:
            values[name] = _section(inner, value, f"{path}{name}.")
        else:
            values[name] = _typed(value, hints[name])
    for name, f in fields.items():
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and name not in values:
            raise SettingsError(f"the recipe has no {path + name!r}, which it needs")
    built = cls(**values)
    check(built, f"recipe{f', {path}' if path else ''}".rstrip("."))
    return built


def _dataclass(hint: Any) -> type[Any] | None:
    inner = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((one for one in inner if isinstance(one, type) and hasattr(one, _FIELDS)), None)


def _typed(value: Any, hint: Any) -> Any:
    """The value as its field wants it: YAML reads 1e-3 as a word, and has no tuples."""
    inner = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, str) and float in inner and str not in inner:
        try:
            return float(value)
        except ValueError:
            return value
    of = next((one for one in inner if typing.get_origin(one) is tuple), None)
    if isinstance(value, list) and of is not None:
        return tuple(_typed(one, typing.get_args(of)[0]) for one in value)
    return value


def _nearest(path: str, key: str) -> str:
    """The known key most like this one: first in its own section, then anywhere."""
    known = list(_keys(Recipe, ""))
    anywhere = {name.rpartition(".")[2]: name for name in reversed(known)}
    here = {
        name.removeprefix(path): name
        for name in known
        if name.startswith(path) and "." not in name.removeprefix(path)
    }
    close = [
        names[word]
        for names in (here, anywhere)
        for word in difflib.get_close_matches(key, list(names), 1)
    ]
    return f" (did you mean {close[0]!r}?)" if close else ""


def _keys(cls: type[Any], path: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        yield path + f.name
        inner = _dataclass(hints[f.name])
        if inner is not None:
            yield from _keys(inner, f"{path}{f.name}.")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def _leaves(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield path + key, value
