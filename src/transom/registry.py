"""What each slug offers. Rooms are discovered by walking `transom.papers`.

A room registers by existing: a module or package `papers/<family>/<slug>` (dashes written as
underscores) that defines a frozen dataclass derived from :class:`Method`, a tuple `BACKBONES`, a
tuple `OFFERS`, or several of them. A room that fails to import is an error, not a warning.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from transom.errors import SettingsError
from transom.front import Front
from transom.settings import check, freeze
from transom.slots import Fill

if TYPE_CHECKING:
    from transom.cards import Card
    from transom.hosts import Host

Kind = Literal["operator", "objective", "lens", "pipeline"]
Takes = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Backbone:
    """A whole architecture that is registered with timm.

    Attributes:
        name: of the timm model.
        params: published number of parameters in millions; None where none is published.
        gmacs: published multiply-adds in units of 1e9 at `size`; None likewise.
        size: height and width of the images they are published for, in pixels.
    """

    name: str
    params: float | None = None
    gmacs: float | None = None
    size: int = 224


@dataclass(frozen=True)
class Offer:
    """Something a room offers beside a method and backbones.

    Attributes:
        kind: what it is.
        name: to ask for it by.
        build: the function or class behind it.
    """

    kind: Kind
    name: str
    build: Callable[..., Any]


@dataclass(frozen=True)
class Room:
    """What one paper offers.

    Attributes:
        slug: registry key.
        module: where it is.
        method: class of the hyperparameters; None if it fits nothing into a host.
        backbones: registered with timm under these names.
        offers: everything else.
        convert: official state dict -> ours; None where the names are the same.
    """

    slug: str
    module: ModuleType
    method: type[Method] | None = None
    backbones: tuple[Backbone, ...] = ()
    offers: tuple[Offer, ...] = ()
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None

    @property
    def kinds(self) -> list[str]:
        """What there is, in words."""
        kinds = ["method"] if self.method else []
        kinds += ["backbone"] if self.backbones else []
        return kinds + sorted({offer.kind for offer in self.offers})


class Training:
    """What a method adds to training. This base adds nothing; rooms override what they need.

    One instance belongs to one run, so it may keep what it needs between calls.
    """

    def at_step(self, model: nn.Module, step: int, total: int) -> Mapping[str, Any]:
        """Settings of the method that hold from this step on.

        Args:
            model: with the method fitted.
            step: of the optimizer, about to be made, counted from 0; `total` when training is over.
            total: steps of the whole training.

        Returns:
            Settings for ``transom.adjust``; empty to leave everything as it is.
        """
        return {}

    def extra_loss(self, model: nn.Module, outputs: Tensor) -> Tensor | None:
        """A loss that is added to that of the task; None for none.

        Args:
            model: with the method fitted, right after its forward pass.
            outputs: what it returned, (B, C).
        """
        return None


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """One paper's idea as something that fills slots of a host.

    Subclasses are frozen dataclasses of hyperparameters, validated on construction.
    """

    slug: ClassVar[str]
    """Registry key: the name of the room's file, with dashes."""
    takes: ClassVar[Takes] = "encoder"
    """Which part of a model it is fitted to."""
    needs_class_token: ClassVar[bool] = False
    """Whether hosts without a class token are refused."""
    needs_grid: ClassVar[bool] = False
    """Whether hosts whose patches have no known grid are refused."""
    keeps_order: ClassVar[bool] = False
    """Whether tokens stay in their order, and the last one of a text that is read from it stays."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "slug" not in cls.__dict__:
            room = cls.__module__.removeprefix("transom.papers.").split(".")
            cls.slug = room[min(1, len(room) - 1)].replace("_", "-")
        own = cls.__dict__.get("__post_init__")
        if own is not None:

            @functools.wraps(own)
            def checked(self: Method) -> None:
                Method.__post_init__(self)  # types first, so that a room compares only numbers
                own(self)

            cls.__post_init__ = checked  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        check(self, self.slug)
        freeze(self)

    @property
    def needs_training(self) -> bool:
        """Whether new parameters have no meaning before training; `apply` says so."""
        return False

    @abstractmethod
    def fit(self, host: Host) -> list[Fill]:
        """What goes into each block of this host.

        Args:
            host: the adapter's view of a model.

        Returns:
            One fill a block.

        Raises:
            FitError: the host lacks something this method needs.
        """

    def front(self, host: Host) -> Front:
        """What goes in front of the blocks of this host: its tokenizer, its positions.

        Args:
            host: the adapter's view of a model.

        Returns:
            By default nothing.

        Raises:
            FitError: the host lacks something this method needs.
        """
        return Front()

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        """Three settings from mild to strong, for comparisons.

        Args:
            depth: blocks of the host.
            patches: patch tokens of the host.

        Returns:
            Settings for the constructor.
        """
        return [{}]

    @classmethod
    def neutral(cls) -> dict[str, Any] | None:
        """Settings under which a fitted host computes what it computes without the method.

        Returns:
            Settings for the constructor; None when there are none.
        """
        return None

    @classmethod
    def for_prompt(cls, model: nn.Module, given: Mapping[str, Any], **settings: Any) -> Method:
        """The method for one prompt, with what has to be found in it first.

        Args:
            model: with a decoder, to which no method is fitted.
            given: arguments of the model: the prompt, and its image.
            **settings: of the constructor; what they name is not looked for.

        Returns:
            By default the method with these settings: the same for every prompt.
        """
        return cls(**settings)

    @classmethod
    def removing(cls, removed: Sequence[int], patches: int) -> dict[str, Any] | None:
        """Settings that remove so many tokens in each block; None if the method cannot be told.

        Args:
            removed: patch tokens to remove in each block, at most half of those there.
            patches: patch tokens that enter the first block.

        Returns:
            Settings for the constructor.
        """
        return None

    def training(self, **options: Any) -> Training:
        """What the paper adds to training: losses, schedules.

        Args:
            **options: of the schedule or loss, with the paper's defaults.

        Raises:
            SettingsError: an option is unknown.
        """
        if options:
            raise SettingsError(
                f"{self.slug} adds nothing to training that has options; got {list(options)}"
            )
        return Training()

    def settings(self) -> dict[str, Any]:
        """The hyperparameters as plain values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@functools.cache
