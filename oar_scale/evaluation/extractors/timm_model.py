"""Any image model of timm, such as DINOv2: ``timm:vit_small_patch14_dinov2.lvd142m`` with a local file of its weights."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.evaluation.extractors.extractor import Extractor, Layers, WeightsFile, fill
from oar_scale.evaluation.extractors.open_clip_tower import MIDDLE_SQUARE, middle_square


class TimmModel(Extractor):
    """What the model hands its classifier, after pooling."""

    takes_model: ClassVar[bool] = True
    preprocessing: ClassVar[str] = MIDDLE_SQUARE

    def __init__(self, model: str, weights: WeightsFile | None) -> None:
        import timm
        from timm.data.config import resolve_model_data_config

        if weights is None:
            raise UserError(f"features timm:{model}: name the file of its weights (--weights FILE); nothing is downloaded")
        if not timm.is_model(model):
            near = ", ".join(difflib.get_close_matches(model, timm.list_models(), n=3, cutoff=0.5)) or "vit_small_patch14_dinov2"
            raise UserError(f"features timm:{model}: timm has no model of this name. Near it: {near}.")
        self.label = model
        self.network = network = cast(Any, timm.create_model(model, pretrained=False, num_classes=0))
        classifier = network.pretrained_cfg.get("classifier") or "head"
        fill(self.network, weights, model, (classifier,) if isinstance(classifier, str) else tuple(classifier))
        config = cast(Any, resolve_model_data_config)(network)
        self._side = int(config["input_size"][-1])
        self._mean, self._std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))

    def layers(self, images_BHW3: Tensor) -> Layers:
        """Pooled ones."""
        images = middle_square(images_BHW3, self._side)
        return {"pooled": self.network((images - self._mean.to(self.device)) / self._std.to(self.device)).float().cpu()}
