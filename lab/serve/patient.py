"""Connections that nothing is asked over: uvicorn waits for the head of a request for ever, and this does not."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


class Patient(H11Protocol):
    """A connection that is cut when no request has come, and none has been answered, for longer than `patience`
    seconds, and before twice as many."""

    def __init__(self, patience: float, **server):
        super().__init__(**server)
        self.patience, self.before = patience, ()

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.next_look = self.loop.call_later(self.patience, self.look)

    def connection_lost(self, exc: Exception | None) -> None:
        self.next_look.cancel()
        super().connection_lost(exc)

    def look(self) -> None:
        """Cuts the connection if it waits, and has since the last look."""
        waits = self.cycle is None or self.cycle.response_complete or self.transport.is_closing()
        if waits and self.before == (self.cycle,):
            self.transport.abort()
            return
        self.before = (self.cycle,) if waits else ()  # that of another request: there was one meanwhile
        self.next_look = self.loop.call_later(self.patience, self.look)
