"""``oar study serve``: takes the study and the port, opens the answers, and shows pairs until it is told to stop."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import IO

from oar_scale.errors import UserError
from oar_scale.preference.answers import Answers
from oar_scale.preference.app import LIMITS, make_app
from oar_scale.preference.sessions import Sessions
from oar_scale.preference.study import ANSWERS, LOCK, read_pictures, read_study
from oar_scale.serve.listening import HttpServer, access_to, address_of, allow_many_connections, listen
from oar_scale.storage import join
from oar_scale.storage.own_folder import no_follow


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
        UserError: the port is taken, an address without a token that others can reach, a folder that holds no whole study, or one that
            another server serves.
    """
    access = access_to(request.host, request.token)
    study = read_study(request.study)
    with only_server(request.study), listen(request.host, request.port) as listener:
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


@contextmanager
def only_server(study: str) -> Iterator[None]:
    """Be the only server of a study's folder: of two, neither knows what the other shows at the moment. The lock ends with its process.

    Raises:
        UserError: another server has the folder, or it cannot be written to.
    """
    path = join(study, LOCK)
    with closing(_opened(path)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            server = file.readline(300).strip() or "another process"
            raise UserError(
                f"{study}: is being served already, by {server}. Stop that server, or serve a copy of the folder: oar study results counts "
                "the answers of both."
            ) from error
        except OSError as error:  # of a file system without locks
            raise UserError(f"{path}: cannot be locked ({error.strerror}). Serve the study from a disk of this machine.") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _opened(path: str) -> IO[str]:
    try:
        return open(path, "a+", encoding="utf-8", errors="replace", opener=no_follow)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. See whether its folder can be written to.") from error
