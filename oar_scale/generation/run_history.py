"""How a model was made, as its run has recorded it: ``history.json`` of an exported folder.

    model        its name in the run: ordered, any_order, control, that of an arm; absent of a checkpoint from the middle of a training
    stages       seconds, settings and results of the stages that led to it
    evaluation   what the stage evaluate measured of it, where it did

Nothing here is computed anew, and nothing is guessed: what a run has not recorded, or has done again since, is absent. Places on this
machine or in buckets are cut to their last part, so that a history can be published.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from oar_scale.config.loading import load_recipe
from oar_scale.generation.folder_files import HISTORY, ORDER_MAP, SAMPLES
from oar_scale.generation.model_bundle import RECIPE, ModelBundle
from oar_scale.json_object import JsonObject
from oar_scale.model.run_models import run_model_file
from oar_scale.orders.order_files import folder_files
from oar_scale.orders.policies.mean import mean_order
from oar_scale.registry import MODELS, STAGES, Stage, current_name
from oar_scale.storage import join, open_storage, read_json

_MEASURED = ("nll", "pretrain", "calibration", "captions", "distances", "distance_differences", "orders")
_PLACE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*|~\S*|(?:(?:s3|file|hf)://|/|~[\w.-]*/|\.\.?/).*", re.DOTALL)
"""Folders and keys of buckets may have blanks in their names; text that begins with a web address is a text."""
MAP_PIXELS, SHEET_PIXELS = 256, 96
"""Sides of the order map, and of a picture on the sheet, about: pictures are enlarged by a whole factor."""
SHOWN = 8
"""Samples."""


def read_history(bundle: ModelBundle) -> JsonObject:
    """The history of a run's model, or the one that lies in its exported folder; empty where there is none.

    Raises:
        UserError: a damaged file.
    """
    if bundle.root is None:
        uri = join(bundle.folder, HISTORY)
        return read_json(uri) if open_storage(uri).exists(uri) else {}
    of_run = _stages(bundle)
    name = _name(bundle, of_run)
    history: JsonObject = {"model": name} if name else {}
    stages = {stage: marker for stage in _led_to(name, of_run) if (marker := _marker(bundle, stage)) is not None}
    if stages:
        history["stages"] = {stage: _published(marker) for stage, marker in stages.items()}
    measured = join(bundle.where, "evaluation.json")
    if "evaluate" in stages and open_storage(measured).exists(measured):
        evaluation = read_json(measured)
        history["evaluation"] = {part: _numbers(evaluation[part]) for part in _MEASURED if part in evaluation}
        if samples := evaluation.get("samples"):
            captions = [row["caption"] for row in samples["rows"][:SHOWN]]
            history["evaluation"]["samples"] = {"settings": samples["settings"], "captions": captions}
    return history


def write_pictures(bundle: ModelBundle, history: JsonObject, folder: str, grid: int) -> None:
    """``order-map.png`` and ``samples.png`` in a local folder: from the evaluation of the run, or the exported folder that the bundle is.

    Neither where there is nothing. Raises UserError for a damaged mean order.
    """
    if "evaluation" in history and bundle.root is not None:
        _evaluated_pictures(bundle, str(history["model"]), folder)
    else:
        for name in (ORDER_MAP, SAMPLES):
            source = join(bundle.folder, name)
            if open_storage(source).exists(source):
                open_storage(source).download(source, join(folder, name))
    files = folder_files(folder)
    if os.path.exists(files.mean) and not os.path.exists(join(folder, ORDER_MAP)):
        _write(order_map(np.argsort(mean_order(files, grid)).astype(np.float64)), join(folder, ORDER_MAP))


def order_map(step_N: NDArray[np.float64]) -> Image.Image:
    """When each cell is placed, dark first: of N cells in raster order, as a square."""
    from matplotlib import colormaps  # half a second, which whoever loads a model need not wait for

    grid = round(len(step_N) ** 0.5)
    share_GG = (step_N - step_N.min()).reshape(grid, grid) / max(float(np.ptp(step_N)), 1e-12)
    side = grid * max(1, MAP_PIXELS // grid)
    return Image.fromarray(colormaps["viridis"](share_GG, bytes=True)[..., :3].copy()).resize((side, side), Image.Resampling.NEAREST)


def sheet(pictures: Sequence[NDArray[np.uint8]]) -> Image.Image:
    """Pictures of one size side by side, with white between them."""
    size = len(pictures[0]) * max(1, SHEET_PIXELS // len(pictures[0]))
    whole = Image.new("RGB", (len(pictures) * (size + 8) - 8, size), "white")
    for number, picture in enumerate(pictures):
        whole.paste(Image.fromarray(picture).resize((size, size), Image.Resampling.NEAREST), (number * (size + 8), 0))
    return whole


def _stages(bundle: ModelBundle) -> list[Stage]:
    """The stages of the run, those of its arms and seeds among them."""
    recipe = join(bundle.where, RECIPE)
    return load_recipe(recipe).stages() if open_storage(recipe).exists(recipe) else list(STAGES.values())


def _name(bundle: ModelBundle, stages: Sequence[Stage]) -> str | None:
    assert bundle.root is not None
    names = dict.fromkeys([*MODELS, *(stage.model for stage in stages if stage.model)])
    return next((name for name in names if run_model_file(bundle.root, name) == bundle.model), None)


def _led_to(name: str | None, stages: Sequence[Stage]) -> list[str]:
    """The stages whose results a model rests on; of a checkpoint, those before any training. ``evaluate`` measures those of every run."""
    wanted = {"tokens"} if name is None else {stage.name for stage in stages if stage.model == name}
    if name in MODELS:
        wanted |= {MODELS[name].stage, "evaluate"}
    for stage in reversed(stages):
        if stage.name in wanted and stage.name != "evaluate":
            wanted |= set(stage.needs)
    return [stage.name for stage in stages if stage.name in wanted]


def _marker(bundle: ModelBundle, stage: str) -> JsonObject | None:
    """The marker of a stage that has finished and has not become stale since."""
    assert bundle.root is not None
    uri = join(bundle.where if stage in STAGES and STAGES[stage].local else bundle.root, "stages", f"{stage}.json")
    if not open_storage(uri).exists(uri):
        return None
    marker = read_json(uri)
    return None if "stale" in marker else marker


def _published(marker: JsonObject) -> JsonObject:
    results = {name: value for name, value in marker.get("results", {}).items() if name not in ("skipped", "notes", "failures", "poison")}
    kept = {"seconds": marker.get("seconds"), "settings": marker.get("settings", {}), "results": results}
    return {name: _without_places(value) for name, value in kept.items()}


def _without_places(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_places(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and _PLACE.fullmatch(value):
        return re.split(r"[?#]", value)[0].rstrip("/").rpartition("/")[2]
    return value


def _numbers(value: object) -> object:
    """A part of ``evaluation.json`` without its pictures and maps, which lie in another file, and without what goes with them."""
    if isinstance(value, dict):
        return {name: _numbers(item) for name, item in value.items() if name != "examples" and not _in_other_file(item)}
    return [_numbers(item) for item in value] if isinstance(value, list) else value


def _in_other_file(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"array"}


def _evaluated_pictures(bundle: ModelBundle, model: str, folder: str) -> None:
    figures = join(bundle.where, "figures", "evaluation.npz")
    if not open_storage(figures).exists(figures):
        return
    columns = read_json(join(bundle.where, "evaluation.json")).get("samples", {}).get("columns", [])
    column = next((place for place, name in enumerate(columns) if current_name(name) == model), None)
    try:
        with np.load(io.BytesIO(open_storage(figures).read(figures)), allow_pickle=False) as arrays:
            _write(order_map(arrays["orders.mean_step_of_cell"].flatten()), join(folder, ORDER_MAP))
            names = [name for row in range(SHOWN) if (name := f"samples.rows.{row}.samples.{column}") in arrays]
            if names:
                _write(sheet([arrays[name] for name in names]), join(folder, SAMPLES))
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return  # of another version: the numbers do without


def _write(picture: Image.Image, path: str) -> None:
    picture.save(path, format="PNG", optimize=True)
