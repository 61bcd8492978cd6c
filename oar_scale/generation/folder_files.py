"""The names of the files of an exported folder."""

from __future__ import annotations

from fnmatch import fnmatchcase

from oar_scale.orders.order_files import folder_files, head_file
from oar_scale.tokenizers.prompts import TEXT_FILE
from oar_scale.tokenizers.safetensors_file import INDEX

CONFIG, MODEL, VQ = "config.json", "model.safetensors", "vq.safetensors"
CARD, HISTORY, ORDER_MAP, SAMPLES = "README.md", "history.json", "order-map.png", "samples.png"
"""How the model was made, for people and for programs."""
DIFFUSERS_INDEX, DIFFUSERS_CODE = "model_index.json", "pipeline.py"
"""What diffusers looks for in a folder; we do not."""
TOWER = "text"
"""Name, without its ending, of the copy of an open_clip checkpoint."""
MODEL_FILES = (MODEL, "model-?????-of-?????.safetensors", MODEL + INDEX)
"""Those of the model: one, or several with an index. ``?`` stands for a character."""
EXTRA_FILES = (folder_files("").mean, head_file(MODEL), CARD, HISTORY, ORDER_MAP, SAMPLES)
"""What may be there, beside the parts that the configuration names."""


def is_folder_file(name: str) -> bool:
    """Whether an exported folder may have a file of this name."""
    patterns = (CONFIG, *MODEL_FILES, VQ, TEXT_FILE, f"{TOWER}.*", *EXTRA_FILES, DIFFUSERS_INDEX, DIFFUSERS_CODE)
    return any(fnmatchcase(name, pattern) for pattern in patterns)
