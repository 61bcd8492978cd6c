"""Our models in diffusers (extra ``diffusers``): an exported folder is a pipeline that it loads.

    pipeline = DiffusionPipeline.from_pretrained("exported/emoji", trust_remote_code=True)
    pictures = pipeline(["a red apple"], seed=1).images                        as model.sample
    pictures = pipeline(["a cat"], image=photo, mask_image=mask).images        as model.edit

``model_index.json`` there names ``pipeline.py``, whose one line imports this module: that is the remote code to be trusted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from PIL import Image

from oar_scale.errors import UserError
from oar_scale.generation.canvas import Mask
from oar_scale.generation.exported_folder import complete_folder, copy_model
from oar_scale.generation.folder_files import CONFIG
from oar_scale.generation.pretrained import Choices, Order, Pretrained, load_pretrained
from oar_scale.storage.folders import new_folder
from oar_scale.tokenizers.prompts import Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

T = TypeVar("T")
Generators = torch.Generator | Sequence[torch.Generator]
_SEEDS = 2**31


class OrderedModel(ModelMixin):  # type: ignore[misc]  # diffusers says nothing of its types
    """A loaded model as the one component of the pipeline; ``pretrained`` has all that it can do beside it."""

    def __init__(self, pretrained: Pretrained) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.network, self.vq = pretrained.model, pretrained.vq

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], torch_dtype: torch.dtype | None = None, **_: object) -> Self:
        """Load an exported folder. Other settings of diffusers' loader (variants, maps of devices) have nothing to do here."""
        return cls(load_pretrained(os.fspath(folder)).to(dtype=torch_dtype))

    def to(self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Self:
        """As :meth:`Pretrained.to`; a dtype alone may come first, as in torch."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        self.pretrained.to(device, dtype)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of the model; the image tokenizer keeps its float32."""
        return self.pretrained.model.dtype


class OrderedPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Pictures from prompts, and parts of pictures drawn anew."""

    def __init__(self, model: OrderedModel) -> None:
        super().__init__()
        self.register_modules(model=model)

    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt],
        image: Image.Image | Sequence[Image.Image] | None = None,
        mask_image: Mask | Sequence[Mask] | None = None,
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        strength: float = 1.0,
        generator: Generators | None = None,
        seed: int | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
        order: Order | None = None,
        **choices: Unpack[Choices],
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | NDArray[np.float32] | Tensor]:
        """Draw ``num_images_per_prompt`` pictures for each prompt: those of ``model.sample`` for the prompts, each as often in a row.

        Args:
            prompt: captions, labels or features, as the model was trained; or one of them.
            image, mask_image: with both, what is white in the mask is drawn anew, as by ``model.edit``; one for all, or one a prompt.
            guidance_scale, num_inference_steps: ``guidance`` and ``steps`` of :class:`Choices`; None: the model's own.
            strength: of an edit, see :class:`oar_scale.generation.editing.EditOptions`.
            generator: in place of ``seed``. One gives a seed for all pictures; a list, with one for each picture, a number for each.
            seed: default 0.
            output_type: Pillow's pictures, or an array [B, H, W, 3] or tensor [B, 3, H, W] of float32 in 0..1.
            return_dict: False: a tuple.
            order, choices: as of ``model.sample``.

        Raises:
            UserError: an image without a mask, arguments that mean nothing beside the others or do not fit together, or as of
                ``model.sample`` and ``model.edit``.
        """
        pretrained: Pretrained = self.model.pretrained
        prompts = _repeated(_listed(prompt), num_images_per_prompt)
        for name, ours, value in (("guidance_scale", "guidance", guidance_scale), ("num_inference_steps", "steps", num_inference_steps)):
            if value is not None and ours in choices:
                raise UserError(f"{name} and {ours} are two names of one setting: give one of them")
        if guidance_scale is not None:
            choices["guidance"] = guidance_scale
        if num_inference_steps is not None:
            choices["steps"] = num_inference_steps
        seed, numbers = _noise(generator, seed, len(prompts))
        if (image is None) != (mask_image is None):
            raise UserError("image and mask_image go together: white in the mask is drawn anew, black stays")
        if image is None or mask_image is None:
            if strength != 1:
                raise UserError(
                    f"strength {strength} is of an edit, and there is no image to edit: give image and mask_image, or leave it out"
                )
            pictures = pretrained.sample(prompts, seed=seed, images=numbers, order=order, **choices)
        else:
            images = _one_each(_listed(image), len(prompts), num_images_per_prompt, "image")
            masks: list[Any] = [mask_image] if _is_box(mask_image) else _listed(mask_image)
            masks = _one_each(masks, len(prompts), num_images_per_prompt, "mask_image")
            edits = pretrained.edit(images, masks, prompts, strength=strength, seed=seed, numbers=numbers, order=order, **choices)
            pictures = [edit.picture for edit in edits]
        result = _as_type(pictures, output_type)
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **others: object) -> None:
        """Write an exported folder, with the files that the model was loaded from.

        Args:
            others: of diffusers' arguments those values that say what is done here.

        Raises:
            UserError: something is there already, or another value.
        """
        _refuse(others, "save_pretrained", safe_serialization=True, variant=None, max_shard_size=None, push_to_hub=False)
        target, pretrained = os.fspath(save_directory), self.model.pretrained
        with new_folder(target, last=CONFIG) as folder:
            complete_folder(folder, pretrained.bundle, copy_model(pretrained.bundle, folder))

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **others: object) -> str:
        """As :meth:`Pretrained.push_to_hub`: one commit, with our model card. ``others`` as of :meth:`save_pretrained`."""
        as_here = {"commit_message": None, "token": None, "create_pr": False, "variant": None, "subfolder": None}
        _refuse(others, "push_to_hub", safe_serialization=True, **as_here)
        pushed: str = self.model.pretrained.push_to_hub(repo_id, private=private)
        return pushed


def _refuse(given: Mapping[str, object], method: str, **as_here: object) -> None:
    """Raise UserError for an argument of diffusers' that has another value than the one that says what is done here; it may be a token."""
    for name, value in given.items():
        if name not in as_here or value != as_here[name]:
            raise UserError(f"{method}: {name} would do nothing here. Leave it out.")


def _listed(given: Any) -> list[Any]:
    """The entries of a list or tuple; anything else is one thing: a caption, a picture, an array."""
    return list(given) if isinstance(given, list | tuple) else [given]


def _is_box(mask: Any) -> bool:
    """Whether this is one mask, (left, top, right, bottom), and no tuple of masks."""
    return isinstance(mask, tuple) and all(isinstance(each, Real) for each in mask)


def _repeated(items: Sequence[T], times: int) -> list[T]:
    if not isinstance(times, int) or times < 1:
        raise UserError(f"num_images_per_prompt {times} must be a whole number from 1")
    return [item for item in items for _ in range(times)]


def _one_each(items: Sequence[T], pictures: int, times: int, name: str) -> list[T]:
    if len(items) == 1:
        return list(items) * pictures
    if len(items) * times != pictures:
        raise UserError(f"{name} holds {len(items)} for {pictures // times} prompts: give one for all of them, or one for each")
    return _repeated(items, times)


def _noise(generator: Generators | None, seed: int | None, pictures: int) -> tuple[int, list[int] | None]:
    """The seed, and a number for each picture."""
    if generator is None:
        return 0 if seed is None else seed, None
    if seed is not None:
        raise UserError(f"seed {seed} and a generator, which draws one: give one of the two")
    if isinstance(generator, torch.Generator):
        return _drawn(generator), None
    if len(generator) != pictures:
        raise UserError(f"{len(generator)} generators for {pictures} pictures: give one for all of them, or one for each")
    return 0, [_drawn(each) for each in generator]


def _drawn(generator: torch.Generator) -> int:
    return int(torch.randint(_SEEDS, (1,), generator=generator, device=generator.device))


def _as_type(pictures: list[Image.Image], kind: str) -> list[Image.Image] | NDArray[np.float32] | Tensor:
    if kind == "pil":
        return pictures
    if kind not in ("np", "pt"):
        raise UserError(f"output_type {kind!r}: there are pil, np and pt")
    if len({picture.size for picture in pictures}) > 1:
        raise UserError(f"output_type {kind}: the pictures have several sizes; take pil")
    array_BHW3 = np.stack([np.asarray(picture.convert("RGB"), dtype=np.float32) / np.float32(255) for picture in pictures])
    return array_BHW3 if kind == "np" else torch.from_numpy(array_BHW3).permute(0, 3, 1, 2)
