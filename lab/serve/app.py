"""Who is answered over HTTP: an ASGI application before a worker.

A request holds its place in the engine for as long as its client is there and reads: when it has gone, or has taken
nothing for a while, what goes on of it is cancelled.
"""

import asyncio
import json
import logging
from collections.abc import Coroutine

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lab.decode.text import Passage
from lab.errors import UserError
from lab.serve import chat, protocol
from lab.serve.chat import ChatReply
from lab.serve.protocol import Refusal, Reply, Served
from lab.serve.worker import Answer, Closing, Full, Worker

LARGEST = 4 * 2**20  # bytes of a body
PATIENCE = 30.0  # seconds in which a client has to send its request, or to read what was sent
STATUS = {UserError: 400, Full: 429, Closing: 503}  # of what the worker refuses


def app(worker: Worker, served: Served, patience: float = PATIENCE) -> Starlette:
    """The routes of what a worker serves."""

    async def health(request: Request) -> Response:
        well = worker.error is None and worker.deadline is None
        about = {"status": "ok" if well else "ending", "requests": len(worker.going), "rows": worker.engine.rows}
        return as_json(about, 200 if well else 503)

    async def models(request: Request) -> Response:
        return as_json({"object": "list", "data": [served.describe()]})

    async def model(request: Request) -> Response:
        protocol.check_model(request.path_params["name"], served)
        return as_json(served.describe())

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", Completions(worker, served, patience, protocol.read, Reply), methods=["POST"]),
            Route(
                "/v1/chat/completions", Completions(worker, served, patience, chat.read, ChatReply), methods=["POST"]
            ),
        ],
        exception_handlers={
            Refusal: refused,
            HTTPException: nowhere,
            ClientDisconnect: gone,
            Exception: failed,
        },
    )


async def refused(request: Request, error: Refusal) -> Response:
    return as_json(error.body, error.status)


async def nowhere(request: Request, error: HTTPException) -> Response:
    """No such path, or another method."""
    said = f"{request.method} {request.url.path}: {error.detail}; choose POST /v1/completions or GET /v1/models"
    return as_json(Refusal(said, error.status_code).body, error.status_code, error.headers)


async def gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)  # that nobody reads


async def failed(request: Request, error: Exception) -> Response:
    return await refused(request, Refusal(f"an error of the server: {error}", 500))


def as_json(value: dict, status: int = 200, headers=None) -> Response:
    return Response(json.dumps(value), status, headers, media_type="application/json")


class Completions:
    """POST of a body that `read` understands and a `reply` answers."""

    def __init__(self, worker: Worker, served: Served, patience: float, read, reply: type[Reply]):
        self.worker, self.served, self.patience, self.read, self.reply = worker, served, patience, read, reply

    async def __call__(self, scope, receive, send) -> None:
        try:
            async with asyncio.timeout(self.patience):
                body = await whole_body(Request(scope, receive))
        except TimeoutError:
            raise Refusal(f"the body did not come within {self.patience:g} seconds", 408) from None
        except asyncio.CancelledError:  # by the server, which ends and waits no longer
            raise Refusal("the server is shutting down", 503) from None
        asked = await asyncio.to_thread(self.read, body, self.served)
        reply, answer = self.reply(asked, self.served), self.worker.open(asked.asks)

        async def patiently(message) -> None:
            async with asyncio.timeout(self.patience):
                await send(message)

        told = streamed(reply, answer, patiently) if asked.stream else at_once(reply, answer, scope, receive, patiently)
        try:
            await while_there(receive, told)
        except TimeoutError:
            logging.warning("a client stopped reading: its request is cancelled")
        finally:
            self.worker.close(answer)


async def whole_body(request: Request) -> bytes:
    """The body. What is too long is read to its end, and not kept: else its sender would see no answer."""
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        pieces.append(piece if size <= LARGEST else b"")
    if size > LARGEST:
        raise Refusal(f"the body has more than {LARGEST} bytes", 413)
    return b"".join(pieces)


async def while_there(receive, work: Coroutine) -> None:
    """Does the work, but for what is left when the client goes away. After its body nothing comes but that it left."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def news(answer: Answer) -> list[Passage]:
    """What is new. Raises Refusal."""
    try:
        return await answer.take()
    except tuple(STATUS) as error:
        raise Refusal(str(error), next(status for kind, status in STATUS.items() if isinstance(error, kind))) from None
    except Exception as error:
        logging.error("the engine failed", exc_info=error)
        raise Refusal(f"an error of the server: {error}", 500) from None


async def at_once(reply: Reply, answer: Answer, scope, receive, send) -> None:
    passages, left = [], len(reply.texts)
    while left:
        new = await news(answer)
        passages += new
        left -= sum(bool(passage.ended) for passage in new)
    await as_json(reply.whole(passages))(scope, receive, send)


async def streamed(reply: Reply, answer: Answer, send) -> None:
    """Server-sent events. An error behind the first of them is one of them, and the last."""
    passages = await news(answer)  # it was taken in; maybe more is known already
    kind = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": kind})
    while True:
        said = [*map(json.dumps, reply.chunks(passages)), *(["[DONE]"] if reply.finished else [])]
        if said:
            await send({"type": "http.response.body", "body": as_events(said), "more_body": not reply.finished})
        if reply.finished:
            return
        try:
            passages = await news(answer)
        except Refusal as error:
            await send({"type": "http.response.body", "body": as_events([json.dumps(error.body)])})
            return


def as_events(said: list[str]) -> bytes:
    return "".join(f"data: {one}\n\n" for one in said).encode()
