"""``oar evaluate --flexibility`` on a small run: from the command to ``flexibility.json`` and the page; stopped, continued, refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_run import finished_run, recipe, small_model
from numpy.typing import NDArray
from scipy import stats

from oar_scale.cli import main
from oar_scale.commands.drawing_target import DrawingTarget
from oar_scale.config.loading import dump_recipe
from oar_scale.config.run_sections import SAMPLE_SCORES
from oar_scale.data.hashing import derived_seed
from oar_scale.errors import UserError
from oar_scale.evaluation.distances import kid_difference, kid_shares
from oar_scale.evaluation.features import picture_features
from oar_scale.evaluation.flexibility.pieces import NetworkFile
from oar_scale.evaluation.flexibility.subjects import Arm, ArmModel
from oar_scale.evaluation.likelihood import nll_table, random_orders
from oar_scale.generation.sampling import generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import load_model, save_model
from oar_scale.registry import ModelName
from oar_scale.results.flexibility import FORMAT, MeasuredModel, unpaired_arms
from oar_scale.results.statistics import clustered_error
from oar_scale.run.artifacts import prompt_encoder, read_pictures, read_tokens
from oar_scale.run.context import Run
from oar_scale.storage import read_json
from oar_scale.studies import flexibility_models
from oar_scale.studies.flexibility import FlexibilityRequest, _plan, describe
from oar_scale.studies.flexibility_models import HeldoutImages, first_images, named_arms, sweep_images
from oar_scale.studies.flexibility_orders import fixed_orders
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, load_vq, save_vq, unit_to_pixels
from tools import flexibility_tables

IMAGES = 12


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = finished_run(tmp_path_factory.mktemp("small"), parallel={"workers": 1, "micro_batch": 24, "precision": "fp32"})
    save_model(run.local("second.safetensors"), small_model(run, 7))
    return run


def models_of(run: Run) -> list[str]:
    """Two seeds of one arm, and the control."""
    folder = run.local()
    return [f"ordered={folder}:ordered,{folder}/second.safetensors", f"{folder}:control"]


def flexibility(models: list[str], out: Path, *more: str) -> int:
    return main(["evaluate", "--flexibility", *models, "--out", str(out), "--images", str(IMAGES), *more])


@pytest.fixture(scope="module")
def measured(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("flexibility")
    assert flexibility(models_of(finished), out, "--chapters", "likelihood") == 0
    return out


def test_figures_are_those_of_the_models_and_of_scipy(finished: Run, measured: Path) -> None:
    """One column again, from the model files; its intervals and tests by scipy."""
    found = read_json(str(measured / "flexibility.json"))
    tokens = read_tokens(finished, "heldout", IMAGES)
    orders = {"random": random_orders(IMAGES, 16, finished.recipe.seed)}
    conditions = prompt_encoder(finished).encode(tokens.prompts)
    files = {("ordered", 0): "models/ordered", ("ordered", 1): "second", ("control", 0): "models/control"}
    nll = {}
    for model in found["models"]:
        key = model["label"], model["seed"]
        table = nll_table(load_model(finished.local(f"{files[key]}.safetensors")), torch.from_numpy(tokens.codes_SN), conditions, orders, 5)
        nll[key] = table["random"].numpy()
        with np.load(measured / model["arrays"]) as arrays:
            assert arrays["nll/random"] == pytest.approx(nll[key], rel=1e-5)
    assert read_json(str(measured / "arrays" / "images.json"))["keys"] == tokens.keys

    difference_S = (nll["ordered", 0] + nll["ordered", 1]) / 2 - nll["control", 0]
    (row,) = [each for each in found["differences"] if each["measure"] == "nll/random"]
    assert (row["first"], row["second"]) == ("ordered", "control")
    assert row["comparison"]["difference"]["mean"] == pytest.approx(difference_S.mean(), rel=1e-4)
    over_seeds = stats.ttest_1samp([(nll["ordered", seed] - nll["control", 0]).mean() for seed in (0, 1)], 0)
    assert row["comparison"]["p_seeds"] == pytest.approx(over_seeds.pvalue, rel=1e-3)
    exact = stats.permutation_test((difference_S, 0 * difference_S), lambda a, b: np.mean(a - b), permutation_type="samples")
    assert row["comparison"]["p_images"] == pytest.approx(exact.pvalue, abs=1e-9), "12 images: all 4,096 flips are tried"
    assert row["comparison"]["p_images"] <= row["p_images_holm"] <= 1


def test_a_call_that_was_stopped_goes_on_where_it_was(
    finished: Run, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without time nothing is measured, and no report is written; then only what is missing, to the same numbers."""
    shutil.copytree(measured / "pieces", tmp_path / "pieces")
    for piece in list((tmp_path / "pieces").glob("NllPiece-*"))[:2]:
        piece.unlink()
    assert flexibility(models_of(finished), tmp_path, "--chapters", "likelihood", "--minutes", "1e-9") == 75
    said = capsys.readouterr().out
    assert "stopped after its minutes: 2 of" in said and "The same command goes on from here" in said
    assert not (tmp_path / "flexibility.json").exists()
    stale = tmp_path / "arrays" / "gone-0.npz"
    stale.parent.mkdir()
    stale.touch()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pieces").iterdir()}
    assert flexibility(models_of(finished), tmp_path, "--chapters", "likelihood") == 0
    assert not stale.exists(), "values of models that are named no more"
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pieces").iterdir()}
    assert len(after) == len(before) + 2 and before.items() <= after.items()
    assert json.loads((tmp_path / "flexibility.json").read_text()) == json.loads((measured / "flexibility.json").read_text())


