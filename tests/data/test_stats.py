"""The figures of ``oar data stats`` are those of the samples, with an index and without."""

from __future__ import annotations

import json
import math
import uuid
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_shards import bomb, img2dataset_folder, img2dataset_sample, picture, token_folder, token_sample, upload, write_tar
from PIL import Image

from oar_scale.cli import main
from oar_scale.data import stats
from oar_scale.data.index import IndexJob, index_folder
from oar_scale.data.stats import StatsJob, collect_stats
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, save_vq


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["data", "stats", *arguments, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_picture_shards_without_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ['{"label": 3}', '{"label": 3}', '{"label": 5}', "no json"]
    samples = [
        img2dataset_sample(0, txt="A red cat, a RED hat.", json=labels[0]),
        img2dataset_sample(1, txt="one two three four five six", json=labels[1], jpg=picture(1, (20, 10))),
        img2dataset_sample(2, txt=b"caf\xe9", json=labels[2], jpg=b"no picture"),
        img2dataset_sample(3, txt=None, json=labels[3], jpg=bomb(9000, 9000)),
    ]
    write_tar(tmp_path / "0.tar", samples)
    statistics = figures(capsys, str(tmp_path))
    assert (statistics["shards"], statistics["samples"], statistics["bytes"]) == (1, 4, (tmp_path / "0.tar").stat().st_size)
    assert statistics["parts"] == {"jpg": 4, "json": 4, "txt": 3}
    assert statistics["captions"]["count"] == 3 and statistics["captions"]["not_utf8"] == 1
    assert statistics["captions"]["words"] == {"min": 1, "p10": 1, "median": 6, "p90": 6, "max": 6, "mean": 4.33}
    assert statistics["captions"]["histogram"] == {"0-4": 1, "5-9": 2}
    assert statistics["captions"]["common_words"]["red"] == 2 and statistics["captions"]["common_words"]["a"] == 2
    assert statistics["images"]["common_sizes"] == {"12x8": 1, "20x10": 1, "9000x9000": 1} and statistics["images"]["unreadable"] == 1
    assert statistics["labels"] == {"count": 3, "different": 2, "common": {"3": 2, "5": 1}}
    assert "codes" not in statistics and "manifest" not in statistics


def test_code_figures_equal_those_of_numpy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token_folder(tmp_path, shards=2)
    write_tar(tmp_path / "00002.tar", [token_sample(9, np.zeros((2, 16), dtype=np.int32))])
    all_codes = np.stack([np.random.default_rng(10_000 * s + n).integers(0, 100, (2, 16)) for s in range(2) for n in range(4)])
    _, counts = np.unique(all_codes, return_counts=True)
    share = counts / counts.sum()
    codes = figures(capsys, str(tmp_path))["codes"]
    assert codes["count"] == all_codes.size and codes["shapes"] == {"2x16": 8} and codes["unreadable"] == 1
    assert codes["entropy_bits"] == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-4)
    assert codes["vocabulary"] == all_codes.max() + 1 and codes["unused"] == codes["vocabulary"] - len(counts)
    (tmp_path / "00002.tar").unlink()
    index_folder(IndexJob(str(tmp_path), vocab_size=128))
    codes = figures(capsys, str(tmp_path))["codes"]
    assert codes["unused"] == 128 - len(counts) and codes["entropy_bits_of_uniform"] == 7.0


def test_the_first_shards_in_natural_order_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(12):
        write_tar(tmp_path / f"s{number}.tar", [img2dataset_sample(n, txt=f"word{number}") for n in range(2)])
    statistics = figures(capsys, str(tmp_path), "--shards", "3")
    assert statistics["samples"] == 6 and set(statistics["captions"]["common_words"]) == {"word0", "word1", "word2"}
    index_folder(IndexJob(str(tmp_path)))
    assert figures(capsys, str(tmp_path), "--shards", "1")["manifest"]["samples"] == 24
    assert figures(capsys, str(tmp_path), "--all")["samples"] == 24


def test_lines_for_people_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", str(token_folder(tmp_path))]) == 0
    shown = capsys.readouterr().out
    assert "3 shards: 12 samples" in shown and ".codes.npy 12" in shown and "2x16: 12 (views x cells)" in shown and "##" in shown


def test_a_grid_shows_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
    samples = []
    for number, colour in enumerate(colours):
        path = tmp_path / "one.png"
        Image.new("RGB", (32, 32), colour).save(path)
        samples.append(img2dataset_sample(number, jpg=None, png=path.read_bytes()))
    write_tar(tmp_path / "0.tar", samples)
    assert main(["data", "stats", str(tmp_path), "--grid", str(tmp_path / "grid.png")]) == 0
    sheet = Image.open(tmp_path / "grid.png")
    side = (sheet.width - 2) // 2
    assert sheet.width == sheet.height
    middles = [(column * (side + 2) + side // 2, row * (side + 2) + side // 2) for row in range(2) for column in range(2)]
    assert [sheet.getpixel(middle) for middle in middles] == colours


@pytest.mark.parametrize("shards", [3, 5, 80])
def test_a_grid_has_as_many_pictures_whatever_the_number_of_shards(tmp_path: Path, shards: int) -> None:
    folder = img2dataset_folder(tmp_path, shards, samples=30 if shards == 3 else 20)
    kept, _ = collect_stats(StatsJob(str(folder), shards=None, pictures=64))
    assert len(kept.pictures) == 64


def test_shards_are_forgotten_once_they_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    living, most, read = dict[str, weakref.ref[stats.ShardStats]](), 0, stats._shard_stats

    def counted(uri: str, pictures: int) -> stats.ShardStats:
        nonlocal most
        living[uri] = weakref.ref(found := read(uri, pictures))
        most = max(most, sum(each() is not None for each in living.values()))
        return found

    monkeypatch.setattr(stats, "_shard_stats", counted)
    whole, _ = collect_stats(StatsJob(str(img2dataset_folder(tmp_path, 60, samples=1)), shards=None, workers=1))
    assert whole.shards == 60 and most < 10


def test_codes_are_drawn_by_their_tokenizer_and_by_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    for name, size in (("right", 8), ("wrong", 16)):
        spec = VQSpec(image_size=size, channels=32, multipliers=(1, 2), res_blocks=1, latent_channels=32, codebook_size=128, codebook_dim=4)
        save_vq(str(tmp_path / f"{name}.safetensors"), VQTokenizer(spec))
    shards, grid = str(token_folder(tmp_path / "shards")), tmp_path / "grid.png"
    assert main(["data", "stats", shards, "--grid", str(grid), "--tokenizer", str(tmp_path / "right.safetensors")]) == 0
    sheet = np.asarray(Image.open(grid))
    assert sheet.shape[0] > 100 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > math.prod((3, 4))
    capsys.readouterr()
    assert main(["data", "stats", shards, "--grid", str(grid), "--tokenizer", str(tmp_path / "wrong.safetensors")]) == 2
    assert "made for 64 codes" in capsys.readouterr().err
    assert main(["data", "stats", shards, "--grid", str(grid)]) == 2
    assert "needs the --tokenizer" in capsys.readouterr().err


def test_shards_on_s3_are_looked_at_without_an_index(s3_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = img2dataset_folder(tmp_path)
    target = upload(folder, f"{s3_root}/{uuid.uuid4().hex[:8]}")
    assert figures(capsys, target) == figures(capsys, str(folder))
    assert main(["data", "stats", target, "--grid", f"{target}/grid.png"]) == 0
