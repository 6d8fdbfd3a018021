"""Connections of a server: silent, slow and broken ones, at its end and where another has its port."""

import contextlib
import json
import socket
import time

import pytest
import serving
from serving import asked

from lab.errors import UserError
from lab.serve import server

SLOW = [  # what they send, and whether it is answered
    (b"", False),
    (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-", False),
    (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{", True),
]


def test_connections_over_which_nothing_is_asked_are_cut():
    """Silence, half a head, and a body that goes on letter by letter when it has been refused."""
    with serving.running(patience=0.3) as running:
        held = [socket.create_connection(("127.0.0.1", running.port)) for _ in SLOW]
        for one, (sent, _) in zip(held, SLOW, strict=True):
            one.sendall(sent)
        end = time.monotonic() + serving.DEADLINE
        while running.server.server_state.connections and time.monotonic() < end:
            with contextlib.suppress(ConnectionError):
                held[2].sendall(b" ")
            time.sleep(0.05)
        assert not running.server.server_state.connections
        for one in held:
            one.close()
        body = dict(prompt="ab", max_tokens=3, temperature=0)
        assert asked(running, body) == serving.alone(body)


def test_a_server_that_ends_answers_whoever_is_still_asking(caplog):
    """The body of a request does not come: the server waits no longer than its grace."""
    with serving.running(grace=0.0) as running, socket.create_connection(("127.0.0.1", running.port)) as held:
        held.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        while not running.server.server_state.tasks:
            time.sleep(0.01)
        running.stop()
        head, _, content = held.makefile("rb").read().partition(b"\r\n\r\n")
    assert int(head.split()[1]) == 503 and "is shutting down" in json.loads(content)["error"]["message"]
    assert "Traceback" not in caplog.text


def test_an_engine_that_fails_when_a_client_leaves_ends_the_server():
    with serving.running() as running:
        serving.held_up(running.worker)

        def broken(*which):
            raise RuntimeError("no memory")

        running.worker.engine.cancel = broken
        body = json.dumps(dict(prompt="ab", max_tokens=40, temperature=0)).encode()
        with socket.create_connection(("127.0.0.1", running.port)) as held:
            held.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            while not running.worker.going:
                time.sleep(0.005)
        running.worker.join(serving.DEADLINE)
        assert not running.worker.is_alive() and str(running.worker.error) == "no memory"


def test_two_servers_do_not_get_one_port():
    """The first is still compiling: nobody is answered yet."""
    refused = pytest.raises(UserError, match=r"cannot serve on port \d+ of 127.0.0.1: Address already in use")
    with server.bound("127.0.0.1", 0) as first, refused:
        server.bound("127.0.0.1", first.getsockname()[1])