def test_the_report_of_another_call_does_not_pass_for_the_one_under_way(finished: Run, measured: Path, tmp_path: Path) -> None:
    shutil.copytree(measured, tmp_path, dirs_exist_ok=True)
    next((tmp_path / "pieces").glob("NllPiece-*")).unlink()
    stopped = ["--chapters", "likelihood", "--minutes", "1e-9"]
    assert flexibility(models_of(finished), tmp_path, *stopped) == 75
    assert (tmp_path / "flexibility.json").exists() and (tmp_path / "index.html").exists(), "the same call: its report stays"
    report = (tmp_path / "flexibility.json").read_text()
    assert flexibility(models_of(finished), tmp_path, "--against", "ordered", *stopped) == 75
    assert not (tmp_path / "flexibility.json").exists() and not (tmp_path / "index.html").exists()
    (tmp_path / "flexibility.json").write_text(report.replace(f'"format": {FORMAT}', '"format": 1'))
    assert flexibility(models_of(finished), tmp_path, *stopped) == 75
    assert not (tmp_path / "flexibility.json").exists(), "of an older format: its figures are others"


def test_orders_of_a_pretraining_are_those_of_one_in_random_orders(finished: Run) -> None:
    images = first_images(finished, "heldout", 4)
    assert "random seen" in fixed_orders(images)[0]
    for changes, why in (({"steps": 0}, "pretrain.steps is 0"), ({"order": "halton", "random_share": 0.0}, "its order is halton")):
        pretrain = finished.recipe.pretrain.model_copy(update=changes)
        found, notes = fixed_orders(replace(images, run=Run(finished.recipe.model_copy(update={"pretrain": pretrain}))))
        assert "random" in found and "random seen" not in found
        assert any("Random orders of the pretraining were left out" in note and why in note for note in notes)


@pytest.mark.parametrize(
    "change",
    [{"steps": 16}, {"top_p": 0.5}, {"min_p": 0.3}, {"order_temperature": 2.0}, {"guidance_schedule": "linear"}, {"score": "margin"}],
)
def test_settings_that_change_images_are_told_apart(change: dict[str, Any]) -> None:
    """``oar compare`` knows by the phrase which samples may be compared."""
    usual = SampleSettings(guidance=2.0, temperature=1.0, top_k=0, order_temperature=0.0)
    assert describe(usual) == describe(replace(usual, draft=4)) == "guidance 2, temperature 1"
    (name, value), *_ = change.items()
    assert describe(replace(usual, **change)) == f"guidance 2, temperature 1, {name} {value}"


