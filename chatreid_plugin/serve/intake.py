"""How requests come in: from whom, how fast, and how many bytes of them are held at once."""

import asyncio
import ipaddress
import secrets
import socket
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from fastapi import Request
from starlette.requests import ClientDisconnect

from .bodies import RequestFault


# Of one request.
MOST_BYTES = 64 << 20
# Of all that are being sent, wait or are worked on.
MOST_BYTES_TOGETHER = 512 << 20
# For one body: 64 MB at 1 MB a second.
BODY_SECONDS = 60.0


class Gate:
    """Who may ask: whoever calls the server by a name of its own, is no page of another site, and has the key."""

    def __init__(self, names: Collection[str], key: str) -> None:
        """``names``: beside ``localhost`` and any IP address; ``key``: empty for none."""
        self.names = {"localhost", *(name.lower() for name in names)}
        self.key = key

    async def check_sender(self, request: Request) -> None:
        """Refuse what a web page sends: its site's name may be made to lead here, so that the browser sees no other.

        Raises:
            RequestFault: foreign Host (421) or Origin (403).
        """
        host = request.headers.get("host", "localhost")
        if not self._is_own(host):
            raise RequestFault(
                f"This server is not called {host!r}; use its IP address, or start it with --allowed-host NAME.", 421
            )
        origin = request.headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            raise RequestFault(f"Pages of {origin!r} may not ask this server.", 403)

    def _is_own(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.removesuffix(".") in self.names
        return True  # a name that is made to lead here is no address

    async def check_key(self, request: Request) -> None:
        """Refuse a request without the key.

        Raises:
            RequestFault: status 401.
        """
        shown = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.key and not secrets.compare_digest(shown.encode(), self.key.encode()):
            raise RequestFault("Wrong or missing key; send Authorization: Bearer KEY.", 401)


def list_own_names(host: str, *, is_local: bool) -> list[str]:
    """Return by what names a server that listens on ``host`` is called; ``is_local``: by this machine alone."""
    machine = socket.gethostname()
    # The long name may have to be asked for, and from this machine alone nobody needs it.
    long = [] if is_local else [socket.getfqdn()]
    return [host, machine, machine.partition(".")[0], *long]


class Intake:
    """Reads bodies, and holds them until their request is answered."""

    def __init__(self) -> None:
        self._held = 0

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncGenerator[bytearray]:
        """Give the body of a request; its bytes count until the context ends.

        Raises:
            RequestFault: no JSON (415), too long (413), too slow (408), cut off (499), or too much at once (503).
        """
        # Asking for JSON makes browsers ask first, so that no web page can reach a server on its reader's machine.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestFault("Send JSON, with Content-Type: application/json.", 415)
        content = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                await self._fill(content, request)
        except TimeoutError:
            self._held -= len(content)
            raise RequestFault(f"The body did not come within {BODY_SECONDS:g} s.", 408) from None
        except BaseException:
            self._held -= len(content)
            raise
        count = len(content)  # whoever reads it may empty it
        try:
            yield content
        finally:
            self._held -= count

    async def _fill(self, content: bytearray, request: Request) -> None:
        """Read a body to its end, though not kept if it is refused: a client that still sends hears no reason."""
        fault: RequestFault | None = None
        try:
            async for chunk in request.stream():
                if fault is not None:
                    continue
                if len(content) + len(chunk) > MOST_BYTES:
                    reason = f"The request has more than {MOST_BYTES} bytes; send fewer or smaller images."
                    fault = RequestFault(reason, 413)
                elif self._held + len(chunk) > MOST_BYTES_TOGETHER:
                    fault = RequestFault("The server holds as many requests as it can; try again later.", 503)
                else:
                    content += chunk
                    self._held += len(chunk)
                    continue
                self._held -= len(content)
                content.clear()
        except ClientDisconnect:
            raise make_gone() from None
        if fault is not None:
            raise fault


def make_gone() -> RequestFault:
    """Return the fault of a request whose client has closed the connection; nobody reads it."""
    return RequestFault("The client has gone.", 499)
