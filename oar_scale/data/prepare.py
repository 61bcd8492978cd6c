"""Captioned images into image shards, a fixed share of the names held out."""

from __future__ import annotations

import io
import json
from collections import Counter
from typing import Any

from oar_scale.config.schema import DataConfig
from oar_scale.data.hashing import name_hash
from oar_scale.data.manifest import Manifest, write_manifest
from oar_scale.data.shards import shard_name, write_shard
from oar_scale.data.sources import SourceImage, open_source
from oar_scale.errors import UserError
from oar_scale.storage import join

SPLITS = ("train", "heldout")


def prepare_images(config: DataConfig, folder: str) -> dict[str, Manifest]:
    """Write ``folder/train`` and ``folder/heldout``; the manifests come last.

    Bad samples (no caption, an image that cannot be read) are skipped and named in the manifest, or stop the stage, as
    ``data.on_bad_sample`` says.

    Raises:
        UserError: a bad sample under ``fail``, too many of them under ``skip``, or an empty split.
    """
    source = open_source(config.source)
    samples: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    families: dict[str, list[str]] = {split: [] for split in SPLITS}
    skipped: dict[str, str] = {}
    images = sorted(source.images(config.image_size), key=lambda image: name_hash(image.key, "shard"))
    for image in images:
        split = "heldout" if name_hash(image.name, "heldout") < config.heldout_fraction else "train"
        fault, sample = _encode(image, config.image_size)
        if sample is None:
            skipped[image.key] = fault
            if config.on_bad_sample == "fail":
                raise UserError(f"data: image {image.key!r}: {fault}. Mend it, or set data.on_bad_sample: skip.")
        else:
            samples[split].append(sample)
            families[split].append(image.family)
    _check_keys(samples)
    _check_amounts(config, len(images), skipped, samples)

    manifests = {}
    for split in SPLITS:
        target, size = join(folder, split), config.samples_per_shard
        shards = [write_shard(target, shard_name(i // size), samples[split][i : i + size]) for i in range(0, len(samples[split]), size)]
        if split == "train":
            manifests[split] = Manifest(shards=tuple(shards), attribution=source.attribution, skipped=skipped)
        else:
            in_train = set(families["train"])
            variants = sum(bool(family) and family in in_train for family in families[split])
            manifests[split] = Manifest(shards=tuple(shards), attribution=source.attribution, with_variant_in_train=variants)
    for split in SPLITS:
        write_manifest(join(folder, split), manifests[split])
    return manifests


def _encode(image: SourceImage, size: int) -> tuple[str, dict[str, Any] | None]:
    """The shard sample of an image, or the reason why there is none."""
    if not image.caption:
        return "no caption", None
    try:
        pixels = image.load(size)
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:  # what PIL and resvg raise for broken files
        return f"cannot be read ({error})", None
    buffer = io.BytesIO()
    pixels.save(buffer, "PNG")
    sample = {
        "__key__": image.key,
        "png": buffer.getvalue(),
        "txt": image.caption,
        "json": json.dumps({**image.facts, "name": image.name, "family": image.family}).encode(),
    }
    return "", sample if image.features is None else {**sample, "features.npy": image.features}


def _check_keys(samples: dict[str, list[dict[str, Any]]]) -> None:
    keys = [sample["__key__"] for split in SPLITS for sample in samples[split]]
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated:
        raise UserError(
            f"data: {len(repeated)} keys stand for more than one image, e.g. {repeated[0]!r}. Give every image a name of its own."
        )


def _check_amounts(config: DataConfig, total: int, skipped: dict[str, str], samples: dict[str, list[dict[str, Any]]]) -> None:
    if total and len(skipped) / total > config.max_bad_fraction:
        named = "; ".join(f"{key}: {fault}" for key, fault in list(skipped.items())[:5])
        raise UserError(
            f"data: {len(skipped)} of {total} images are bad, more than data.max_bad_fraction = {config.max_bad_fraction}.\n"
            f"The first: {named}"
        )
    for split, found in samples.items():
        if not found:
            raise UserError(f"data: no image left for the {split} split of {total} images; change data.heldout_fraction or add images.")
