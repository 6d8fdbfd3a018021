"""OpenAI's completions protocol, as its clients know it: what a body asks for, and what it is answered.

Fields are those of its API reference (Completions), and top_k, min_p and repetition_penalty, which other servers have
beside them. As with those, a field that is unknown is left unread; one that is known and not supported is refused.
"""

import dataclasses
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lab.data.tokenizers import Tokenizer
from lab.decode import sampling
from lab.decode.engine import Event
from lab.decode.forest import needed_for
from lab.decode.sampling import Sampling
from lab.decode.text import BROKEN, Passage, spelled
from lab.errors import UserError, shown
from lab.serve.worker import Ask

DRAWN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": None}
OTHERS = {"max_tokens": 16, "n": 1, "logprobs": None, "stream": False}  # defaults, of the same types
TYPES = {"seed": int, "logprobs": int}  # of those whose default is None
NOTHING = {  # what is not there, and the values that ask for none of it
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "best_of": (1,),
}
MOST_STOPS = 16
LEAST_LOG_P = -9999.0  # JSON has no infinity


class Refusal(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        kinds = {429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Served:
    """What is served, and what one request may ask of it."""

    name: str
    tokenizer: Tokenizer
    branches: int
    length: int  # slots of a row of the cache
    unit: int  # of them, those of a stem of a prompt
    page: int
    own_pages: bool  # whether a branch has some of it to itself
    alternatives: int
    most_prompts: int
    since: int = field(default_factory=lambda: int(time.time()))

    def needed(self, prompt: Sequence[int], n: int, most: int) -> int:
        """Slots that n texts of at most so many tokens take, with their prompt."""
        return needed_for(len(prompt), [0] * branches(n), most, self.unit, self.page, self.own_pages)

    def describe(self) -> dict:
        about = {"id": self.name, "object": "model", "created": self.since, "owned_by": "lab"}
        return about | {"max_model_len": self.length}


@dataclass(frozen=True)
class Completion:
    """A request that is valid as far as can be said without the engine."""

    prompts: Sequence[Sequence[int]]  # tokens
    echoes: Sequence[str]  # of each prompt what its texts begin with
    asks: Sequence[Ask]
    n: int
    stream: bool
    usage: bool  # whether a stream ends with it
    logprobs: int | None


def parsed(body: bytes, served: Served) -> dict:
    """The fields of a body that are not null. Raises Refusal."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise Refusal("the body is no JSON object")
    given = {name: value for name, value in given.items() if value is not None}
    check_model(given.get("model", served.name), served)
    return given


def read(body: bytes, served: Served) -> Completion:
    """What a body asks. Raises Refusal."""
    given, tokenizer = parsed(body, served), served.tokenizer
    texts = prompts_of(given, served)
    prompts = [tokens_of(text, tokenizer) for text in texts]
    made = completion(given, served, prompts, () if tokenizer.eos is None else (tokenizer.eos,))
    if not typed("echo", given.get("echo", False), False):
        return made
    if made.logprobs is not None:
        raise Refusal("echo = true gives no logprobs of the prompt here; leave one of them out", param="echo")
    echoes = [text if isinstance(text, str) else tokenizer.decode(text) for text in texts]
    return dataclasses.replace(made, echoes=echoes)


def completion(given: dict, served: Served, prompts: Sequence[Sequence[int]], ends: Sequence[int]) -> Completion:
    """What these fields ask about prompts of tokens. ends: tokens that end a text. Raises Refusal."""
    found = {name: typed(name, given.get(name, default), default) for name, default in (DRAWN | OTHERS).items()}
    for name, values in NOTHING.items():
        values = (1, found["n"]) if name == "best_of" else values
        if name in given and given[name] not in values:
            raise Refusal(f"{name} = {shown(given[name])} is not supported here; leave it out", param=name)
    for name, least, most in (
        ("n", 1, served.branches),
        ("max_tokens", 1, served.length),
        ("logprobs", 0, served.alternatives),
    ):
        if found[name] is not None and not least <= found[name] <= most:
            raise Refusal(f"{name} = {shown(found[name])} is not valid; choose {least} to {most}", param=name)
    n, most = found["n"], found["max_tokens"]
    for prompt in prompts:
        needed = served.needed(prompt, n, most)
        if needed > served.length:
            raise Refusal(
                f"a prompt of {len(prompt)} tokens and {n} x {most} to generate need {needed} slots, and "
                f"{served.length} are there; choose a shorter prompt, a smaller n or fewer max_tokens",
                param="prompt",
                code="context_length_exceeded",
            )
    wanted = dict(
        branches=branches(n), sampling=drawn(found), stop=tuple(ends), most_tokens=most,
        alternatives=found["logprobs"] or 0,
    )  # fmt: skip
    stops = stops_of(given)
    return Completion(
        prompts=prompts,
        echoes=[""] * len(prompts),
        asks=[Ask(dict(prompt=prompt, stream=i, **wanted), stops) for i, prompt in enumerate(prompts)],
        n=n,
        stream=found["stream"],
        usage=usage_of(given),
        logprobs=found["logprobs"],
    )


def branches(n: int) -> int:
    """Of a request for n texts: one alone is no branch, but the prompt's own text."""
    return n if n > 1 else 0


def check_model(name, served: Served) -> None:
    """Raises Refusal for another model than the one that is served."""
    if name != served.name:
        message = f"the model {shown(name)} does not exist; choose {served.name!r}"
        raise Refusal(message, 404, param="model", code="model_not_found")


def typed(name: str, value, default):
    """A value of the field's type, or its default. Raises Refusal for one of another."""
    kind = TYPES[name] if default is None else type(default)
    if value is None:
        return None
    fits = isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise Refusal(f"{name} = {shown(value)} is no {kind.__name__}; the default is {default}", param=name)
    return value


def drawn(found: dict) -> Sampling:
    """How tokens are drawn. At temperature 0 filters change nothing, and clients give them all the same."""
    made = Sampling(**{name: found[name] for name in DRAWN})
    if made.seed is None:
        made = made._replace(seed=secrets.randbits(32))
    try:
        sampling.check(made if made.temperature else made._replace(temperature=1.0))
    except UserError as error:
        raise Refusal(str(error), param=str(error).split(" ")[0]) from None
    return made if made.temperature else Sampling(repetition_penalty=made.repetition_penalty, seed=made.seed)


def prompts_of(given: dict, served: Served) -> list[str | list[int]]:
    """Each a text, or tokens."""
    prompt = given.get("prompt")
    several = prompt if isinstance(prompt, list) and prompt and not is_tokens(prompt) else [prompt]
    if not all(isinstance(one, str) or is_tokens(one) for one in several):
        raise Refusal("prompt is none; give a text, a list of tokens, or a list of either", param="prompt")
    if len(several) > served.most_prompts:
        raise Refusal(f"{len(several)} prompts are too many; choose 1 to {served.most_prompts}", param="prompt")
    return several


def is_tokens(value) -> bool:
    whole = isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
    return whole and len(value) > 0


def tokens_of(text: str | list[int], tokenizer: Tokenizer) -> list[int]:
    """Behind the token that begins texts; of tokens that are given these alone."""
    if not isinstance(text, str):
        unknown = [token for token in text if not 0 <= token < tokenizer.size]
        if unknown:
            raise Refusal(f"token {shown(unknown[0])} is none; choose 0 to {tokenizer.size - 1}", param="prompt")
        return text
    try:
        tokens = tokenizer.encode(text).tolist()
    except (UserError, ValueError, OverflowError) as error:
        raise Refusal(f"the tokenizer {tokenizer.name!r} cannot read the prompt: {error}", param="prompt") from None
    return ([] if tokenizer.bos is None else [tokenizer.bos]) + tokens


def stops_of(given: dict) -> tuple[str, ...]:
    stop = given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise Refusal(
            f"stop = {shown(stop)} is not valid; choose a text, or a list of at most {MOST_STOPS}, none of them empty",
            param="stop",
        )
    return tuple(stops)


def usage_of(given: dict) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or not isinstance(options.get("include_usage") or False, bool):
        raise Refusal('stream_options is not valid; choose {"include_usage": true}', param="stream_options")
    return bool(options.get("include_usage"))


class Continuation:
    """One text of an answer, as it grows. Tokens are told with the text that they are in."""

    def __init__(self):
        self.text, self.ended, self.tokens = "", "", 0
        self.waiting: list[tuple[Event, int]] = []

    def add(self, passage: Passage) -> list[tuple[Event, int]]:
        """The tokens that can be told now, and where in the text they begin."""
        self.text, self.ended, event = self.text + passage.text, passage.ended, passage.event
        if event.token is not None:
            self.waiting.append((event, passage.begins))
            self.tokens += 1
        whole = self.ended and event.ended == self.ended  # it ends by itself, not before a stop string
        told = [held for held in self.waiting if whole or held[1] < len(self.text)]
        self.waiting = self.waiting[len(told) :]
        return told


class Reply:
    """The answer to a request: objects that are to be written as JSON."""

    prefix, kind, kind_of_chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, asked: Completion, served: Served):
        self.asked, self.served = asked, served
        self.texts = [Continuation() for _ in asked.prompts for _ in range(asked.n)]
        self.begun = [False] * len(self.texts)
        self.about = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.kind_of_chunk if asked.stream else self.kind,
            "created": int(time.time()),
            "model": served.name,
        }

    @property
    def finished(self) -> bool:
        return all(text.ended for text in self.texts)

    def add(self, passages: Sequence[Passage]) -> list[dict]:
        """The choices of what is new, one for each text that goes on."""
        pieces: dict[int, list] = {}
        for passage in passages:
            index = passage.request * self.asked.n + passage.branch - 1
            piece = pieces.setdefault(index, ["", [], ""])
            piece[1] += self.texts[index].add(passage)
            piece[0], piece[2] = piece[0] + passage.text, passage.ended
        return [self.choice(index, *piece) for index, piece in pieces.items() if any(piece)]

    def choice(self, index: int, text: str, tokens: list, ended: str) -> dict:
        first, self.begun[index] = not self.begun[index], True
        logprobs = None if self.asked.logprobs is None else self.logprobs(tokens)
        about = {"index": index, "logprobs": logprobs, "finish_reason": ended or None}
        return about | self.content(text, index // self.asked.n, first)

    def content(self, text: str, prompt: int, first: bool) -> dict:
        """Of a choice, the text that is new; first: whether none was told before."""
        return {"text": (self.asked.echoes[prompt] if first else "") + text}

    def logprobs(self, tokens: list[tuple[Event, int]]) -> dict:
        tops = []
        for event, _ in tokens:
            top = {self.spelled(token): max(LEAST_LOG_P, log_p) for token, log_p in event.likeliest}
            tops.append(top | {self.spelled(event.token): max(LEAST_LOG_P, event.log_p)})
        return {
            "tokens": [self.spelled(event.token) for event, _ in tokens],
            "token_logprobs": [max(LEAST_LOG_P, event.log_p) for event, _ in tokens],
            "top_logprobs": tops,
            "text_offset": [begins for _, begins in tokens],
        }

    def spelled(self, token: int) -> str:
        """A token as text; by its number where it is none by itself."""
        text = spelled(token, self.served.tokenizer)
        return f"token_id:{token}" if not text or BROKEN in text else text

    def chunks(self, passages: Sequence[Passage]) -> list[dict]:
        """What a stream says of what is new."""
        usage = {"usage": None} if self.asked.usage else {}
        made = [self.about | {"choices": [choice]} | usage for choice in self.add(passages)]
        if self.asked.usage and self.finished:
            made.append(self.about | {"choices": [], "usage": self.usage()})
        return made

    def whole(self, passages: Sequence[Passage]) -> dict:
        """The answer at once, of all passages."""
        choices = sorted(self.add(passages), key=lambda choice: choice["index"])
        return self.about | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict:
        read, written = sum(map(len, self.asked.prompts)), sum(text.tokens for text in self.texts)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
