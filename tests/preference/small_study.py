"""A small study of three arms, and a server around it in this process."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from waiting import wait_until

from oar_scale.generation.picture_files import DrawingRecord, encode_png
from oar_scale.generation.settings import SampleSettings
from oar_scale.preference.answers import Answers
from oar_scale.preference.app import LIMITS, make_app
from oar_scale.preference.build import BuildRequest, build_study
from oar_scale.preference.sessions import Sessions
from oar_scale.preference.study import ANSWERS, Study, read_pictures, read_study
from oar_scale.serve.guard import Access
from oar_scale.serve.listening import HttpServer, listen

SIDE = 8
CAPTIONS = ["a red apple", "a smiling cat", "a blue car", "<b>two</b> green leaves", "\u05ea\u05e4\u05d5\u05d7 \u05d0\u05d3\u05d5\u05dd"]


def picture(*seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def record(prompt: str | int | None, number: int = 0, *, model: str = "a" * 16, seed: int = 0) -> DrawingRecord:
    settings = SampleSettings(guidance=1, temperature=1, top_k=0, order_temperature=0)
    return DrawingRecord(
        prompt=prompt, seed=seed, number=number, model=model, name="small", order="halton", settings=settings, grid=2, size=(SIDE, SIDE)
    )


def drawings(folder: Path, arm: int, captions: list[str] = CAPTIONS) -> str:
    """A folder as ``oar sample`` writes it."""
    folder.mkdir(parents=True)
    for number, caption in enumerate(captions):
        drawn = record(caption, number, model=f"{arm:016x}")
        (folder / f"{number:06d}.png").write_bytes(encode_png(picture(arm, number), drawn))
    return str(folder)


def small_study(folder: Path, names: tuple[str, ...] = ("ordered", "control", "raster"), **changes: Any) -> Study:
    """A study of these arms; its folder is ``folder / "study"``."""
    arms = [(name, drawings(folder / name, arm, changes.get("captions", CAPTIONS))) for arm, name in enumerate(names)]
    changes.pop("captions", None)
    return build_study(BuildRequest(arms=arms, out=str(folder / "study"), **changes), lambda text: None)


@dataclass
class ServedStudy:
    """A server that answers."""

    url: str
    study: Study
    sessions: Sessions
    answers: Answers

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)


@contextmanager
def served_study(folder: Path, *, token: str | None = None, port: int = 0) -> Iterator[ServedStudy]:
    """Serve a study until the end of the block."""
    study = read_study(str(folder))
    listener = listen("127.0.0.1", port)
    with closing(Answers(str(folder / ANSWERS), study.fingerprint)) as answers:
        sessions = Sessions(study, answers)
        server = HttpServer(make_app(sessions, read_pictures(str(folder), study), Access("127.0.0.1", token)), LIMITS)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            yield ServedStudy(f"http://127.0.0.1:{listener.getsockname()[1]}", study, sessions, answers)
        finally:
            server.should_exit = True
            thread.join(60)
            listener.close()
            assert not thread.is_alive(), "the server did not end"


def open_png(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def rater(number: int) -> str:
    return f"{number:032x}"
