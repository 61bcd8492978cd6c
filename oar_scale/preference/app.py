"""The ASGI application of a study: its page, and what the page speaks.

    GET  /                         the page; /static/ of oar serve, /static/study/ of this package
    GET  /api/study                -> {fingerprint, comparisons: of a whole session, checks}
    POST /api/session              {study, rater} -> where the rater is: {done, total, last, next: [{comparison, question, left, right}]}
    POST /api/answers              {study, rater, comparison, choice: left | right | tie, ms} -> the same
    POST /api/undo                 {study, rater, comparison} -> the same; the comparison is the ``last`` one
    GET  /api/pictures/HASH.png    a picture of the study

``rater`` is 32 random hex digits that the page has made. Each request names the study by its fingerprint, so that a page of yesterday's
study does not answer today's. Errors have the form of `oar serve`'s. Which arm drew a picture is in no answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp

from oar_scale import __version__
from oar_scale.preference.answers import Choice, Showing
from oar_scale.preference.sessions import Session, Sessions
from oar_scale.preference.study import Hash
from oar_scale.serve.api_errors import ApiError, add_handlers
from oar_scale.serve.guard import Access, Guard
from oar_scale.serve.limits import BodyLimits

STATIC = Path(__file__).parent / "static"
SHARED = Path(__file__).parents[1] / "serve" / "static"
"""Files that the page of ``oar serve`` has, too."""
LIMITS = BodyLimits(body_bytes=4096, bodies_bytes=1 << 20, body_s=30.0)


class Asked(BaseModel):
    """What every request of a rater says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    study: Annotated[str, Field(max_length=64)]
    rater: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class Undone(Asked):
    """An answer that is taken back."""

    comparison: Hash


class Answered(Asked):
    """A choice."""

    comparison: Hash
    choice: Choice
    ms: Annotated[int, Field(ge=0, le=2**53)]


class StudyInfo(BaseModel):
    """What the page says before it begins."""

    fingerprint: str
    comparisons: int
    checks: int


class Shown(BaseModel):
    """A comparison as the rater sees it."""

    comparison: str
    question: str
    left: str
    right: str


class SessionInfo(BaseModel):
    """Where a rater is."""

    done: int
    total: int
    last: str | None
    next: list[Shown]


def make_app(sessions: Sessions, pictures: Mapping[str, bytes], access: Access) -> ASGIApp:
    """The application.

    Args:
        pictures: PNG files by name.
    """
    app = FastAPI(title="oar study serve", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    add_handlers(app)
    app.include_router(_api(sessions, pictures))

    @app.head("/healthz")
    @app.get("/healthz")
    async def health() -> dict[str, bool]:
        return {"live": True}

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/static/study", StaticFiles(directory=STATIC))
    app.mount("/static", StaticFiles(directory=SHARED))
    return Guard(app, access, LIMITS)


def _api(sessions: Sessions, pictures: Mapping[str, bytes]) -> APIRouter:
    """The routes below ``/api``. Those that touch the database are plain functions, which FastAPI calls in threads."""
    api, study = APIRouter(prefix="/api"), sessions.study

    def check(asked: Asked) -> None:
        if asked.study != study.fingerprint:
            raise ApiError(409, "this page belongs to another study: load it again", param="study", code="other_study")

    def shown(showing: Showing) -> Shown:
        comparison = sessions.comparisons[showing.comparison]
        left, right = reversed(comparison.pictures) if showing.swapped else comparison.pictures
        return Shown(comparison=comparison.id, question=study.question_for(comparison), left=left, right=right)

    def told(session: Session) -> SessionInfo:
        return SessionInfo(done=session.done, total=session.total, last=session.last, next=[shown(each) for each in session.next])

    @api.get("/study")
    async def about() -> StudyInfo:
        return StudyInfo(fingerprint=study.fingerprint, comparisons=sessions.total, checks=len(study.checks))

    @api.post("/session")
    def session(asked: Asked) -> SessionInfo:
        check(asked)
        return told(sessions.at(asked.rater))

    @api.post("/answers")
    def answer(asked: Answered) -> SessionInfo:
        check(asked)
        return told(sessions.answer(asked.rater, asked.comparison, asked.choice, asked.ms))

    @api.post("/undo")
    def undo(asked: Undone) -> SessionInfo:
        check(asked)
        return told(sessions.undo(asked.rater, asked.comparison))

    @api.get("/pictures/{name}.png")
    async def picture(name: str) -> Response:
        if name not in pictures:
            raise ApiError(404, "there is no such picture", code="unknown_picture")
        return Response(pictures[name], media_type="image/png", headers={"Cache-Control": "private, max-age=86400, immutable"})

    return api
