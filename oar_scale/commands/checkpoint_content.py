"""``oar checkpoint diff | convert``: how two checkpoints differ, and a checkpoint in the format of DeepSpeed's own tools.

Both read the shards parameter by parameter: memory stays at one parameter, whatever the size of the model.
"""

from __future__ import annotations

import io
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import cast

import torch
from torch import Tensor

from oar_scale.distributed.checkpoints.fetch import local_checkpoint
from oar_scale.distributed.checkpoints.layout import Checkpoint
from oar_scale.distributed.checkpoints.shard_keys import WEIGHTS
from oar_scale.distributed.checkpoints.shard_tensors import Shards, read_shards
from oar_scale.errors import UserError
from oar_scale.runtime.tables import text_table
from oar_scale.storage.folders import new_folder
from oar_scale.text import cut
from oar_scale.tokenizers.pickles import read_pickle

_LATEST, _TAG = "latest_universal", "universal"
_UNIVERSAL = {WEIGHTS: "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""What DeepSpeed's converter takes along, under its names."""
_NOT_COMPARED = ("files", "saved_at")


def diff_checkpoints(first: str, second: str) -> str:
    """The differences of two checkpoints: of their manifests, then the largest absolute one of each parameter and its moments.

    Raises:
        UserError: one of them is not whole.
    """
    with ExitStack() as stack:
        a, b = (stack.enter_context(local_checkpoint(uri)) for uri in (first, second))
        left, right = (read_shards(folder, checkpoint.files) for checkpoint, folder in (a, b))
        kinds = [WEIGHTS, *sorted({*left.moments, *right.moments})]
        rows = [["MANIFEST", first, second], *([name, *values] for name, values in _manifest_differences(a[0], b[0]))]
        differences = [["PARAMETER", *kinds]]
        for name in sorted({*left.shapes, *right.shapes}):
            differences.append([name, *(_difference(left, right, name, kind) for kind in kinds)])
    return "\n".join([*text_table(rows, align="numbers right"), "", *text_table(differences, align="numbers right")])


def convert_checkpoint(uri: str, out: str) -> str:
    """Write a checkpoint in DeepSpeed's universal format: ``out/universal``, for ``load_universal``, with the moving average beside it.

    DeepSpeed's own converter writes it, from what our own reading has let pass; then every value in it is compared with the shards.

    Raises:
        UserError: the checkpoint is not whole, a file of it asks for code to be run, it was written under ZeRO 0, or something is at
            ``out`` already.
    """
    with local_checkpoint(uri) as (checkpoint, folder):
        if checkpoint.zero_stage == 0:
            raise UserError(f"{uri}: DeepSpeed converts none of ZeRO 0. Continue it under ZeRO 1, 2 or 3, and convert the next one.")
        shards = read_shards(folder, checkpoint.files)  # first, since the converter makes folders of the parameters' names
        with new_folder(out, last=_LATEST) as target:
            _to_universal(folder, checkpoint.files, os.path.join(target, _TAG))
            for name in shards.shapes:
                _check_parameter(shards, name, os.path.join(target, _TAG, "zero", name), uri)
    return out


def _to_universal(folder: str, names: Iterable[str], out: str) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    from oar_scale.distributed.checkpoints.deepspeed_files import safe_torch_load

    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True, "inject_missing_state": False}
    with tempfile.TemporaryDirectory(prefix="oar-convert-") as only:  # it takes whatever lies in its folder
        for name in names:
            os.symlink(os.path.abspath(os.path.join(folder, name)), os.path.join(only, name))
        with safe_torch_load(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it prints progress and draws bars
            main(Namespace(input_folder=only, output_folder=out, **settings))


def _check_parameter(shards: Shards, name: str, folder: str, uri: str) -> None:
    """Compare what the converter wrote of a parameter with the shards; add the moments that it does not know."""
    for kind in (WEIGHTS, *shards.moments):
        path, whole = os.path.join(folder, f"{_UNIVERSAL.get(kind, kind)}.pt"), shards.whole(name, kind)
        if kind not in _UNIVERSAL:
            torch.save({"param": whole.clone()}, path)
            continue
        stored = read_pickle(path, path)
        tensor = cast(Tensor, stored["param"] if isinstance(stored, dict) else stored)  # the bare tensor under ZeRO-3
        if not torch.equal(tensor.view(whole.shape), whole):
            raise RuntimeError(f"{uri}: DeepSpeed's converter has changed {kind} of {name}")


def _manifest_differences(a: Checkpoint, b: Checkpoint) -> Iterator[tuple[str, list[str]]]:
    left, right = (dict(_flat({name: value for name, value in each.manifest.items() if name not in _NOT_COMPARED})) for each in (a, b))
    for name in sorted({*left, *right}):
        values = [str(each.get(name, "-")) for each in (left, right)]
        if values[0] != values[1]:
            yield _short(name), [_short(value) for value in values]


def _short(text: str) -> str:
    return cut(text, lines=1, characters=100)


def _flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _difference(left: Shards, right: Shards, name: str, kind: str) -> str:
    here: list[Tensor | None] = [
        each.whole(name, kind) if name in each.shapes and (kind == WEIGHTS or kind in each.moments) else None for each in (left, right)
    ]
    if here[0] is None or here[1] is None:
        return "-" if here[0] is here[1] else "only one"
    if here[0].shape != here[1].shape:
        return "shapes"
    return f"{float((here[0] - here[1]).abs().max()):.3g}"
