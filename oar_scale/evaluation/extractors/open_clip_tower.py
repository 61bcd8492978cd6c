"""The towers of a CLIP model: embeddings of images, and of captions for the CLIP score. ``openclip:ViT-B-32`` with a local checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.evaluation.extractors.extractor import Extractor, Layers, WeightsFile, fill

MIDDLE_SQUARE = "the middle square, bicubic (antialiased), mean and deviation of the model"


class OpenClipTower(Extractor):
    """Projected embeddings, not normalised: ``pooled`` of images, and :meth:`captions`."""

    takes_model: ClassVar[bool] = True
    preprocessing: ClassVar[str] = MIDDLE_SQUARE

    def __init__(self, model: str, weights: WeightsFile | None) -> None:
        import open_clip

        if weights is None:
            raise UserError(f"features openclip:{model}: name the file of its weights (--weights FILE); nothing is downloaded")
        if model not in (names := open_clip.list_models()):
            near = ", ".join(difflib.get_close_matches(model, names, n=3, cutoff=0.5)) or "ViT-B-32, ViT-L-14"
            raise UserError(f"features openclip:{model}: open_clip has no model of this name. Near it: {near}.")
        if "hf_model_name" in open_clip.get_model_config(model)["text_cfg"]:
            raise UserError(f"features openclip:{model}: its text tower would be downloaded. Use a model with CLIP's own, e.g. ViT-B-32.")
        self.label = model
        self.network = self._clip = cast(Any, open_clip.create_model(model, pretrained=None))
        fill(self.network, weights, model)
        self._tokenizer = open_clip.get_tokenizer(model)
        visual = self._clip.visual
        self._side = visual.image_size[0] if isinstance(visual.image_size, tuple) else int(visual.image_size)
        self._mean, self._std = (
            torch.tensor(each).view(1, 3, 1, 1)
            for each in (visual.image_mean or open_clip.OPENAI_DATASET_MEAN, visual.image_std or open_clip.OPENAI_DATASET_STD)
        )

    def layers(self, images_BHW3: Tensor) -> Layers:
        """Embeddings."""
        images = middle_square(images_BHW3, self._side)
        return {"pooled": self._clip.encode_image((images - self._mean.to(self.device)) / self._std.to(self.device)).float().cpu()}

    @torch.inference_mode()
    def captions(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of captions."""
        embedded: Tensor = self._clip.encode_text(self._tokenizer(list(texts)).to(self.device))
        return embedded.float().cpu()


def middle_square(images_BHW3: Tensor, side: int) -> Tensor:
    """uint8 images as float [B, 3, side, side] in [0, 1]: the shorter side becomes ``side`` (bicubic, antialiased), the middle is kept."""
    images = images_BHW3.permute(0, 3, 1, 2).float() / 255
    height, width = images.shape[2:]
    shorter = min(height, width)
    size = (round(height * side / shorter), round(width * side / shorter))
    images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return images[:, :, top : top + side, left : left + side]
