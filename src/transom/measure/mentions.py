"""Which objects are in images, and which a text mentions: COCO-style files and a vocabulary.

Objects come from a COCO instances file, their other names from a file the user supplies, one
category a line as published with CHAIR: "person, girl, boy". Words are matched in English, plurals
included, the longest name first.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom.errors import DataError

_log = logging.getLogger(__name__)

Captions = Mapping[int | str, str]
ODD_PLURALS = {
    "men": "man",
    "women": "woman",
    "people": "person",
    "children": "child",
    "mice": "mouse",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "oxen": "ox",
}


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and possessive s."""
    return re.findall(r"[^\W_]+", re.sub(r"['’]s\b", "", text.lower()))


def _singulars(word: str) -> list[str]:
    """What an English word may be the plural of, the word itself first."""
    found = [word]
    for ending, single in (("men", "man"), ("ies", "y"), ("ves", "f"), ("ves", "fe")):
        if word.endswith(ending) and len(word) > len(ending):
            found.append(word[: -len(ending)] + single)
    if word in ODD_PLURALS:
        found.append(ODD_PLURALS[word])
    if word.endswith("es") and len(word) > 3:
        found.append(word[:-2])
    if word.endswith("s") and not word.endswith("ss") and len(word) > 2:
        found.append(word[:-1])
    return found


class Vocabulary:
    """Which words mean which category.

    Args:
        categories: their names.
        synonyms: further names of each.
    """

    def __init__(
        self, categories: Iterable[str], synonyms: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        self.categories = tuple(categories)
        self._names: dict[tuple[str, ...], str] = {}
        named = [(name, name) for name in self.categories]
        named += [(s, name) for name, more in (synonyms or {}).items() for s in more]
        for text, category in named:
            phrase = tuple(words(text))
            if not phrase:
                raise DataError(f"category {category!r} has the name {text!r} without a word in it")
            taken = self._names.setdefault(phrase, category)
            if taken != category:
                _log.warning("%r means %r and %r; the first counts", text, taken, category)
        for phrase, category in list(self._names.items()):
            for single in _singulars(phrase[-1]):  # categories such as "scissors"
                self._names.setdefault((*phrase[:-1], single), category)
        self._longest = max(map(len, self._names))

    def mentions(self, text: str) -> list[str]:
        """Categories in the order in which a text names them, each as often as it does."""
        said, found, i = words(text), [], 0
        while i < len(said):
            for length in range(min(self._longest, len(said) - i), 0, -1):
                phrase = said[i : i + length]
                forms = ((*phrase[:-1], single) for single in _singulars(phrase[-1]))
                category = next((self._names[f] for f in forms if f in self._names), None)
                if category is not None:
                    found.append(category)
                    break
            else:
                length = 1
            i += length
        return found


@dataclass(frozen=True)
class Truth:
    """What is in the images.

    Attributes:
        objects: categories in each image, by its id.
        vocabulary: how they are named.
        source: where it is from, for messages.
    """

    objects: Mapping[int | str, frozenset[str]]
    vocabulary: Vocabulary
    source: str = "the annotations"


def read_truth(
    instances: str | Path,
    synonyms: str | Path | None = None,
    references: str | Path | None = None,
) -> Truth:
    """Objects of images from COCO-style files.

    Args:
        instances: JSON with "images", "annotations" (image_id, category_id) and "categories".
        synonyms: a category a line, its name first, further names behind commas.
        references: JSON with "annotations" (image_id, caption) written by people; what they name
            counts as seen too, as in the paper.

    Raises:
        DataError: a file is missing, is not of that form, or does not fit the others.
    """
    content = _json(instances)
    for key in ("annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(
                f"{instances} has no list {key!r}; expected COCO instances: "
                '{"images": [...], "annotations": [...], "categories": [{"id": 1, "name": ...}]}'
            )
    try:
        names = {c["id"]: str(c["name"]) for c in content["categories"]}
        listed = [_id(i["id"]) for i in content.get("images", [])]
        pairs = [(_id(a["image_id"]), a["category_id"]) for a in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{instances}: an entry lacks {error}; categories need id and name, images an id, "
            "annotations image_id and category_id (captions go into --references)"
        ) from None
    if not names:
        raise DataError(f"{instances} lists no category, so no object could be named")
    unknown = sorted({str(c) for _, c in pairs if c not in names})
    if unknown:
        raise DataError(f"{instances}: annotations name categories {unknown[:5]} that it lacks")
    vocabulary = Vocabulary(names.values(), _synonyms(synonyms, set(names.values())))
    objects: dict[int | str, set[str]] = {image: set() for image in listed}
    for image, category in pairs:
        objects.setdefault(image, set()).add(names[category])
    if not objects:
        raise DataError(f"{instances} has neither images nor annotations")
    if references is not None:
        for image, text in _pairs(references):
            if image in objects:
                objects[image].update(vocabulary.mentions(text))
    return Truth({i: frozenset(o) for i, o in objects.items()}, vocabulary, str(instances))


def read_captions(path: str | Path) -> dict[int | str, str]:
    """Captions from JSON ([{"image_id": 1, "caption": "..."}]) or the same as JSON lines.

    Raises:
        DataError: there is no such file, it is not of that form, it is empty, or an image has
            several captions.
    """
    found: dict[int | str, str] = {}
    for image, text in _pairs(path):
        if image in found:
            raise DataError(f"{path} has two captions of image {image}; expected one an image")
        found[image] = text
    if not found:
        raise DataError(f"{path} holds no captions")
    return found


def _id(value: Any) -> int | str:
    """Ids are numbers; some tools write them as text with leading zeros."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"a usable image id, got {value!r}")
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _json(path: str | Path) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from None


def _pairs(path: str | Path) -> list[tuple[int | str, str]]:
    """Image ids and captions of a JSON list, COCO captions, or JSON lines."""
    text = _read(path)
    try:
        content = json.loads(text)
    except ValueError:
        content = _lines(path, text)
    if isinstance(content, dict):
        content = content.get("annotations", [content])
    if not isinstance(content, list):
        raise DataError(f'{path}: expected a list of {{"image_id": 1, "caption": "..."}}')
    found = []
    for i, entry in enumerate(content):
        try:
            image, said = _id(entry["image_id"]), entry["caption"]
        except (KeyError, TypeError) as error:
            raise DataError(
                f'{path}: entry {i} lacks {error}; expected {{"image_id": 1, "caption": "..."}}'
            ) from None
        if not isinstance(said, str):
            raise DataError(f"{path}: the caption of image {image} is {said!r}; expected a text")
        found.append((image, said))
    return found


def _lines(path: str | Path, text: str) -> list[Any]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise DataError(
                    f"{path} is neither JSON nor JSON lines: line {number}: {error}"
                ) from None
    return found


def _synonyms(path: str | Path | None, categories: set[str]) -> dict[str, list[str]]:
    if path is None:
        return {}
    found: dict[str, list[str]] = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        names = [name.strip() for name in line.split(",") if name.strip()]
        if not names:
            continue
        if names[0] not in categories:
            raise DataError(
                f"{path}, line {number}: {names[0]!r} is no category; a line begins with the name "
                f"of one, such as {min(categories)!r}"
            )
        found.setdefault(names[0], []).extend(names[1:])
    return found
