"""The ASGI application around one served model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp

from oar_scale import __version__
from oar_scale.serve.api_errors import add_handlers
from oar_scale.serve.guard import Access, Guard
from oar_scale.serve.openai_api import add_openai
from oar_scale.serve.page_api import add_page
from oar_scale.serve.service import Service


def make_app(service: Service, access: Access) -> ASGIApp:
    """The application. FastAPI's pages of documentation load scripts from elsewhere, so there are none; /openapi.json is there."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(title="oar serve", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    add_handlers(app)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["operation"])
    async def health() -> JSONResponse:
        """Whether the server works, and takes jobs; 503 where it does not."""
        live, ready = service.worker.alive, service.worker.alive and not service.stopping
        return JSONResponse({"live": live, "ready": ready}, 200 if ready else 503)

    @app.head("/healthz/live", include_in_schema=False)
    @app.get("/healthz/live", tags=["operation"])
    async def is_live() -> JSONResponse:
        """Whether the server works; where it does not, it has to be started again."""
        return JSONResponse({"live": service.worker.alive}, 200 if service.worker.alive else 503)

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    add_openai(app, service)
    add_page(app, service)
    return Guard(app, access, service.limits, lambda path, status: service.metrics.requests.labels(path, str(status)).inc())
