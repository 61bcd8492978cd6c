"""``oar study serve``: takes the port, opens the answers, and shows pairs until it is told to stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from oar_scale.preference.answers import Answers
from oar_scale.preference.app import LIMITS, make_app
from oar_scale.preference.sessions import Sessions
from oar_scale.preference.study import ANSWERS, read_pictures, read_study
from oar_scale.serve.listening import HttpServer, access_to, address_of, allow_many_connections, listen
from oar_scale.storage import join


@dataclass(frozen=True, kw_only=True)
class StudyRequest:
    """What the command line says."""

    study: str
    host: str
    port: int
    """0: any that is free."""
    token: str | None


def serve_study(request: StudyRequest, say: Callable[[str], None]) -> None:
    """Serve a study until SIGTERM or Ctrl-C.

    Raises:
        UserError: the port is taken, an address without a token that others can reach, or a folder that holds no whole study.
    """
    access = access_to(request.host, request.token)
    with listen(request.host, request.port) as listener:
        study = read_study(request.study)
        pictures = read_pictures(request.study, study)
        path = join(request.study, ANSWERS)
        with closing(Answers(path, study.fingerprint)) as answers:
            sessions = Sessions(study, answers)
            app = make_app(sessions, pictures, access)
            allow_many_connections()
            counted = sum(answers.counts().values())
            already = f"; {counted} answers are there" if counted else ""
            say(
                f"study of {len(study.pairs)} pairs on {address_of(request.host, listener)}{already}; answers go to {path}; Ctrl-C stops it"
            )
            if access.token:
                say("raters open that address with #token=TOKEN behind it")
            HttpServer(app, LIMITS).run([listener])
