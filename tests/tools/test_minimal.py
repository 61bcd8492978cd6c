"""tools/minimal.py, the whole method in one process, at a small size."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oar_scale.data.manifest import read_manifest
from oar_scale.orders.order_table import read_orders

SCRIPT = Path(__file__).parents[2] / "tools" / "minimal.py"
SCALE = ("ray", "deepspeed", "boto3", "botocore", "wandb")
RUN = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import minimal
minimal.main()
print("loaded:", [name for name in {SCALE!r} if name in sys.modules])
"""


pytestmark = pytest.mark.timeout(900)  # of a hang only


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("minimal")


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    """What it prints: 24 drawings, 12 steps of pretraining and 4 of fine-tuning."""
    command = [sys.executable, "-c", RUN, str(folder), "--count", "24", "--steps", "12"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_minimal_loads_nothing_of_scale(output: str) -> None:
    assert output.splitlines()[-1] == "loaded: []"


def test_minimal_learns(output: str) -> None:
    """The training loss falls while it is pretrained; twelve steps on twenty images teach nothing about held-out ones."""
    pretraining = output.partition("extraction")[0]
    losses = [float(value) for value in re.findall(r" loss (\d+\.\d+)", pretraining)]
    assert losses[-1] < losses[0] - 0.3


def test_minimal_orders_are_permutations(output: str, folder: Path) -> None:
    manifest = read_manifest(str(folder / "tokens" / "train"))
    orders = np.concatenate([read_orders(str(path)).order_SN for path in sorted((folder / "orders" / "train").glob("*.parquet"))])
    assert len(orders) == manifest.samples > 0
    assert (np.sort(orders, axis=1) == np.arange(64)).all()


def test_minimal_draws_pictures(output: str, folder: Path) -> None:
    """Training images, drawings of their captions, orders; the same for held-out captions."""
    picture = Image.open(folder / "pictures.png")
    assert picture.height == 6 * 96 + 5 * 4
    assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_minimal_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 200
