"""A trained model with all it needs to draw: ``oar_scale.load``.

import oar_scale
model = oar_scale.load("exported/emoji")
for number, image in enumerate(model.sample(["a red apple", "a smiling cat"])):
    image.save(f"{number}.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Unpack, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.generation.arguments import MAX_EDITED, Choices, EditChoices, Order, check_list, given_seed, image_numbers
from oar_scale.generation.canvas import Margins, Mask, expand, upright_picture
from oar_scale.generation.editing import DECODE_BATCH, VARIATION_SHIFT, Edit, EditOptions, edit_pages, noise_numbers
from oar_scale.generation.exported_folder import complete_folder, copy_model
from oar_scale.generation.loaded_model import LoadedModel
from oar_scale.generation.model_bundle import HUB, ModelBundle, check_codes, find_bundle
from oar_scale.generation.pages import make_pages
from oar_scale.generation.picture_files import DrawingKind, DrawingRecord, check_prompt
from oar_scale.generation.sampling import Generated, generate
from oar_scale.generation.seen_codes import DEFAULT_FILLS, Fill
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import check_prompts, load_model
from oar_scale.model.spec import ClassSpec, FeatureSpec, ModelSpec
from oar_scale.orders.policies import LateOrder
from oar_scale.orders.selection import Images
from oar_scale.text import shown
from oar_scale.tokenizers.prompts import (
    FeatureReader,
    LabelEncoder,
    Prompt,
    PromptEncoder,
    for_new_prompts,
    load_prompts,
)
from oar_scale.tokenizers.vq import load_vq, unit_to_pixels

__all__ = ["Choices", "Order", "Pretrained", "load_bundle", "load_pretrained"]


class Pretrained(LoadedModel):
    """``sample`` gives pictures, ``draw`` the codes with their orders; ``edit``, ``variations`` and ``expand`` both."""

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
        self._tokenizer()
        return self.decode(self.draw(prompts, seed=seed, images=images, order=order, **choices).codes_BN)

    @torch.no_grad()
    def decode(self, codes_BN: Tensor) -> list[Image.Image]:
        """The picture of each row of codes. Raises UserError where there is no image tokenizer."""
        vq = self._tokenizer()
        batches = [unit_to_pixels(vq.decode(codes)).cpu().numpy() for codes in codes_BN.split(DECODE_BATCH)]
        return [Image.fromarray(picture) for batch in batches for picture in batch]

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
        images_B, seed = image_numbers(images, len(condition_BTD), "images"), given_seed(seed)
        settings = self._settings(choices, order)
        order_BN = self.orders(order, images_B, seed, settings.steps)
        return generate(self.model, condition_BTD, settings, seed, order_BN, images_B=images_B)

    def edit(
        self,
        images: Sequence[Image.Image],
        masks: Sequence[Mask | list[Mask]],
        prompts: Sequence[Prompt | list[Prompt]],
        *,
        variations: int = 1,
        strength: float = 1.0,
        windows: bool = False,
        fills: Sequence[Fill] = DEFAULT_FILLS,
        ring: int = 0,
        feather: float | None = None,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        order: Order | None = None,
        **choices: Unpack[Choices],
    ) -> list[Edit]:
        """Draw marked pixels of pictures anew, knowing the others. Those stay exactly as they are.

        Args:
            images: of any size and mode. Each is made upright, and scaled to fit the square that the model draws.
            masks: which pixels of each upright picture are to be drawn, see :data:`oar_scale.generation.canvas.Mask`; a list of masks for
                regions that are drawn one after the other, each from a prompt of its own.
            prompts: one for each picture; a list of prompts where there is a list of masks.
            variations, strength, fills, ring, feather: see :class:`oar_scale.generation.editing.EditOptions`.
            windows: draw pictures larger than the square at their own resolution, see ``oar_scale.generation.windows``.
            seed, numbers: as ``seed`` and ``images`` of :meth:`sample`; a number for each picture, below 2^32 for its first
                variation; n + v * 2^32 begins with variation v, so that many can be drawn in parts.
            order: as for :meth:`sample`, known cells first; [B, N] has a row for each variation of each picture.

        Returns:
            All drawings of the first picture, then those of the second, and so on.

        Raises:
            UserError: as :meth:`sample`; pictures and masks that do not fit together, or a model that draws in raster order only.
        """
        rules = tuple(fills) if isinstance(fills, list | tuple) else (fills,)  # one that is no list is named in the error
        vq, options = self._tokenizer(), EditOptions(variations, strength, rules, ring, feather)
        if self.model.spec.layout == "raster":
            raise UserError(f"{self.where}: a raster model draws in raster order, whatever is known. Edit with an any-order model.")
        pages, texts = make_pages(images, masks, prompts, vq.spec.image_size, windows=windows)
        condition_PTD = self._condition(texts)
        most = MAX_EDITED - (variations - 1 << VARIATION_SHIFT)
        images_B, seed = image_numbers(numbers, len(pages), "numbers", most), given_seed(seed)
        settings = self._settings(choices, order)
        whole_order = None if order is None or isinstance(order, str) else self.orders(order, noise_numbers(images_B, variations), seed)

        def order_of(rows: Sequence[int], numbers_B: Images, known_BN: Tensor) -> Tensor | LateOrder | None:
            if isinstance(whole_order, Tensor):
                return whole_order[list(rows)]
            return self.orders(order, numbers_B, seed, settings.steps, known_BN)

        return edit_pages(self.model, vq, pages, condition_PTD, settings, options, seed, order_of, images_B)

    def variations(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[Prompt],
        count: int = 4,
        strength: float = 0.5,
        **options: Unpack[EditChoices],
    ) -> list[Edit]:
        """Pictures of which a share of the cells is drawn anew: those whose codes the model expects least, given the prompt.

        Args:
            count: drawings of each picture.
            strength: the share; 1 draws all of it, from the prompt alone.
            options: other arguments of :meth:`edit`.

        Returns:
            As :meth:`edit`, with its errors.
        """
        check_list(images, "images")
        everything = [(0, 0, *upright_picture(image, f"picture {number}").size) for number, image in enumerate(images, 1)]
        return self.edit(images, everything, prompts, variations=count, strength=strength, **options)

    def expand(
        self,
        images: Sequence[Image.Image],
        margins: Margins | list[Margins],
        prompts: Sequence[Prompt],
        *,
        variations: int = 1,
        windows: bool = True,
        **options: Unpack[EditChoices],
    ) -> list[Edit]:
        """Let pictures grow: their new margins are drawn.

        Args:
            margins: pixels on each side (left, top, right, bottom), of all pictures or a list with one for each.
            windows: where the page is larger than the model's square, draw at the picture's resolution; else scale the page to the square.
            options: other arguments of :meth:`edit`.

        Returns:
            As :meth:`edit`, with its errors.
        """
        check_list(images, "images")
        if not isinstance(margins, tuple | list):
            raise UserError(f"margins {shown(margins)} must be Margins(left, top, right, bottom), or a list with one for each picture")
        each = [margins] * len(images) if isinstance(margins, tuple) else margins
        if len(each) != len(images):
            raise UserError(f"margins has {len(each)} of them for {len(images)} pictures")
        grown = [expand(image, by, f"picture {number}") for number, (image, by) in enumerate(zip(images, each, strict=True), 1)]
        pages, new = [page for page, _ in grown], [new_HW for _, new_HW in grown]
        return self.edit(pages, new, prompts, variations=variations, windows=windows, **options)

    def record(
        self,
        prompt: Prompt,
        number: int,
        settings: SampleSettings,
        *,
        seed: int,
        order: Order | None = None,
        kind: DrawingKind = "sample",
        size: tuple[int, int] | None = None,
        edit: dict[str, str | int | float | bool | None] | None = None,
    ) -> DrawingRecord:
        """What a PNG says about how it was drawn (``generation.picture_files``).

        Args:
            number, seed, order: as for :meth:`sample`; a given order is the one of this picture, [N].
            size: of the picture; default: the square that the model draws.

        Raises:
            UserError: a caption that is longer than a record takes.
        """
        check_prompt(prompt)
        model, tokenizer = self.ids
        side = self.vq.spec.image_size if self.vq is not None else self.model.spec.grid
        return DrawingRecord(
            kind=kind,
            prompt=prompt if isinstance(prompt, str) else int(prompt) if np.ndim(prompt) == 0 else None,
            seed=seed,
            number=number,
            model=model,
            tokenizer=tokenizer,
            name=self.bundle.recipe,
            dtype=cast(Literal["float32"], str(self.model.dtype).removeprefix("torch.")),
            order=self._policy(order) if order is None or isinstance(order, str) else tuple(torch.as_tensor(order).tolist()),
            settings=settings,
            grid=self.model.spec.grid,
            size=size or (side, side),
            edit=edit,
        )

    def again(self, record: DrawingRecord) -> Image.Image:
        """The picture that a record describes, drawn again.

        Raises:
            UserError: it is no ``sample``, or another model's, or of a model in another dtype.
        """
        if record.kind != "sample":
            raise UserError(f"this picture is of kind {record.kind}: its record does not hold the picture that it was made from")
        if record.prompt is None:
            raise UserError("this picture was drawn from features, which its record does not hold")
        if (record.model, record.tokenizer) != self.ids:
            theirs, mine = (" with tokenizer ".join(map(str, each)) for each in ((record.model, record.tokenizer), self.ids))
            raise UserError(f"{self.where}: this picture was drawn by another model: {theirs}; this is {mine}")
        if record.dtype != str(self.model.dtype).removeprefix("torch."):
            raise UserError(f"this picture was drawn in {record.dtype}, and the model is in {self.model.dtype}: model.to(dtype=...)")
        choices = cast(Choices, vars(record.settings))
        if record.order == "confidence":
            choices = {**choices, "draft": 0}  # the recipe's, of another order
        return self.sample([record.prompt], seed=record.seed, images=[record.number], order=record.order, **choices)[0]

    def push_to_hub(self, repo: str, *, private: bool | None = None, revision: str | None = None, license: str | None = None) -> str:
        """Publish the files that this was loaded from on the Hugging Face hub, in one commit, with a model card.

        Args:
            repo: ``owner/name``; made where there is none. Who is logged in, and the token, are those of huggingface_hub.
            private: of a new repository; None: as the account says.
            revision: a branch, which is made where there is none.
            license: of the weights, as the hub writes it: ``cc-by-sa-4.0``. None: as it is known.

        Returns:
            ``hf://owner/name@COMMIT``, for ``oar_scale.load``.

        Raises:
            UserError: as :func:`oar_scale.generation.hub.publish`.
        """
        from oar_scale.generation.hub import HubPath, publish  # brings huggingface_hub

        def fill(folder: str, public: HubPath) -> None:
            complete_folder(folder, self.bundle, copy_model(self.bundle, folder), license_id=license, public=public)

        path = HubPath.parse(repo if repo.startswith(HUB) else HUB + repo)
        return publish(str(replace(path, revision=revision or path.revision)), fill, private=private)


def load_pretrained(path: str, model: str | None = None) -> Pretrained:
    """An exported folder, a run's folder or a model file, ready to draw: eval mode, float32, CPU.

    Args:
        path: local, ``s3://``, or of an exported folder ``hf://owner/name[@revision][/folder]``.
        model: which one of a run, see :func:`oar_scale.generation.model_bundle.find_bundle`.

    Raises:
        UserError: nothing to load, or a model and tokenizers that do not fit together.
    """
    return load_bundle(find_bundle(path, model))


def load_bundle(bundle: ModelBundle) -> Pretrained:
    """The files of a bundle, ready to draw. Errors as :func:`load_pretrained`."""
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
