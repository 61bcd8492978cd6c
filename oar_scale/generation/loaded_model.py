"""A loaded model with its tokenizers, and what prompts, orders and settings mean to it; ``pretrained`` draws with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Self, Unpack

import torch
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.generation.arguments import Choices, Order, check_list, given_order
from oar_scale.generation.model_bundle import ModelBundle
from oar_scale.generation.picture_files import check_prompt
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel
from oar_scale.model.weights import model_id
from oar_scale.orders.policies import LateOrder, OrderRequest, own_policy, sampling_order
from oar_scale.orders.selection import Images
from oar_scale.text import shown
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.prompts import Prompt, PromptEncoder, conditioning_inputs
from oar_scale.tokenizers.vq import vq_id


class LoadedModel:
    """The files of a bundle, loaded.

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

    def settings(self, **choices: Unpack[Choices]) -> SampleSettings:
        """The settings of the model's own recipe, with these choices instead of its own. Raises ValueError for what means nothing."""
        return replace(SampleSettings.from_recipe(self.defaults), **choices)

    def _settings(self, choices: Choices, order: Order | None) -> SampleSettings:
        try:
            settings = self.settings(**choices)
        except ValueError as error:
            raise UserError(str(error)) from error
        if choices.get("draft") and (order is None or isinstance(order, str)) and self._policy(order) == "confidence":
            raise UserError(
                f"draft {settings.draft}: cells are drafted along an order that is known beforehand, and here the model decides while it "
                "draws. Name an order (docs/order-policies.md), or leave draft out."
            )
        return settings

    @cached_property
    def _model_id(self) -> str:
        """The content hash of the model's file, all of which is read for it."""
        return model_id(self.bundle.model)

    @cached_property
    def ids(self) -> tuple[str, str | None]:
        """Content hashes of model and image tokenizer, as records name them. The model's file is read for it, once."""
        return self._model_id, None if self.vq is None else vq_id(self.vq)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _tokenizer(self) -> ImageTokenizer:
        if self.vq is None:
            raise UserError(
                f"{self.where}: a model without an image tokenizer draws codes only (.draw). Export it from its run's folder, or import "
                "a tokenizer into its folder: oar checkpoint import llamagen-vq FILE --out FOLDER"
            )
        return self.vq

    def encode(self, prompts: Sequence[Prompt]) -> Tensor:
        """Prompts as the ids, labels or features that :meth:`condition` takes; no network runs. Raises UserError for any other prompt."""
        if self.text is None:
            raise UserError(f"{self.where}: nobody knows what its captions are encoded with. Load its run's folder, or an export of that.")
        check_list(prompts, "prompts")
        wrong = [prompt for prompt in prompts if not isinstance(prompt, str)] if self.text.field == "txt" else []
        if wrong:
            raise UserError(f"{shown(wrong[0])} is not a caption: this model is conditioned on captions")
        for prompt in prompts:
            check_prompt(prompt)
        encoded_prompts = self.text.encode(prompts)
        if self.text.field == "txt" and not encoded_prompts.flatten(1).any(1).all():
            empty = int((~encoded_prompts.flatten(1).any(1)).nonzero()[0])
            raise UserError(f"caption {shown(prompts[empty])} has no token in the model's vocabulary")
        return encoded_prompts

    @torch.no_grad()
    def condition(self, encoded_prompts: Tensor) -> Tensor:
        """What the model is conditioned on, [B, T, D], from what :meth:`encode` gave."""
        assert self.text is not None, "it encoded the prompts"
        return self.model.condition(conditioning_inputs(self.text, encoded_prompts.to(self._device), self.model.dtype))

    def _condition(self, prompts: Sequence[Prompt]) -> Tensor:
        return self.condition(self.encode(prompts))

    def _policy(self, order: str | None) -> str:
        return order or self.defaults.order or own_policy(self.model)

    def orders(
        self, order: Order | None, images_B: Images, seed: int, steps: int | None = None, known_BN: Tensor | None = None
    ) -> Tensor | LateOrder | None:
        """The orders of images with these numbers, on the model's device; arguments and errors as ``sample``, ``steps`` too, and known
        cells as of ``OrderRequest``."""
        if order is None or isinstance(order, str):
            return sampling_order(self._policy(order), self.order_request(images_B, seed, steps, known_BN), "order")
        return given_order(order, self.model.spec.cells, len(images_B)).to(self._device)

    def order_request(self, images_B: Images, seed: int, steps: int | None = None, known_BN: Tensor | None = None) -> OrderRequest:
        """What order policies are told of images with these numbers."""
        numbers_B, bundle = torch.from_numpy(images_B), self.bundle
        return OrderRequest(self.model, numbers_B, seed, bundle.orders, bundle.model, steps, lambda: self._model_id, known_BN)
