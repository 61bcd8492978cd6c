"""The model card of an exported folder: the run's own figures under their own names, "not recorded" for the rest, and code that runs."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing_run import CAPTIONS, small_run
from PIL import Image
from ruamel.yaml import YAML

from oar_scale.cli import main
from oar_scale.evaluation.evaluation_record import Evaluation, save_evaluation
from oar_scale.model.spec import ClassSpec
from oar_scale.storage import read_json, write_json
from tests.observe.synthetic import report as synthetic_report

STAGES: dict[str, dict[str, Any]] = {
    "data": {
        "settings": {"data.source": {"type": "table", "path": "/home/me/secret place/pictures.csv"}},
        "results": {"train": 3550, "heldout": 403, "attribution": "Drawn by <b>Ann</b> | CC BY 4.0", "skipped": {"cat of Ann": "is cut"}},
    },
    "tokenizer": {"settings": {}, "results": {"psnr_db": 23.397, "codebook_use": 0.75}},
    "tokens": {"settings": {}, "results": {}},
    "pretrain": {"settings": {"pretrain.global_batch": 48, "pretrain.lr": 0.0015}, "results": {"steps": 2800, "seconds": 5400.0}},
    "extract": {"settings": {"extract.score": "max_prob"}, "results": {"images": 3550}},
    "finetune": {"settings": {"finetune.global_batch": 48, "finetune.lr": 0.001}, "results": {"steps": 100, "images_per_s": 81.6}},
    "control": {"settings": {}, "results": {"steps": 101}},
    "evaluate": {"settings": {}, "results": {}},
}


def record(run: str) -> None:
    """What stages leave in a run's folder."""
    for name, marker in STAGES.items():
        write_json(f"{run}/stages/{name}.json", {"stage": name, "seconds": 1.0, **marker})
    report = synthetic_report()
    parts = {
        name: getattr(report, name) for name in ("nll", "pretrain", "captions", "distances", "samples", "edits", "orders", "tokenizer")
    }
    save_evaluation(Evaluation(**parts, calibration=report.calibration), run)


