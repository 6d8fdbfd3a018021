"""OpenAI's chat completions: messages that a chat template makes one prompt of, and a message in answer.

Source: OpenAI's API reference (Chat Completions). What is asked beside the messages is as of lab.serve.protocol.
"""

import bisect
import datetime

from lab.decode.engine import Event
from lab.errors import UserError, shown
from lab.serve.protocol import LEAST_LOG_P, Completion, Refusal, Reply, Served, completion, parsed, typed

NOTHING = {"tools": ([],), "functions": ([],), "response_format": ({"type": "text"},), "modalities": (["text"],)}


def read(body: bytes, served: Served) -> Completion:
    """What a body asks. Raises Refusal."""
    given, tokenizer = parsed(body, served), served.tokenizer
    if tokenizer.chat is None:
        raise Refusal(f"no chat template came with the tokenizer {tokenizer.name!r}; ask /v1/completions")
    for name, values in NOTHING.items():
        if name in given and given[name] not in values:
            raise Refusal(f"{name} = {shown(given[name])} is not supported here; leave it out", param=name)
    try:
        text = tokenizer.chat.talk(messages_of(given), datetime.datetime.now())
        prompt = tokenizer.encode_chat(text).tolist()
    except UserError as error:
        raise Refusal(str(error), param="messages") from None
    given["logprobs"] = likely(given)
    given["max_tokens"] = given.get("max_completion_tokens", given.get("max_tokens", room(prompt, given, served)))
    given = {name: value for name, value in given.items() if value is not None}
    return completion(given, served, [prompt], tokenizer.ends)


def messages_of(given: dict) -> list[dict[str, str]]:
    """Each with its role and its text, which may be given in parts."""
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal("messages is none; give a list of at least one", param="messages")
    return [message_of(one, i) for i, one in enumerate(messages)]


def message_of(message, place: int) -> dict[str, str]:
    if isinstance(message, dict) and isinstance(message.get("role"), str):
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            return {"role": message["role"], "content": "".join(part["text"] for part in parts)}
    raise Refusal(
        f"messages[{place}] = {shown(message)} is not valid; give a role, and a content that is a text",
        param="messages",
    )


def likely(given: dict) -> int | None:
    """Of how many of the likeliest tokens is told beside each; None: nothing is."""
    wanted = typed("logprobs", given.get("logprobs", False), False)
    count = typed("top_logprobs", given.get("top_logprobs", 0), 0)
    if count and not wanted:
        raise Refusal(f"top_logprobs = {count} means nothing without logprobs = true; set it", param="top_logprobs")
    return count if wanted else None


def room(prompt: list[int], given: dict, served: Served) -> int:
    """As many tokens as there is room for, at least one: what an answer may have where nothing is said."""
    n = min(max(typed("n", given.get("n", 1), 1), 1), served.branches)
    longest = range(1, served.length + 1)
    return max(bisect.bisect_right(longest, served.length, key=lambda most: served.needed(prompt, n, most)), 1)


class ChatReply(Reply):
    """The answer as a message, or as what is new of one."""

    prefix, kind, kind_of_chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def content(self, text: str, prompt: int, first: bool) -> dict:
        if not self.asked.stream:
            return {"message": {"role": "assistant", "content": text}}
        return {"delta": {"role": "assistant", "content": text} if first else {"content": text}}

    def logprobs(self, tokens: list[tuple[Event, int]]) -> dict:
        return {"content": [self.told(event) for event, _ in tokens]}

    def told(self, event: Event) -> dict:
        """A token, and others that were likely there."""
        tops = [self.token(token, log_p) for token, log_p in event.likeliest]
        return self.token(event.token, event.log_p) | {"top_logprobs": tops}

    def token(self, token: int, log_p: float) -> dict:
        return {"token": self.spelled(token), "logprob": max(LEAST_LOG_P, log_p), "bytes": None}
