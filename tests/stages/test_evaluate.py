"""Stages evaluate, report and sample on a run whose models are small and random: real shards, files and pictures."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_run import finished_run, recipe, small_model
from numpy.typing import NDArray
from PIL import Image

from oar_scale.commands import sample
from oar_scale.commands.sample import SampleRequest, sample_pictures
from oar_scale.config.loading import dump_recipe
from oar_scale.config.schema import ParallelConfig
from oar_scale.data.manifest import read_manifest
from oar_scale.data.shards import read_shard
from oar_scale.errors import UserError
from oar_scale.evaluation.evaluation_record import load_evaluation
from oar_scale.generation import pretrained
from oar_scale.generation.sampling import generate
from oar_scale.model import AnyOrderModel, save_model
from oar_scale.observe.console import Console
from oar_scale.run.artifacts import prompt_encoder, read_tokens, without_variant
from oar_scale.run.context import Run
from oar_scale.run.gpu_node import chosen_device, devices_here
from oar_scale.stages import evaluate
from oar_scale.stages.evaluate import run_evaluate
from oar_scale.stages.report import run_report
from oar_scale.storage import join, read_json, write_json
from oar_scale.tokenizers import prompts
from oar_scale.tokenizers.text import train_text_tokenizer

MISSING = "This run has no {} yet."


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run up to the fine-tuned models; ``ordered`` has the weights of ``any_order``."""
    run = finished_run(tmp_path_factory.mktemp("small"))
    with run.log("pretrain") as log:
        for step in (1, 2):
            log.emit("train", step=step, loss=3.5 - step, lr=1e-3, grad_norm=1.0, images_per_s=10.0, data_wait_s=0.0)
    return run


@pytest.fixture(scope="module")
def evaluated(finished: Run) -> Run:
    run_evaluate(finished)
    return finished


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Copies of the run that a test may change, with another recipe if it likes."""

    def copy(**changes: Any) -> Run:
        shutil.copytree(finished.local(), tmp_path / "run")
        return Run(recipe(tmp_path / "run", **changes), Console(io.StringIO()))

    yield copy


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_every_number_of_the_evaluation_is_finite(evaluated: Run) -> None:
    report = numbers(read_json(evaluated.local("evaluation.json")))
    assert len(report) > 60
    assert all(math.isfinite(number) for number in report)


def test_models_with_the_same_weights_differ_by_exactly_nothing(evaluated: Run) -> None:
    evaluation = load_evaluation(evaluated.local())
    assert evaluation is not None
    by_pair = {(d.first, d.second, d.order): d.difference for d in evaluation.nll.differences}
    for order in ("own max_prob", "own gt_logprob", "random"):
        assert (by_pair["ordered", "any_order", order].mean, by_pair["ordered", "any_order", order].standard_error) == (0.0, 0.0)
        assert by_pair["ordered", "control", order].mean != 0.0
    distances = {row.name: row for row in evaluation.distances}
    assert distances["ordered"].fd == distances["any-order"].fd
    grid = evaluation.samples
    assert all(
        np.array_equal(row.samples[grid.columns.index("ordered")], row.samples[grid.columns.index("any_order")]) for row in grid.rows
    )


def test_gt_logprob_orders_leak_and_max_prob_orders_do_not(evaluated: Run) -> None:
    """On models with random weights no order can help; the one that was chosen by the codes seems to."""
    evaluation = load_evaluation(evaluated.local())
    assert evaluation is not None
    nll = {(entry.model, entry.order): entry.nll.mean for entry in evaluation.nll.entries}
    for model in ("any_order", "control", "ordered"):
        assert nll[model, "own gt_logprob"] < nll[model, "random"] - 0.1
        assert nll[model, "own max_prob"] > nll[model, "own gt_logprob"] + 0.1


def test_evaluation_knows_what_the_order_tables_say(evaluated: Run) -> None:
    evaluation = load_evaluation(evaluated.local())
    assert evaluation is not None
    orders = evaluation.orders
    assert orders.images == read_manifest(evaluated.at("tokens", "train")).samples
    assert orders.distinct > 1
    assert orders.mean_step_of_cell.sum() == pytest.approx(sum(range(16)))
    assert all(sorted(example.step_of_cell.ravel()) == list(range(16)) for example in orders.examples)
    assert "all 2 orders are equal" in orders.brute_force


def test_pictures_with_a_variant_in_training_are_told_apart(evaluated: Run) -> None:
    """Families are read with the codes; they are those of the pictures' own shards."""
    heldout, train = (read_tokens(evaluated, split) for split in ("heldout", "train"))
    for split, tokens in (("heldout", heldout), ("train", train)):
        folder = evaluated.at("images", split)
        samples = [each for shard in read_manifest(folder).shards for each in read_shard(join(folder, shard.name), evaluated.cache)]
        assert tokens.keys == [each["__key__"] for each in samples]
        assert tokens.families == [json.loads(each["json"])["family"] for each in samples]
    new_S = without_variant(heldout, train)
    manifest = read_manifest(evaluated.at("images", "heldout"))
    assert 0 < manifest.with_variant_in_train == int((~new_S).sum()) < len(heldout.keys)
    evaluation = load_evaluation(evaluated.local())
    assert evaluation is not None
    novel, near = evaluation.groups
    assert (novel.name, near.name) == ("novel", "near-duplicate")
    assert novel.nll.images == int(new_S[: evaluation.nll.images].sum())
    assert novel.nll.images + near.nll.images == evaluation.nll.images
    for model, order in {(entry.model, entry.order) for entry in evaluation.nll.entries}:
        parts = [
            (table.images, entry.nll.mean)
            for table in (evaluation.nll, novel.nll, near.nll)
            for entry in table.entries
            if (entry.model, entry.order) == (model, order)
        ]
        (count, mean), *of_groups = parts
        assert mean == pytest.approx(sum(images * nll for images, nll in of_groups) / count)
    assert [row.novel for row in evaluation.samples.rows] == new_S[: len(evaluation.samples.rows)].tolist()


