"""What EfficientNet-Lite0 sees in an image: 1280 numbers.

The network (ImageNet-1k, 4.7 M parameters, Apache-2.0) comes with the extra ``eval`` as an ordinary package, so that the evaluation needs
no download. It is not InceptionV3: distances on these features are named ``kid_efflite0`` and ``fd_efflite0`` and are not comparable with
published FID or KID values.
"""

from __future__ import annotations

import copy
from typing import ClassVar

from torch import Tensor

from oar_scale.evaluation.extractors.extractor import Extractor, Layers, WeightsFile
from oar_scale.tokenizers.perceptual import INPUT_PIXELS, efficientnet_lite0, network_input
from oar_scale.tokenizers.vq import pixels_to_unit


class EffLite0(Extractor):
    """Pooled features of the last layer, [B, 1280]."""

    needs_weights: ClassVar[bool] = False
    preprocessing: ClassVar[str] = "bicubic to 128 x 128, antialiased"

    def __init__(self, model: str, weights: WeightsFile | None) -> None:
        self.label = "efflite0"
        self.network = copy.deepcopy(efficientnet_lite0("features efflite0"))  # others share the original, on the CPU

    def layers(self, images_BHW3: Tensor) -> Layers:
        """Pooled ones."""
        images = network_input(pixels_to_unit(images_BHW3), INPUT_PIXELS)
        features = self.network.extract_features(images)  # type: ignore[operator]
        return {"pooled": features.mean((2, 3)).cpu()}