def test_whatever_a_report_depends_on_makes_it_one_of_another_call(finished: Run) -> None:
    plan = _plan(FlexibilityRequest(tuple(models_of(finished)), "", images=4, chapters=("likelihood",)))
    images, tokens = plan.images, plan.images.tokens

    def of_run(**sections: object) -> HeldoutImages:
        return replace(images, run=Run(finished.recipe.model_copy(update=sections)))

    recipe = finished.recipe
    others = {
        "orders": replace(plan, fixed=plan.fixed | {"random": plan.fixed["random"][::-1]}),
        "an order less": replace(plan, fixed={name: order for name, order in plan.fixed.items() if name != "mean"}),
        "precision": replace(plan, images=of_run(parallel=recipe.parallel.model_copy(update={"precision": "bf16"}))),
        "seed": replace(plan, images=of_run(seed=recipe.seed + 1)),
        "ties": replace(plan, images=of_run(extract=recipe.extract.model_copy(update={"tie_seed": 5}))),
        "captions": replace(plan, images=replace(images, tokens=replace(tokens, captions=["a pear", *tokens.captions[1:]]))),
        "families": replace(plan, images=replace(images, families=["pears", *images.families[1:]])),
        "keys": replace(plan, images=replace(images, tokens=replace(tokens, keys=tokens.keys[::-1]))),
        "settings": replace(plan, settings=replace(plan.settings, temperature=0.5)),
        "against": replace(plan, against="ordered"),
        "chapters": replace(plan, chapters=("likelihood", "edits")),
    }
    calls = {name: other.call for name, other in others.items()}
    assert plan.call not in calls.values() and len({*calls.values()}) == len(others)
    assert replace(plan, images=of_run(pipeline=recipe.pipeline)).call == plan.call, "the same again"


def test_models_of_runs_are_paired_by_the_seeds_of_their_trainings(tmp_path: Path) -> None:
    """However they are listed. Arms of other seeds are not paired; of files nothing is known, and they are paired as they are listed."""
    run = Run(recipe(tmp_path, pipeline={"seeds": 3}))

    def arm(label: str, *names: str) -> Arm:
        target = DrawingTarget(None, run)  # type: ignore[arg-type]  # no file is opened
        seeds = [flexibility_models._drawn_from(name, target) for name in names]
        files = [NetworkFile(name, "", name) for name in names]
        models = [ArmModel(label, 0, file, np.zeros(1), seed) for file, seed in zip(files, seeds, strict=True)]
        return Arm(label, flexibility_models._by_seed(models))

    control, crosswise = arm("control", "a:control", "a:control.s1"), arm("ordered", "a:ordered.s1", "a:ordered")
    seeds = {name: run.recipe.of(run.recipe.stage(name)).seed for name in ("control", "control.s1")}
    assert {model.file.id.removeprefix("a:"): model.drawn_from for model in control.models} == seeds
    pairs = list(zip(control.models, crosswise.models, strict=True))
    assert all(one.drawn_from == other.drawn_from and one.seed == other.seed for one, other in pairs)
    others = arm("others", "a:ordered", "a:ordered.s2"), arm("files", "a.safetensors", "b.safetensors"), arm("one", "a:ordered.s2")
    measured = [
        MeasuredModel(model.label, model.seed, model.drawn_from, model.file.where, model.file.id, "")
        for each in (control, crosswise, *others)
        for model in each.models
    ]
    assert unpaired_arms(measured, "control") == ["others"]


DRAWN, CHOSEN_ON = 3, 6


