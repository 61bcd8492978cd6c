"""Files that others wrote run no code, and name no place outside of their own folder."""

from __future__ import annotations

import ast
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import Payload, hostile_files
from PIL import Image

import oar_scale
from oar_scale.cli import main
from oar_scale.errors import UserError
from oar_scale.generation.model_bundle import read_config
from oar_scale.model.weights import open_model
from oar_scale.orders.head import KIND, read_head
from oar_scale.tokenizers import clip_text
from oar_scale.tokenizers.pickles import read_pickle
from oar_scale.tokenizers.safetensors_file import save_weights
from oar_scale.tokenizers.vq import load_vq

PACKAGE = Path(oar_scale.__file__).parent
READERS = {
    "pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "torch.load",
    "torch.hub",
    "torch.jit",
    "yaml.load",
    "yaml.unsafe_load",
}
"""Modules and functions that may run what they read."""
ALLOWED = {"tokenizers/pickles.py": {"torch.serialization.load"}}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_only_one_file_of_the_package_unpickles() -> None:
    """And that one by torch's restricted unpickler; numpy's files are read without objects; YAML by the safe loader."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name, tree = str(path.relative_to(PACKAGE)), ast.parse(path.read_text())
        for node in ast.walk(tree):
            used: set[str] = set()
            if isinstance(node, ast.Import | ast.ImportFrom):
                used = {alias.name for alias in node.names} | ({node.module or ""} if isinstance(node, ast.ImportFrom) else set())
            elif isinstance(node, ast.Call):
                called = dotted(node.func)
                used = {called, called.split(".")[0]} - ({"torch.load"} if name in ALLOWED else set())
                if called == "torch.serialization.load":
                    assert name in ALLOWED and any(each.arg == "weights_only" and dotted(each.value) == "" for each in node.keywords)
                for each in node.keywords:
                    assert each.arg != "weights_only" or ast.literal_eval(each.value) is True, f"{name}:{node.lineno}"
                    assert each.arg != "allow_pickle" or ast.literal_eval(each.value) is False, f"{name}:{node.lineno}"
                if called == "YAML":
                    assert {each.arg: ast.unparse(each.value) for each in node.keywords}.get("typ") == "'safe'" or not node.keywords
            assert not used & READERS, f"{name}:{getattr(node, 'lineno', 0)} uses {used & READERS}"


def test_files_that_run_code_are_refused_by_name(tmp_path: Path) -> None:
    """Whatever the way in which they were pickled, with or without the bytes of their tensors; and nothing has run."""
    ran = tmp_path / "ran"
    for how, data in hostile_files(str(ran)).items():
        path = tmp_path / f"{how}.pt"
        path.write_bytes(data)
        for place in ("cpu", "meta"):
            with pytest.raises(UserError, match=rf"{how}\.pt: .*run(?:ning)? code"):
                read_pickle(str(path), str(path), map_location=place, mmap=place == "cpu")
            with open(path, "rb") as file, pytest.raises(UserError, match=r"bucket/x: .*run(?:ning)? code"):
                read_pickle(file, "bucket/x", map_location=place)
        assert not ran.exists(), how


@pytest.mark.parametrize("kind", ["llamagen-vq", "randar", "llamagen-c2i"])
def test_no_import_runs_code(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = tmp_path / "ran"
    for ending in (".pt", ".pth", ".bin"):
        for how, data in hostile_files(str(ran)).items():
            path = tmp_path / f"weights{ending}"
            path.write_bytes(data)
            assert main(["checkpoint", "import", kind, str(path), "--out", str(tmp_path / "out")]) == 2, how
            assert f"{path}: " in capsys.readouterr().err
    assert not ran.exists() and not (tmp_path / "out").exists()


def test_no_text_tower_runs_code(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for how, data in hostile_files(str(ran)).items():
        path = tmp_path / "tower.pt"
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"tower\.pt: "):
            clip_text._read(str(path), str(path), [how])
    assert not ran.exists()


SPECS = ["", "{}", "[]", '{"image_size": "large"}', '{"image_size": 16, "channels": 33}', '{"image_size": 16, "channels": -32}']


@pytest.mark.parametrize("spec", SPECS)
def test_strange_sizes_in_a_file_are_one_clear_error(tmp_path: Path, spec: str) -> None:
    """Of image tokenizers and order heads: an exported folder has both, and may come from the hub."""
    path = str(tmp_path / "weights.safetensors")
    for kind in ("vq", "maskgit vq"):
        save_weights(path, {"w": torch.zeros(2)}, {"kind": kind, "spec": spec})
        with pytest.raises(UserError, match=r"weights\.safetensors: (the sizes of this image tokenizer|not the weights)"):
            load_vq(path)
    sizes = {"model_id": "a", "dim": 4, "grid": 2, "width": 4, "first": 0}
    for head in (spec, json.dumps({**sizes, "width": -4}), json.dumps(sizes), json.dumps({**sizes, "dim": 10**9, "width": 10**6})):
        save_weights(path, {"w": torch.zeros(2)}, {"kind": KIND, "spec": head})
        with pytest.raises(UserError, match=r"weights\.safetensors: (the sizes of this order head|its tensors are not those)"):
            read_head(path, "a")


SIZES = {"dim": 8, "layers": 1, "heads": 2, "ffn_hidden": 8, "vocab_size": 4, "grid": 2, "condition": {"type": "class", "classes": 2}}


STRANGE: list[dict[str, object]] = [{"heads": 0}, {"dim": -8}, {"grid": -2}, {"kv_heads": 0}, {"dim": 2**40}, {"layers": 10**9}]
STRANGE += [{"condition": {"type": "class", "classes": 10**18}}, {"condition": {"type": "text", "vocab": 9, "rows": 2**40}}]


@pytest.mark.parametrize("change", STRANGE)
def test_strange_sizes_of_a_model_are_one_clear_error(tmp_path: Path, change: dict[str, object]) -> None:
    """In its file and in the configuration of its folder."""
    path, sizes = str(tmp_path / "model.safetensors"), {**SIZES, **change}
    save_weights(path, {"w": torch.zeros(2)}, {"kind": "any-order model", "spec": json.dumps(sizes)})
    with pytest.raises(UserError, match=r"model\.safetensors: the sizes of this model are not understood"):
        open_model(path)
    (tmp_path / "config.json").write_text(json.dumps({"library": "oar_scale", "source": "", "model": sizes}))
    with pytest.raises(UserError, match=rf"config\.json: not the configuration of an exported folder \(model\.{next(iter(change))}"):
        read_config(str(tmp_path))


def test_no_member_of_a_shard_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """webdataset's own decoders would: ``.pyd`` and ``.pickle`` by pickle, ``.pth`` by torch, ``.npy`` with objects."""
    ran, folder = tmp_path / "ran", tmp_path / "shards"
    folder.mkdir()
    pickled = hostile_files(str(ran))
    objects, picture = io.BytesIO(), io.BytesIO()
    np.save(objects, np.array([Payload(str(ran))], dtype=object))
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    members = {"png": picture.getvalue(), "txt": b"a cat", "json": b"{}", "npy": objects.getvalue(), "features.npy": objects.getvalue()}
    members |= dict.fromkeys(("pyd", "pickle", "pkl", "pth", "pt", "ten", "tb", "mp", "cbor", "cls"), pickled["protocol 2"])
    for name, parts in (("image.tar", members), ("tokens.tar", {"codes.npy": objects.getvalue(), "txt": b"a cat", "pyd": members["pyd"]})):
        with tarfile.open(folder / name, "w") as tar:
            for ending, data in parts.items():
                info = tarfile.TarInfo(f"0.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        for verb in ("index", "verify", "stats"):
            assert main(["data", verb, str(folder), *(["--force"] if verb == "index" else [])]) in (0, 1, 2)
            assert "Traceback" not in capsys.readouterr().err
        source = f"data.source={{type: webdataset, url: {folder}/{name}}}"
        arguments = ["-o", source, "-o", "data.on_bad_sample=skip", "-o", f"run_dir={tmp_path / name}.run"]
        assert main(["prepare", str(PACKAGE.parent / "recipes" / "smoke.yaml"), *arguments]) == 2, "one image is no data set"
    assert not ran.exists()
