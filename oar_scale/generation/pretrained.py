"""A trained model with all it needs to draw: ``oar_scale.load``.

import oar_scale
model = oar_scale.load("exported/emoji")
for number, image in enumerate(model.sample(["a red apple", "a smiling cat"])):
    image.save(f"{number}.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oar_scale.config.schema import GuidanceSchedule
from oar_scale.data.images import to_rgb
from oar_scale.errors import UserError
from oar_scale.generation import editing
from oar_scale.generation.model_bundle import ModelBundle, check_codes, find_bundle
from oar_scale.generation.sampling import Generated, generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, check_prompts, load_model
from oar_scale.model.spec import ClassSpec, FeatureSpec, ModelSpec
from oar_scale.orders.policies import LateOrder, OrderRequest, sampling_order
from oar_scale.orders.selection import Images
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.prompts import (
    FeatureReader,
    LabelEncoder,
    Prompt,
    PromptEncoder,
    conditioning_inputs,
    for_new_prompts,
    load_prompts,
)
from oar_scale.tokenizers.vq import load_vq, pixels_to_unit, unit_to_pixels

DECODE_BATCH = 16
Order = str | Sequence[int] | Tensor
"""The way through the cells: the name of a policy (docs/order-policies.md), or a permutation [N] for all images or [B, N] for each."""


class Choices(TypedDict, total=False):
    """Settings that override those of the model's own recipe; see :class:`oar_scale.generation.settings.SampleSettings`."""

    guidance: float
    guidance_schedule: GuidanceSchedule
    guidance_start: float | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    order_temperature: float
    steps: int | None
    draft: int


class Pretrained:
    """``sample`` and ``inpaint`` give pictures, ``draw`` the codes with their orders.

    ``model``, ``vq`` (the image tokenizer) and ``text`` (the prompt encoder) are what ``bundle`` names, loaded; ``vq`` is None where
    only a model was loaded, ``text`` where nothing says how its captions are encoded. ``defaults`` holds the settings that
    :class:`Choices` replace.
    """

    def __init__(self, model: AnyOrderModel, vq: ImageTokenizer | None, text: PromptEncoder | None, bundle: ModelBundle) -> None:
        self.model, self.vq, self.text, self.bundle = model, vq, text, bundle
        self.defaults, self.where = bundle.sample, bundle.where

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move model and image tokenizer, in place. ``dtype`` is the model's; the image tokenizer, small beside it, keeps its float32."""
        self.model.to(device=device, dtype=dtype)
        if self.vq is not None:
            self.vq.to(device=device)
        return self

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int = 0,
        images: Sequence[int] | None = None,
        order: Order | None = None,
        **choices: Unpack[Choices],
    ) -> list[Image.Image]:
        """One picture for each prompt; the same seed, prompt and number give the same picture, whatever else is drawn with it.

        Args:
            prompts: captions, class labels, or arrays of features, as the model was trained.
            images: a number for each picture; default 0, 1, 2 ... Its noise depends on the seed and on this number alone.
            order: the way through the cells; None: as the recipe says, else the model chooses (a raster model: its raster).
            choices: settings other than the recipe's, see :class:`Choices`.

        Raises:
            UserError: there is no image tokenizer, or prompts of another kind than the model's.
            ValueError: as :func:`oar_scale.generation.sampling.generate`.
        """
        vq = self._tokenizer()
        return _pictures(vq, self.draw(prompts, seed=seed, images=images, order=order, **choices).codes_BN)

    def draw(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int = 0,
        images: Sequence[int] | None = None,
        order: Order | None = None,
        **choices: Unpack[Choices],
    ) -> Generated:
        """As :meth:`sample`, but return codes, orders, scores and passes."""
        condition_BTD = self._condition(prompts)
        images_B = np.arange(len(condition_BTD)) if images is None else np.asarray(images, dtype=np.int64)
        order_BN = self._order(order, images_B, seed)
        return generate(self.model, condition_BTD, self._settings(choices), seed, order_BN, images_B=images_B)

    def inpaint(
        self,
        image: Image.Image,
        box: tuple[int, int, int, int],
        prompt: Prompt,
        *,
        seed: int = 0,
        order: Order | None = None,
        **choices: Unpack[Choices],
    ) -> Image.Image:
        """The image with a box drawn anew. The rest comes back as the image tokenizer reconstructs it.

        Args:
            image: of any mode; it is made upright RGB on white (:mod:`oar_scale.data.images`), which ``box`` refers to.
            box: left, top, right, bottom in pixels, as Pillow counts them; every cell that it touches is redrawn.

        Raises:
            UserError: as :meth:`sample`; an image of another size than the model draws, or a box that is not inside it.
        """
        vq = self._tokenizer()
        size, cell = vq.spec.image_size, vq.spec.image_size // vq.spec.grid
        image = to_rgb(image, "the image")
        if image.size != (size, size):
            raise UserError(f"the image has {image.width} x {image.height} pixels, the model draws {size} x {size}: resize it first")
        left, top, right, bottom = box
        if not (0 <= left < right <= size and 0 <= top < bottom <= size):
            raise UserError(f"box {box} (left, top, right, bottom) does not lie inside {size} x {size} pixels")
        first_row, first_column, rows_end, columns_end = top // cell, left // cell, -(-bottom // cell), -(-right // cell)
        redo_N = editing.box_mask(vq.spec.grid, first_row, first_column, rows_end - first_row, columns_end - first_column)
        condition_BTD = self._condition([prompt])
        pixels_1HW3 = torch.from_numpy(np.array(image))[None]
        codes_1N = vq.encode(pixels_to_unit(pixels_1HW3).to(condition_BTD.device))
        drawn = editing.inpaint(
            self.model,
            codes_1N,
            redo_N.to(codes_1N.device),
            condition_BTD,
            self._settings(choices),
            seed,
            self._order(order, np.arange(1), seed),
        )
        return _pictures(vq, drawn.codes_BN)[0]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _settings(self, choices: Choices) -> SampleSettings:
        return replace(SampleSettings.from_recipe(self.defaults), **choices)

    def _tokenizer(self) -> ImageTokenizer:
        if self.vq is None:
            raise UserError(
                f"{self.where}: a model without an image tokenizer draws codes only (.draw). Export it from its run's folder, or import "
                "a tokenizer into its folder: oar checkpoint import llamagen-vq FILE --out FOLDER"
            )
        return self.vq

    @torch.no_grad()
    def _condition(self, prompts: Sequence[Prompt]) -> Tensor:
        if self.text is None:
            raise UserError(f"{self.where}: nobody knows what its captions are encoded with. Load its run's folder, or an export of that.")
        if isinstance(prompts, str) or not len(prompts):
            raise UserError("prompts are a list with one entry for each picture")
        if self.text.field == "txt":
            wrong = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
            if wrong is not None:
                raise UserError(f"{wrong!r} is not a caption: this model is conditioned on captions")
        encoded_prompts = self.text.encode(prompts)
        if self.text.field == "txt" and not encoded_prompts.flatten(1).any(1).all():
            empty = int((~encoded_prompts.flatten(1).any(1)).nonzero()[0])
            raise UserError(f"caption {prompts[empty]!r} has no token in the model's vocabulary")
        return self.model.condition(conditioning_inputs(self.text, encoded_prompts.to(self._device), self.model.dtype))

    def _order(self, order: Order | None, images_B: Images, seed: int) -> Tensor | LateOrder | None:
        if order is None or isinstance(order, str):
            request = OrderRequest(self.model, torch.from_numpy(images_B), seed, self.bundle.orders, self.bundle.model)
            return sampling_order(order or self.defaults.order, request, "order")
        given = torch.as_tensor(order, dtype=torch.long)
        return (given.expand(len(images_B), -1) if given.ndim == 1 else given).to(self._device)


