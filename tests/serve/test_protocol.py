"""What a body asks, what is refused of it, and how what the engine tells becomes an answer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.data.tokenizers import Bytes
from lab.decode.engine import Event
from lab.decode.sampling import Sampling
from lab.decode.text import Transcripts
from lab.serve import protocol
from lab.serve.protocol import Refusal, Reply, Served

SERVED = Served(
    "tiny", Bytes(), branches=3, length=256, unit=64, page=64, own_pages=False, alternatives=2, most_prompts=4
)


def read(**body) -> protocol.Completion:
    return protocol.read(json.dumps({"prompt": "ab"} | body).encode(), SERVED)


@pytest.mark.parametrize(("body", "status", "param", "says"), [
    ({"model": "other"}, 404, "model", "'other' does not exist; choose 'tiny'"),
    ({"model": ["tiny"]}, 404, "model", "does not exist"),
    ({"prompt": None}, 400, "prompt", "prompt is none; give a text, a list of tokens, or a list of either"),
    ({"prompt": []}, 400, "prompt", "prompt is none"),
    ({"prompt": [True]}, 400, "prompt", "prompt is none"),
    ({"prompt": [1, "a"]}, 400, "prompt", "prompt is none"),
    ({"prompt": [258]}, 400, "prompt", "token 258 is none; choose 0 to 257"),
    ({"prompt": ["a"] * 5}, 400, "prompt", "5 prompts are too many; choose 1 to 4"),
    ({"prompt": "a" * 194}, 400, "prompt", "a prompt of 194 tokens and 1 x 16 to generate need 320 slots, and 256 are"),
    ({"max_tokens": 0}, 400, "max_tokens", "max_tokens = 0 is not valid; choose 1 to 256"),
    ({"max_tokens": 1.5}, 400, "max_tokens", "max_tokens = 1.5 is no int; the default is 16"),
    ({"n": 4}, 400, "n", "n = 4 is not valid; choose 1 to 3"),
    ({"n": True}, 400, "n", "n = True is no int"),
    ({"logprobs": 3}, 400, "logprobs", "logprobs = 3 is not valid; choose 0 to 2"),
    ({"logprobs": 1, "echo": True}, 400, "echo", "leave one of them out"),
    ({"stream": 1}, 400, "stream", "stream = 1 is no bool"),
    ({"temperature": "hot"}, 400, "temperature", "temperature = 'hot' is no float; the default is 1.0"),
    ({"temperature": float("nan")}, 400, "temperature", "temperature = nan is not valid; choose 0"),
    ({"temperature": 0, "top_p": 2}, 400, "top_p", "top_p = 2 is not valid; choose a number above 0 and at most 1"),
    ({"seed": -1}, 400, "seed", "seed = -1 is not valid; choose a whole number from 0 to 2**32 - 1"),
    ({"stop": ""}, 400, "stop", "stop = '' is not valid"),
    ({"stop": ["a"] * 17}, 400, "stop", "or a list of at most 16"),
    ({"stop": {}}, 400, "stop", "stop = {} is not valid"),
    ({"stream_options": 1}, 400, "stream_options", "stream_options is not valid"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "presence_penalty = 0.5 is not supported here"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "is not supported here; leave it out"),
    ({"best_of": 2}, 400, "best_of", "best_of = 2 is not supported here"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused(body, status, param, says):
    with pytest.raises(Refusal) as refused:
        read(**body)
    error = refused.value.body["error"]
    assert refused.value.status == status and error["param"] == param and says in error["message"]
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b'"a"', b"1" * 5000])
def test_bodies_that_are_no_objects_are_refused(body):
    with pytest.raises(Refusal, match="the body is no JSON") as refused:
        protocol.read(body, SERVED)
    assert refused.value.status == 400


def test_a_prompt_that_is_too_long_is_told_by_its_code():
    with pytest.raises(Refusal) as refused:
        read(prompt="a" * 194)
    assert refused.value.body["error"]["code"] == "context_length_exceeded"
    assert read(prompt="a" * 193).asks
    assert read(prompt="a" * 129, n=2, max_tokens=64).asks
    with pytest.raises(Refusal, match="2 x 65 to generate need 320 slots"):
        read(prompt="a" * 129, n=2, max_tokens=65)


def test_defaults_are_those_of_the_protocol():
    """Null means the default, and what is unknown or asks for nothing is left alone."""
    asked = read(
        n=None, stop=None, best_of=1, presence_penalty=0, logit_bias={}, suffix=None, user="me", unheard_of=[1], seed=5
    )
    assert asked == read(seed=5) and (asked.n, asked.stream, asked.logprobs, asked.echoes) == (1, False, None, [""])
    (ask,) = asked.asks
    assert ask.settings == dict(
        prompt=[97, 98], stream=0, branches=0, sampling=Sampling(temperature=1.0, seed=5), stop=(256,), most_tokens=16,
        alternatives=0,
    )  # fmt: skip


def test_filters_mean_nothing_where_nothing_is_drawn():
    (ask,) = read(temperature=0, top_p=0.5, top_k=3, repetition_penalty=1.5, seed=3).asks
    assert ask.settings["sampling"] == Sampling(repetition_penalty=1.5, seed=3)


def test_each_prompt_is_a_request_with_random_numbers_of_its_own():
    asked = read(prompt=["a", "b"], n=2, best_of=2, stop="x", echo=True)
    assert [(ask.settings["prompt"], ask.settings["stream"], ask.stops) for ask in asked.asks] == [
        ([97], 0, ("x",)), ([98], 1, ("x",)),
    ]  # fmt: skip
    assert asked.echoes == ["a", "b"] and read(prompt=[[97], [98]], echo=True).echoes == ["a", "b"]


class Scripted:
    """An engine that writes given tokens, one for each branch and step."""

    def __init__(self, texts: list[list[int]], last: str):
        self.events = [
            [Event(0, branch, token, last if i + 1 == len(text) else "", -1.0 - i, ((token, -1.0 - i), (0, -9.0)))]
            for branch, text in enumerate(texts, 1)
            for i, token in enumerate(text)
        ]
        self.cancelled = set()

    def step(self) -> list[Event]:
        events = self.events.pop(0)
        return [event for event in events if event.branch not in self.cancelled]

    def cancel(self, request: int, branch: int) -> None:
        self.cancelled.add(branch)


LETTERS = st.text(st.sampled_from("ab¢€😀"), min_size=1, max_size=8)


@given(st.lists(LETTERS, min_size=2, max_size=2), st.sampled_from(["", "b", "a¢", "€"]), st.data())
def test_tokens_are_told_with_their_text_however_it_is_cut(texts, stop, data):
    """Chunks put together are the whole answer; the bytes of its tokens are its text."""
    stops = [stop] if stop else []
    asked = read(n=2, logprobs=2, stop=stops, seed=1)
    engine = Scripted([list(text.encode()) for text in texts], "length")
    transcripts, passages = Transcripts(engine, Bytes(), [stops]), []
    while engine.events:
        passages += transcripts.step()
    whole = Reply(asked, SERVED).whole(passages)
    for choice, text in zip(whole["choices"], texts, strict=True):
        found = text.find(stop) if stop else -1
        expected = text[:found] if found >= 0 else text
        count = len(expected.encode())
        assert choice["text"] == expected and choice["finish_reason"] == ("stop" if found >= 0 else "length")
        assert choice["logprobs"]["token_logprobs"] == [-1.0 - i for i in range(count)]
        offsets = [at for at, letter in enumerate(expected) for _ in letter.encode()]
        assert choice["logprobs"]["text_offset"] == offsets
    reply, put = Reply(asked, SERVED), {0: [], 1: []}
    while passages:
        count = data.draw(st.integers(1, 5))
        for chunk in reply.chunks(passages[:count]):
            for choice in chunk["choices"]:
                put[choice["index"]].append(choice)
        passages = passages[count:]
    assert reply.finished
    for choice in whole["choices"]:
        pieces = put[choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [choice["finish_reason"]]
        for name, told in choice["logprobs"].items():
            assert [one for piece in pieces for one in piece["logprobs"][name]] == told


def test_what_no_json_can_hold_is_not_written():
    """A log probability of minus infinity, and a token that is no text."""
    reply = Reply(read(logprobs=1), SERVED)
    infinite = float("-inf")
    told = reply.logprobs([(Event(0, 1, 200, "", infinite, ((97, -0.5),)), 0)])
    assert told == {
        "tokens": ["token_id:200"],
        "token_logprobs": [-9999.0],
        "top_logprobs": [{"a": -0.5, "token_id:200": -9999.0}],
        "text_offset": [0],
    }
