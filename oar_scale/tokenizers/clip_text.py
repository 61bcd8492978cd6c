"""A frozen open_clip text tower as the text encoder: captions to ids, ids to features.

    caption --byte-pair encoding--> start, word pieces, end --tower--> one feature row a token, or one for the caption

The features are those of the pretrained model: ``tokens`` are the outputs of the final layer norm, ``pooled`` is what
open_clip's ``encode_text`` returns (projected, not normalised). Only the text tower is ever built; its vocabulary comes
with open_clip, so nothing but the weights has to be fetched, and those may be a file.

Ids are CLIP's plus one: CLIP's id 0 is a real piece (an exclamation mark inside a run of signs), and 0 means "no token" here.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from oar_scale.errors import UserError, error_line
from oar_scale.json_object import JsonObject
from oar_scale.storage import open_storage
from oar_scale.text import clean_text
from oar_scale.tokenizers.clip_spec import ClipTextSpec, Features
from oar_scale.tokenizers.pickles import read_pickle
from oar_scale.tokenizers.without_values import without_values


class ClipText:
    """ids int64 [B, T] (0 = no token) -> features float [B, T, F] (``tokens``) or [B, 1, F] (``pooled``).

    Feature rows without a token are exactly zero. Instances come from :meth:`load`.
    """

    field: ClassVar[Literal["txt"]] = "txt"
    spec: ClipTextSpec
    max_tokens: int
    """T: context length of the tower."""
    width: int
    """F: the tower's width for ``tokens``, that of the joint space for ``pooled``."""
    vocab_size: int
    """Ids lie in [0, vocab_size)."""
    content_id: str
    """Hash of the tower's weights in float32, so the same for a file stored in half precision and its float32 copy."""

    def __init__(self, spec: ClipTextSpec, tower: nn.Module) -> None:
        import open_clip

        self.spec = spec
        self.max_tokens = int(tower.context_length)  # type: ignore[arg-type]
        self.vocab_size = int(tower.vocab_size) + 1  # type: ignore[arg-type]
        joint = tower.width if tower.text_projection is None else tower.output_dim
        self.width = int(tower.width if spec.features == "tokens" else joint)  # type: ignore[arg-type]
        self.content_id = _content_id(tower.state_dict())
        self._tower = tower.eval().requires_grad_(False)
        self._tokenizer = open_clip.get_tokenizer(spec.architecture)

    @property
    def rows(self) -> int:
        """Feature rows of a caption: T, or 1."""
        return self.max_tokens if self.spec.features == "tokens" else 1

    def check(self, caption: str) -> None:
        """Any text can be encoded."""

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Ids int64 [B, T]: start, pieces, end, zeros; a longer caption keeps its end token; an empty one is all zeros."""
        ids_BT = torch.zeros(len(captions), self.max_tokens, dtype=torch.long)
        for row, caption in enumerate(captions):
            token_ids = self._tokenizer.encode(clean_text(caption))[: self.max_tokens - 2]
            if token_ids:
                ids = [self._tokenizer.sot_token_id, *token_ids, self._tokenizer.eot_token_id]
                ids_BT[row, : len(ids)] = torch.tensor(ids) + 1
        return ids_BT

    @torch.no_grad()
    def features(self, ids_BT: Tensor, *, half: bool = False) -> Tensor:
        """Features of ids from :meth:`encode`, on the ids' device, in the tower's precision, without a gradient.

        A caption's features do not depend on the other captions of the batch. The tower sees all T positions, as in its training.

        Args:
            half: compute matrix products in bfloat16; norms, sums and the weights themselves keep the tower's precision.

        Raises:
            ValueError: rows of another length than ``max_tokens``.
        """
        if ids_BT.ndim != 2 or ids_BT.shape[1] != self.max_tokens:
            raise ValueError(f"ids are {tuple(ids_BT.shape)}, the text tower takes [B, {self.max_tokens}]")
        ids_BT, device = ids_BT.to(next(self._tower.parameters()).device), ids_BT.device
        with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=half):
            pooled_BF, tokens_BTF = self._tower((ids_BT - 1).clamp_min(0))
        if half:
            pooled_BF, tokens_BTF = pooled_BF.float(), tokens_BTF.float()
        present_BT = ids_BT != 0
        if self.spec.features == "tokens":
            features, present = tokens_BTF, present_BT
        else:
            features, present = pooled_BF.unsqueeze(1), present_BT.any(1, keepdim=True)
        features_BTF: Tensor = features.masked_fill(~present.unsqueeze(-1), 0).to(device)
        return features_BTF

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ClipText:
        """Move the tower, in place, and return it; ``dtype`` changes its precision as well."""
        self._tower.to(device=device, dtype=dtype)
        return self

    @classmethod
    def load(cls, architecture: str, weights: str, *, features: Features = "tokens") -> ClipText:
        """Read a tower (eval mode, float32, CPU).

        Args:
            architecture: name of an open_clip model with a text tower of its own.
            weights: a checkpoint (``.safetensors``, or ``.pt``/``.bin`` with a state dict; whole model or text tower;
                local or ``s3://``), or one of open_clip's pretrained tags, which open_clip then fetches. A file goes first.
            features: one row a token, or one for the caption.

        Raises:
            UserError: unknown or unsupported architecture, weights that are missing, unreadable or of another shape, no network.
        """
        config = _config(architecture)
        with tempfile.TemporaryDirectory(prefix="oar-clip-") as scratch:
            path = _local_file(architecture, config, weights, scratch)
            tower = _tower(config)
            tensors = _read(path, weights, list(tower.state_dict()))
        _check(tensors, tower.state_dict(), f"{weights} for {architecture}")
        tower.load_state_dict(tensors, assign=True)
        if tower.attn_mask is not None:
            tower.attn_mask = tower.build_causal_mask()  # type: ignore[operator]  # it is in no checkpoint
        return cls(ClipTextSpec(architecture=architecture, features=features), tower)


def _config(architecture: str) -> JsonObject:
    """open_clip's description of a model whose text side is a plain CLIP tower."""
    import open_clip

    names = open_clip.list_models()
    if architecture not in names:
        near = difflib.get_close_matches(architecture, names, n=3, cutoff=0.5)
        remedy = f"Near it: {', '.join(near)}." if near else "open_clip.list_models() has all names, e.g. ViT-B-32, ViT-L-14."
        raise UserError(f"{architecture}: open_clip has no model of this name. {remedy}")
    config: JsonObject = open_clip.get_model_config(architecture)
    text = config["text_cfg"]
    if "hf_model_name" in text:
        other = f"is the Hugging Face model {text['hf_model_name']}"
    elif "hf_tokenizer_name" in text:
        other = f"needs the tokenizer {text['hf_tokenizer_name']}"
    elif "multimodal_cfg" in config or text.get("embed_cls"):
        other = "is CoCa's, with a class token and features before the layer norm"
    else:
        return config
    raise UserError(
        f"{architecture}: its text tower {other}, which is not supported. "
        "Use a model with CLIP's own text tower and vocabulary, e.g. ViT-B-32, ViT-L-14 or ViT-H-14."
    )


def _tower(config: JsonObject) -> nn.Module:
    """The text tower alone, without values: the weights take their place as they are read."""
    from open_clip.model import _build_text_tower  # what open_clip's own models call; there is no public name for it

    with without_values():
        tower: nn.Module = _build_text_tower(
            config["embed_dim"], {**config["text_cfg"], "output_tokens": True}, config.get("quick_gelu", False)
        )
    return tower


def _local_file(architecture: str, config: JsonObject, weights: str, scratch: str) -> str:
    """The path of the checkpoint: the file itself, a copy of the object in ``scratch``, or what open_clip has fetched."""
    if os.path.isfile(weights):
        return weights
    if "/" in weights or os.path.splitext(weights)[1]:
        path = os.path.join(scratch, os.path.basename(weights))
        open_storage(weights).download(weights, path)
        return path
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not open_clip.is_pretrained_cfg(architecture, weights):
        near = difflib.get_close_matches(weights, tags, n=1, cutoff=0.5) or tags[:5]
        remedy = f"Name a checkpoint file, or one of its tags: {', '.join(near)}." if near else "It has no tags: name a checkpoint file."
        raise UserError(f"{weights}: there is no such file, and {architecture} has no pretrained tag of this name. {remedy}")
    source = open_clip.get_pretrained_cfg(architecture, weights)
    if bool(source.get("quick_gelu")) != bool(config.get("quick_gelu")):
        raise UserError(
            f"{weights}: these weights were not trained with the activation of {architecture}. Use {architecture}-quickgelu with this tag."
        )
    try:
        return str(open_clip.download_pretrained(source))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{weights}: open_clip could not fetch these weights of {architecture} "
            f"from {source.get('hf_hub') or source.get('url')} ({error_line(error)}).\n"
            "Fetch the checkpoint on a machine with a network and name the file instead of the tag."
        ) from error


