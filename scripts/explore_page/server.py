"""What the browser talks to: the page, images by id, and what the model says of them as json.

Nothing here takes a path. An error is one line of json, ``{"error": "..."}``, with a status.
"""
from __future__ import annotations

import asyncio
import io
import ipaddress
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from detr.visualize import viewable

from .images import MOST_BYTES, MOST_PIXELS, UPLOADS, Images, Recent, Refused
from .sight import Sight

HERE = Path(__file__).resolve().parent
FILES = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"),
         "/page.js": ("page.js", "text/javascript"), "/draw.js": ("draw.js", "text/javascript"),
         "/icon.svg": ("icon.svg", "image/svg+xml")}
PAGE = 24                           # images of the list at a time
SHOWN = 2048                        # pixels of the long side of what the browser gets, at most
SMALL = 160
AT_ONCE = 3                         # uploads that may be under way
PATIENCE = 60.0                     # seconds that an upload may take to come
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin"}
REMEMBERED = {"Cache-Control": "private, max-age=3600"}         # of addresses that carry the server's own token


def make_app(sight: Sight, images: Images, host: str = "127.0.0.1", data: str = "") -> ASGIApp:
    """The server for requests to ``host``, the name or address that it listens on; ``data`` names the data set."""
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(sight.stop)

    app = Starlette(routes=[*(Route(path, static(*file)) for path, file in FILES.items()),
                            *Addresses(sight, images, data).routes()], lifespan=lifespan, exception_handlers={
        Refused: refused, HTTPException: no_such, ClientDisconnect: gone, Exception: failed})
    app.router.redirect_slashes = False
    return Guard(app, host)                     # around all of it, so that no answer goes without the headers


class Addresses:
    """What is said of a data set and its images at each address; ``data`` names the data set."""

    def __init__(self, sight: Sight, images: Images, data: str = "") -> None:
        self.sight, self.images, self.data = sight, images, data
        self.token, self._smalls, self._under_way = secrets.token_hex(4), Recent(400), 0

    def routes(self) -> list[Route]:
        """All addresses."""
        key = "/api/images/{key}"
        return [Route("/api/about", self.about), Route("/api/images", self.some),
                Route("/api/uploads", self.upload, methods=["POST"]), Route(f"{key}/neighbour", self.neighbour),
                Route(f"{key}/picture", self.picture), Route(f"{key}/thumbnail", self.thumbnail),
                Route(f"{key}/detections", self.detections), Route(f"{key}/errors", self.errors),
                Route(f"{key}/query/{{query:int}}", self.query), Route(f"{key}/point", self.point)]

    def about(self, request: Request) -> Response:
        """What the page has to know before it shows anything."""
        return JSONResponse({
            **self.sight.about(), "data": self.data, "images": len(self.images.by_name), "iou": self.sight.iou,
            "threshold": self.sight.threshold, "token": self.token, "most_bytes": MOST_BYTES, "most_pixels": MOST_PIXELS,
            "uploads": UPLOADS, "takes_uploads": self.images.channels in (1, 3)})

    def some(self, request: Request) -> Response:
        """A page of the list of images, by name or the worst first, and all uploads."""
        by_error = choice(request, "sort", ("name", "error")) == "error"
        order, known = self.sight.worst_first() if by_error else (self.images.by_name, dict(self.sight.errors))
        pages = max(1, -(-len(order) // PAGE))
        page = min(number(request, "page", int, 0), pages - 1)
        if page < 0:
            raise Refused(400, f"page is {page}; 0 to {pages - 1} are there")
        rows = [{**self.images.row(key), "errors": known.get(key), "looked_at": key in known}
                for key in order[page * PAGE:(page + 1) * PAGE]]
        return JSONResponse({"images": rows, "page": page, "pages": pages,
                             "done": len(known) if by_error else 0, "of": len(order),
                             "uploads": [self.images.row(key) for key in self.images.uploads]})

    def neighbour(self, request: Request) -> Response:
        """The image before or after one, in the order of the list."""
        key, step = request.path_params["key"], number(request, "step", int, 1)
        order = self.images.by_name
        if choice(request, "sort", ("name", "error")) == "error":
            order, _ = self.sight.worst_first()
        order = [*self.images.uploads, *order]
        place = order.index(key) + step if key in order else 0
        return JSONResponse({"id": order[place] if 0 <= place < len(order) else None})

    def picture(self, request: Request) -> Response:
        """An image as a browser can show it."""
        shown = viewable(self.images.picture(request.path_params["key"]))
        if max(shown.size) > SHOWN:
            shown = shown.copy()
            shown.thumbnail((SHOWN, SHOWN))
        small = shown.width * shown.height <= 512 * 512
        return as_image(shown, "PNG" if small else "JPEG")

    def thumbnail(self, request: Request) -> Response:
        """A small picture of an image."""
        def make() -> Response:
            shown = viewable(self.images.picture(key, keep=False)).copy()
            shown.thumbnail((2 * SMALL, SMALL))
            return as_image(shown, "JPEG")

        key = request.path_params["key"]
        return self._smalls.get(key, make)

    def detections(self, request: Request) -> Response:
        """``Sight.detections``."""
        return JSONResponse(self.sight.detections(request.path_params["key"]))

    def errors(self, request: Request) -> Response:
        """``Sight.mistakes``."""
        threshold = number(request, "threshold", float, self.sight.threshold)
        if not 0 <= threshold <= 1:
            raise Refused(400, f"threshold is {threshold}; scores are between 0 and 1")
        return JSONResponse(self.sight.mistakes(request.path_params["key"], threshold))

    def query(self, request: Request) -> Response:
        """``Sight.of_query``."""
        return JSONResponse(self.sight.of_query(request.path_params["key"], request.path_params["query"]))

    def point(self, request: Request) -> Response:
        """``Sight.of_point``."""
        return JSONResponse(self.sight.of_point(request.path_params["key"], number(request, "x", float),
                                                number(request, "y", float)))

    async def upload(self, request: Request) -> Response:
        """Keep an image, and say its id."""
        if self._under_way >= AT_ONCE:
            raise Refused(429, f"{AT_ONCE} uploads are under way; try again when they are done")
        self._under_way += 1
        try:
            content = await asyncio.wait_for(received(request, MOST_BYTES), PATIENCE)
            return JSONResponse(self.images.row(await run_in_threadpool(self.images.upload, content)), 201)
        except asyncio.TimeoutError:
            raise Refused(408, f"the file did not come within {PATIENCE:g} seconds; try again, or make it smaller "
                               f"first") from None
        finally:
            self._under_way -= 1


def as_image(picture: Image.Image, kind: str) -> Response:
    """A picture as a file that the browser may keep."""
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 88} if kind == "JPEG" else {"compress_level": 3}))
    return Response(file.getvalue(), media_type=f"image/{kind.lower()}", headers=REMEMBERED)


