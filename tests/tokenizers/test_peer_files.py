"""Checkpoints as other projects leave them: every wrapping is read bit for bit, and none of them can run code."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.tokenizers.peer_files import read_peer_file, write_peer_file

TENSORS = {
    "norm.weight": torch.linspace(-1, 1, 8),
    "layers.0.attention.wo.weight": torch.arange(16.0).view(4, 4).to(torch.bfloat16),
    "counts": torch.arange(5),
}


def assert_same_bits(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].dtype == expected[name].dtype and torch.equal(tensors[name], expected[name]) for name in expected)


WRAPPED: dict[str, Any] = {
    "bare": TENSORS,
    "model": {"model": TENSORS, "optimizer": {"state": {0: torch.ones(3)}}, "steps": 7},
    "module": {"module": TENSORS},
    "state_dict": {"epoch": 3, "state_dict": TENSORS},
    "distributed": {"model": {f"module.{name}": tensor for name, tensor in TENSORS.items()}},
    "compiled": {f"_orig_mod.{name}": tensor for name, tensor in TENSORS.items()},
    "both": {"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in TENSORS.items()}},
    "parameters": {name: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) for name, tensor in TENSORS.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize("ending", ["pt", "pth", "bin"])
def test_every_wrapping_gives_the_same_tensors_in_their_dtypes(tmp_path: Path, wrapping: str, ending: str) -> None:
    path = tmp_path / f"peer.{ending}"
    torch.save(WRAPPED[wrapping], path)
    assert_same_bits(read_peer_file(str(path)).tensors, TENSORS)


def test_the_format_that_torch_wrote_before_version_1_6_is_read(tmp_path: Path) -> None:
    torch.save({"model": TENSORS}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same_bits(read_peer_file(str(tmp_path / "old.pt")).tensors, TENSORS)


@pytest.mark.parametrize("line", [None, ["train.py", "--epochs", "3"], "train.py --epochs 3"])
def test_a_command_line_in_another_form_than_llamagens_says_nothing(tmp_path: Path, line: object) -> None:
    torch.save({"model": TENSORS, "args": line}, tmp_path / "weights.pt")
    content = read_peer_file(str(tmp_path / "weights.pt"))
    assert_same_bits(content.tensors, TENSORS)
    assert content.settings == {}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_give_the_same_tensors(tmp_path: Path, prefix: str) -> None:
    save_file({prefix + name: tensor for name, tensor in TENSORS.items()}, tmp_path / "peer.safetensors")
    peer = read_peer_file(str(tmp_path / "peer.safetensors"))
    assert_same_bits(peer.tensors, TENSORS)
    assert (prefix in peer.where) and peer.settings == {}


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_several_files_with_an_index_are_read(tmp_path: Path, ending: str) -> None:
    """As the Hugging Face hub splits large models."""
    names = sorted(TENSORS)
    parts = {"model-00001-of-00002": names[:1], "model-00002-of-00002": names[1:]}
    for part, own in parts.items():
        tensors = {name: TENSORS[name] for name in own}
        save_file(tensors, tmp_path / (part + ending)) if ending == ".safetensors" else torch.save(tensors, tmp_path / (part + ending))
    weight_map = {name: part + ending for part, own in parts.items() for name in own}
    index = tmp_path / f"model{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert_same_bits(read_peer_file(str(index)).tensors, TENSORS)
    index.write_text(json.dumps({"weight_map": {**weight_map, "lost": f"model-00001-of-00002{ending}"}}))
    with pytest.raises(UserError, match="tensor lost is in none of its files"):
        read_peer_file(str(index))
    index.write_text(json.dumps({"weight_map": {"far": f"../elsewhere{ending}"}}))
    with pytest.raises(UserError, match="names files outside its folder"):
        read_peer_file(str(index))
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / f"model-00002-of-00002{ending}").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002"):
        read_peer_file(str(index))


def test_a_file_on_s3_is_read(s3_root: str, tmp_path: Path) -> None:
    write_peer_file(f"{s3_root}/peer.pt", TENSORS, "model")
    assert_same_bits(read_peer_file(f"{s3_root}/peer.pt").tensors, TENSORS)


def test_the_command_line_that_llamagen_stores_is_read(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "args": argparse.Namespace(image_size=384, gpt_model="GPT-L", lr=1e-4)}, tmp_path / "peer.pt")
    peer = read_peer_file(str(tmp_path / "peer.pt"))
    assert peer.settings == {"image_size": 384, "gpt_model": "GPT-L", "lr": 1e-4}
    assert_same_bits(peer.tensors, TENSORS)


@pytest.mark.parametrize(
    ("ending", "wrapping", "unwrapped"), [("pt", "model", "model"), ("bin", "bare", None), ("safetensors", "model", None)]
)
def test_what_is_written_is_read_again_and_never_overwritten(tmp_path: Path, ending: str, wrapping: Any, unwrapped: str | None) -> None:
    path = str(tmp_path / f"peer.{ending}")
    write_peer_file(path, TENSORS, wrapping)
    assert_same_bits(read_peer_file(path).tensors, TENSORS)
    if ending != "safetensors":
        stored = torch.load(path, weights_only=True)
        assert_same_bits(stored[unwrapped] if unwrapped else stored, TENSORS)
    before = Path(path).read_bytes()
    with pytest.raises(UserError, match="there is a file of this name"):
        write_peer_file(path, {}, wrapping)
    assert Path(path).read_bytes() == before


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("location", ["beside", "instead", "inside args"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool, location: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "evil.pt"
    bomb = Bomb(victim)
    content = {
        "beside": {"model": TENSORS, "notes": bomb},
        "instead": bomb,
        "inside args": {"model": TENSORS, "args": argparse.Namespace(x=bomb)},
    }
    torch.save(content[location], path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"evil\.pt: asks for posix\.system, .*run code"):
        read_peer_file(str(path))
    assert not victim.exists()
    torch.load(path, weights_only=False)  # the bomb is real
    assert victim.exists()


def test_a_plain_pickle_with_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps(Bomb(victim), protocol=2))
    with pytest.raises(UserError, match=r"evil\.bin"):
        read_peer_file(str(path))
    assert not victim.exists()


@pytest.mark.parametrize("ending", ["safetensors", "pt", "old.pt"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.99])
def test_a_truncated_file_is_one_clear_error(tmp_path: Path, ending: str, share: float) -> None:
    path = tmp_path / f"peer.{ending}"
    if ending == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save({"model": TENSORS}, path, _use_new_zipfile_serialization=ending == "pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"peer\..*(not a readable safetensors file|damaged, cut off).*Copy it again"):
        read_peer_file(str(path))


@pytest.mark.parametrize(
    ("content", "holds"),
    [
        ({"optimizer": {"state": {0: torch.ones(3)}, "param_groups": []}, "steps": 9}, "only optimizer, steps"),
        ({"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1.0}]}, "only state, param_groups"),
        ({"model": {}}, "nothing"),
        ({}, "nothing"),
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "a Tensor"),
        ({0: torch.ones(2)}, "only 0"),
    ],
)
def test_a_file_without_a_models_tensors_says_what_it_holds(tmp_path: Path, content: Any, holds: str) -> None:
    torch.save(content, tmp_path / "peer.pt")
    with pytest.raises(UserError, match=rf"peer\.pt: has no model's tensors, .*{holds}"):
        read_peer_file(str(tmp_path / "peer.pt"))


def test_a_file_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "peer.pt")
    with pytest.raises(UserError, match="has no model's tensors"):
        read_peer_file(str(tmp_path / "peer.pt"))


def test_a_missing_file_and_an_unknown_ending_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pt: there is nothing here"):
        read_peer_file(str(tmp_path / "none.pt"))
    with pytest.raises(UserError, match=r"peer\.ckpt: a checkpoint's name ends in"):
        read_peer_file(str(tmp_path / "peer.ckpt"))
