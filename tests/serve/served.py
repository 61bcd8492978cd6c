"""A real server in this process: a small model, uvicorn in a thread, a free port of loopback."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import torch
from PIL import Image
from small_models import small_model
from waiting import wait_until

import oar_scale
from oar_scale.config.loading import dump_recipe
from oar_scale.config.schema import Recipe
from oar_scale.generation.pretrained import Pretrained
from oar_scale.model import save_model
from oar_scale.model.spec import ClassSpec, FeatureSpec, TextSpec
from oar_scale.serve.app import make_app
from oar_scale.serve.guard import Access
from oar_scale.serve.limits import Limits
from oar_scale.serve.listening import listen
from oar_scale.serve.server import Server
from oar_scale.serve.service import Service
from oar_scale.tokenizers.text import train_text_tokenizer
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, save_vq

SIDE, GRID, CODES = 12, 3, 7
CAPTIONS = ["a red apple", "a smiling cat", "a blue car", "two green leaves"]
CONDITIONS = {
    "captions": {"type": "sentencepiece", "max_tokens": 4},
    "classes": {"type": "labels", "classes": 10},
    "features": {"type": "features", "rows": 3, "width": 6},
}


def small_run(folder: Path, kind: str = "captions", layout: str = "instructed") -> str:
    """The folder of a run whose model draws 3 x 3 cells on 12 x 12 pixels."""
    recipe = {"name": "small", "data": {"image_size": SIDE}, "model": {"layout": layout}, "sample": {"guidance": 1.5, "top_k": 5}}
    tokenizer = {"image": {"multipliers": (1, 1, 1)}, "text": CONDITIONS[kind]}
    (folder / "models").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(Recipe.model_validate({**recipe, "tokenizer": tokenizer})))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": SIDE, "channels": 32, "multipliers": (1, 1, 1), "res_blocks": 1, "latent_channels": 32}
    save_vq(str(folder / "tokenizers" / "vq.safetensors"), VQTokenizer(VQSpec(**sizes, codebook_size=CODES, codebook_dim=4)))
    condition: Any = ClassSpec(classes=10) if kind == "classes" else FeatureSpec(rows=3, width=6)
    if kind == "captions":
        encoder = train_text_tokenizer(CAPTIONS, 64, 4)
        encoder.save(str(folder / "tokenizers" / "text.model"))
        condition = TextSpec(vocab=encoder.vocab_size, rows=4)
    name = "any_order" if layout == "raster" else "ordered"
    save_model(str(folder / "models" / f"{name}.safetensors"), small_model(condition=condition, layout=layout))
    return str(folder)


@dataclass
class Served:
    """A server that answers."""

    url: str
    service: Service
    server: Server
    token: str | None

    def http(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return httpx.Client(base_url=self.url, timeout=60, headers=headers, trust_env=False, **options)

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.token or "none", max_retries=0, timeout=60, http_client=httpx.Client(trust_env=False)
        )

    def idle(self) -> bool:
        """Whether nothing is drawn, and nothing waits."""
        worker = self.service.worker
        return not worker.busy and not worker.waiting and not worker.upload_bytes


@contextmanager
def served(drawer: Pretrained, *, slots: int = 4, token: str | None = None, **limits: Any) -> Iterator[Served]:
    """Serve a model until the end of the block."""
    service = Service(drawer, "small", slots, Limits(**limits))
    listener = listen("127.0.0.1", 0)
    app = make_app(service, Access("127.0.0.1", token))
    server = Server(app, service, lambda text: None)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", service, server, token)
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive(), "the server did not end"


def load(folder: Path, kind: str = "captions", layout: str = "instructed") -> Pretrained:
    return oar_scale.load(small_run(folder / "run", kind, layout))


@dataclass(frozen=True)
class Event:
    id: int
    kind: str
    data: dict[str, Any]


def read_events(response: httpx.Response) -> Iterator[Event]:
    """The server-sent events of an answer, as they come."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "event" in fields:
            yield Event(int(fields.get("id", -1)), fields["event"], json.loads(fields["data"]))
            fields = {}


def job_events(client: httpx.Client, name: str, after: int | None = None) -> list[Event]:
    """All events of a job, to its end."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    with client.stream("GET", f"/api/jobs/{name}/events", headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream"), response.read()
        return list(read_events(response))


def picture(width: int = SIDE, height: int = SIDE, seed: int = 0, channels: int = 3) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(1, 256, (height, width, channels), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def open_png(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def box_mask(box: tuple[int, int, int, int], size: tuple[int, int] = (SIDE, SIDE), *, openai: bool = False) -> Image.Image:
    """White in a box and black elsewhere; or, as at OpenAI, transparent in it and opaque elsewhere."""
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    if not openai:
        return mask
    page = Image.new("RGBA", size, "black")
    page.putalpha(mask.point(lambda value: 255 - value))
    return page
