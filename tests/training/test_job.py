"""What a training job takes along to its workers."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from small_models import small_model
from small_run import small_recipe

from oar_scale.errors import Missing
from oar_scale.model import model_id, save_model
from oar_scale.training.job import TrainingJob


def test_a_copy_of_a_job_knows_the_models_id(tmp_path: Path) -> None:
    """The file of the model is read for it once, and not by each of hundreds of workers."""
    file = tmp_path / "base.safetensors"
    save_model(str(file), small_model())
    job = TrainingJob(small_recipe(str(tmp_path)), "pretrain", str(tmp_path), str(tmp_path), str(file), "")
    fresh = pickle.loads(pickle.dumps(job))
    expected = model_id(str(file))
    assert job.start_id == expected
    copy = pickle.loads(pickle.dumps(job))
    file.unlink()
    assert copy.start_id == expected
    with pytest.raises(Missing):
        _ = fresh.start_id
