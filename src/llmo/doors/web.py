"""The chat page: static files read once, sent with headers that let nothing but themselves run or be reached."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.responses import Response

from llmo.errors import NotFoundError
from llmo.guard.access import require

_FOLDER = Path(__file__).parent / "pages"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No inline script or style, no other host, no frame around it; trusted-types: no text ever becomes HTML.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-cache",  # asked for again, and answered 304, so that an upgrade is seen at once
}


@dataclass(frozen=True, slots=True)
class Page:
    """A file as it is sent."""

    content: bytes
    kind: str
    etag: str


def pages() -> dict[str, Page]:
    """Every file of the chat page by its name."""
    found = {}
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            found[path.name] = Page(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def include_pages(app: FastAPI) -> None:
    """Add `/` and `/pages/{name}`: public, for there are no data in them; what they show needs a key."""
    files = pages()
    router = APIRouter(dependencies=[Depends(require("public"))], include_in_schema=False)

    @router.get("/")
    async def chat(request: Request) -> Response:
        """The chat page."""
        return _send(files["index.html"], request)

    @router.get("/pages/{name}")
    async def file(name: str, request: Request) -> Response:
        """One of the page's files."""
        if name not in files:
            raise NotFoundError(f"the chat page has no file '{name[:80]}'", hint="the page is at /")
        return _send(files[name], request)

    app.include_router(router)


def _send(page: Page, request: Request) -> Response:
    headers = {**HEADERS, "etag": page.etag}
    if request.headers.get("if-none-match") == page.etag:
        return Response(status_code=304, headers=headers)
    return Response(page.content, headers=headers, media_type=page.kind)