def _read(path: str, weights: str, wanted: Sequence[str]) -> dict[str, Tensor]:
    """The text tower's tensors of a checkpoint, in float32; of a whole model, the rest is not brought into memory."""
    if path.endswith(".safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                names = _text_names(list(file.keys()), wanted)
                return {name: file.get_tensor(stored).float() for name, stored in names.items()}
        except SafetensorError as error:
            raise _no_checkpoint(weights, error_line(error)) from error
    try:
        content = read_pickle(path, weights, mmap=True)
    except UserError as error:
        raise _no_checkpoint(weights, str(error).removeprefix(f"{weights}: ")) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{weights}: holds a {type(content).__name__}, not a state dict. Save the model's state_dict() and name that file.")
    names = _text_names([name for name, value in content.items() if isinstance(value, Tensor)], wanted)
    return {name: content[stored].to(torch.float32, copy=True) for name, stored in names.items()}


def _no_checkpoint(weights: str, why: str) -> UserError:
    return UserError(
        f"{weights}: not a checkpoint that can be read without running code from it ({why}). "
        "Save the model's state_dict() with safetensors or torch.save, and name that file."
    )


def _text_names(stored: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """The tower's name of each stored tensor that belongs to the text tower -> its name in the file.

    A distributed wrapper puts ``module.`` before all names; a model with a tower of its own ``text.`` before the tower's.
    """
    bare = {name.removeprefix("module."): name for name in stored}
    if any(name.startswith("text.") for name in bare):
        bare = {name.removeprefix("text."): original for name, original in bare.items() if name.startswith("text.")}
    prefixes = {name.split(".")[0] for name in wanted}
    return {name: original for name, original in bare.items() if name.split(".")[0] in prefixes}


def _check(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """The tensors are those of the tower, all of them and no other.

    Raises:
        UserError: names the first that differs, and both shapes.
    """
    for name in [*wanted, *stored]:
        has, needs = (str(tuple(side[name].shape)) if name in side else "absent" for side in (stored, wanted))
        if has != needs:
            raise UserError(
                f"{what}: tensor {name} is {has} in the weights and {needs} in the text tower. "
                "Name the architecture that the weights were trained with."
            )


def _content_id(tensors: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of a SHA-256 over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().numpy().data)
    return digest.hexdigest()[:16]
