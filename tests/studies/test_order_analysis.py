"""``oar orders`` on a real run, and order policies where a run uses them: in training, in drawing, in an exported folder."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import copy_run, prepare_small_run, small_recipe

import oar_scale
from oar_scale.cli import main
from oar_scale.commands.checkpoint_export import export_checkpoint
from oar_scale.config.loading import dump_recipe
from oar_scale.config.schema import Recipe
from oar_scale.data.hashing import permutations
from oar_scale.data.manifest import read_manifest
from oar_scale.data.shards import read_token_shard
from oar_scale.errors import UserError
from oar_scale.model import load_model, model_id, save_model
from oar_scale.observe.console import Console
from oar_scale.observe.run_location import find_run
from oar_scale.observe.status import status
from oar_scale.orders.order_table import OrderTable, read_orders, table_name, write_orders
from oar_scale.orders.policies import grid_policies
from oar_scale.orders.policies.mean import mean_order
from oar_scale.registry import STAGES
from oar_scale.run.context import Run
from oar_scale.storage import read_json, write_json
from oar_scale.studies import compare_extraction as compare
from oar_scale.studies import order_head
from oar_scale.studies.compare_extraction import run_compare
from oar_scale.studies.order_analysis import run_orders, spread
from oar_scale.studies.order_head import run_predict, run_train_head
from oar_scale.training.inputs import job_orders, job_prompts, job_stream
from oar_scale.training.job import TrainingJob


def write_tables(run: Run, folder: str, seed: int, settings_id: str = "s") -> None:
    """Orders that nobody found."""
    tokens = run.at("tokens", "train")
    for number, info in enumerate(read_manifest(tokens).shards):
        keys = read_token_shard(f"{tokens}/{info.name}", run.cache, info).keys
        order = permutations("made up", 64, seed, number, np.arange(len(keys))).astype(np.uint16)
        scores = np.tile(-np.arange(64, dtype=np.float32), (len(keys), 1))
        table = OrderTable(keys, [0] * len(keys), order, scores, model_id(run.model_uri("any_order")), settings_id)
        write_orders(f"{folder}/{table_name(info.name)}", table)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run up to its orders."""
    head = {"steps": 3, "batch": 16, "width": 8, "heldout_fraction": 0.3}
    recipe = small_recipe(str(tmp_path_factory.mktemp("small") / "run"), finetune={"random_share": 0.25}, order_head=head)
    run = replace(prepare_small_run(recipe), console=Console(io.StringIO()))
    model = load_model(run.model_uri("base"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    for name in ("any_order", "ordered"):
        save_model(run.model_uri(name), model)
    write_tables(run, run.at("orders", "train"), 0)
    Path(run.local("recipe.yaml")).write_text(dump_recipe(recipe))
    return run


def changed(run: Run, **changes: object) -> Run:
    return Run(Recipe.model_validate({**run.recipe.model_dump(), **changes}), run.console)


def job(run: Run, stage: str, **training: object) -> TrainingJob:
    """A stage of the run, with other fields in the section that it is of."""
    section = "pretrain" if stage == "pretrain" else "finetune"
    run = changed(run, **{section: {**getattr(run.recipe, section).model_dump(), **training}})
    result = STAGES[stage].model
    assert result is not None
    return TrainingJob(run.recipe, stage, run.at(), run.local(), run.model_uri("any_order"), run.model_uri(result))


# -- the analysis -------------------------------------------------------------------------------------------------------------


def test_one_command_leaves_a_page_numbers_and_two_animations(run: Run, tmp_path: Path) -> None:
    """One command leaves a page its numbers and two animations."""
    write_tables(run, str(tmp_path / "others"), 1)
    page = run_orders(run, images=1000, against=[run.at("orders", "train"), str(tmp_path / "others")], out=str(tmp_path / "out"))
    assert page == str(tmp_path / "out" / "index.html") and "in which order?" in Path(page).read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.html", "orders.json", "appearing.webp", "appearing.gif"}
    report = read_json(str(tmp_path / "out" / "orders.json"))
    images = read_manifest(run.at("tokens", "train")).samples
    assert report["statistics"]["orders"] == report["all_images"] == images and report["statistics"]["distinct"] == images
    assert set(report["distances"]) == set(grid_policies()) | {"mean"} and report["distances"]["raster"] == pytest.approx(0.5, abs=0.05)
    np.testing.assert_allclose(report["step_score"], -np.arange(64))
    same, other = report["agreements"]
    assert same["distance"] == 0 and other["distance"] == pytest.approx(0.5, abs=0.05)


def test_fewer_images_are_whole_shards_from_everywhere(run: Run, tmp_path: Path) -> None:
    """Fewer images are whole shards from all over the data set."""
    shards = list(read_manifest(run.at("tokens", "train")).shards)
    assert spread(shards, 1) == shards[:1] and spread(shards, 10**6) == shards
    assert spread(shards, 20) == [shards[0], shards[-1]]
    run_orders(run, images=20, out=str(tmp_path))
    assert read_json(str(tmp_path / "orders.json"))["statistics"]["orders"] == shards[0].samples + shards[-1].samples


def test_a_folder_without_these_shards_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"00000\.parquet: missing\. --against names a folder with order tables of this run"):
        run_orders(run, images=10, against=[str(tmp_path)], out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# -- the head -----------------------------------------------------------------------------------------------------------------


def test_the_head_is_trained_measured_and_predicts_by_the_cli(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = run.local("recipe.yaml")
    assert main(["orders", recipe, "--train-head", "--predict"]) == 0
    output = capsys.readouterr().out
    assert "order head in hindsight" in output and "mean order of the data set" in output and "2,080" in output
    predicted = [read_orders(str(path)) for path in sorted(Path(run.at("orders", "predicted")).glob("*.parquet"))]
    assert sum(len(table.keys) for table in predicted) == read_manifest(run.at("tokens", "train")).samples
    assert {table.model_id for table in predicted} == {model_id(run.model_uri("any_order"))}
    assert main(["orders", recipe, "--out", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "orders.json").read_text())["head"]["rows"]) == 5
    assert "order head in hindsight" in (tmp_path / "index.html").read_text()


def test_the_training_of_a_head_has_an_end_in_its_events(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """``oar status`` does not call it stalled when it is done, nor still running when it has failed."""
    run_train_head(run, "any_order")
    later = time.time() + 3600
    screen = status(find_run(run.local()), now=later)
    assert re.search(r"^order-head +done", screen, re.MULTILINE) and "STALLED" not in screen
    monkeypatch.setattr(order_head, "save_head", lambda *_: (_ for _ in ()).throw(UserError("the disk is full")))
    with pytest.raises(UserError, match="the disk is full"):
        run_train_head(run, "any_order")
    assert re.search(r"^order-head +failed", status(find_run(run.local()), now=later), re.MULTILINE)


def test_the_comparison_judges_the_head_by_unseen_images(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison judges the head by images that it has not seen."""
    run_train_head(run, "any_order")
    monkeypatch.setattr(compare, "ROUNDS", 1)
    exact, *_, ahead, hindsight, random = run_compare(run, images=20)["ways"]
    assert (ahead["way"], hindsight["way"]) == ("order head ahead", "order head in hindsight")
    assert 2 <= ahead["judged_by_images"] == hindsight["judged_by_images"] < 20 == exact["judged_by_images"] == random["judged_by_images"]
    with pytest.raises(UserError, match=r"cannot be judged by what it has seen\. Take more \(--images\)"):
        run_compare(run, images=2)


def test_a_head_of_other_orders_than_the_present_is_not_used(run: Run, tmp_path: Path) -> None:
    """A head that learned from other orders than there are now is used nowhere."""
    run_train_head(run, "any_order")
    write_tables(run, run.at("orders", "train"), 0, "t")
    try:
        drawer = oar_scale.load(run.local(), model="any_order")
        uses = (run_predict, lambda run: run_compare(run, images=20), lambda run: drawer.draw(["a cat"], order="order-head"))
        for use in uses:
            with pytest.raises(UserError, match=r"learned from orders of the settings s, .* extracted with t\. Train the head again"):
                use(run)
        run_orders(run, images=20, out=str(tmp_path))
        assert read_json(str(tmp_path / "orders.json"))["head"] is None
    finally:
        write_tables(run, run.at("orders", "train"), 0)


def test_a_head_needs_its_model(run: Run) -> None:
    with pytest.raises(UserError, match=r"control\.safetensors: missing\. The stage control writes it"):
        run_train_head(run, "control")


def test_a_file_that_is_gone_of_a_stage_that_is_done_is_made_by_doing_it_again(run: Run) -> None:
    """``oar run`` alone would skip the stage."""
    marker = Path(run.marker("control"))
    write_json(str(marker), {})
    try:
        with pytest.raises(UserError, match=r"control\.safetensors: missing, although the stage control .* is done.*--only control$"):
            run_train_head(run, "control")
    finally:
        marker.unlink()


# -- in training --------------------------------------------------------------------------------------------------------------


def orders_of(job: TrainingJob) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample ids, codes and orders of a few steps."""
    stream = job_stream(job, job_prompts(job), 0, 1)
    batches = [stream.batch(step) for step in range(6)]
    return tuple(torch.cat(each) for each in zip(*((b.uid_b, b.codes_bN, b.orders()) for b in batches), strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["halton", "mean"])
def test_fine_tuning_on_another_order_changes_orders_alone(name: str, run: Run) -> None:
    """Fine tuning on another order changes the orders and nothing else."""
    stored, other, control = (orders_of(each) for each in (job(run, "finetune"), job(run, "finetune", order=name), job(run, "control")))
    assert all(torch.equal(a, b) for a, b in zip(stored[:2], other[:2], strict=True))
    given = torch.tensor(job_orders(job(run, "finetune", order=name)).order)
    follows = (other[2] == given).all(1)
    assert 0.5 < float(follows.float().mean()) < 1.0
    assert not (stored[2][follows] == given).all(1).any()
    assert torch.equal(stored[2][~follows], other[2][~follows]), "the random share takes the random orders it would have taken"
    assert torch.equal(control[2][~follows], other[2][~follows]) and not (control[2][follows] == given).all(1).any()


def test_pretraining_in_one_order_keeps_the_views(run: Run) -> None:
    random, spiral = orders_of(job(run, "pretrain")), orders_of(job(run, "pretrain", order="spiral", random_share=0.0))
    assert torch.equal(random[1], spiral[1])
    assert (spiral[2] == torch.from_numpy(grid_policies()["spiral"].path(8))).all()


def test_fine_tuning_follows_the_heads_written_orders(run: Run) -> None:
    """Fine tuning follows the heads orders where they were written."""
    if not Path(run.at("orders", "predicted")).exists():
        run_train_head(run, "any_order")
        run_predict(run)
    uids, _, orders = orders_of(job(run, "finetune", order="order-head", random_share=0.0))
    tables = [read_orders(str(path)) for path in sorted(Path(run.at("orders", "predicted")).glob("*.parquet"))]
    expected = np.concatenate([table.order_SN for table in tables])[uids.numpy()]
    assert np.array_equal(orders.numpy(), expected)


@pytest.mark.parametrize("order", ["stored", "order-head", "mean"])
def test_fine_tuning_on_several_views_takes_the_order_of_each(order: str, run: Run, tmp_path: Path) -> None:
    """Whatever the orders are, the control sees the same views of the same samples."""
    both = changed(copy_run(run, str(tmp_path)), extract={"views": 2}, finetune=run.recipe.finetune, order_head=run.recipe.order_head)
    save_model(both.model_uri("any_order"), load_model(run.model_uri("any_order")))
    write_tables(both, both.at("orders", "train"), 0)
    tokens, folder = both.at("tokens", "train"), both.at("orders", "predicted" if order == "order-head" else "train")
    if order == "stored":
        with pytest.raises(UserError, match=r"\.parquet: no orders of view 1, where extract\.views asks"):
            orders_of(job(both, "finetune", order=order))
    for path in Path(both.at("orders", "train")).glob("*.parquet"):  # of the second view: the same, backwards
        table = read_orders(str(path))
        two = {"keys": table.keys * 2, "views": [0] * len(table.keys) + [1] * len(table.keys), "draws": None}
        order_SN = np.concatenate([table.order_SN, table.order_SN[:, ::-1]])
        write_orders(str(path), replace(table, **two, order_SN=order_SN, score_SN=np.concatenate([table.score_SN, table.score_SN - 9])))
    if order == "stored":
        run_orders(both, images=20, out=str(tmp_path / "analysis"))
        scores = read_json(str(tmp_path / "analysis" / "orders.json"))["step_score"]
        np.testing.assert_allclose(scores, -np.arange(64), err_msg="scores belong to the orders that are shown, those of the first view")
    if order == "order-head":
        run_train_head(both, "any_order")
        run_predict(both)
    uids, codes, orders = orders_of(job(both, "finetune", order=order, random_share=0.0))
    control = orders_of(job(both, "control", random_share=0.0))
    assert torch.equal(uids, control[0]) and torch.equal(codes, control[1])
    shards = [read_token_shard(f"{tokens}/{info.name}", both.cache, info) for info in read_manifest(tokens).shards]
    views = np.concatenate([np.stack([shard.view(0), shard.view(1)], axis=1) for shard in shards])[uids.numpy()]
    seen = np.stack([(views[:, view] == codes.numpy()).all(axis=1) for view in (0, 1)])
    assert seen.any(axis=0).all() and (seen[0] & ~seen[1]).any() and (seen[1] & ~seen[0]).any()
    if order == "mean":
        return
    tables = [read_orders(f"{folder}/{table_name(info.name)}") for info in read_manifest(tokens).shards]
    of_view = [np.concatenate([t.order_SN[np.array(t.views) == view] for t in tables])[uids.numpy()] for view in (0, 1)]
    for view in (0, 1):
        only = seen[view] & ~seen[1 - view]
        assert np.array_equal(orders.numpy()[only], of_view[view][only])


def test_a_stage_says_at_once_what_its_policy_lacks(run: Run) -> None:
    with pytest.raises(UserError, match=r"finetune\.order 'zigzag': no such policy\. There are: .*spiral"):
        job_orders(job(run, "finetune", order="zigzag"))
    with pytest.raises(UserError, match="order 'confidence' has no orders to train on"):
        job_orders(job(run, "pretrain", order="confidence", random_share=0.0))


# -- in drawing ---------------------------------------------------------------------------------------------------------------


def test_a_sheet_is_drawn_in_the_order_that_is_asked_for(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = run.local("recipe.yaml")
    sheets = {}
    for name in ("spiral", "halton"):
        assert main(["sample", recipe, "a cat", "--order", name, "--out", str(tmp_path / f"{name}.png")]) == 0
        sheets[name] = (tmp_path / f"{name}.png").read_bytes()
    assert main(["sample", recipe, "a cat", "-o", "sample.order=halton", "--out", str(tmp_path / "recipe.png")]) == 0
    assert (tmp_path / "recipe.png").read_bytes() == sheets["halton"] != sheets["spiral"]
    assert main(["sample", recipe, "a cat", "--order", "zigzag"]) == 2
    assert "--order 'zigzag': no such policy" in capsys.readouterr().err


def test_an_order_head_of_other_orders_stays_behind(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.local(), tmp_path / "run")
    old = changed(run, run_dir=str(tmp_path / "run"))
    run_train_head(old, "ordered")
    write_tables(old, old.at("orders", "train"), seed=1, settings_id="newer")
    Path(old.local("recipe.yaml")).write_text(dump_recipe(old.recipe))
    export_checkpoint(old.local(), str(tmp_path / "out"))
    assert not [*(tmp_path / "out").glob("*head*")] and oar_scale.load(str(tmp_path / "out")).draw(["a cat"], order="raster")
    drawn_by_it = changed(old, sample={"order": "order-head"})
    Path(old.local("recipe.yaml")).write_text(dump_recipe(drawn_by_it.recipe))
    with pytest.raises(UserError, match="this order head learned from orders of the settings"):
        export_checkpoint(old.local(), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_an_export_takes_the_mean_order_and_the_head_along(run: Run, tmp_path: Path) -> None:
    """An exported folder takes the mean order and the head along."""
    run_train_head(run, "ordered")
    mean = changed(run, sample={"order": "mean"})
    Path(run.local("recipe.yaml")).write_text(dump_recipe(mean.recipe))
    export_checkpoint(run.local(), str(tmp_path / "out"))
    drawer = oar_scale.load(str(tmp_path / "out"))
    expected = mean_order(drawer.bundle.orders, 8).tolist()
    assert drawer.draw(["a cat"]).order_BN.tolist() == [expected]
    assert drawer.draw(["a cat"], order="raster").order_BN.tolist() == [list(range(64))]
    by_head = drawer.draw(["a cat", "a dog"], order="order-head").order_BN
    assert torch.equal(by_head.sort(1).values, torch.arange(64).expand(2, -1))
    assert torch.equal(by_head, oar_scale.load(run.local()).draw(["a cat", "a dog"], order="order-head").order_BN)
    with pytest.raises(UserError, match="order 'stored' belongs to images that are there already"):
        drawer.draw(["a cat"], order="stored")
