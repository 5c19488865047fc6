"""The chat page at `/`: `add_page(app)` serves the files of `serve/page` beside the REST interface that they speak to.

The page is HTML, CSS and ES modules as they lie there: nothing is built, and nothing is loaded from elsewhere. Every
conversation is kept in the browser; the server holds nothing of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import Response

FOLDER = Path(__file__).resolve().parent / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# What a model says becomes part of the page. Should a mistake there ever let markup through, the browser still runs no
# script but the page's own files, makes no element of a text (trusted types), and sends nothing to another address.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked for again by its tag: a newer server is seen at once
}


Answer = Callable[[Request], Awaitable[Response]]


class PageFile(NamedTuple):
    body: bytes
    kind: str
    tag: str


def add_page(app: FastAPI) -> None:
    """Adds `/` and the files it loads, `/page/NAME`; see `page_routes`."""
    for path, answer in page_routes().items():
        app.router.add_route(path, answer, methods=["GET"], include_in_schema=False)


def page_routes() -> dict[str, Answer]:
    """What answers each path of the page, its files read once. Raises FileNotFoundError where they do not lie."""
    files = read_files(FOLDER)
    return {"/" if name == "index.html" else f"/page/{name}": _answer_with(file) for name, file in files.items()}


def _answer_with(file: PageFile) -> Answer:
    headers = HEADERS | {"ETag": file.tag}

    async def answer(request: Request) -> Response:
        known = request.headers.get("if-none-match", "").split(",")
        if file.tag in (tag.strip().removeprefix("W/") for tag in known):
            return Response(status_code=304, headers=headers)
        return Response(file.body, media_type=file.kind, headers=headers)

    return answer


def is_page(path: str) -> bool:
    """Whether a path is of the page, which needs no key: it holds nothing, and asks for the key itself."""
    return path == "/" or path.startswith("/page/")


def read_files(folder: Path) -> dict[str, PageFile]:
    """The files of the page by name. Raises FileNotFoundError where there is no page."""
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.suffix in KINDS}
    if "index.html" not in found:
        raise FileNotFoundError(f"the chat page is not in {folder}; check it out again, or leave it out with --no-web")
    return {
        name: PageFile(body, KINDS[Path(name).suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
        for name, body in found.items()
    }
