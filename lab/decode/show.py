"""What is generated, shown as it comes: JSON lines, plain text, or on a terminal a panel for each branch."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from lab.decode.text import Passage

NARROWEST = 40  # letters across a panel


class Answers:
    """The texts so far, {branch: text} of each request, which count from 0, and why each branch has ended."""

    def __init__(self, branches: Sequence[Iterable[int]]):
        self.texts = [dict.fromkeys(numbers, "") for numbers in branches]
        self.ended = [dict.fromkeys(numbers, "") for numbers in branches]

    def add(self, piece: Passage) -> bool:
        """Whether the piece is its request's last."""
        self.texts[piece.request][piece.branch] += piece.text
        self.ended[piece.request][piece.branch] = piece.ended
        return all(self.ended[piece.request].values())

    @property
    def finished(self) -> int:
        """How many requests have ended."""
        return sum(all(of_branches.values()) for of_branches in self.ended)


def as_json(pieces: Iterable[Passage], answers: Answers, asked: Sequence[dict], out: TextIO) -> None:
    """A line for each request as it ends: what was asked, and the text of each branch."""
    for piece in pieces:
        if answers.add(piece):
            texts, ended = answers.texts[piece.request], answers.ended[piece.request]
            found = [{"branch": number, "text": text, "ended": ended[number]} for number, text in texts.items()]
            print(json.dumps(asked[piece.request] | {"branches": found}, ensure_ascii=False), file=out, flush=True)


def as_text(pieces: Iterable[Passage], answers: Answers, out: TextIO) -> None:
    """A single text as it comes; of several each when its request has ended, under a heading."""
    alone = sum(map(len, answers.texts)) == 1
    for piece in pieces:
        last = answers.add(piece)
        if alone:
            print(piece.text, end="\n" if last else "", file=out, flush=True)
        elif last:
            for number, text in answers.texts[piece.request].items():
                print(f"--- prompt {piece.request + 1}, branch {number}\n{text}", file=out, flush=True)


def as_panels(pieces: Iterable[Passage], answers: Answers, console: Console) -> None:
    """A panel for each branch: of what goes on its end, and of a request that has ended all of it, above."""
    with Live(console=console, transient=True, auto_refresh=False, vertical_overflow="ellipsis") as live:
        going = {}
        for piece in pieces:
            going[piece.request] = True
            if answers.add(piece):
                del going[piece.request]
                console.print(panels(answers, [piece.request], console, whole=True))
            live.update(panels(answers, list(going), console, whole=False), refresh=True)


def panels(answers: Answers, requests: Sequence[int], console: Console, whole: bool) -> Columns:
    """Those of all branches of these requests, side by side."""
    places = [(request, number) for request in requests for number in answers.texts[request]]
    across = max(1, min(len(places), console.width // NARROWEST))
    width = console.width // across
    lines = max(1, console.height // max(1, -(-len(places) // across)) - 2)
    made = []
    for request, number in places:
        text, ended = answers.texts[request][number], answers.ended[request][number]
        shown = text if whole else "\n".join(text[-lines * (width - 4) :].split("\n")[-lines:])
        title = f"prompt {request + 1}, branch {number}" + (f": {ended}" if ended else "")
        made.append(Panel(Text(shown), title=title, width=width))
    return Columns(made, padding=(0, 0))


def show(pieces: Iterable[Passage], answers: Answers, asked: Sequence[dict], in_json: bool) -> None:
    """On standard output, in the way that suits what it is."""
    if in_json:
        as_json(pieces, answers, asked, sys.stdout)
    elif sys.stdout.isatty():
        as_panels(pieces, answers, Console(highlight=False))
    else:
        as_text(pieces, answers, sys.stdout)
