"""InceptionV3 as FID knows it: the TensorFlow network of 2015-12-05, converted to PyTorch by pytorch-fid and used by torch-fidelity.

The layers are those of ADM's evaluation (Dhariwal & Nichol 2021):

    pooled    the last pooling layer, [B, 2048]                                                TensorFlow's ``pool_3``
    spatial   the first 7 channels of Mixed_6d, rows and columns first, [B, 17 * 17 * 7]       ``mixed_6/conv``
    logits    without the bias, [B, 1008]                                                      as ADM and torch-fidelity do

An image is resized to 299 x 299 as TensorFlow 1 did (bilinear from the corner of pixels, not antialiased; so does the graph that ADM runs,
and so does torch-fidelity), then ``(x - 128) / 128``. The images that come in should have the resolution of the reference:
``oar distance --size``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.evaluation.extractors.extractor import Extractor, Layers, WeightsFile, fill
from oar_scale.evaluation.extractors.fid_inception import FidInception
from oar_scale.tokenizers.without_values import without_values

KNOWN = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of pytorch-fid's ``pt_inception-2015-12-05-6726825d.pth``; torch-fidelity has the same file under another name."""
SIDE, SPATIAL_CHANNELS = 299, 7


class Inception(Extractor):
    """Pooled, spatial and logits of the FID network."""

    preprocessing: ClassVar[str] = "bilinear to 299 x 299 as TensorFlow 1, not antialiased"

    def __init__(self, model: str, weights: WeightsFile | None) -> None:
        if weights is None:
            raise UserError(
                "features inception: the weights are not shipped. Fetch pt_inception-2015-12-05-6726825d.pth from the releases of "
                "pytorch-fid, and name the file (--weights FILE)."
            )
        self.standard = weights.sha256 == KNOWN
        self.label = "inception" if self.standard else f"inception_{weights.sha256[:8]}"
        with without_values():
            self._inception = FidInception()
        self.network = self._inception.to_empty(device="cpu")
        fill(self.network, weights, "the InceptionV3 of FID")

    def layers(self, images_BHW3: Tensor) -> Layers:
        """All three."""
        images = images_BHW3.permute(0, 3, 1, 2).float()
        middle, pooled = self._inception((resize_as_tensorflow(images, SIDE) - 128) / 128)
        spatial = middle[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        logits = pooled @ self._inception.fc.weight.T
        return {"pooled": pooled.cpu(), "spatial": spatial.cpu(), "logits": logits.cpu()}


def resize_as_tensorflow(images_BCHW: Tensor, side: int) -> Tensor:
    """``tf.image.resize_bilinear`` of TensorFlow 1: output pixel i is at input ``i * in / out``, between its two neighbours."""
    for axis in (2, 3):
        length = images_BCHW.shape[axis]
        at = torch.arange(side, device=images_BCHW.device, dtype=torch.float32) * torch.tensor(length / side, dtype=torch.float32)
        low = at.long()
        high, share = (low + 1).clamp_max(length - 1), at - low
        share = share[:, None] if axis == 2 else share
        lower, upper = images_BCHW.index_select(axis, low), images_BCHW.index_select(axis, high)
        images_BCHW = lower + (upper - lower) * share
    return images_BCHW
