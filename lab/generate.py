"""Continues prompts with the model of a cell or of a checkpoint, in parallel branches if asked.

python -m lab.generate runs/rope_ablation/cells/NAME-IDENTITY --prompt "def main():"
python -m lab.generate runs/rope_ablation/cells/NAME-IDENTITY --prompt "def " --branches 4 --temperature 0.8

Prompts come from --prompt, from a file, or from standard input: text, which is one prompt, or JSON lines, objects with
"prompt" and maybe "id" and settings under their own names: {"prompt": "def ", "branches": 4, "stop": ["\\n"]}.

A prompt is continued as it is, as by /v1/completions of a server. With --chat it is a message that a user writes, as
by /v1/chat/completions and `transformers chat`: the chat template that came with the tokenizer stands around it.

python -m lab.generate runs/rope_ablation/cells/NAME-IDENTITY --serve 8000

serves OpenAI's completions protocol; --serve 8000 --help lists the flags that it takes.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import lab
from lab import command, runtime
from lab.errors import UserError, choose, shown

MOST_BRANCHES, LONGEST = 256, 2**17  # of a request: branches, and tokens with its prompt
ROWS = 8  # prompts that are decoded at once
DRAWN = {  # settings of lab.decode.sampling.Sampling
    "temperature": (float, 0.0, "of the softmax that tokens are drawn from; 0: the likeliest token"),
    "top_k": (int, 0, "draw among the k likeliest tokens; 0: among all"),
    "top_p": (float, 1.0, "draw among the fewest tokens that have this probability together"),
    "min_p": (float, 0.0, "draw among the tokens that have this share of the largest probability"),
    "repetition_penalty": (float, 1.0, "divides the logits of tokens that the prompt or the branch has"),
    "seed": (int, 0, "of the random numbers"),
}
OTHERS = {
    "branches": (int, 0, "branches that continue the prompt, as branches 1, 2, ... of it; 0: it is one text with it"),
    "max_tokens": (int, 128, "tokens of a branch at most"),
}
SERVED = {  # of lab.decode.engine.Engine
    "rows": (int, ROWS, "of the cache; each holds as many requests as it has room for"),
    "length": (int, 2048, "tokens of a row: of prompts and branches, in pages of 64 or 256"),
    "branches": (int, 16, "of a row, so of a request"),
}
TEXTS = {"stop": "a string that ends a branch", "begin": "what one branch begins with after the prompt"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt, the settings of its line over those of the command, and what else to say of it."""

    prompt: str
    settings: dict
    about: dict
    place: str  # that a mistake is found at


def parser(description: str, settings: dict) -> command.Parser:
    """What both ways of calling the command have."""
    made = command.Parser(prog="python -m lab.generate", description=description)
    made.add_argument(
        "checkpoint", help="the directory of a cell, of a seed, of a checkpoint, of an imported or a Hugging Face model"
    )
    made.add_argument(
        "--rule",
        help="who sees whom, such as all_branches (default: as the model was trained, "
        "but under causal branches are texts of their own, as under own_branch)",
    )
    for name, (kind, default, says) in settings.items():
        made.add_argument(flag(name), type=kind, default=default, metavar=kind.__name__.upper(), help=says)
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    made = parser(__doc__, OTHERS | DRAWN)
    made.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given more than once")
    made.add_argument("--file", metavar="FILE", help="prompts; JSON lines if it is called *.jsonl; -: standard input")
    made.add_argument("--jsonl", action="store_true", help="the file or standard input has JSON lines")
    made.add_argument("--json", action="store_true", help="write a line of JSON for each prompt")
    made.add_argument("--chat", action="store_true", help="answer prompts, in the chat template of the tokenizer")
    for name, says in TEXTS.items():
        made.add_argument(flag(name), action="append", default=[], metavar="TEXT", help=f"{says}; more than once")
    return made.parse_args(argv)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def prompts(flags: argparse.Namespace) -> Iterator[Asked]:
    """Those of the command line, then those of the file; of standard input where there are neither, nor beginnings."""
    settings = {name: getattr(flags, name) for name in OTHERS | DRAWN | TEXTS}
    alone = [""] if flags.begin and not flags.file else []
    for prompt in flags.prompt or alone:
        yield Asked(prompt, settings, {"prompt": prompt}, "")
    name = flags.file or (None if flags.prompt or alone else "-")
    if name is None:
        return
    text, called = content(name), "standard input" if name == "-" else name
    if not (flags.jsonl or name.endswith(".jsonl")):
        yield Asked(text, settings, {"prompt": text}, f"{called}: ")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield asked(line, settings, f"{called}, line {number}: ")


def content(name: str) -> str:
    """What a file holds, or standard input."""
    if name == "-" and sys.stdin is None:
        raise UserError("standard input is closed; give a prompt with --prompt or --file")
    try:
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 at byte {error.start}") from None


def asked(line: str, settings: dict, place: str) -> Asked:
    """What a line of JSON asks. Raises UserError, with its place, for one that is malformed."""
    with at(place):
        try:
            given = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"no JSON: {error}") from None
        if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
            raise UserError('no object with a text under "prompt"')
        about = {name: given.pop(name) for name in ("id", "prompt") if name in given}
        own = {choose("a setting", name, settings): checked(name, value) for name, value in given.items()}
    return Asked(about["prompt"], settings | own, about, place)


def checked(name: str, value):
    """A setting, as the command has it. Raises UserError for a value of another type."""
    if name not in TEXTS:
        kind, default, _ = (OTHERS | DRAWN)[name]
        if isinstance(value, bool) or not isinstance(value, int | float if kind is float else int):
            raise UserError(f"{name} = {shown(value)} is no {kind.__name__}; the default is {default}")
        return value
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name} = {shown(value)} is neither a text nor a list of texts")
    return texts


