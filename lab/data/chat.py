"""The chat template that came with a tokenizer: what stands around a message to a model that was tuned to answer.

As `transformers` has it: chat_template.jinja, or chat_template of tokenizer_config.json, in a sandbox.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from jinja2 import ext, nodes, sandbox

from lab.errors import UserError, shown

FILE, SETTINGS, SPECIAL, GENERATION = (
    "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"
)  # fmt: skip
DEFAULT = "default"  # of several templates with names
LATER = datetime.datetime(2024, 7, 26)  # the day that templates are told where texts are to be the same on any day


class Spoken(ext.Extension):
    """{% generation %}, which marks what a model has said: the text in it is as it is."""

    tags = {"generation"}

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Chat:
    """A template. file: where it came from. tokens: {"bos_token": "<s>"}, names of special tokens that it may use."""

    def __init__(self, text: str, file: Path, tokens: Mapping[str, str]):
        self.text, self.file, self.tokens = text, file, dict(tokens)

    def asked(self, message: str, day: datetime.datetime | None = None) -> str:
        """The text that a user's message is answered after; as of `talk`."""
        return self.talk([{"role": "user", "content": message}], day)

    def talk(self, messages: Sequence[Mapping[str, str]], day: datetime.datetime | None = None) -> str:
        """The text that an answer follows after these messages, each with a role and a content. day: today's, for
        templates that tell it; None: one that is the same always. Raises UserError for a template that is damaged, or
        takes no such messages."""
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Spoken]
        )
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": (day or LATER).strftime}
        values = {"messages": [*messages], "tools": None, "documents": None}
        try:
            return environment.from_string(self.text).render(**values, add_generation_prompt=True, **self.tokens)
        except Exception as error:  # a template is a program, and fails in any way
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"the chat template of {self.file} cannot be used: {said}") from error


def _refuse(told) -> None:
    raise jinja2.TemplateError(str(told))


def find(directory: Path) -> Chat | None:
    """That of a directory; None where there is none. Raises UserError where it is none."""
    settings = _object(directory / SETTINGS)
    if (directory / FILE).is_file():
        try:
            text, file = (directory / FILE).read_text("utf-8"), directory / FILE
        except UnicodeDecodeError as error:
            raise UserError(f"{directory / FILE} is not UTF-8 at byte {error.start}") from None
    else:
        text, file = settings.get("chat_template"), directory / SETTINGS
    if text is None:
        return None
    every = text if isinstance(text, list) else [{"name": DEFAULT, "template": text}]
    named = [one.get("template") for one in every if isinstance(one, dict) and one.get("name") == DEFAULT]
    if not named or not isinstance(named[0], str):
        raise UserError(f"{file}: chat_template = {shown(text)} is no text, and none named {DEFAULT!r}")
    special = _object(directory / SPECIAL) | settings
    held = {name: one.get("content") if isinstance(one, dict) else one for name, one in special.items()}
    tokens = {name: one for name, one in held.items() if name.endswith("_token") and isinstance(one, str)}
    return Chat(named[0], file, tokens)


def ends(directory: Path) -> list[int]:
    """The tokens that end what a model says, as generation_config.json names them; none where there is no such file."""
    found = _object(directory / GENERATION).get("eos_token_id")
    named = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(one) is int and one >= 0 for one in named):
        raise UserError(f"{directory / GENERATION}: eos_token_id = {shown(found)} must be whole numbers of at least 0")
    return named


def _object(file: Path) -> dict:
    """Of JSON; empty where there is no file."""
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object")
    return found
