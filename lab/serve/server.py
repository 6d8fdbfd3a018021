"""The process that serves a checkpoint: its socket, its engine, and its end by a signal."""

import asyncio
import functools
import socket

import uvicorn
from starlette.applications import Starlette

from lab.data.tokenizers import Tokenizer
from lab.decode.engine import Engine
from lab.errors import UserError
from lab.serve.app import PATIENCE, app
from lab.serve.patient import Patient
from lab.serve.protocol import Served
from lab.serve.worker import Worker

WAITING = 64  # requests that wait for a row of the cache at most
ALTERNATIVES = 20  # of the likeliest tokens, for log probabilities
GRACE = 10.0  # seconds that requests have to finish after a signal
AFTER = 2  # further ones in which their last words are sent


def bound(host: str, port: int) -> socket.socket:
    """A socket with this address: who connects waits until it is served. Raises UserError where it cannot be had."""
    try:
        if not 0 <= port < 2**16:
            raise OverflowError("there is no such port")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen()  # else Linux gives the address to others that do not listen yet, too
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: of a name that can be none
        said = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot serve on port {port} of {host}: {said}; choose another port (0: any), or host"
        ) from None
    return made


def serve(
    model, tokenizer: Tokenizer, name: str, place: socket.socket, *, rows: int, length: int, branches: int
) -> None:
    """Answers until SIGINT or SIGTERM: then what goes on has some seconds to finish. A second signal ends at once.

    Raises UserError for a cache that holds nothing, and what the engine failed by.
    """
    alternatives = min(ALTERNATIVES, model.embedding.shape[0])
    engine = Engine(model, rows=rows, length=length, branches=branches, alternatives=alternatives)
    if engine.length < (least := 2 * engine.page):
        raise UserError(f"length = {length} has no room for a prompt and what follows it; choose at least {least}")
    worker = Worker(engine, tokenizer, WAITING)
    cache = dict(length=engine.length, unit=engine.unit, page=engine.page, own_pages=engine.own_pages)
    served = Served(name, tokenizer, branches, **cache, alternatives=alternatives, most_prompts=worker.room)
    server = Server(worker, app(worker, served))
    print(f"lab: compiling for {rows} rows of {engine.length} tokens and up to {branches} branches", flush=True)
    engine.submit([0, 0], most_tokens=1)
    while engine.busy:
        engine.step()
    asyncio.run(until_stopped(server, place, name))
    if worker.error:
        raise worker.error


async def until_stopped(server: "Server", place: socket.socket, name: str) -> None:
    host, port = place.getsockname()[:2]
    server.worker.start()
    print(f"lab: serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1; Ctrl-C ends it", flush=True)
    await server.serve(sockets=[place])
    await asyncio.to_thread(server.worker.stop)


class Server(uvicorn.Server):
    """uvicorn's, which tells the worker when it is to end, and ends when the worker fails."""

    def __init__(self, worker: Worker, application: Starlette, grace: float = GRACE, patience: float = PATIENCE):
        super().__init__(
            uvicorn.Config(
                application,
                http=functools.partial(Patient, patience),
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=int(grace) + AFTER,
            )
        )
        self.worker, self.grace = worker, grace
        worker.failed = self.leave

    def leave(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame) -> None:
        """uvicorn raises a signal that it keeps again at its end: this one is answered by ending well."""
        self.force_exit |= self.should_exit
        self.leave()
        self.worker.drain(0 if self.force_exit else self.grace)
