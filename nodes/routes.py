"""The one question that the browser asks outside of a run: is the file that this workflow remembers here? Reads only."""

from __future__ import annotations

import asyncio

from aiohttp import web
from server import PromptServer

from .shared_file import opening_message

PATH = "/stepquant/v1/file"
LARGEST_QUESTION_BYTES = 100_000


def add_routes() -> None:
    """POST {the property a Load node kept} -> {"message": sentence or null}."""

    @PromptServer.instance.routes.post(PATH)
    async def answer(request: web.Request) -> web.Response:
        if (request.content_length or 0) > LARGEST_QUESTION_BYTES:
            return web.json_response({"error": "too long"}, status=413)
        try:
            known = await request.json()
        except ValueError:
            known = None
        if not isinstance(known, dict):
            return web.json_response({"error": "a JSON object is needed"}, status=400)
        return web.json_response({"message": await asyncio.to_thread(opening_message, known)})
