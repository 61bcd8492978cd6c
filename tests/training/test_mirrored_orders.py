"""A mirrored view follows its original's order, mirrored: what is trained on, and what is not extracted for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small_run import prepare_small_run, small_recipe

from oar_scale.config.data_sections import mirrored_views
from oar_scale.config.schema import Recipe
from oar_scale.data.manifest import read_manifest
from oar_scale.data.shards import read_token_shard
from oar_scale.data.stream import Batch
from oar_scale.model import model_id
from oar_scale.orders.order_table import OrderTable, mirror_orders, table_name, write_orders
from oar_scale.run.context import Run
from oar_scale.run.stage_markers import stage_fingerprint
from oar_scale.training.inputs import job_prompts, job_stream
from oar_scale.training.job import TrainingJob

VIEWS = ("center", "jitter1", "center_flip")
GRID = 8


def recipe(folder: str, **extract: Any) -> Recipe:
    return small_recipe(folder, tokenizer={"views": VIEWS}, extract=extract, finetune={"random_share": 0.25})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With a random order for the first view of each image."""
    run = prepare_small_run(recipe(str(tmp_path_factory.mktemp("run")), mirror=True))
    random = np.random.default_rng(0)
    for shard in read_manifest(run.at("tokens", "train")).shards:
        keys = read_token_shard(run.at("tokens", "train", shard.name), run.cache).keys
        order_SN = np.stack([random.permutation(GRID**2) for _ in keys]).astype(np.uint16)
        scores_SN = np.zeros(order_SN.shape, dtype=np.float32)
        table = OrderTable(keys, [0] * len(keys), order_SN, scores_SN, model_id(run.model_uri("base")), "settings")
        write_orders(run.at("orders", "train", table_name(shard.name)), table)
    return run


def job(run: Run, stage: str, recipe: Recipe | None = None) -> TrainingJob:
    return TrainingJob(recipe or run.recipe, stage, run.at(), run.local(), run.model_uri("base"), run.at("result"))


def batches(training: TrainingJob, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(job_stream(training, job_prompts(training), rank, world).batches(0, 30))


def stored_orders(run: Run) -> dict[bytes, tuple[int, np.ndarray]]:
    """By the codes of each view of each image: the view's number, and the order of the image's first view."""
    from oar_scale.orders.order_table import read_orders

    found = {}
    for shard in read_manifest(run.at("tokens", "train")).shards:
        tokens = read_token_shard(run.at("tokens", "train", shard.name), run.cache)
        order_SN = read_orders(run.at("orders", "train", table_name(shard.name))).order_SN
        for view in range(len(VIEWS)):
            found |= {codes.astype(np.int64).tobytes(): (view, order) for codes, order in zip(tokens.view(view), order_SN, strict=True)}
    return found


def test_left_and_right_change_places() -> None:
    order = np.array([[0, 5, 2, 7, 1, 3, 4, 6, 8]], dtype=np.uint16)
    grid = np.empty((3, 3), dtype=int)
    grid.flat[order[0]] = np.arange(9)
    mirrored = np.empty((3, 3), dtype=int)
    mirrored.flat[mirror_orders(order, 3)[0]] = np.arange(9)
    np.testing.assert_array_equal(mirrored, grid[:, ::-1])
    large = np.arange(256**2, dtype=np.uint16)
    np.testing.assert_array_equal(np.sort(mirror_orders(large, 256)), large)
    np.testing.assert_array_equal(mirror_orders(mirror_orders(large, 256), 256), large)


def test_a_mirrored_view_follows_its_originals_order_mirrored(run: Run) -> None:
    found, seen = stored_orders(run), np.zeros(3, dtype=int)
    for batch in batches(job(run, "finetune")):
        for codes, order, fixed in zip(batch.codes_bN.numpy(), batch.orders().numpy(), batch.fixed_b.tolist(), strict=True):
            view, stored = found[codes.tobytes()]
            if fixed:
                seen[view] += 1
                expected = {0: stored, 2: mirror_orders(stored, GRID)}[view]
                np.testing.assert_array_equal(order, expected)
    assert seen[1] == 0 and seen[0] > 60 and seen[2] > 60, "both are taken about as often; the jittered view has no order"


def test_the_control_sees_the_same_views(run: Run) -> None:
    """As does another order policy, and each of two ranks."""
    expected = batches(job(run, "finetune"))
    other = run.recipe.model_copy(update={"finetune": run.recipe.finetune.model_copy(update={"order": "halton"})})
    for training in (job(run, "control"), job(run, "finetune", other)):
        assert all(torch.equal(a.codes_bN, b.codes_bN) for a, b in zip(batches(training), expected, strict=True))
    of_ranks = zip(*(batches(job(run, "finetune"), rank, 2) for rank in range(2)), strict=True)
    for whole, parts in zip(expected, of_ranks, strict=True):
        for rank, part in enumerate(parts):
            assert torch.equal(part.codes_bN, whole.codes_bN[rank::2]) and torch.equal(part.orders(), whole.orders()[rank::2])


def test_tables_stay_what_they_are_and_trainings_do_not(tmp_path: Path, run: Run) -> None:
    """A finished extraction counts with and without; a training does not, and no checkpoint of one is taken for that of the other."""
    plain = recipe(str(tmp_path))
    stages = {stage.name: stage for stage in plain.stages()}
    changed = {name for name, stage in stages.items() if stage_fingerprint(plain, stage) != stage_fingerprint(run.recipe, stage)}
    assert changed == {"finetune", "control", "evaluate", "report"}
    with_mirror, without = (job(run, "finetune", each) for each in (run.recipe, plain))
    assert with_mirror.changed_since(without.identity) == {"extract.mirror": (None, True)}
    assert without.changed_since(with_mirror.identity) == {"extract.mirror": (True, None)}


def test_a_view_and_its_mirror_image() -> None:
    ten = tuple(f"crop{number}" for number in range(10))
    assert mirrored_views(ten, 5) == {0: 5, 1: 6, 2: 7, 3: 8, 4: 9}
    assert mirrored_views(("center_flip", "jitter1", "center"), 1) == {0: 2}
    assert mirrored_views(("crop12", "crop3", "crop17"), 2) == {0: 2}
    assert mirrored_views(("center", "jitter1"), 2) == {}


@pytest.mark.parametrize(
    ("views", "count", "complaint"),
    [
        (("center", "jitter1"), 2, "(?s)orders are extracted for center, jitter1, and no view of tokenizer.views is a mirror image"),
        (("center", "center_flip"), 2, "(?s)with extract.views 2 orders are extracted for center_flip itself"),
    ],
)
def test_recipes_without_a_mirrored_view_are_refused(views: tuple[str, ...], count: int, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Recipe.model_validate({"name": "a", "tokenizer": {"views": views}, "extract": {"mirror": True, "views": count}})