@pytest.fixture(scope="module")
def drawn(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples and edits of two models, and a sweep, on three images."""
    out, folder = tmp_path_factory.mktemp("drawn"), finished.local()
    more = ["--images", str(DRAWN), "--chapters", "samples,edits", "--sweep", "temperature=0.5,1"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(flexibility_models, "CHOSEN_ON", CHOSEN_ON)
        assert flexibility([f"{folder}:ordered", f"{folder}:control"], out, *more) == 0
    return out


@torch.no_grad()
def features_by_hand(run: Run, name: ModelName, rows: list[int], temperature: float, seed: int) -> NDArray[np.float32]:
    """Samples for the captions of some held-out images in the order that the model chooses, as pictures, as features."""
    tokens, model, vq = read_tokens(run, "heldout"), load_model(run.model_uri(name)), load_vq(run.vq_uri)
    condition = model.condition(prompt_encoder(run).encode([tokens.prompts[row] for row in rows]))
    settings = replace(SampleSettings.from_recipe(run.recipe.sample), temperature=temperature)
    made = generate(model, condition, settings, derived_seed("drawing", seed), images_B=np.arange(len(rows)))
    return picture_features(unit_to_pixels(vq.decode(made.codes_BN)).numpy())


def test_distances_are_those_of_samples_drawn_by_hand(finished: Run, drawn: Path) -> None:
    """The U-statistic over pairs of different captions; its difference and error by ``kid_difference``."""
    found = read_json(str(drawn / "flexibility.json"))
    pictures = read_pictures(finished, "heldout", read_tokens(finished, "heldout", DRAWN).keys)
    heldout = picture_features(np.stack(pictures))
    by_hand = {name: features_by_hand(finished, name, list(range(DRAWN)), 1.0, finished.recipe.seed) for name in ("ordered", "control")}
    shares = {}
    for model in found["models"]:
        with np.load(drawn / model["arrays"]) as arrays:
            shares[model["label"]] = arrays["samples/max_prob/heldout"]
    wanted = kid_difference(by_hand["ordered"], by_hand["control"], heldout)
    difference = shares["ordered"] - shares["control"]
    assert difference.mean() == pytest.approx(wanted.mean, rel=1e-3)
    assert stats.sem(difference) == pytest.approx(wanted.standard_error, rel=1e-3)
    columns = {each["name"].split("/")[1] for each in found["measures"] if each["chapter"] == "samples"}
    assert columns == {"random", "raster", "halton", "spiral", "mean", "best", *SAMPLE_SCORES}
    assert {each["unit"] for each in found["measures"] if each["chapter"] == "samples"} == {"kid_efflite0"}


def test_the_best_setting_is_chosen_on_other_families_with_other_noise(finished: Run, drawn: Path) -> None:
    """On held-out images behind the measured ones, of other families than these; drawn with a seed that no figure is drawn with."""
    found = read_json(str(drawn / "flexibility.json"))
    tokens = read_tokens(finished, "heldout")
    families = dict(zip(tokens.keys, tokens.families, strict=True))
    measured = {families[key] for key in tokens.keys[:DRAWN]} - {""}
    rows = [row for row in range(DRAWN, len(tokens.keys)) if families[tokens.keys[row]] not in measured][:CHOSEN_ON]
    assert found["sweep_images"] == f"{CHOSEN_ON} images of heldout, of other families than those that are measured"
    assert any(f"chosen on {CHOSEN_ON} images only" in note for note in found["notes"])
    keys = [tokens.keys[row] for row in rows]
    others = picture_features(np.stack(read_pictures(finished, "heldout", keys)))
    by_family = [families[key] or f"image {key}" for key in keys]
    numbers = np.array([by_family.index(family) for family in by_family])
    seed = derived_seed("sweep", finished.recipe.seed)
    for label in ("ordered", "control"):
        of_arm = [each for each in found["sweep"] if each["label"] == label]
        shares = [kid_shares(features_by_hand(finished, label, rows, each["temperature"], seed), others, numbers) for each in of_arm]
        means = [float(each.mean()) for each in shares]
        assert [each["distance"] for each in of_arm] == pytest.approx(means, rel=1e-3)
        assert [each["chosen"] for each in of_arm] == [mean == min(means) for mean in means]
        best = shares[int(np.argmin(means))]
        assert [each["above_error"] for each in of_arm] == pytest.approx(
            [clustered_error(each - best, numbers) for each in shares], rel=1e-2
        )
        assert [each["edges"] for each in of_arm if each["chosen"]] == [["temperature"]], "of two values each is at the edge"


def test_measured_images_of_one_family_have_no_distance(finished: Run) -> None:
    images = first_images(finished, "heldout", 4)
    twins = replace(images, families=["apple"] * 4)
    others, _ = sweep_images(twins)
    assert not {"apple"} & set(others.families) and min(others.rows) == 4
    everything = replace(images, families=first_images(finished, "heldout", len(read_tokens(finished, "heldout").keys)).families)
    with pytest.raises(UserError, match=r"0 are of other families than the 4 that are measured"):
        sweep_images(everything)


def test_tables_of_a_report_have_its_differences(
    measured: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Markdown; to another arm than the report's it is the same number with the other sign, and nothing is corrected."""

    def printed(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["flexibility_tables.py", *arguments])
        flexibility_tables.main()
        return capsys.readouterr().out.splitlines()

    found = read_json(str(measured / "flexibility.json"))
    (row,) = [each for each in found["differences"] if each["measure"] == "nll/random"]
    mean, both = row["comparison"]["difference"]["mean"], row["comparison"]["difference"]["over_both"]
    lines = printed(str(measured))
    columns = next(line for line in lines if line.startswith("| arm | random | random seen |"))
    of_arm = lines[lines.index(columns) + 3]
    assert of_arm.startswith(f"| ordered | {mean:+.3f} ± {(both['high'] - both['low']) / 2:.3f}") and "own of" not in columns
    assert of_arm.count("|") == columns.count("|")

    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    found = read_json(str(tmp_path / "flexibility.json"))
    for row in found["differences"]:
        row["p_holm"] = 0.04 if row["measure"] == "samples/random/heldout" else 0.2
    (tmp_path / "flexibility.json").write_text(json.dumps(found))
    mean = next(row for row in found["differences"] if row["measure"] == "samples/random/heldout")["comparison"]["difference"]["mean"]
    for arguments in ((), ("--against", "control")):
        (marked,) = [line for line in printed(str(tmp_path), *arguments) if "*" in line]
        assert re.match(rf"\| ordered \| {re.escape(f'{mean:+.3f}')} ± [\d.]+\* \|", marked) and marked.count("*") == 1
    turned = printed(str(tmp_path), "--against", "ordered")
    assert any(line.startswith(f"| control | {-mean:+.3f} ± ") for line in turned) and not any("*" in line for line in turned)

    images = read_json(str(tmp_path / "arrays" / "images.json"))
    del images["families"]
    (tmp_path / "arrays" / "images.json").write_text(json.dumps(images))
    with pytest.raises(UserError, match="by an earlier version"):
        printed(str(tmp_path), "--against", "ordered")

    found["format"] = FORMAT - 1
    (tmp_path / "flexibility.json").write_text(json.dumps(found))
    for arguments, message in (
        ((str(measured), "--against", "nobody"), "There are: ordered, control"),
        ((str(measured / "pieces"),), "no flexibility.json"),
        ((str(tmp_path),), f"of format {FORMAT - 1}"),
    ):
        with pytest.raises(UserError, match=message):
            printed(*arguments)


def test_the_page_shows_every_table_and_picture(drawn: Path, measured: Path) -> None:
    page = (drawn / "index.html").read_text()
    assert page.count("data:image/png") == 2 * DRAWN * (2 + 10) + 3 * DRAWN * (2 + 2), "samples by arm; edits by hole"
    text = re.sub('data:image/png;base64,[^"]*', "", page)
    assert not re.search(r"\bnan\b", text, re.IGNORECASE) and "images of heldout, of other families" in text
    assert "at the edge of what was tried" in text and "Primary differences to control" in text
    for word in ("inpainting", "outpainting", "right half", "kid_efflite0", "One seed each"):
        assert word in text
    page = (measured / "index.html").read_text()
    assert (
        "over seeds (Student" in page
        and re.search(r'class="muted">[−+][\d.]+ ± [\d.]+</span>\s*<span class="detail muted">images [\d.]+ to', page)
        and "those of control (not tested)" in page
        and "its own (primary)" in page
        and "data:image/png" not in page
    )


def refused(capsys: pytest.CaptureFixture[str], models: list[str], out: Path, *more: str) -> str:
    assert flexibility(models, out, *more) == 2
    return capsys.readouterr().err


def test_models_that_do_not_fit_together_are_refused(finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished.local()
    control = f"{folder}:control"
    model = load_model(finished.local("models", "control.safetensors"))
    wide = model.spec.model_copy(update={"grid": 5})
    save_model(str(tmp_path / "wide.safetensors"), type(model)(wide))
    said = refused(capsys, [control, str(tmp_path / "wide.safetensors")], tmp_path)
    assert "wide.safetensors: draws 5 x 5 cells of 32 codes" in said and "are 4 x 4 of 32" in said

    other = tmp_path / "other"
    shutil.copytree(finished.local("models"), other / "models")
    shutil.copytree(finished.local("tokenizers"), other / "tokenizers")
    (other / "recipe.yaml").write_text((Path(folder) / "recipe.yaml").read_text())
    torch.manual_seed(5)
    spec = VQSpec(image_size=16, channels=32, multipliers=(1, 1, 1), res_blocks=1, latent_channels=32, codebook_size=32, codebook_dim=4)
    save_vq(str(other / "tokenizers" / "vq.safetensors"), VQTokenizer(spec))
    said = refused(capsys, [control, f"theirs={other}:control"], tmp_path)
    assert f"{other}:control: its image tokenizer is" in said and finished.vq_uri in said and "another picture" in said


@pytest.mark.parametrize(
    ("models", "more", "error"),
    [
        (["{run}:control", "{run}:control"], [], "two arms are called 'control'"),
        (["a b={run}:control"], [], "'a b' is no label"),
        (["a={run}:control,"], [], "LABEL=MODEL,MODEL"),
        (["{run}:control"], ["--against", "ordered"], "--against ordered: no arm has this label. There are: control"),
        (["{run}:control"], ["--images", "2"], "at least 3"),
        (["{run}:control"], ["--images", "5000"], "5000 are wanted"),
        (["{run}:control"], ["--split", "test"], "data.test_fraction 0"),
        (["{run}:control"], ["--split", "train"], "--split train: there are heldout and test"),
        (["{run}:control"], ["--run", "/nowhere"], "/nowhere: no run here"),
        (["{run}/second.safetensors"], [], "Name a run"),
        (["{run}:better"], [], "better"),
        (["{run}:control"], ["--chapters", "likelihod"], "There are: likelihood, samples, edits"),
        (["{run}:control"], ["--sweep", "temperature=hot"], "--sweep temperature=hot: wanted is"),
        (["{run}:control"], ["--sweep", "temperature=0"], "--sweep: temperature 0.0 must be"),
        (["{run}:control"], ["--sweep", "guidance=1", "--images", "35"], "settings are chosen on other ones"),
        (["{run}:control"], ["--sweep", "guidance=1", "--chapters", "edits"], "--chapters leaves out"),
        (["{run}:control"], ["--features", "eyes"], "no such extractor"),
    ],
)
def test_bad_arguments_get_one_clear_error(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], models: list[str], more: list[str], error: str
) -> None:
    said = refused(capsys, [each.format(run=finished.local()) for each in models], tmp_path, *more)
    assert said.startswith("error: ") and error in said
    assert not list(tmp_path.iterdir())


def test_all_of_a_run_are_its_arms_with_their_seeds(tmp_path: Path) -> None:
    arms = {"seeds": 2, "arms": {"raster": {"order": "raster"}}}
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(tmp_path, pipeline=arms)))
    found = named_arms([f"{tmp_path}:all", "x=a,b"])
    assert {arm.label: [path.removeprefix(f"{tmp_path}:") for path in arm.models] for arm in found} == {
        "any_order": ["any_order"],
        "ordered": ["ordered", "ordered.s1"],
        "control": ["control", "control.s1"],
        "raster": ["raster", "raster.s1"],
        "x": ["a", "b"],
    }


def test_options_that_would_do_nothing_are_refused(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, error in {
        ("evaluate",): "which run?",
        ("evaluate", "recipes/smoke.yaml", "--images", "3"): "--images means nothing without --flexibility",
        ("evaluate", "--flexibility", "a"): "--flexibility wants --out",
        ("evaluate", "recipes/smoke.yaml", "--flexibility", "a"): "takes no recipe",
    }.items():
        assert main(arguments) == 2
        assert error in capsys.readouterr().err