def main(argv: list[str]) -> int | None:
    if any(word.partition("=")[0] == "--serve" for word in argv):
        return serve(argv)
    flags = parse(argv)
    given = list(prompts(flags))
    if not given:
        raise UserError("there is no prompt; give one with --prompt, in a file or on standard input")
    runtime.start_alone()
    model, tokenizer = loaded(flags)
    from lab.decode.show import Answers, show
    from lab.decode.text import transcribed

    asks = [request(one, tokenizer, flags.chat) for one in given]
    for one, ask in zip(given, asks, strict=True):
        with at(one.place):
            within(ask)
    engine = fitting(model, asks)
    for one, ask in zip(given, asks, strict=True):
        with at(one.place):
            engine.submit(**ask)  # numbers them as they are given
    answers = Answers([range(1, max(ask["branches"], 1) + 1) for ask in asks])
    pieces = transcribed(engine, tokenizer, [one.settings["stop"] for one in given])
    try:
        show(pieces, answers, [one.about for one in given], flags.json)
    except KeyboardInterrupt:
        print(f"\nlab: interrupted: {answers.finished} of {len(given)} prompts were finished", file=sys.stderr)
        return 128 + signal.SIGINT


def loaded(flags: argparse.Namespace):
    """(model, tokenizer)."""
    if flags.rule:
        return lab.load(flags.checkpoint, model=(("rule", flags.rule),))
    return lab.load(flags.checkpoint, apart=True)


def serve(argv: list[str]) -> None:
    """Serves the model until a signal ends it."""
    made = parser(
        "Serves OpenAI's protocol: POST /v1/completions and /v1/chat/completions, GET /v1/models, /health.", SERVED
    )
    made.add_argument("--serve", type=int, metavar="PORT", help="0: any that is free")
    made.add_argument("--host", default="127.0.0.1", help="the address to serve at; whoever reaches it is answered")
    flags = made.parse_args(argv)
    runtime.start_alone()
    try:
        from lab.serve import server
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise UserError(f"--serve needs {error.name}: pip install -r requirements-serve.txt") from None
    place = server.bound(flags.host, flags.serve)
    name, shape = Path(flags.checkpoint).resolve().name, {name: getattr(flags, name) for name in SERVED}
    server.serve(*loaded(flags), name, place, **shape)


@contextlib.contextmanager
def at(place: str):
    """Says where a mistake was found."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}{error}") from None


def request(one: Asked, tokenizer, chat: bool = False) -> dict:
    """What the engine is to be asked. chat: the prompt is a message."""
    from lab.decode.sampling import Sampling

    own = one.settings
    with at(one.place):
        texts = [tokens(text, tokenizer) for text in own["begin"]]
        if own["branches"] and texts and own["branches"] != len(texts):
            raise UserError(f"branches = {own['branches']} and {len(texts)} texts in begin; leave one out")
        if "" in own["stop"]:
            raise UserError("stop = '' would end a text at once; choose another string")
        return {
            "prompt": message(one.prompt, tokenizer)
            if chat
            else ([] if tokenizer.bos is None else [tokenizer.bos]) + tokens(one.prompt, tokenizer),
            "branches": own["branches"] or len(texts),
            "texts": texts or None,
            "sampling": Sampling(**{name: own[name] for name in DRAWN}),
            "most_tokens": own["max_tokens"],
            "stop": tokenizer.ends if chat else () if tokenizer.eos is None else (tokenizer.eos,),
        }


def message(text: str, tokenizer) -> list[int]:
    """The tokens after which an answer to it comes: what begins them, the template says."""
    if tokenizer.chat is None:
        raise UserError(f"--chat: no chat template came with the tokenizer {tokenizer.name!r}; leave it out")
    return tokenizer.encode_chat(tokenizer.chat.asked(text, datetime.datetime.now())).tolist()


def tokens(text: str, tokenizer) -> list[int]:
    try:
        return tokenizer.encode(text).tolist()
    except (ValueError, OverflowError) as error:  # of a tokenizer that reads numbers
        raise UserError(f"the tokenizer {tokenizer.name!r} cannot read the prompt: {error}") from None


def slots(ask: dict) -> int:
    """How many a request takes of a row of the cache."""
    from lab.decode.forest import needed_for

    texts = ask["texts"] or [[]] * ask["branches"]
    return needed_for(len(ask["prompt"]), [len(text) for text in texts], ask["most_tokens"])


def within(ask: dict) -> None:
    """Raises UserError for a request over what one may have: before a cache is made that has room for it."""
    if not 0 <= ask["branches"] <= MOST_BRANCHES:
        raise UserError(f"branches = {ask['branches']} is not within the budget; choose 0 to {MOST_BRANCHES}")
    if ask["most_tokens"] < 1:
        raise UserError(f"max_tokens = {ask['most_tokens']} generates nothing; choose at least 1")
    if (needed := slots(ask)) > LONGEST:
        raise UserError(
            f"a prompt of {len(ask['prompt'])} tokens and {max(ask['branches'], 1)} x {ask['most_tokens']} to generate "
            f"need {needed} slots, over {LONGEST}; choose fewer tokens or branches"
        )


def fitting(model, asks: Sequence[dict]):
    """An engine for these requests."""
    from lab.decode.engine import Engine

    branches = max(1, *(ask["branches"] for ask in asks))
    return Engine(model, rows=min(ROWS, len(asks)), length=max(map(slots, asks)), branches=branches)


if __name__ == "__main__":
    command.run(main)
