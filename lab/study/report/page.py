"""A report as typed blocks, written as Markdown and as one self-contained HTML page."""

import base64
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from lab.storage import write_atomically


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph. `code` and **bold** are rendered, here and in tables and captions; nothing else is."""

    text: str
    strong: bool = False  # set larger: the answer


@dataclasses.dataclass(frozen=True)
class Code:
    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[str]]
    caption: str = ""
    folded: bool = False  # behind its caption, for tables one looks things up in
    sortable: bool = False  # by a click on a heading, where the page's script may run
    links: Sequence[str] = ()  # where the first cell of each row leads, relative to the page; "": nowhere


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure: written to figures/<name>.png and embedded in the page; b"" of one that the script alone draws. live:
    the same as `lab.study.report.live` has it, for readers who look into it."""

    name: str
    content: bytes
    caption: str
    live: dict | None = None


Piece = Heading | Text | Code | Table | Chart


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Piece]


def write(directory: Path, title: str, sections: list[Section], name: str = "report") -> list[Path]:
    """Writes the figures, <name>.md and <name>.html; returns the paths of the pages."""
    for block in (block for section in sections for block in section.blocks):
        if isinstance(block, Chart):
            write_atomically(directory / "figures" / f"{block.name}.png", block.content)
    return [
        write_atomically(directory / f"{name}.md", markdown(title, sections).encode()),
        write_atomically(directory / f"{name}.html", html(title, sections).encode()),
    ]


def markdown(title: str, sections: list[Section]) -> str:
    """GitHub-flavoured Markdown that links to figures/*.png."""
    parts = [f"# {_plain(title)}"]
    for section in sections:
        parts += [f"## {_plain(section.title)}", *(_MARKDOWN[type(block)](block) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def html(title: str, sections: list[Section], script: str = "", home: str = "") -> str:
    """A page that needs no network. Its own script sorts tables and hands figures to plotly, whose script is in it
    once if there is a figure to look into; a page that is one of many names it by `script`, where that lies, and the
    page that leads to it by `home`."""
    blocks = [block for section in sections for block in section.blocks]
    live = any(isinstance(block, Chart) and block.live for block in blocks)
    scripted = live or any(isinstance(block, Table) and block.sortable for block in blocks)
    inlined = Markup(plotly()) if live and not script else ""
    shown = dict(title=title, sections=sections, scripted=scripted, live=live, plotly=inlined, script=script, home=home)
    return _template().render(shown)


@functools.cache
def plotly() -> str:
    """The script that draws figures to look into."""
    from plotly.offline import get_plotlyjs  # late: reports of studies that have no figure yet do without

    return get_plotlyjs()


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"inline": _inline, "slug": _slug, "numeric": _numeric, "base64": _base64}
    environment.filters["linked"] = _with_links
    environment.tests["kind"] = lambda block, name: type(block).__name__ == name
    return environment.get_template("report.html.j2")


def _markdown_table(table: Table) -> str:
    aligned = ["--:" if number else ":--" for number in _numeric(table)]
    rows = [table.columns, aligned, *(_linked(row, link) for row, link in _with_links(table))]
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    body = "\n".join(lines)
    if not table.folded:
        return f"{_plain(table.caption)}\n\n{body}" if table.caption else body
    return f"<details><summary>{_plain(table.caption)}</summary>\n\n{body}\n\n</details>"


def _with_links(table: Table) -> list[tuple[list[str], str]]:
    return list(zip(table.rows, table.links or [""] * len(table.rows), strict=True))


def _linked(row: list[str], link: str) -> list[str]:
    text = re.sub(r"([\[\]])", r"\\\1", row[0])
    return [f"[{text}]({link})", *row[1:]] if link else row


_MARKDOWN = {
    Heading: lambda block: f"### {_plain(block.text)}",
    Text: lambda block: _plain(block.text),
    Code: lambda block: _fenced(block.text),
    Table: _markdown_table,
    Chart: lambda block: f"![{_plain(block.name)}](figures/{block.name}.png)\n\n{_plain(block.caption)}",
}


def _fenced(text: str) -> str:
    """Between fences that are longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def _plain(text: str) -> str:
    """Text that cannot be taken for HTML tags."""
    return " ".join(text.split()).replace("<", "&lt;")


def cell(text: object) -> str:
    """Text of a Markdown table: a | that ends no column, whatever stands before it."""
    return re.sub(r"(\\*)\|", r"\1\1\\|", _plain(str(text)))


def _inline(text: str) -> Markup:
    """Escapes everything, then renders `code` and **bold**."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", marked))


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def _numeric(table: Table) -> list[bool]:
    """Which columns hold only numbers, and so are aligned to the right."""
    number = re.compile(r"(\*\*)?[-+<]?\d[\d,.]*(e[-+]?\d+)?( ?[%kMGTPEZ])?( \(.*\)| ± [\d.]+)?(\*\*)?|—|[-+]?inf%?")
    columns = zip(*table.rows, strict=True) if table.rows else [[] for _ in table.columns]
    return [bool(column) and all(number.fullmatch(text) for text in column) for column in columns]


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
