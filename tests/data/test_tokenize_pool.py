"""Tokenising a folder with the pool: the codes of every view, a manifest that counts them, and no mixing of tokenizers."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oar_scale.config.schema import ImageTokenizerConfig
from oar_scale.data.manifest import Manifest, read_manifest, write_manifest
from oar_scale.data.ray_session import ray_session
from oar_scale.data.shards import read_token_shard, shard_name, write_shard
from oar_scale.data.tokenize_pool import TokenizeJob, tokenize_all
from oar_scale.errors import UserError
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, load_vq, pixels_to_unit, save_vq


@pytest.fixture(scope="module", autouse=True)
def ray_for_this_file() -> Iterator[None]:
    with ray_session(cpus=2):
        yield
