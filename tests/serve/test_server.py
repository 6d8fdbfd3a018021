"""A server, asked by OpenAI's own client: answers are those of the engine alone, mistakes are told, slots freed."""

import asyncio
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import commands
import openai
import pytest
import serving
import tiny
import variants
from serving import asked

from lab import generate, runtime
from lab.decode.text import Passage
from lab.errors import UserError
from lab.serve import protocol, server
from lab.serve.app import app, streamed
from lab.serve.worker import Answer


@pytest.fixture(scope="module")
def running():
    with serving.running() as made:
        yield made
        assert made.idle()


BODIES = [
    dict(prompt="ab", max_tokens=6, temperature=0),
    dict(prompt="ab", max_tokens=6, temperature=0, top_p=0.9, echo=True),
    dict(prompt="é", n=3, max_tokens=5, seed=3, logprobs=2),
    dict(prompt=["one", "two"], n=2, max_tokens=4, temperature=0.7, top_p=0.8, seed=1),
    dict(prompt=[[1, 2], [3]], max_tokens=4, seed=2, logprobs=0),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", BODIES, ids=str)
def test_an_answer_is_that_of_the_engine_alone(running, body, stream):
    assert asked(running, body | {"stream": stream}) == serving.alone(body)


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(running):
    body = dict(prompt="ab", max_tokens=8, temperature=0)
    (whole,) = asked(running, body)
    stop = whole["text"][3:5]
    (found,) = asked(running, body | {"stop": [stop, "never there"]})
    assert found["text"] == whole["text"][: whole["text"].index(stop)] and found["ended"] == "stop"


def test_what_is_drawn_depends_on_the_seed(running):
    first, again, other = (asked(running, dict(prompt="ab", max_tokens=20, seed=seed)) for seed in (1, 1, 2))
    unseeded = [asked(running, dict(prompt="ab", max_tokens=20)) for _ in range(2)]
    assert first == again != other and unseeded[0] != unseeded[1]


def test_usage_and_likely_tokens_are_told(running):
    body = dict(model=serving.NAME, prompt="abc", max_tokens=4, n=2, temperature=0, logprobs=2)
    made = running.client.completions.create(**body)
    tokens = sum(len(choice.logprobs.tokens) for choice in made.choices)
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (3, tokens, 3 + tokens)
    for choice in made.choices:
        told = choice.logprobs
        for token, log_p, top, offset in zip(
            told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True
        ):
            assert top[token] == log_p == max(top.values()) <= 0 and len(top) == 2  # greedy: it is the likeliest
            assert token.startswith("token_id:") or choice.text[offset:].startswith(token)
    *_, last = running.client.completions.create(**body, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == made.usage


def test_the_model_is_listed(running):
    assert [model.id for model in running.client.models.list()] == [serving.NAME]
    assert running.client.models.retrieve(serving.NAME).owned_by == "lab"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist; choose 'tiny'"):
        running.client.models.retrieve("other")
    with urllib.request.urlopen(f"{running.url}/health") as answer:
        assert json.load(answer) == {"status": "ok", "requests": 0, "rows": serving.SHAPE["rows"]}


@pytest.mark.parametrize(("body", "error", "says"), [
    (dict(model="other"), openai.NotFoundError, "'other' does not exist; choose 'tiny'"),
    (dict(n=7), openai.BadRequestError, "n = 7 is not valid; choose 1 to 6"),
    (dict(prompt="a" * 400), openai.BadRequestError, "a prompt of 400 tokens and 1 x 16 to generate need 512 slots"),
    (dict(prompt=""), openai.BadRequestError, "the prompt is empty"),
    (dict(stream=True, prompt=""), openai.BadRequestError, "the prompt is empty"),
])  # fmt: skip
def test_a_mistake_is_an_error_of_the_client(running, body, error, says):
    with pytest.raises(error) as refused:
        running.client.completions.create(**dict(model=serving.NAME, prompt="a") | body)
    assert says in refused.value.body["message"] and refused.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(("request_", "status"), [
    (b"GET /nowhere HTTP/1.1", 404),
    (b"GET /v1/completions HTTP/1.1", 405),
    (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\n\r\n{", 400),
    (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5000000\r\n\r\n" + b" " * 5_000_000, 413),
])  # fmt: skip
def test_other_requests_are_answered_in_the_same_shape(running, request_, status):
    with socket.create_connection(("127.0.0.1", running.port)) as held:
        head, _, body = request_.partition(b"\r\n\r\n")
        held.sendall(head + b"\r\nHost: x\r\nConnection: close\r\n\r\n" + body)
        head, _, content = held.makefile("rb").read().partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status and json.loads(content)["error"]["message"]


def test_more_requests_than_may_wait_are_refused():
    """Those that were taken in are answered."""
    with serving.running(most_waiting=1) as running:
        held = threading.Event()
        running.worker.commands.put(lambda: held.wait(serving.DEADLINE))  # the engine does not step meanwhile
        body = dict(model=serving.NAME, prompt="a", max_tokens=3, temperature=0)
        found = []
        threads = [threading.Thread(target=lambda: found.append(outcome(running, body))) for _ in range(6)]
        for thread in threads:
            thread.start()
        while running.worker.commands.qsize() < 6:
            time.sleep(0.01)
        held.set()
        for thread in threads:
            thread.join(serving.DEADLINE)
        assert sorted(found) == [1, 1, 1, 429, 429, 429] and running.idle()


def outcome(running, body: dict) -> int:
    """How many choices it has, or its status."""
    try:
        return len(running.client.completions.create(**body).choices)
    except openai.APIStatusError as error:
        return error.status_code


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slots(stream):
    body = json.dumps(dict(prompt="ab", n=3, max_tokens=40, stream=stream, temperature=0)).encode()
    with serving.running() as running:
        cancelled = serving.held_up(running.worker)
        with socket.create_connection(("127.0.0.1", running.port)) as held:
            held.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            while not running.worker.going:
                time.sleep(0.005)
        assert running.idle() and cancelled == [(0,)]


def test_a_client_that_stops_reading_frees_its_slots():
    """Of the stream it takes the beginning."""
    worker, sent = serving.worker(), []
    cancelled = serving.held_up(worker)
    worker.start()
    application = app(worker, serving.served(worker), patience=0.3)
    body = json.dumps(dict(prompt="ab", n=3, max_tokens=40, stream=True, temperature=0)).encode()

    async def exchange():
        came = asyncio.Queue()
        came.put_nowait({"type": "http.request", "body": body, "more_body": False})

        async def send(message):
            sent.append(message["type"])
            if len(sent) > 1:
                await asyncio.Event().wait()

        await asyncio.wait_for(application(scope("/v1/completions"), came.get, send), serving.DEADLINE)

    asyncio.run(exchange())
    assert sent == ["http.response.start", "http.response.body"]
    assert serving.Running(worker, None, 0).idle() and cancelled == [(0,)]
    worker.stop()


def test_what_is_told_before_a_stream_begins_is_in_it():
    """That a request was taken in, and what it generates, may be heard at once."""
    body, worker, sent = dict(prompt="ab", max_tokens=5, temperature=0), serving.worker(), []
    served = serving.served(worker)
    asked = protocol.read(json.dumps(body).encode(), served)

    async def send(message):
        sent.append(message.get("body", b""))

    async def exchange():
        answer = worker.open(asked.asks)
        worker.obey(wait=True)  # in this thread
        while worker.busy:
            worker.step()
        await asyncio.wait_for(streamed(protocol.Reply(asked, served), answer, send), serving.DEADLINE)

    asyncio.run(exchange())
    *chunks, done = b"".join(sent).decode().removesuffix("\n\n").split("\n\n")
    texts = [json.loads(chunk.removeprefix("data: "))["choices"][0]["text"] for chunk in chunks]
    assert ["".join(texts)] == [choice["text"] for choice in serving.alone(body)] and done == "data: [DONE]"


def test_of_what_is_refused_in_part_nothing_goes_on():
    worker = serving.worker()
    asked = protocol.read(json.dumps(dict(prompt=["a", ""])).encode(), serving.served(worker))

    async def exchange():
        answer = worker.open(asked.asks)
        worker.obey(wait=True)
        worker.step()  # tells of the end of the first
        assert not worker.busy and not worker.going
        with pytest.raises(UserError, match="the prompt is empty"):
            await asyncio.wait_for(answer.take(), serving.DEADLINE)

    asyncio.run(exchange())


def test_an_error_comes_after_what_was_told_before_it():
    async def exchange():
        answer, passage = Answer([]), Passage(0, 1, "a", "")
        for news in ([passage], ValueError("the end")):
            answer.take_in(news)
        assert await answer.take() == [passage]
        with pytest.raises(ValueError, match="the end"):
            await asyncio.wait_for(answer.take(), serving.DEADLINE)

    asyncio.run(exchange())


def scope(path: str) -> dict:
    return {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "http_version": "1.1"}


def test_a_body_that_does_not_come_is_refused():
    worker, sent = serving.worker(), []

    async def send(message):
        sent.append(message)

    application = app(worker, serving.served(worker), patience=0.05)
    asyncio.run(application(scope("/v1/completions"), asyncio.Event().wait, send))
    assert sent[0]["status"] == 408 and "did not come" in json.loads(sent[1]["body"])["error"]["message"]


def test_a_signal_ends_streams_with_a_reason():
    with serving.running(grace=0.0) as running:
        stepped = running.worker.step
        running.worker.step = lambda: (time.sleep(0.02), stepped())
        made = iter(running.client.completions.create(
            model=serving.NAME, prompt="ab", n=3, max_tokens=40, stream=True, logit_bias={}, temperature=0
        ))  # fmt: skip
        next(made)
        running.stop()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(made)
        with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):  # or on a connection that it had
            running.client.completions.create(model=serving.NAME, prompt="ab")


def test_a_signal_lets_requests_finish():
    with serving.running(grace=serving.DEADLINE) as running:
        stepped = running.worker.step
        running.worker.step = lambda: (time.sleep(0.02), stepped())
        body = dict(prompt="ab", max_tokens=20, temperature=0)
        made = running.client.completions.create(model=serving.NAME, stream=True, **body)
        pieces = [next(made).choices[0].text]
        running.stop()
        pieces += [chunk.choices[0].text for chunk in made]
        assert "".join(pieces) == serving.alone(body)[0]["text"]


def test_an_engine_that_fails_ends_the_server():
    with serving.running() as running:

        def broken():
            raise RuntimeError("no memory")

        running.worker.engine.step = broken
        with pytest.raises(openai.InternalServerError, match="an error of the server: no memory"):
            running.client.completions.create(model=serving.NAME, prompt="ab")
        end = time.monotonic() + serving.DEADLINE
        while running.worker.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
        assert not running.worker.is_alive() and str(running.worker.error) == "no memory"


@pytest.mark.parametrize(
    "flags",
    [("--serve", "70000"), ("--serve", "TAKEN"), *(("--serve", "8000", "--host", x) for x in ("no.such", "a..b"))],
)
def test_a_place_that_cannot_be_had_is_one_line(flags, monkeypatch):
    monkeypatch.setattr(runtime, "start_alone", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        with pytest.raises(UserError, match=r"cannot serve on port \d+ of \S+: .*; choose another port") as refused:
            generate.main(["somewhere", *(taken if flag == "TAKEN" else flag for flag in flags)])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("missing", ["uvicorn", "starlette"])
def test_the_extra_has_to_be_installed(missing, monkeypatch):
    monkeypatch.setattr(runtime, "start_alone", lambda: None)
    for name in ("lab.serve.server", "lab.serve.app"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("lab.serve.server", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == missing] + [missing]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"--serve needs {missing}[\w.]*: pip install -r requirements-serve.txt"):
        generate.main(["somewhere", "--serve", "0"])


@pytest.mark.slow
def test_the_command_serves_until_a_signal(tmp_path):
    made = variants.config("default", model__vocabulary=258, model__rule="own_branch")  # branches have own pages
    cell = tiny.saved(tmp_path / "cell", tiny.model(made), made)
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.generate", str(cell), "--serve", "0", "--length", "128"],
        cwd=commands.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        found = re.search(r"lab: serving (\S+) at (http://127\.0\.0\.1:\d+)/v1", lines[1])
        assert found[1] == pathlib.Path(cell).name
        with openai.OpenAI(base_url=f"{found[2]}/v1", api_key="none") as asking:
            assert asking.completions.create(model="cell", prompt="ab", max_tokens=2).choices[0].finish_reason
        process.send_signal(signal.SIGTERM)
        assert process.wait(serving.DEADLINE) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("shape", "says"), [
    (dict(rows=0), "an engine of rows = 0 holds nothing"),
    (dict(length=64), "length = 64 has no room for a prompt and what follows it; choose at least 128"),
])  # fmt: skip
def test_a_cache_that_holds_nothing_is_refused(shape, says):
    with pytest.raises(UserError, match=says):
        server.serve(serving.model(), serving.Bytes(), "tiny", None, **dict(rows=1, length=128, branches=1) | shape)
