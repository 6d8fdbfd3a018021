"""A server on a tiny model of bytes in a thread of its own, and what the engine alone answers."""

import asyncio
import contextlib
import functools
import itertools
import queue
import signal
import socket
import threading
import time
from dataclasses import dataclass

import decoding
import openai
import tiny
import variants

from lab.data.tokenizers import Bytes
from lab.decode.engine import Engine
from lab.decode.sampling import Sampling
from lab.decode.text import Transcripts
from lab.serve import server
from lab.serve.app import app
from lab.serve.protocol import Served
from lab.serve.worker import Worker

SHAPE = dict(rows=2, length=384, branches=6, chunk=4, alternatives=3)
NAME, DEADLINE = "tiny", 60.0  # seconds in which anything has to happen


@functools.cache
def model():
    return tiny.model(variants.config("default", **decoding.ALONE, model__vocabulary=258))


def engine() -> Engine:
    return Engine(model(), **SHAPE)


@dataclass
class Running:
    worker: Worker
    server: server.Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @functools.cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE)

    def idle(self) -> bool:
        """Whether, after a while at most, no request is left, and every slot of the cache is free."""
        end = time.monotonic() + DEADLINE
        while (self.worker.going or self.worker.engine.busy) and time.monotonic() < end:
            time.sleep(0.01)
        told = queue.Queue()
        self.worker.commands.put(lambda: told.put(self.worker.engine.free_slots))
        held = self.worker.going or self.worker.stops or self.worker.transcripts.going or self.worker.engine.busy
        return not held and told.get(timeout=DEADLINE) == SHAPE["rows"] * SHAPE["length"]

    def stop(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)


def held_up(worker: Worker, steps: int = 2) -> list[tuple]:
    """After so many steps the worker takes none before it is told something, until it cancels what then is in the list:
    so a reader's going away comes in time."""
    step, cancel, taken, cancelled = worker.step, worker.engine.cancel, itertools.count(), []

    def patiently():
        end = time.monotonic() + DEADLINE
        while next(taken) >= steps and not cancelled and worker.commands.empty() and time.monotonic() < end:
            time.sleep(0.005)
        step()

    worker.step = patiently
    worker.engine.cancel = lambda *which: (cancelled.append(which), cancel(*which))
    return cancelled


def worker(most_waiting: int = 64, tokenizer: Bytes = Bytes()) -> Worker:  # noqa: B008  it does not change
    return Worker(engine(), tokenizer, most_waiting)


def served(worker: Worker) -> Served:
    engine = worker.engine
    return Served(
        NAME,
        worker.transcripts.tokenizer,
        engine.branches,
        engine.length,
        engine.unit,
        engine.page,
        engine.own_pages,
        engine.alternatives,
        worker.room,
    )


@contextlib.contextmanager
def running(patience: float = DEADLINE, grace: float = 0.0, backlog: int | None = None, **settings):
    """A server, until it is left. backlog: bytes that the system keeps of what it sends. settings: of `worker`."""
    made, place = worker(**settings), server.bound("127.0.0.1", 0)
    if backlog:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, backlog)
    process = server.Server(made, app(made, served(made), patience), grace, patience)
    thread = threading.Thread(target=lambda: asyncio.run(server.until_stopped(process, place, NAME)))
    port = place.getsockname()[1]
    thread.start()
    try:
        while not process.started:
            time.sleep(0.01)
        yield Running(made, process, port)
    finally:
        process.handle_exit(signal.SIGTERM, None)
        thread.join(DEADLINE)
    assert not thread.is_alive() and not made.is_alive()


def prompts(body: dict) -> list:
    prompt = body["prompt"]
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def asked(running: Running, body: dict) -> list[dict]:
    """What OpenAI's client gets: for each choice its text, why it ended, and the log probabilities of its tokens."""
    extra = {name: body[name] for name in ("top_k", "min_p", "repetition_penalty") if name in body}
    known = {name: value for name, value in body.items() if name not in extra}
    found = [dict(text="", ended="", log_p=[]) for _ in range(len(prompts(body)) * body.get("n", 1))]
    made = running.client.completions.create(model=NAME, extra_body=extra, **known)
    for chunk in made if body.get("stream") else [made]:
        for choice in chunk.choices:
            one = found[choice.index]
            assert not one["ended"]
            one["text"] += choice.text
            one["ended"] = choice.finish_reason or ""
            one["log_p"] += choice.logprobs.token_logprobs if choice.logprobs else []
    return found


def alone(body: dict, of: Engine | None = None) -> list[dict]:
    """The same of an engine of the same shape that has nothing else to do."""
    of, n, found = of or engine(), body.get("n", 1), []
    for place, one in enumerate(prompts(body)):
        tokens = list(one.encode()) if isinstance(one, str) else one
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        settings = {"temperature": 1.0} | {name: body[name] for name in names if name in body}
        if not settings["temperature"]:  # nothing is drawn
            settings = {name: settings[name] for name in ("repetition_penalty",) if name in settings}
        number = of.submit(
            tokens, branches=n if n > 1 else 0, sampling=Sampling(**settings), stop=[256], stream=place,
            most_tokens=body.get("max_tokens", 16), alternatives=body.get("logprobs") or 0,
        )  # fmt: skip
        stop = body.get("stop", [])
        transcripts = Transcripts(of, Bytes(), {number: [stop] if isinstance(stop, str) else stop})
        choices = [dict(text="", ended="", log_p=[]) for _ in range(n)]
        while of.busy:
            for passage in transcripts.step():
                choice = choices[passage.branch - 1]
                choice["text"], choice["ended"] = choice["text"] + passage.text, passage.ended
                cut = passage.ended == "stop" and passage.event.ended != "stop"  # before a stop string
                if passage.event.token is not None:
                    choice["log_p"].append((passage.begins, passage.event.log_p))
                if cut:  # of tokens that are no part of the text nothing is told
                    choice["log_p"] = [held for held in choice["log_p"] if held[0] < len(choice["text"])]
        for choice in choices:
            choice["log_p"] = [log_p for _, log_p in choice["log_p"]] if "logprobs" in body else []
            choice["text"] = (one if body.get("echo") else "") + choice["text"]
        found += choices
    return found