def exported(run: str, folder: Path, *options: str) -> str:
    assert main(["checkpoint", "export", run, "--out", str(folder), *options]) == 0
    return (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = small_run(tmp_path_factory.mktemp("card") / "run", {"type": "sentencepiece", "max_tokens": 4}, None)
    record(folder)
    return folder


def metadata(card: str) -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe").load(card.split("---\n")[1])
    return found


def test_figures_are_those_of_the_run(run: str, tmp_path: Path) -> None:
    card = exported(run, tmp_path / "exported", "--license", "cc-by-4.0")
    assert metadata(card) == {
        "license": "cc-by-4.0",
        "library_name": "oar_scale",
        "pipeline_tag": "text-to-image",
        "tags": ["oar_scale", "image-generation", "autoregressive", "any-order", "inpainting", "diffusers"],
    }
    assert "table; 3550 for training, 403 held out" in card and "23.4 dB PSNR on held-out images, 75% of the codes in use" in card
    assert "| pretrain | 2800 | 48 | 0.0015 | not recorded | 1.50 |" in card
    assert "| finetune | 100 | 48 | 0.001 | 81.6 | not recorded |" in card
    assert "| control |" not in card, "another model's training"
    assert "Orders were extracted for 3550 training images by the score `max_prob`." in card
    measured = synthetic_report()
    assert measured.nll is not None
    for entry in measured.nll.entries:
        row = f"{entry.nll.mean:.3f} ± {entry.nll.standard_error:.3f}"
        if entry.model == "ordered" and entry.order != "own gt_logprob":
            assert f"| nats per code, {entry.order} orders, {measured.nll.images} images | {row} |" in card
    assert "own gt_logprob" not in card, "that likelihood leaks"


def test_distances_of_other_features_are_not_called_fid(run: str, tmp_path: Path) -> None:
    card = exported(run, tmp_path / "exported")
    (row,) = (row for row in synthetic_report().distances if row.name == "ordered")
    assert f"| `fd_efflite0`, {row.samples} samples | {row.fd:.1f} |" in card
    assert re.findall(r"[^.]*\bFID\b[^.]*", card) == [next(text for text in re.findall(r"[^.]*\bFID\b[^.]*", card) if "no FID" in text)]


def test_texts_of_others_are_no_markup_and_places_stay_private(run: str, tmp_path: Path) -> None:
    card = exported(run, tmp_path / "exported")
    assert "Drawn by &lt;b&gt;Ann&lt;/b&gt; \\| CC BY 4.0" in card
    history = (tmp_path / "exported" / "history.json").read_text()
    assert "secret" not in history + card and "cat of Ann" not in history + card
    assert json.loads(history)["stages"]["data"]["settings"]["data.source"] == {"type": "table", "path": "pictures.csv"}


def test_pictures_are_the_runs_mean_order_and_samples(run: str, tmp_path: Path) -> None:
    card = exported(run, tmp_path / "exported")
    assert "![order map](order-map.png)" in card and "![samples](samples.png)" in card
    report = synthetic_report()
    assert report.orders is not None and report.samples is not None
    shades = np.asarray(Image.open(tmp_path / "exported" / "order-map.png").convert("L"), dtype=int)
    steps = report.orders.mean_step_of_cell
    side = len(shades) // len(steps)
    cells = shades[side // 2 :: side, side // 2 :: side]
    first, last = (cells.flatten()[place] for place in (steps.argmin(), steps.argmax()))
    assert (first, last) == (cells.min(), cells.max()) and first < last - 100, "dark: first"
    column = report.samples.columns.index("ordered")
    sheet = np.asarray(Image.open(tmp_path / "exported" / "samples.png"))
    drawn = report.samples.rows[0].samples[column]
    scale = len(sheet) // len(drawn)
    assert np.array_equal(sheet[::scale, : scale * len(drawn) : scale], drawn)


def test_an_export_of_an_export_keeps_its_record(run: str, tmp_path: Path) -> None:
    card = exported(run, tmp_path / "first", "--license", "cc-by-4.0")
    assert exported(str(tmp_path / "first"), tmp_path / "second") == card
    for name in ("history.json", "order-map.png", "samples.png", "pipeline.py"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_what_was_done_again_since_is_not_claimed(run: str, tmp_path: Path) -> None:
    """The evaluation of a run whose fine-tuning was continued is one of another model."""
    marker = read_json(f"{run}/stages/evaluate.json")
    write_json(f"{run}/stages/evaluate.json", {"stale": "finetune", **marker})
    try:
        card = exported(run, tmp_path / "exported")
    finally:
        write_json(f"{run}/stages/evaluate.json", marker)
    assert "## Evaluation\n\nNot recorded." in card and "kid_efflite0" not in card and not (tmp_path / "exported" / "samples.png").exists()


def test_a_model_without_a_record_says_so(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", {"type": "labels", "classes": 10}, ClassSpec(classes=10))
    card = exported(run, tmp_path / "exported")
    assert metadata(card)["license"] == "unknown" and "pipeline_tag" not in metadata(card)
    assert "- Their attribution and licence: not recorded" in card and "The training of the model is not recorded." in card
    assert "## Evaluation\n\nNot recorded." in card and "class labels, 0 to 9" in card and "model.sample([0, 0], seed=0)" in card


@pytest.mark.parametrize("damage", ['{"model": ["x"], "stages": 7, "evaluation": {"nll": [], "distances": {"a": 1}, "samples": 3}}', "{}"])
def test_a_strange_history_is_no_obstacle(run: str, tmp_path: Path, damage: str) -> None:
    """It may come from the hub, where anybody writes."""
    exported(run, tmp_path / "first")
    (tmp_path / "first" / "history.json").write_text(damage)
    assert "not recorded" in exported(str(tmp_path / "first"), tmp_path / "second")


def test_the_python_of_a_card_runs(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = exported(run, tmp_path / "exported")
    monkeypatch.chdir(tmp_path / "exported")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "import oar_scale" in block)
    done: dict[str, Any] = {}
    exec(code.replace(json.dumps(synthetic_caption()), json.dumps(CAPTIONS[0])), done)
    assert [picture.size for picture in done["images"]] == [(12, 12)] * 2
    assert Image.open(io.BytesIO(Path("picture.png").read_bytes())).size == (12, 12)


def synthetic_caption() -> str:
    """The card's example: a caption of the run, of which this test's tokenizer has never heard."""
    samples = synthetic_report().samples
    assert samples is not None
    return next(row.caption for row in samples.rows if row.caption.isprintable() and "`" not in row.caption)
