"""Checkpoints of other projects as they come: safetensors or ``torch.save``, in any of the peers' wrappings.

    {name: tensor}     {"model": {...}}     {"module": {...}}     {"state_dict": {...}}
    and before all names of a file, once or more: "module." (DistributedDataParallel), "_orig_mod." (torch.compile)

No file runs code: besides tensors and plain values only ``argparse.Namespace`` is read, since LlamaGen's training keeps its
command line beside the weights. Dtypes stay as they are stored.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.names import file_name
from oar_scale.storage import Missing, fetch, open_storage, read_json
from oar_scale.tokenizers.pickles import read_pickle
from oar_scale.tokenizers.safetensors_file import INDEX
from oar_scale.tokenizers.safetensors_file import SAFE as SAFE
from oar_scale.tokenizers.safetensors_format import FileWriter

Wrapping = Literal["bare", "model"]
"""How a peer's own code expects a ``torch.save`` file."""
PICKLED = (".pt", ".pth", ".bin")
_FORMAT = {"format": "pt"}
_WRAPPINGS = ("model", "module", "state_dict")
_DEEPEST = 4
_PREFIXES = ("module.", "_orig_mod.")


class PeerFile(NamedTuple):
    """A state dict, and what came with it."""

    tensors: dict[str, Tensor]
    where: str
    """The file, for errors; names the prefix that was removed from its tensor names."""
    settings: dict[str, object]
    """The training's command line, where the file has it (``args``)."""


def read_peer_file(uri: str) -> PeerFile:
    """The tensors of a checkpoint of another project.

    Args:
        uri: a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file, or the index of several (``.index.json``), local or ``s3://``.

    Raises:
        UserError: no such file, a damaged one, one that could run code, or one without a state dict.
    """
    content = _content(uri)
    settings = content.get("args", {}) if isinstance(content, dict) else {}
    tensors = _state_dict(content, uri)
    prefix = ""
    while step := next((each for each in _PREFIXES if all(name.startswith(prefix + each) for name in tensors)), None):
        prefix += step
    where = f"{uri} (names without {prefix!r})" if prefix else uri
    bare = {name.removeprefix(prefix): tensor.detach() for name, tensor in tensors.items()}
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    return PeerFile(bare, where, settings if isinstance(settings, dict) else {})


def write_peer_file(uri: str, tensors: dict[str, Tensor], wrapping: Wrapping) -> None:
    """Write a state dict for a peer's code, atomically, as what the name's ending says.

    Raises:
        UserError: another ending, or there is a file of this name.
    """
    ending, storage = _ending(uri), open_storage(uri)
    if storage.exists(uri):
        raise UserError(f"{uri}: there is a file of this name. Delete it, or choose another name.")
    with storage.create(uri) as file:
        if ending == SAFE:
            writer = FileWriter(file, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, _FORMAT)
            for name, tensor in tensors.items():
                writer.put(name, tensor)
            writer.finish(_FORMAT)
        else:
            own = {name: _of_its_own(tensor) for name, tensor in tensors.items()}
            torch.save({"model": own} if wrapping == "model" else own, file)


def _of_its_own(tensor: Tensor) -> Tensor:
    """A tensor whose storage holds nothing else, as ``torch.save`` writes the whole storage."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _ending(uri: str) -> str:
    ending = os.path.splitext(uri)[1]
    if ending not in (SAFE, *PICKLED):
        raise UserError(f"{uri}: a checkpoint's name ends in {SAFE} or in {', '.join(PICKLED)}, which says how it is stored.")
    return ending


def _content(uri: str) -> object:
    if uri.endswith(INDEX):
        return _parts(uri)
    ending = _ending(uri)
    if not open_storage(uri).exists(uri):
        raise Missing(uri)
    with tempfile.TemporaryDirectory(prefix="oar-peer-") as scratch:
        path = fetch(uri, scratch)
        if ending == SAFE:
            try:
                return load_file(path)
            except SafetensorError as error:
                raise UserError(f"{uri}: not a readable safetensors file ({error}). Copy it again.") from error
        return read_pickle(path, uri, classes=[argparse.Namespace], mmap=True)


def _parts(uri: str) -> dict[str, Tensor]:
    """The tensors of all files that an index of the Hugging Face hub names."""
    weight_map = read_json(uri).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{uri}: not an index of weights in several files (it has no weight_map). Name the file that holds the weights.")
    for file in weight_map.values():
        try:
            file_name(file)
        except ValueError as error:
            raise UserError(
                f"{uri}: names files outside its folder, which are not read ({error}). Put all files into one folder."
            ) from error
    folder, tensors = uri.removesuffix(uri.rpartition("/")[2]), dict[str, Tensor]()
    for file in sorted(set(weight_map.values())):
        tensors |= _state_dict(_content(folder + file), folder + file)
    if missing := weight_map.keys() - tensors.keys():
        raise UserError(f"{uri}: tensor {min(missing)} is in none of its files. Copy them again.")
    return tensors


def _state_dict(content: object, uri: str) -> dict[str, Tensor]:
    for _ in range(_DEEPEST):  # wrappings may be nested, to a bounded depth
        inner = (
            next((content[key] for key in _WRAPPINGS if isinstance(content.get(key), dict)), None) if isinstance(content, dict) else None
        )
        if inner is None:
            break
        content = inner
    entries = content if isinstance(content, dict) else {}
    tensors = {name: value for name, value in entries.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        holds = ", ".join(map(str, list(entries)[:6])) or ("nothing" if isinstance(content, dict) else f"a {type(content).__name__}")
        raise UserError(f"{uri}: has no model's tensors, only {holds}. Name the file that holds the model's state dict.")
    return tensors