def test_edits_hide_the_middle_or_all_but_the_middle(evaluated: Run) -> None:
    evaluation = load_evaluation(evaluated.local())
    assert evaluation is not None
    middle = np.zeros((4, 4), dtype=bool)
    middle[1:3, 1:3] = True
    assert [edit.kind for edit in evaluation.edits] == ["inpainting", "outpainting"]
    assert np.array_equal(evaluation.edits[0].known, ~middle)
    assert np.array_equal(evaluation.edits[1].known, middle)
    assert all(len(edit.completions) == 4 for edit in evaluation.edits)


def test_all_models_edit_the_same_images_and_honestly(evaluated: Run) -> None:
    """Models with the same weights give the same pictures; what is known is that of the picture."""
    evaluation = load_evaluation(evaluated.local())
    assert evaluation is not None and evaluation.gallery is not None and evaluation.drawing is not None
    gallery = evaluation.gallery
    assert gallery.columns == ("any_order", "control", "ordered") and len(gallery.rows) == 8
    for row in gallery.rows:
        any_order, control, ordered = row.edits
        assert np.array_equal(ordered, any_order) and not np.array_equal(ordered, control)
        known = row.known.repeat(4, 0).repeat(4, 1)
        assert 0 < known.sum() < known.size and np.array_equal(control[known], row.original[known])
    assert len({row.known.tobytes() for row in gallery.rows}) == 4
    assert [(leak.kind, leak.model, leak.images) for leak in evaluation.leaks] == [
        (kind, "ordered", 24) for kind in ("inpainting", "outpainting")
    ]
    for leak in evaluation.leaks:
        assert leak.difference.mean == pytest.approx(leak.honest.mean - leak.leaky.mean, abs=1e-5) and leak.difference.mean != 0
    assert sorted(evaluation.drawing.order_N) == list(range(16))


def test_two_processes_find_the_same_numbers_as_one(evaluated: Run, copied: Callable[..., Run]) -> None:
    run = copied(parallel={"workers": 2, "micro_batch": 24})
    run_evaluate(run)
    one, two = (read_json(each.local("evaluation.json")) for each in (evaluated, run))
    assert numbers(one["nll"]) == pytest.approx(numbers(two["nll"]), rel=1e-6)
    assert numbers(one["captions"]) == pytest.approx(numbers(two["captions"]), rel=1e-6, abs=1e-9)


