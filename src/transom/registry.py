"""What each slug offers. Methods are discovered by walking `transom.papers`.

A room registers by existing: a module `papers/<family>/<slug>.py` (dashes written as underscores)
that defines one frozen dataclass derived from :class:`Method`. A room that fails to import is an
error, not a warning.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from transom.errors import SettingsError
from transom.settings import check
from transom.slots import Fill

if TYPE_CHECKING:
    from transom.cards import Card
    from transom.hosts import Host


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """One paper's idea as something that fills slots of a host.

    Subclasses are frozen dataclasses of hyperparameters, validated on construction.
    """

    slug: ClassVar[str]
    """Registry key: the name of the room's file, with dashes."""
    needs_class_token: ClassVar[bool] = False
    """Whether hosts without a class token are refused."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "slug" not in cls.__dict__:
            cls.slug = cls.__module__.rpartition(".")[2].replace("_", "-")
        own = cls.__dict__.get("__post_init__")
        if own is not None:

            @functools.wraps(own)
            def checked(self: Method) -> None:
                Method.__post_init__(self)  # types first, so that a room compares only numbers
                own(self)

            cls.__post_init__ = checked  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        check(self, self.slug)

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
    def removing(cls, removed: Sequence[int], patches: int) -> dict[str, Any] | None:
        """Settings that remove so many tokens in each block; None if the method cannot be told.

        Args:
            removed: patch tokens to remove in each block, at most half of those there.
            patches: patch tokens that enter the first block.

        Returns:
            Settings for the constructor.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """The hyperparameters as plain values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@functools.cache
def methods() -> dict[str, type[Method]]:
    """Every method by slug, in alphabetical order.

    Raises:
        ImportError: a room does not import.
        TypeError: a room does not define exactly one method.
    """
    papers = importlib.import_module("transom.papers")
    found: dict[str, type[Method]] = {}
    for info in pkgutil.walk_packages(papers.__path__, "transom.papers."):
        module = importlib.import_module(info.name)
        if info.ispkg:
            continue
        own = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, Method)
            and value.__module__ == module.__name__
        ]
        if len(own) != 1:
            raise TypeError(f"{info.name} defines {len(own)} methods; a room defines exactly one")
        found[own[0].slug] = own[0]
    return dict(sorted(found.items()))


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
