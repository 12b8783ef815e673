"""The words of a room as HTML: paragraphs, equations where lines are indented, code in backticks.

A docstring is text. It is escaped before anything else, so whatever stands in it stays text.
"""

from __future__ import annotations

import inspect
import re
import textwrap

from markupsafe import Markup, escape


def lead(docstring: str | None) -> str:
    """The first sentence, without the name that stands before its colon."""
    first = inspect.cleandoc(docstring or "").partition("\n\n")[0].replace("\n", " ").strip()
    name, colon, rest = first.partition(": ")
    says = rest if colon and len(name) < 40 else first
    return says[:1].upper() + says[1:]


def body(docstring: str | None) -> Markup:
    """Everything behind the first paragraph."""
    blocks = inspect.cleandoc(docstring or "").partition("\n\n")[2]
    parts = []
    for block in re.split(r"\n\s*\n", blocks):
        if not block.strip():
            continue
        parts += [_block(piece) for piece in _pieces(block)]
    return Markup("\n").join(parts)


def inline(text: str) -> Markup:
    """One line: code in backticks and roles of Sphinx as code, addresses as links."""
    safe = str(escape(text))
    safe = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", safe)
    safe = re.sub(r"``?([^`]+)``?", r"<code>\1</code>", safe)
    repository = r"(?<![\w/@.-])((?:https?://)?github\.com/[\w.-]+/[\w.-]*[\w-])"
    return Markup(re.sub(repository, _link, safe))


def _link(found: re.Match[str]) -> str:
    address = found[1] if found[1].startswith("http") else f"https://{found[1]}"
    return f'<a href="{address}" rel="noopener">{found[1]}</a>'


def _pieces(block: str) -> list[tuple[bool, str]]:
    """Runs of lines that are indented, or not."""
    pieces: list[tuple[bool, list[str]]] = []
    for line in block.split("\n"):
        shown = line.startswith(("    ", "\t"))
        if pieces and pieces[-1][0] == shown:
            pieces[-1][1].append(line)
        else:
            pieces.append((shown, [line]))
    return [(shown, "\n".join(lines)) for shown, lines in pieces]


def _block(piece: tuple[bool, str]) -> Markup:
    shown, text = piece
    if shown:
        equation = textwrap.dedent(text).rstrip()
        return Markup('<pre class="equation" tabindex="0">{}</pre>').format(equation)
    if re.match(r"\s*[-*] ", text):
        items = re.split(r"\n\s*[-*] ", "\n" + text)[1:]
        points = Markup("").join(
            Markup("<li>{}</li>").format(inline(" ".join(item.split()))) for item in items
        )
        return Markup("<ul>{}</ul>").format(points)
    return Markup("<p>{}</p>").format(inline(" ".join(text.split())))