def load_pretrained(path: str, model: str | None = None) -> Pretrained:
    """An exported folder, a run's folder or a model file, ready to draw: eval mode, float32, CPU.

    Args:
        path: local or ``s3://``.
        model: which one of a run, see :func:`oar_scale.generation.model_bundle.find_bundle`.

    Raises:
        UserError: nothing to load, or a model and tokenizers that do not fit together.
    """
    bundle = find_bundle(path, model)
    network = load_model(bundle.model)
    vq = load_vq(bundle.vq) if bundle.vq else None
    if vq is not None:
        check_codes(network.spec, vq.spec, bundle.where)
    text = _prompts(bundle, network.spec)
    if text is not None:
        check_prompts(network.spec, text, bundle.where)
    return Pretrained(network, vq, text, bundle)


def _prompts(bundle: ModelBundle, spec: ModelSpec) -> PromptEncoder | None:
    """The prompt encoder: of the folder, or the only one there can be."""
    if bundle.text is not None:
        return load_prompts(for_new_prompts(bundle.text), bundle.text_folder)
    if isinstance(spec.condition, ClassSpec):
        return LabelEncoder(spec.condition.classes)
    return FeatureReader(spec.condition.rows, spec.condition.width) if isinstance(spec.condition, FeatureSpec) else None


@torch.no_grad()
def _pictures(vq: ImageTokenizer, codes_BN: Tensor) -> list[Image.Image]:
    batches = [unit_to_pixels(vq.decode(codes)).cpu().numpy() for codes in codes_BN.split(DECODE_BATCH)]
    return [Image.fromarray(picture) for batch in batches for picture in batch]
