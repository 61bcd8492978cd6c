"""What a mirrored order costs: the regret of a mirrored image along the mirrored order of its original (``extract.mirror``).

    oar prepare recipes/quickstart.yaml -o run_dir=/tmp/drawings
    python tools/mirrored_orders.py recipes/weights/emoji /tmp/drawings/images/heldout --images 128

Regret is (sum of the scores along the image's own order - the same along the other one) / cells, each score given what came before; of
``max_prob``, in nats per code. Beside it stand the original's order as it is, and random ones; and all of it over
the half of the images whose pixels differ most from their mirror image. Images are encoded as they are and mirrored, in float32.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np
import torch
from torch import Tensor

import oar_scale
from oar_scale.data.hashing import device_permutations
from oar_scale.data.manifest import read_manifest
from oar_scale.data.open_shard import ImageShard
from oar_scale.errors import UserError
from oar_scale.model import AnyOrderModel
from oar_scale.orders.analysis.statistics import kendall_distance
from oar_scale.orders.extraction import extract_orders, scores_along
from oar_scale.orders.order_table import mirror_orders
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.runtime.program import program
from oar_scale.storage import join, open_storage
from oar_scale.tokenizers.vq import pixels_to_unit

SETTINGS, BATCH = ExtractionSettings(), 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an exported folder, or the folder of a run")
    parser.add_argument("images", help="a folder of image shards that the model was not trained on")
    parser.add_argument("--images", dest="count", type=int, default=128)
    request = parser.parse_args()
    measure(request.model, request.images, request.count)


def measure(name: str, images: str, count: int) -> None:
    """Print a line for each kind of order, over all images and over the least symmetric half.

    Raises:
        UserError: no such model or images, too few of them, or a model without an image tokenizer.
    """
    if count < 4:
        raise UserError(f"--images {count}: there are standard errors over the images and over half of them, which need at least 4")
    model = oar_scale.load(name)
    if model.vq is None:
        raise UserError(f"{name}: there is no image tokenizer, which encodes the images. Name a model with one.")
    prompts, pixels = read_images(images, count, model.vq.spec.image_size)
    condition_STD = model.condition(model.encode(prompts))
    codes = [torch.cat([model.vq.encode(pixels_to_unit(part)) for part in each.split(BATCH)]) for each in (pixels, pixels.flip(2))]
    plain_SN, own_SN = (orders(model.model, codes_SN, condition_STD) for codes_SN in codes)
    mirrored_SN = torch.from_numpy(mirror_orders(plain_SN.numpy().astype(np.uint16), model.model.spec.grid).astype(np.int64))
    random_SN = device_permutations(
        "order", plain_SN.shape[1], 0, torch.zeros(len(plain_SN), dtype=torch.long), torch.arange(len(plain_SN))
    )
    difference_S = (pixels.float() - pixels.flip(2).float()).square().flatten(1).mean(1)
    skewed_S = difference_S.argsort(descending=True)[: len(pixels) // 2].numpy()
    best_S = worth(model.model, codes[1], condition_STD, own_SN)
    for name, order_SN in (("mirrored", mirrored_SN), ("as it is", plain_SN), ("random", random_SN)):
        regret_S = best_S - worth(model.model, codes[1], condition_STD, order_SN)
        tau_S = 1 - 2 * kendall_distance(order_SN.numpy().astype(np.uint16), own_SN.numpy())
        for kind, rows in (("all", slice(None)), ("least symmetric half", skewed_S)):
            some_S, error = regret_S[rows], regret_S[rows].std() / len(regret_S[rows]) ** 0.5
            print(f"{name}: regret {some_S.mean():.3f} +- {error:.3f}, tau {tau_S[rows].mean():.3f}, {len(some_S)} images, {kind}")


def read_images(folder: str, count: int, size: int) -> tuple[list[str], Tensor]:
    """Captions, and pixels uint8 [S, H, W, 3], of the first images."""
    shards = (
        ImageShard(memoryview(open_storage(uri).read(uri)), uri)
        for uri in (join(folder, info.name) for info in read_manifest(folder).shards)
    )
    rows = itertools.islice(((shard, row) for shard in shards for row in range(len(shard))), count)
    found = [(str(shard.prompt(row, "txt")), shard.pixels(row, "center", size)) for shard, row in rows]
    return [caption for caption, _ in found], torch.from_numpy(np.stack([pixels for _, pixels in found]))


def orders(model: AnyOrderModel, codes_SN: Tensor, condition_STD: Tensor) -> Tensor:
    """The images' own orders."""
    parts = zip(codes_SN.split(BATCH), condition_STD.split(BATCH), strict=True)
    return torch.cat([extract_orders(model, codes, condition, SETTINGS).order_BN for codes, condition in parts])


def worth(model: AnyOrderModel, codes_SN: Tensor, condition_STD: Tensor, order_SN: Tensor) -> Tensor:
    """The mean score along an order, for each image."""
    parts = zip(codes_SN.split(BATCH), condition_STD.split(BATCH), order_SN.split(BATCH), strict=True)
    return torch.cat([scores_along(model, codes, condition, SETTINGS, order).mean(1) for codes, condition, order in parts])


if __name__ == "__main__":
    program(main)
