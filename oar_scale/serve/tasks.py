"""From what a client asks for to what the worker draws.

Settings (checked by pydantic) --plan--> Task --begin, on the worker's thread--> a Drawing for each image
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.generation.canvas import Shown
from oar_scale.generation.continuous import Drawing
from oar_scale.generation.editing import EditOptions, known_cells, known_first, noise_numbers
from oar_scale.generation.pretrained import Pretrained
from oar_scale.generation.settings import SampleSettings
from oar_scale.model.spec import ClassSpec, FeatureSpec, ModelSpec
from oar_scale.orders.policies import LateOrder, known, own_policy, policy
from oar_scale.serve.api_errors import bad_request
from oar_scale.serve.limits import Limits
from oar_scale.serve.requests import EditSettings, Settings
from oar_scale.serve.uploads import Upload, prepare
from oar_scale.tokenizers.prompts import Prompt

PromptKind = Literal["captions", "classes", "features"]


def prompt_kind(spec: ModelSpec) -> PromptKind:
    """What the model is conditioned on."""
    return "classes" if isinstance(spec.condition, ClassSpec) else "features" if isinstance(spec.condition, FeatureSpec) else "captions"


@dataclass(frozen=True)
class Task:
    """What a job draws, checked as far as can be without the model."""

    prompt: Prompt
    encoded: Tensor
    """The prompt as the model's encoder gives it, [1, ...]."""
    settings: SampleSettings
    order: str
    """An order policy."""
    seed: int
    count: int
    """Drawings: of the prompt, or of each picture."""
    uploads: tuple[Upload, ...] = ()
    shown: tuple[Shown, ...] = ()
    """Of the uploads."""
    options: EditOptions = field(default_factory=EditOptions)
    previews: int = 0
    """Of each image, while it is drawn."""

    @property
    def kind(self) -> Literal["sample", "edit"]:
        """What it is."""
        return "edit" if self.uploads else "sample"

    @property
    def images(self) -> int:
        """How many are drawn in all."""
        return self.count * max(1, len(self.uploads))

    @property
    def numbers(self) -> list[int]:
        """Of the images: with the seed, all their noise depends on them. As those of ``model.sample`` and ``model.edit``."""
        if not self.uploads:
            return list(range(self.count))
        return [int(number) for number in noise_numbers(np.arange(len(self.uploads)), self.count)]