def test_no_more_held_out_images_are_read_than_measured(copied: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor their captions encoded, nor their codes decoded: there may be 50,000 of them, of 256 pixels."""
    run = copied(evaluate={"nll_images": 9, "feature_images": 8}, sample={"images": 10})
    monkeypatch.setattr(prompts, "PROMPTS_AT_ONCE", 4)
    encoded: list[int] = []
    real = prompts.conditioning_inputs

    def noted(encoder: Any, encoded_prompts: torch.Tensor, *rest: Any) -> torch.Tensor:
        encoded.append(len(encoded_prompts))
        return real(encoder, encoded_prompts, *rest)

    monkeypatch.setattr(prompts, "conditioning_inputs", noted)
    inputs = evaluate._read(run, torch.device("cpu"))
    assert len(inputs.heldout.keys) > 10 == len(inputs.heldout_pictures) == len(inputs.cond_inputs_S)
    assert encoded == [4, 4, 2, 2]  # of the held-out images; of the training images that brute force looks at
    whole = real(prompt_encoder(run), prompt_encoder(run).encode(inputs.heldout.prompts[:10]))
    assert torch.equal(inputs.cond_inputs_S, whole)


@pytest.mark.parametrize(
    ("gpus", "parallel", "devices"),
    [
        (8, {"workers": 512, "gpus_per_worker": 1}, [f"cuda:{index}" for index in range(8)]),
        (8, {"workers": 2, "gpus_per_worker": 1}, ["cuda:0", "cuda:1"]),
        (8, {"workers": 3}, ["cpu"] * 3),
        (0, {"workers": 4, "cpu_threads": 2}, ["cpu"] * 2),
    ],
)
def test_evaluation_has_a_process_for_each_gpu_or_core_group(
    gpus: int, parallel: dict[str, int], devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert devices_here(ParallelConfig(**parallel)) == devices


def test_a_gpu_recipe_is_not_evaluated_on_a_cpu_in_silence(copied: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU here the work goes to a node of the cluster that has one, and is refused where there is no cluster."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = copied(parallel={"gpus_per_worker": 1, "micro_batch": 24})
    with pytest.raises(UserError, match=r"works on GPUs .*this machine has none.*\n.*RAY_ADDRESS"):
        run_evaluate(run)
    with pytest.raises(UserError, match=r"torch finds no GPU here, and the recipe has parallel\.gpus_per_worker 1"):
        devices_here(run.recipe.parallel)


def test_report_has_the_numbers_and_pictures_of_the_evaluation(evaluated: Run) -> None:
    path = run_report(evaluated)["path"]
    page = Path(path).read_text()
    evaluation = load_evaluation(evaluated.local())
    assert evaluation is not None
    names = read_tokens(evaluated, "heldout", evaluation.nll.images).family_names
    assert evaluation.nll.families == len(set(names)) < evaluation.nll.images
    assert f"over {evaluation.nll.images} held-out images of {evaluation.nll.families} families" in page
    for entry in evaluation.nll.entries:
        assert f"{entry.nll.mean:.3f} ± {entry.nll.standard_error:.3f}" in page
    for row in evaluation.distances:
        assert f"{row.fd:.1f}" in page
    assert evaluation.samples.rows[0].caption in page
    assert f"of the first {evaluation.samples.compared} training images" in page
    for row in evaluation.samples.rows:
        assert row.nearest is not None and f"nearest ({row.nearest.rms:.0f})" in page
    assert "all 2 orders are equal" in page
    assert "OpenMoji" in page and "CC" in page
    assert "any-order pretraining" in page
    assert page.count("data:image/png;base64,") > 30


def test_report_of_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    page = Path(run_report(Run(recipe(tmp_path), Console(io.StringIO())))["path"]).read_text()
    for section in ("samples", "held-out likelihoods", "distances", "extracted orders", "training curves", "data"):
        assert MISSING.format(section) in page


def test_evaluation_of_another_version_is_refused_by_name(evaluated: Run, tmp_path: Path) -> None:
    shutil.copytree(evaluated.local("figures"), tmp_path / "figures")
    plain = read_json(evaluated.local("evaluation.json"))
    del plain["nll"]["images"]
    write_json(str(tmp_path / "evaluation.json"), plain)
    with pytest.raises(UserError, match=r"evaluation\.json.*stage evaluate again"):
        load_evaluation(str(tmp_path))


def test_without_control_nothing_asks_for_it(copied: Callable[..., Run]) -> None:
    run = copied(pipeline={"control": False}, evaluate={"nll_images": 16, "feature_images": 8})
    os.remove(run.model_uri("control"))
    run_evaluate(run)
    evaluation = load_evaluation(run.local())
    assert evaluation is not None
    assert evaluation.samples.columns == ("any_order", "ordered")
    assert {difference.second for difference in evaluation.nll.differences} == {"any_order"}
    assert "No control" in Path(run_report(run)["path"]).read_text()


@pytest.mark.parametrize(
    ("lost", "stage"),
    [("models/ordered.safetensors", "finetune"), ("models/base.safetensors", "pretrain"), ("orders/train/00000.parquet", "extract"),
     ("tokens/heldout/manifest.json", "tokens"), ("tokenizers/vq.safetensors", "tokenizer")],
)  # fmt: skip
def test_missing_input_names_the_stage_that_makes_it(copied: Callable[..., Run], lost: str, stage: str) -> None:
    run = copied()
    os.remove(run.at(lost))
    with pytest.raises(UserError, match=f"{lost.rsplit('/', 1)[1]}.*stage {stage} "):
        run_evaluate(run)


def test_images_of_one_caption_are_evaluated_unshuffled(copied: Callable[..., Run]) -> None:
    run = copied(evaluate={"nll_images": 8, "feature_images": 8}, tokenizer={"image": {"codebook_size": 32}, "text": {"max_tokens": 1}})
    train_text_tokenizer(["a"] * 10, 64, 1).save(run.text_uri)
    for name in ("base", "any_order", "control", "ordered"):
        save_model(run.model_uri(name), small_model(run, seed=4))
    run_evaluate(run)
    evaluation = load_evaluation(run.local())
    assert evaluation is not None
    assert evaluation.captions == ()


def sample_from(run: Run, out: Path, *captions: str, **options: Any) -> NDArray[np.uint8]:
    """What ``oar sample`` draws from the run's recipe."""
    file = out.with_suffix(".yaml")
    file.write_text(dump_recipe(run.recipe))
    sample_pictures(SampleRequest(target=str(file), captions=captions, out=str(out), **options), say=lambda line: None)
    return np.asarray(Image.open(out))


def test_sample_draws_a_row_for_each_caption(finished: Run, tmp_path: Path) -> None:
    out, captions = tmp_path / "sheet.png", ("a cat", "a red heart")
    first = sample_from(finished, out, *captions)
    assert first.shape == (2 * 128 + 8, 4 * 128 + 3 * 8, 3)
    assert np.array_equal(first, sample_from(finished, out, *captions))
    assert not np.array_equal(first, sample_from(finished, out, *captions, model="control"))
    assert not np.array_equal(first, sample_from(finished, out, *captions, seed=1))


def test_sample_without_captions_draws_held_out_ones(finished: Run, tmp_path: Path) -> None:
    sheet = sample_from(finished, tmp_path / "sheet.png", model="any_order", overrides=["sample.images=2"])
    assert sheet.shape[0] == 2 * 128 + 8
    (tmp_path / "recipe.yaml").write_text(dump_recipe(finished.recipe))
    for part in ("tokenizers", "models", "tokens", "images"):
        (tmp_path / part).symlink_to(finished.local(part))
    request = SampleRequest(target=str(tmp_path), model="any_order", overrides=["sample.images=2"], out=str(tmp_path / "moved.png"))
    sample_pictures(request, say=lambda line: None)
    assert np.array_equal(sheet, np.asarray(Image.open(tmp_path / "moved.png")))


def test_sample_runs_on_the_device_in_the_precision_asked_for(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, used = tmp_path / "sheet.png", list[tuple[torch.device, torch.dtype]]()

    def noted(model: AnyOrderModel, *arguments: Any, **options: Any) -> Any:
        used.append((next(model.parameters()).device, model.dtype))
        return generate(model, *arguments, **options)

    monkeypatch.setattr(pretrained, "generate", noted)
    sample_from(finished, out, "a cat", device="cpu", precision="fp32")
    sample_from(finished, out, "a cat")
    assert used == [(torch.device("cpu"), torch.float32), (chosen_device(None), torch.bfloat16)]
    with pytest.raises(UserError, match="--device gpu: there are cpu, cuda"):
        sample_from(finished, out, "a cat", device="gpu")


def test_sample_is_the_same_from_a_node_of_the_cluster(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What travels there is pickled, and knows the files by absolute names."""
    here = sample_from(finished, tmp_path / "here.png", "a cat")

    def there(run: Run, work: Callable[[Run], Iterator[Any]], **_: Any) -> Iterator[Any]:
        sent = pickle.dumps(work)
        monkeypatch.chdir(tmp_path)
        yield from pickle.loads(sent)(run)

    monkeypatch.setattr(sample, "each_from_gpu_node", there)
    monkeypatch.chdir(Path(finished.local()).parent)
    relative = finished.recipe.model_copy(update={"run_dir": Path(finished.local()).name})
    assert np.array_equal(here, sample_from(Run(relative, finished.console), tmp_path / "there.png", "a cat"))


def test_sample_of_an_unknown_model_names_the_known_ones(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="base, any_order, control, ordered"):
        sample_from(finished, tmp_path / "sheet.png", "a cat", model="anyordre")
