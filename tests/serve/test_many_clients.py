"""Random requests of clients that read, leave, stall and send garbage: those that read get what the engine alone gives,
and when all have gone every slot is free."""

import collections
import concurrent.futures
import contextlib
import json
import random
import socket
import struct

import hostile
import numpy as np
import pytest
import serving

LETTERS = "abcdef é€😀\n"
FEW = 4096  # bytes that the system keeps for a reader that reads none


def drawn(chance: random.Random) -> dict:
    """A request that is valid."""
    text = lambda: "".join(chance.choices(LETTERS, k=chance.randint(1, 9)))  # noqa: E731
    tokens = lambda: [chance.randrange(256) for _ in range(chance.randint(1, 9))]  # noqa: E731
    body = dict(
        prompt=chance.choice([text, tokens, lambda: [text(), text()], lambda: [tokens()]])(),
        n=chance.randint(1, 3),
        max_tokens=chance.randint(1, 12),
        stream=chance.random() < 0.5,
    )
    if chance.random() < 0.3:
        body["temperature"] = 0
    else:
        body |= dict(seed=chance.randrange(2**32), temperature=chance.choice([0.5, 1.0, 3.0]))
        body |= chance.choice([{}, dict(top_p=0.9), dict(top_k=5), dict(min_p=0.1), dict(repetition_penalty=1.3)])
    if chance.random() < 0.3:
        body["stop"] = chance.choice(["a", ["e", "\x80", " "], [chr(chance.randrange(128)) for _ in range(9)]])
    if chance.random() < 0.3:
        body["logprobs"] = chance.randint(0, 3)
    elif isinstance(body["prompt"], str) and chance.random() < 0.3:
        body["echo"] = True
    return body


def posted(body: bytes) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def connected(running) -> socket.socket:
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, FEW)
    held.settimeout(serving.DEADLINE)
    held.connect(("127.0.0.1", running.port))
    return held


def leaves(running, chance: random.Random) -> str:
    """It goes away, mostly before the end: closes, or resets the connection."""
    body = drawn(chance) | dict(max_tokens=chance.randint(10, 25))
    request = posted(json.dumps(body).encode())
    with connected(running) as held:
        held.sendall(request if chance.random() < 0.7 else request[: chance.randrange(len(request))])
        if chance.random() < 0.5:
            held.settimeout(chance.random() / 5)
            with contextlib.suppress(TimeoutError):
                held.recv(chance.randrange(1, 400))
        if chance.random() < 0.5:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return "left"


def stalls(running, chance: random.Random, stalled: list[socket.socket]) -> str:
    """It reads nothing of what fills every buffer between it and the server, and stays."""
    body = dict(prompt="ab", n=3, max_tokens=40, stream=True, logprobs=3, temperature=0)
    stalled.append(connected(running))
    stalled[-1].sendall(posted(json.dumps(body).encode()))
    return "stalled"


def garbage(running, chance: random.Random) -> str:
    """It sends bytes that are no HTTP, or a damaged body, which is answered: as a mistake, or as what it still says."""
    ways = [
        hostile.flip,
        hostile.overwrite,
        hostile.cut,
        hostile.remove,
        hostile.insert,
        hostile.digit,
        hostile.replace,
    ]
    body = drawn(chance) | dict(stream=False)
    damaged = chance.choice(ways)(json.dumps(body).encode(), chance)
    request = posted(damaged) if chance.random() < 0.8 else chance.choice(ways)(posted(damaged), chance)
    whole = request == posted(damaged)
    with connected(running) as held:
        held.sendall(request.replace(b"Host: x", b"Host: x\r\nConnection: close", 1))
        if not whole:
            held.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):  # of what is no HTTP
            answer = held.makefile("rb").read()
    if not whole:
        return "garbage"
    head, _, content = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status < 500 and (b'"choices"' if status == 200 else b'"message"') in content
    return f"damaged, {status}"


def reads(running, chance: random.Random, answers: list) -> str:
    body = drawn(chance)
    answers.append((body, serving.asked(running, body)))
    return "read"


def check(count: int, seed: int) -> collections.Counter:
    """So many requests at once, as many as clients have threads."""
    chance, answers, stalled = random.Random(seed), [], []
    ways = [
        lambda chance: reads(running, chance, answers),
        lambda chance: leaves(running, chance),
        lambda chance: garbage(running, chance),
        lambda chance: stalls(running, chance, stalled),
    ]
    with serving.running(backlog=FEW) as running:
        with concurrent.futures.ThreadPoolExecutor(6) as clients:
            drawn_ways = chance.choices(ways, weights=(60, 20, 17, 3), k=count)
            found = [clients.submit(way, random.Random(chance.random())) for way in drawn_ways]
            did = collections.Counter(one.result() for one in found)
        assert running.idle()
        for one in stalled:
            one.close()
        engine = serving.engine()
        for body, answer in answers:
            assert answer == serving.alone(body, engine), body
        body = dict(prompt="ab", max_tokens=5, temperature=0)
        assert serving.asked(running, body) == serving.alone(body)
    return did


def test_clients_of_every_kind_leave_nothing_behind():
    did = check(40, int(np.random.default_rng().integers(2**32)))
    assert did["read"]


@pytest.mark.slow
def test_five_hundred_clients_leave_nothing_behind():
    seed = int(np.random.default_rng().integers(2**32))
    did = check(500, seed)
    print(f"\nseed {seed}: {dict(did)}")
    assert min(did["read"], did["left"], did["stalled"], did["garbage"], did["damaged, 400"]) > 0
