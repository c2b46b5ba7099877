"""The page at / and its two files: plain HTML, CSS and JavaScript, out of the package, with nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

_FOLDER = Path(__file__).with_name("page")
# Scripts and styles from here alone, none within the page: text that came in as markup would still do nothing.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


def routes() -> APIRouter:
    """GET / and what the page needs."""
    router = APIRouter()
    for path, (name, kind) in _FILES.items():
        router.add_api_route(path, _serving((_FOLDER / name).read_bytes(), kind), methods=["GET"])
    return router


def _serving(content: bytes, kind: str):  # type: ignore[no-untyped-def]
    async def serve() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=_HEADERS)

    return serve
