"""What EfficientNet-Lite0 sees in an image: 1280 numbers whose distribution over images KID and the Frechet distance compare.

The network (ImageNet-1k, 4.7 M parameters, Apache-2.0) comes with the extra ``eval`` as an ordinary package, so that the
evaluation needs no download. It is not InceptionV3: distances on these features are named ``kid_efflite0`` and
``fd_efflite0`` and are not comparable with published FID or KID values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oar_scale.tokenizers.perceptual import INPUT_PIXELS, efficientnet_lite0, network_input
from oar_scale.tokenizers.vq import pixels_to_unit

FEATURES = 1280


def image_features(images_B3HW: Tensor, batch: int = 64) -> Tensor:
    """Pooled features of EfficientNet-Lite0.

    Args:
        images_B3HW: RGB in [-1, 1], any size; resized to 128 x 128 (bicubic, antialiased).
        batch: images taken through the network at once.

    Returns:
        float32 [B, 1280] on the CPU.

    Raises:
        UserError: the packages of the extra ``eval`` are missing.
        ValueError: not a batch of RGB images.
    """
    if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3:
        raise ValueError(f"expected images [B, 3, H, W], got {list(images_B3HW.shape)}")
    network = efficientnet_lite0("kid_efflite0 and fd_efflite0")
    features = torch.empty(len(images_B3HW), FEATURES)
    with torch.inference_mode():
        for start in range(0, len(images_B3HW), batch):
            images = network_input(images_B3HW[start : start + batch].cpu(), INPUT_PIXELS)
            features[start : start + batch] = network.extract_features(images).mean((2, 3))  # type: ignore[operator]
    return features


def picture_features(pixels_SHW3: Tensor, batch: int = 64) -> Tensor:
    """:func:`image_features` of uint8 images [S, H, W, 3], of which a batch at a time is made float32."""
    return torch.cat([image_features(pixels_to_unit(part), batch) for part in pixels_SHW3.split(batch)])
