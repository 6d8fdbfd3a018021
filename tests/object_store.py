"""A server of object storage on this machine that speaks S3, and fails as often as it is told:

    python tests/object_store.py PORT SHARE SEED

Of the requests that fail, one half is not carried out, and one half is, and its answer is lost. The bucket `theirs` is
not ours. GET /counts tells the requests that were answered, and those that failed.
"""

import contextlib
import json
import pathlib
import random
import subprocess
import sys
import threading
import time
import urllib.request

BUCKET, THEIRS = "bucket", "theirs"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class Flaky:
    """A WSGI application before another one."""

    def __init__(self, application, share: float, seed: int):
        self._application, self._share = application, share
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._counts = {"requests": 0, "not carried out": 0, "answer lost": 0}

    def __call__(self, environ, start_response):
        if environ["PATH_INFO"] == "/counts":
            return self._answer(start_response, "200 OK", json.dumps(self._counts).encode())
        with self._lock:
            drawn = self._random.random()
            self._counts["requests"] += 1
            self._counts["not carried out"] += drawn < self._share / 2
            self._counts["answer lost"] += self._share / 2 <= drawn < self._share
        if drawn < self._share / 2:
            return self._answer(start_response, "503 Slow Down", b"")
        if environ["PATH_INFO"].split("/")[1] == THEIRS:
            return self._answer(start_response, "403 Forbidden", DENIED)
        if drawn < self._share:
            list(self._application(environ, lambda *answer: None))
            return self._answer(start_response, "500 Internal Server Error", b"")
        return self._application(environ, start_response)

    def _answer(self, start_response, status: str, body: bytes):
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


def serve(port: int, share: float, seed: int) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    flaky = Flaky(DomainDispatcherApplication(create_backend_app), share, seed)
    run_simple("127.0.0.1", port, flaky, threaded=True)


class Server:
    """A server in a process of its own, its bucket made. environment: what the lab finds it by."""

    def __init__(self, port: int, log: pathlib.Path):
        self.url, self._log = f"http://127.0.0.1:{port}", log
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def counts(self) -> dict[str, int]:
        with urllib.request.urlopen(f"{self.url}/counts", timeout=10) as answer:
            return json.loads(answer.read())


@contextlib.contextmanager
def running(port: int, share: float, seed: int, log: pathlib.Path):
    """A Server while the block runs."""
    server = Server(port, log)
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, __file__, str(port), str(share), str(seed)], stdout=out, stderr=out)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                server.counts()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.2)
        yield server
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    serve(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
