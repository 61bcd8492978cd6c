"""Answers of server-sent events, of which a number may be open at once."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse

from oar_scale.serve.api_errors import full
from oar_scale.serve.service import Service


def check_streams(service: Service) -> None:
    """Raises ApiError where as many as can be are open."""
    if service.streams >= service.limits.event_streams:
        raise full(f"{service.streams} event streams are open already")


def stream(lines: AsyncIterator[bytes], service: Service) -> StreamingResponse:
    """An answer of server-sent events, counted among the open ones."""

    async def counted() -> AsyncIterator[bytes]:
        service.streams += 1
        try:
            async for line in lines:
                yield line
        finally:
            service.streams -= 1

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(counted(), media_type="text/event-stream", headers=headers)