def rooms() -> dict[str, Room]:
    """What every room offers, by slug, in alphabetical order.

    Raises:
        ImportError: a room does not import.
        TypeError: a room offers nothing, or several methods.
    """
    found = (_room(module) for module in _modules())
    return dict(sorted((room.slug, room) for room in found))


def _modules() -> Iterator[ModuleType]:
    papers = importlib.import_module("transom.papers")
    for family in pkgutil.iter_modules(papers.__path__, "transom.papers."):
        path = importlib.import_module(family.name).__path__
        for info in pkgutil.iter_modules(path, f"{family.name}."):
            yield importlib.import_module(info.name)


def _room(module: ModuleType) -> Room:
    name = module.__name__
    own = {
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and (value.__module__ == name or value.__module__.startswith(f"{name}."))
    }
    if len(own) > 1:
        raise TypeError(f"{name} defines {len(own)} methods; a room defines at most one")
    method = next(iter(own), None)
    room = Room(
        name.rpartition(".")[2].replace("_", "-"),
        module,
        method,
        tuple(getattr(module, "BACKBONES", ())),
        tuple(getattr(module, "OFFERS", ())),
        getattr(module, "convert", None),
    )
    if not room.kinds:
        raise TypeError(f"{name} offers nothing: no method, no BACKBONES and no OFFERS")
    return room


@functools.cache
def methods() -> dict[str, type[Method]]:
    """Every method by slug, in alphabetical order."""
    return {slug: room.method for slug, room in rooms().items() if room.method is not None}


def backbones() -> dict[str, tuple[Backbone, ...]]:
    """The backbones of every room that has some, by slug."""
    return {slug: room.backbones for slug, room in rooms().items() if room.backbones}


def build(method: str | Method, settings: dict[str, Any]) -> Method:
    """A method from a slug and settings, or from an instance and changes to it.

    Args:
        method: slug or instance.
        settings: hyperparameters by name.

    Returns:
        A validated instance.

    Raises:
        SettingsError: the slug or a setting is unknown, or a value is out of range.
    """
    if isinstance(method, Method):
        cls, given = type(method), {**method.settings(), **settings}
    elif isinstance(method, str):
        cls, given = _by_slug(method), settings
    else:
        raise SettingsError(
            f"got a {type(method).__name__} as method; expected a slug such as 'tome' or an "
            "instance such as ToMe(r=8)"
        )
    names = [f.name for f in dataclasses.fields(cls)]
    for name in settings:
        if name not in names:
            raise SettingsError(
                f"{cls.slug} has no setting {name!r}{_nearest(name, names)}; it has {names}"
            )
    return cls(**given)


def _by_slug(slug: str) -> type[Method]:
    known = methods()
    if slug not in known:
        raise SettingsError(
            f"there is no method {slug!r}{_nearest(slug, list(known))}; methods are {list(known)}"
        )
    return known[slug]


def _nearest(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def cards() -> dict[str, Card]:
    """The facts of all papers of the index, by slug."""
    from transom.cards import load_cards

    return load_cards()