class Planner:
    """Turns requests into tasks. What it does takes time (pictures are decoded), but no network runs."""

    def __init__(self, drawer: Pretrained, limits: Limits, orders: Sequence[str]) -> None:
        """``orders`` are the policies that the model can follow."""
        self.drawer, self.limits, self.orders = drawer, limits, orders
        assert drawer.vq is not None, "the server checks it"
        self.size = drawer.vq.spec.image_size
        self.default_order = drawer.defaults.order or own_policy(drawer.model)

    def sample(self, ask: Settings, count: int, previews: int) -> Task:
        """A task that draws from a prompt. Raises ApiError and UserError for what cannot be."""
        prompt, encoded = self._prompt(ask)
        self._check_count(count)
        seed = secrets.randbelow(2**32) if ask.seed is None else ask.seed
        return Task(prompt, encoded, self._settings(ask), ask.order or self.default_order, seed, count, previews=previews)

    def edit(self, ask: EditSettings, uploads: Sequence[Upload], count: int, previews: int) -> Task:
        """A task that draws parts of pictures. Raises as :meth:`sample`."""
        if self.drawer.model.spec.layout == "raster":
            raise bad_request("this model draws in raster order, whatever is known: it cannot edit", "image")
        self._check_count(count * len(uploads))
        plain = self.sample(ask, count, previews)
        shown = tuple(prepare(upload, hide=ask.strength == 1) for upload in uploads)
        options = EditOptions(count, ask.strength, feather=ask.feather)
        return replace(plain, uploads=tuple(uploads), shown=shown, options=options)

    def _prompt(self, ask: Settings) -> tuple[Prompt, Tensor]:
        asked, wanted = ask.prompt, prompt_kind(self.drawer.model.spec)
        if wanted == "captions":
            if not isinstance(asked, str):
                raise bad_request("prompt must be a caption: this model draws from text", "prompt")
            if not asked.strip():
                raise bad_request("prompt is empty", "prompt")
            if len(asked) > self.limits.prompt_characters:
                raise bad_request(f"prompt has {len(asked)} characters, the limit is {self.limits.prompt_characters}", "prompt")
        elif wanted == "features" and not isinstance(asked, list):
            raise bad_request("prompt must be the features of a caption, a list of numbers for each of its rows", "prompt")
        try:
            prompt = np.asarray(asked) if isinstance(asked, list) else asked
            return prompt, self.drawer.encode([prompt])
        except UserError as error:
            raise bad_request(f"prompt: {error}", "prompt") from error
        except ValueError as error:
            raise bad_request("prompt: all rows of features must have the same length", "prompt") from error

    def _settings(self, ask: Settings) -> SampleSettings:
        if ask.order is not None and ask.order not in self.orders:
            raise bad_request(f"order {ask.order!r}: this model can follow: {', '.join(self.orders)}", "order")
        try:
            return self.drawer.settings(**ask.choices())
        except ValueError as error:
            text = str(error)
            raise bad_request(text, next((name for name in type(ask).model_fields if text.startswith(name + " ")), None)) from error

    def _check_count(self, images: int) -> None:
        if images > self.limits.images_per_request:
            raise bad_request(f"{images} images are too many for one request, the limit is {self.limits.images_per_request}", "n")


@dataclass(frozen=True)
class Start:
    """One image before its first cell is drawn."""

    drawing: Drawing
    known: list[int]
    """Cells that are known, in the order in which the model is shown them."""
    codes: list[int]
    """Theirs."""


@torch.no_grad()
def begin(drawer: Pretrained, task: Task) -> list[Start]:
    """Where each image of a task starts: its condition and order, and what is known of it. The image tokenizer and the model run."""
    assert drawer.vq is not None, "the server checks it"
    condition_TD = drawer.condition(task.encoded)[0]
    seen = [known_cells(drawer.model, drawer.vq, shown, condition_TD, task.options) for shown in task.shown]
    # Of all images at once: what a policy reads for it, such as an order head and the weights file that it belongs to, may be large.
    known_BN = torch.stack([codes.known_N for codes in seen for _ in range(task.count)]) if seen else None
    orders = drawer.orders(task.order, np.array(task.numbers), task.seed, task.settings.steps, known_BN)
    starts = []
    for row, number in enumerate(task.numbers):
        image, known = slice(row, row + 1), None
        order = orders.part(image) if isinstance(orders, LateOrder) else None if orders is None else orders[image]
        if seen:
            codes_N, known_N = seen[row // task.count]
            cells_1K, codes_1K = known_first(codes_N[None], known_N[None], order if isinstance(order, Tensor) else None)
            known = cells_1K[0], codes_1K[0]
        drawing = Drawing(
            condition_TD=condition_TD,
            settings=task.settings,
            seed=task.seed,
            number=number,
            order=order[0] if isinstance(order, Tensor) else order,
            known=known,
        )
        cells, codes = ([], []) if known is None else (each.tolist() for each in known)
        starts.append(Start(drawing, cells, codes))
    return starts


def usable_orders(drawer: Pretrained) -> list[str]:
    """The order policies that this model can draw by: what one of them needs may not be there."""
    if drawer.model.spec.layout == "raster":
        return ["raster"]
    usable, request = [], drawer.order_request(np.zeros(1, dtype=np.int64), 0)
    for name in known():
        with suppress(UserError):
            policy(name).check_sampling(request)
            usable.append(name)
    return usable
