"""Where a run keeps its models: ``models/NAME.safetensors`` in its storage."""

from __future__ import annotations

from oar_scale.registry import MODELS, model_file
from oar_scale.storage import join, open_storage


def run_model_file(root: str, name: str) -> str:
    """The file of a model in the run whose storage is ``root``.

    A run of an earlier version may have the any-order model as ``models/anyorder.safetensors``: where that file is there and the new
    one is not, it is the one to read and to write. Nothing need be there.
    """
    file, model = join(root, model_file(name)), next((model for model in MODELS.values() if model.name == name), None)
    if model is not None and model.old_file and not open_storage(file).exists(file):
        old = join(root, model.old_file)
        if open_storage(old).exists(old):
            return old
    return file
