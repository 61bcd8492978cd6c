"""Weights as they ship: the run's any-order model, rounded once, with how it was made; the whole folder or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drawing_run import CAPTIONS, PIXELS, small_run

import oar_scale
from oar_scale.errors import UserError
from oar_scale.generation.model_bundle import read_config
from oar_scale.model import load_model
from oar_scale.observe.events import EventLog
from oar_scale.storage import read_json
from tools import ship_weights


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a small model, tokenizers, and events of both trainings."""
    folder = Path(small_run(tmp_path / "run", {"type": "sentencepiece", "max_tokens": 4}, None, layout="raster"))
    with EventLog(str(folder / "events"), "tokenizer") as log:
        log.emit("vq", step=20, loss=0.25, psnr=18.125, codebook_use=1.0)
    with EventLog(str(folder / "events"), "pretrain") as log:
        log.emit("train", step=1, loss=2.5)
        log.emit("heldout", step=1, nll_random=2.75)
    return folder


def test_the_shipped_model_has_matrices_in_bfloat16(run: Path, tmp_path: Path) -> None:
    ship_weights.ship(run, tmp_path / "shipped", "cc-by-4.0")
    shipped = load_model(str(tmp_path / "shipped" / "model.safetensors"), as_stored=True).state_dict()
    trained = load_model(str(run / "models" / "any_order.safetensors")).state_dict()
    for name, tensor in trained.items():
        wanted = tensor.to(torch.bfloat16) if tensor.ndim > 1 else tensor
        assert shipped[name].dtype == wanted.dtype and torch.equal(shipped[name], wanted)
    [drawn] = oar_scale.load(str(tmp_path / "shipped")).sample(CAPTIONS[:1], seed=0)
    assert drawn.size == (PIXELS, PIXELS)


def test_licence_recipe_and_curves_travel_with_the_weights(run: Path, tmp_path: Path) -> None:
    ship_weights.ship(run, tmp_path / "shipped", "cc-by-4.0")
    assert read_config(str(tmp_path / "shipped")).license == "cc-by-4.0"
    assert "license: cc-by-4.0" in (tmp_path / "shipped" / "README.md").read_text()
    history = read_json(str(tmp_path / "shipped" / "history.json"))
    assert history["recipe"] == (run / "recipe.yaml").read_text() and history["model"] == "any_order"
    assert history["curves"] == {"tokenizer": [[20, 0.25, 18.12]], "pretrain": [[1, 2.5]], "heldout": [[1, 2.75]]}
    assert (tmp_path / "shipped" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_is_shipped_as_a_whole_or_not_at_all(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(ship_weights, "draw_curves", fail)
    with pytest.raises(OSError, match="no space left"):
        ship_weights.ship(run, tmp_path / "shipped", "cc-by-4.0")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    (run / "models" / "any_order.safetensors").unlink()
    with pytest.raises(UserError, match="this run has no model 'any_order'"):
        ship_weights.ship(run, tmp_path / "shipped", "cc-by-4.0")
