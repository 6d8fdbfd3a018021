"""Chat completions: the prompt is what the template makes of the messages, and the answer that of the engine alone."""

import dataclasses
import json
import pathlib

import openai
import pytest
import serving
from tokenizers import Tokenizer, models

from lab.data.chat import Chat
from lab.data.tokenizers import Bytes, Json
from lab.serve import chat
from lab.serve.protocol import Refusal, Served

TEMPLATE = "{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}<assistant>"


class Talking(Bytes):
    """Bytes that a chat template came with."""

    chat = Chat(TEMPLATE, pathlib.Path("chat_template.jinja"), {})
    ends = (256, 255)
    encode_chat = Bytes.encode


SERVED = Served(
    "tiny", Talking(), branches=3, length=256, unit=64, page=64, own_pages=False, alternatives=2, most_prompts=4
)
HELLO = [{"role": "user", "content": "ab"}]


def read(**body):
    return chat.read(json.dumps({"messages": HELLO} | body).encode(), SERVED)


def test_messages_become_a_prompt():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    talk = [{"role": "system", "content": "be"}, {"role": "user", "content": parts}]
    (ask,) = read(messages=talk).asks
    assert bytes(ask.settings["prompt"]) == b"<system>be<user>ab<assistant>" and ask.settings["stop"] == (256, 255)


@pytest.mark.parametrize(("n", "most"), [(1, 192), (2, 96), (3, 64)])
def test_an_answer_has_all_the_room_that_there_is(n, most):
    """A prompt of one page leaves three."""
    assert read(n=n).asks[0].settings["most_tokens"] == most
    assert read(n=n, max_tokens=5).asks[0].settings["most_tokens"] == 5
    assert read(n=n, max_completion_tokens=7, max_tokens=None).asks[0].settings["most_tokens"] == 7


@pytest.mark.parametrize(("body", "param", "says"), [
    ({"messages": None}, "messages", "messages is none; give a list of at least one"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages", "messages[0] = {'role': 'user', 'content': 1} is not"),
    ({"messages": HELLO * 99}, "prompt", "to generate need 896 slots, and 256 are there"),
    ({"top_logprobs": 1}, "top_logprobs", "top_logprobs = 1 means nothing without logprobs = true"),
    ({"logprobs": 1}, "logprobs", "logprobs = 1 is no bool"),
    ({"tools": [{}]}, "tools", "tools = [{}] is not supported here; leave it out"),
    ({"n": 9}, "n", "n = 9 is not valid; choose 1 to 3"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused(body, param, says):
    with pytest.raises(Refusal) as refused:
        read(**body)
    error = refused.value.body["error"]
    assert error["param"] == param and says in error["message"] and refused.value.status == 400


def test_half_a_letter_of_a_message_is_a_mistake():
    """Of a client that cuts a text within a letter beyond the first plane: JSON can say it, and UTF-8 cannot."""
    made = Json(Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).to_str())
    made.chat = Talking.chat
    with pytest.raises(Refusal, match="cannot write the messages") as refused:
        chat.read(json.dumps({"messages": [{"role": "user", "content": "a \ud83d"}]}).encode(),
                  dataclasses.replace(SERVED, tokenizer=made))  # fmt: skip
    assert refused.value.status == 400


def test_the_client_talks():
    body = dict(max_tokens=6, n=2, seed=4, temperature=0.9)
    expected = serving.alone(body | dict(prompt="<user>ab<assistant>", logprobs=2))
    with serving.running(tokenizer=Talking()) as running:
        ask = dict(model=serving.NAME, messages=HELLO, logprobs=True, top_logprobs=2, **body)
        create = running.client.chat.completions.create
        whole = create(**ask)
        found = [dict(text="", ended="", log_p=[]) for _ in range(2)]
        for chunk in create(**ask, stream=True):
            for choice in chunk.choices:
                one = found[choice.index]
                assert (choice.delta.role == "assistant") == (not one["text"] and not one["log_p"])
                one["text"], one["ended"] = one["text"] + choice.delta.content, choice.finish_reason or ""
                one["log_p"] += [told.logprob for told in choice.logprobs.content]
        assert running.idle()
    assert found == expected
    for choice, one in zip(whole.choices, expected, strict=True):
        assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", *told(one))
        for token in choice.logprobs.content:
            tops = {top.token: top.logprob for top in token.top_logprobs}
            assert len(token.top_logprobs) == 2 and tops.get(token.token, token.logprob) == token.logprob


def told(one: dict) -> tuple[str, str]:
    return one["text"], one["ended"]


def test_a_tokenizer_without_a_template_does_not_talk():
    with serving.running() as running, pytest.raises(openai.BadRequestError, match="ask /v1/completions"):
        running.client.chat.completions.create(model=serving.NAME, messages=HELLO)
