"""How the server ends: what runs may end within the grace, and clients of what runs longer are told so."""

import asyncio
import contextlib
import socket
from types import FrameType

import uvicorn

from minipyramid.serve.app import Service

MORE_S = 5.0  # for the connections, after their requests have ended


class Server(uvicorn.Server):
    """uvicorn's, but it lets answers end that uvicorn would break off."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        # Longer than `_end_what_is_left` takes, for uvicorn cuts without an answer.
        config.timeout_graceful_shutdown = grace + 2 * MORE_S  # type: ignore[assignment]  # a float will do
        super().__init__(config)
        self.service, self.grace = service, grace
        self._end_at_once = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, the next one ends the grace."""
        if self.should_exit:
            self._end_at_once.set()
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and end when those that are there have ended, or the grace."""
        ending = asyncio.ensure_future(self._end_what_is_left())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_what_is_left(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._end_at_once.wait(), self.grace)
        self.service.end_all()
        await asyncio.sleep(MORE_S)
        self.force_exit = True  # a client that does not read keeps nobody waiting
