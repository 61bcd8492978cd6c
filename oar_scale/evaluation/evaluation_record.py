"""The results of an evaluation, and how they are kept between the stages.

    evaluation.json           every number and text, as a person or another program would read them
    figures/evaluation.npz    every picture and map; the JSON names them: {"array": "samples.rows.3.original"}

The parts are those of the report (``report.report_data``), so that a report can be written again without a model.
"""

from __future__ import annotations

import io
import types
import zipfile
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.registry import ModelName, current_name
from oar_scale.results.estimates import (
    Calibration,
    CaptionDependence,
    DistanceDifference,
    DistanceRow,
    ImageGroup,
    LeakEffect,
    NllTable,
    PretrainEffect,
)
from oar_scale.results.examples import DrawingExample, EditExample, EditGallery, OrderSummary, SampleGrid, TokenizerMetadata
from oar_scale.storage import join, open_storage, read_json, write_json

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Evaluation:
    """Everything that the stage ``evaluate`` measured and drew."""

    nll: NllTable
    pretrain: PretrainEffect
    captions: tuple[CaptionDependence, ...]
    distances: tuple[DistanceRow, ...]
    samples: SampleGrid
    edits: tuple[EditExample, ...]
    orders: OrderSummary
    tokenizer: TokenizerMetadata
    calibration: tuple[Calibration, ...] = ()
    distance_differences: tuple[DistanceDifference, ...] = ()
    groups: tuple[ImageGroup, ...] = ()
    """The same over novel and over near-duplicate held-out images; empty where all are novel."""
    drawing: DrawingExample | None = None
    gallery: EditGallery | None = None
    leaks: tuple[LeakEffect, ...] = ()


def save_evaluation(evaluation: Evaluation, folder: str) -> None:
    """Write the two files below ``folder``; the JSON comes last and makes them count."""
    arrays: Arrays = {}
    plain = _to_plain(evaluation, arrays, "")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # the names are never one of its options
    uri = join(folder, "figures", "evaluation.npz")
    open_storage(uri).write(uri, buffer.getvalue())
    write_json(join(folder, "evaluation.json"), plain)


def load_evaluation(folder: str) -> Evaluation | None:
    """Read what :func:`save_evaluation` wrote; None where there is none.

    Raises:
        UserError: the files are damaged, or come from another version.
    """
    uri = join(folder, "evaluation.json")
    if not open_storage(uri).exists(uri):
        return None
    figures = join(folder, "figures", "evaluation.npz")
    try:
        with np.load(io.BytesIO(open_storage(figures).read(figures)), allow_pickle=False) as arrays:
            evaluation: Evaluation = _from_plain(Evaluation, upgraded(read_json(uri)), dict(arrays))
    except (KeyError, TypeError, AttributeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{uri}: not what this version of oar_scale writes ({error}). Run the stage evaluate again.") from error
    return evaluation


def upgraded(plain: JsonObject) -> JsonObject:
    """An evaluation of version 0.1.0 in today's words: its "own confidence" orders were those of the recipe's score."""
    novel = plain.pop("nll_new", None)
    if novel is not None:
        plain["groups"] = [{"name": "novel", "nll": novel}]
    for row in (row for table in (plain.get("nll", {}), novel or {}) for rows in ("entries", "differences") for row in table.get(rows, ())):
        if row["order"] == "own confidence":
            row["order"] = f"own {plain['orders']['score']}"
    for table in (plain, *plain.get("groups", ())):  # until version 0.1.0 there were no other features
        for row in (*table.get("distances", ()), *table.get("distance_differences", ())):
            for name in ("kid", "kid_std", "fd"):
                old = name.replace("_", "_efflite0_") if "_" in name else f"{name}_efflite0"
                if old in row:
                    row[name] = row.pop(old)
    return plain


def _to_plain(value: object, arrays: Arrays, path: str) -> object:
    """``value`` as JSON knows it; arrays go to ``arrays`` under the path that leads to them."""
    if isinstance(value, np.ndarray):
        arrays[path] = value
        return {"array": path}
    if is_dataclass(value):
        return {field.name: _to_plain(getattr(value, field.name), arrays, f"{path}.{field.name}".lstrip(".")) for field in fields(value)}
    if isinstance(value, tuple):
        return [_to_plain(item, arrays, f"{path}.{index}") for index, item in enumerate(value)]
    return value


def _from_plain(kind: Any, plain: Any, arrays: Arrays) -> Any:
    """The value of type ``kind`` that :func:`_to_plain` made ``plain`` of."""
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        return None if plain is None else _from_plain(get_args(kind)[0], plain, arrays)
    if kind is ModelName:
        return current_name(plain)
    if isinstance(plain, dict) and plain.keys() == {"array"}:
        return arrays[plain["array"]]
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _from_plain(hints[name], item, arrays) for name, item in plain.items()})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        return tuple(_from_plain(get_args(kind)[0], item, arrays) for item in plain)
    return plain