def static(name: str, kind: str) -> Callable[[Request], Response]:
    """One file of the page, and no other."""
    return lambda request: Response((HERE / name).read_bytes(), media_type=kind, headers={"Cache-Control": "no-cache"})


def number(request: Request, name: str, kind: Callable[[str], Any], default: Any = None) -> Any:
    """A number of the address, behind the question mark."""
    text = request.query_params.get(name)
    if text is None and default is not None:
        return default
    try:
        value = kind(text)                                                              # type: ignore[arg-type]
        if abs(value) < 1e9:                                                            # nor is it "nan"
            return value
    except (TypeError, ValueError):
        pass
    raise Refused(400, f"{name}={text}: a number is needed")


def choice(request: Request, name: str, options: tuple[str, ...]) -> str:
    """One word of ``options``, the first by default."""
    text = request.query_params.get(name, options[0])
    if text not in options:
        raise Refused(400, f"{name}={text}: one of {', '.join(options)} is needed")
    return text


async def received(request: Request, most: int) -> bytes:
    """What is sent, as long as it is no more than ``most`` bytes; what comes behind them is never read."""
    too_large = Refused(413, f"the file is larger than {most / 1e6:g} MB, the limit of an upload; make it smaller first")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > most:
        raise too_large
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise too_large
    if not content:
        raise Refused(400, "the file is empty")
    return bytes(content)


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return said(error.status, str(error))


async def no_such(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return said(error.status_code, {404: "there is nothing at this address", 405: "this address takes no such request"}
                .get(error.status_code, error.detail))


async def gone(request: Request, error: Exception) -> Response:
    return said(400, "the connection ended before the file did")


async def failed(request: Request, error: Exception) -> Response:
    return said(500, f"the server failed: {type(error).__name__}; its terminal says where")


def said(status: int, message: str) -> Response:
    """An error as one line."""
    return JSONResponse({"error": " ".join(message.split())}, status,
                        {"Connection": "close"} if status in (408, 413) else None)        # the rest of a file is not read


class Guard:
    """Refuses what other pages in the same browser could ask for, and puts the headers on every answer.

    A page of elsewhere can have its name resolve to this machine, and would then be of the same origin (DNS rebinding);
    its requests carry its name as ``Host``. So a server on a loopback address answers to the names of that alone. One
    that was told to listen elsewhere answers to any numeric address, to the machine's own name and to what it was told.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.any_address = app, not is_loopback(host)
        self.names = {"127.0.0.1", "localhost", "::1", host.lower().rstrip(".")}
        if self.any_address:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        wrong = self.objection(Request(scope))
        await (wrong or self.app)(scope, receive, with_headers)

    def objection(self, request: Request) -> Response | None:
        """What is wrong with where a request says it comes from and goes to."""
        host = request.headers.get("host", "")
        if not self.knows(host):
            return said(421, f"this server does not go by the name {host[:100]!r}; open it by the address it printed")
        origin = request.headers.get("origin")
        elsewhere = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if elsewhere and request.headers.get("sec-fetch-mode") != "navigate" \
                or origin is not None and urlsplit(origin).netloc != host:
            return said(403, "this request comes from another page; only the server's own page may ask")
        return None

    def knows(self, host: str) -> bool:
        """Whether ``Host`` names this server."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        return "@" not in host and (name in self.names or self.any_address and is_address(name))


def is_address(name: str) -> bool:
    """Whether ``name`` is numeric, which needs no resolving."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether other machines cannot reach ``host``."""
    return host.lower() == "localhost" or is_address(host) and ipaddress.ip_address(host).is_loopback
