"""What the browser talks to: the page, images by id, and what the model says of them as json.

Nothing here takes a path. An error is one line of json, ``{"error": "..."}``, with a status.
"""
from __future__ import annotations

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
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin"}
REMEMBERED = {"Cache-Control": "private, max-age=3600"}         # of addresses that carry the server's own token


def make_app(sight: Sight, images: Images, host: str = "127.0.0.1", data: str = "") -> ASGIApp:
    """The server for requests to ``host``, the name or address that it listens on; ``data`` names the data set."""
    token, smalls, under_way = secrets.token_hex(4), Recent(400), [0]

    def about(request: Request) -> Response:
        return JSONResponse({**sight.about(), "data": data, "images": len(images.by_name), "threshold": sight.threshold,
                             "iou": sight.iou, "token": token, "most_bytes": MOST_BYTES, "most_pixels": MOST_PIXELS,
                             "uploads": UPLOADS, "takes_uploads": images.channels in (1, 3)})

    def some(request: Request) -> Response:
        by_error = choice(request, "sort", ("name", "error")) == "error"
        order, done = sight.worst_first() if by_error else (images.by_name, 0)
        pages = max(1, -(-len(order) // PAGE))
        page = min(number(request, "page", int, 0), pages - 1)
        if page < 0:
            raise Refused(400, f"page is {page}; 0 to {pages - 1} are there")
        rows = [{**images.row(key), "errors": sight.errors.get(key), "looked_at": key in sight.errors}
                for key in order[page * PAGE:(page + 1) * PAGE]]
        return JSONResponse({"images": rows, "page": page, "pages": pages, "done": done, "of": len(order),
                             "uploads": [images.row(key) for key in images.uploads]})

    def neighbour(request: Request) -> Response:
        """The image before or after one, in the order of the list."""
        key, step = request.path_params["key"], number(request, "step", int, 1)
        order = images.by_name
        if choice(request, "sort", ("name", "error")) == "error":
            order, _ = sight.worst_first()
        order = [*images.uploads, *order]
        place = order.index(key) + step if key in order else 0
        return JSONResponse({"id": order[place] if 0 <= place < len(order) else None})

    def picture(request: Request) -> Response:
        shown = viewable(images.picture(request.path_params["key"]))
        if max(shown.size) > SHOWN:
            shown = shown.copy()
            shown.thumbnail((SHOWN, SHOWN))
        small = shown.width * shown.height <= 512 * 512
        return as_image(shown, "PNG" if small else "JPEG")

    def thumbnail(request: Request) -> Response:
        def make() -> Response:
            shown = viewable(images.picture(key, keep=False)).copy()
            shown.thumbnail((2 * SMALL, SMALL))
            return as_image(shown, "JPEG")

        key = request.path_params["key"]
        return smalls.get(key, make)

    def detections(request: Request) -> Response:
        return JSONResponse(sight.detections(request.path_params["key"]))

    def errors(request: Request) -> Response:
        threshold = number(request, "threshold", float, sight.threshold)
        if not 0 <= threshold <= 1:
            raise Refused(400, f"threshold is {threshold}; scores are between 0 and 1")
        return JSONResponse(sight.mistakes(request.path_params["key"], threshold))

    def query(request: Request) -> Response:
        return JSONResponse(sight.of_query(request.path_params["key"], request.path_params["query"]))

    def point(request: Request) -> Response:
        return JSONResponse(sight.of_point(request.path_params["key"], number(request, "x", float),
                                           number(request, "y", float)))

    async def upload(request: Request) -> Response:
        if under_way[0] >= AT_ONCE:
            raise Refused(429, f"{AT_ONCE} uploads are under way; try again when they are done")
        under_way[0] += 1
        try:
            content = await body(request, MOST_BYTES)
            return JSONResponse(images.row(await run_in_threadpool(images.upload, content)), 201)
        finally:
            under_way[0] -= 1

    key = "/api/images/{key}"
    routes = [Route(path, static(*file)) for path, file in FILES.items()]
    routes += [Route("/api/about", about), Route("/api/images", some), Route("/api/uploads", upload, methods=["POST"]),
               Route(f"{key}/neighbour", neighbour), Route(f"{key}/picture", picture),
               Route(f"{key}/thumbnail", thumbnail), Route(f"{key}/detections", detections),
               Route(f"{key}/errors", errors), Route(f"{key}/query/{{query:int}}", query), Route(f"{key}/point", point)]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(sight.stop)

    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={
        Refused: refused, HTTPException: no_such, ClientDisconnect: gone, Exception: failed})
    app.router.redirect_slashes = False
    return Guard(app, host)                     # around all of it, so that no answer goes without the headers


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


async def body(request: Request, most: int) -> bytes:
    """What is sent, as long as it is no more than ``most`` bytes; what comes behind them is never read."""
    too_large = Refused(413, f"the file is larger than {most / 1e6:g} MB, the limit of an upload; make it smaller first")
    said = request.headers.get("content-length", "0")
    if not said.isdecimal() or int(said) > most:
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
    return JSONResponse({"error": " ".join(message.split())}, status, {"Connection": "close"} if status == 413 else None)


class Guard:
    """Refuses what other pages in the same browser could ask for, and puts the headers on every answer.

    A page of elsewhere can have its name resolve to this machine, and would then be of the same origin (DNS rebinding);
    its requests carry its name as ``Host``. So a server on a loopback address answers to the names of that alone. One
    that was told to listen elsewhere answers to any numeric address, to the machine's own name and to what it was told.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.names, self.any_address = app, {"127.0.0.1", "localhost", "::1", host}, not is_loopback(host)
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
    return host == "localhost" or is_address(host) and ipaddress.ip_address(host).is_loopback
