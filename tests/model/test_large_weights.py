"""Weights larger than a machine's memory: written and read a tensor at a time, in one file or in several with an index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import small_model, small_spec
from torch import Tensor

from oar_scale.errors import Missing, UserError
from oar_scale.model import AnyOrderModel, ModelSpec, load_model, model_id, save_model
from oar_scale.model.spec import ClassSpec, FeatureSpec, TextSpec
from oar_scale.model.weights import copy_weights, fresh_weights, meta_model, open_model, read_spec, save_tensors
from oar_scale.storage import join
from oar_scale.tokenizers.safetensors_file import file_damage, load_weights
from oar_scale.tokenizers.safetensors_format import combined_checksum, tensor_crc

SMALL_SHARD = 20_000
MEGABYTE = 1 << 20


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*-of-*.safetensors"))


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[str, AnyOrderModel]:
    """A small model in several files."""
    model, uri = small_model(), str(tmp_path / "model.safetensors")
    save_model(uri, model, shard_bytes=SMALL_SHARD)
    return uri, model


@pytest.mark.parametrize("condition", [ClassSpec(classes=5), TextSpec(vocab=11, rows=4), FeatureSpec(width=24, rows=3)])
@pytest.mark.parametrize("layout", ["raster", "instructed", "dual", "decoupled", "grouped"])
def test_fresh_weights_are_those_a_constructor_draws(layout: str, condition: ClassSpec | TextSpec | FeatureSpec) -> None:
    spec = small_spec(layout=layout, condition=condition)
    torch.manual_seed(3)
    expected = AnyOrderModel(spec).state_dict()
    torch.manual_seed(3)
    fresh = {name: tensor.clone() for name, tensor in fresh_weights(spec)}
    assert fresh.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in fresh.items())


def test_a_model_in_several_files_is_the_same_model(sharded: tuple[str, AnyOrderModel], tmp_path: Path) -> None:
    uri, model = sharded
    assert not os.path.exists(uri) and len(parts(tmp_path)) > 2
    assert read_spec(uri) == model.spec
    for name in (uri, f"{uri}.index.json"):
        loaded = load_model(name).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_the_files_are_those_of_the_hugging_face_hub(sharded: tuple[str, AnyOrderModel], tmp_path: Path) -> None:
    """Names, index and metadata as the hub's readers expect them; a part is no larger than asked for."""
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files, state = parts(tmp_path), sharded[1].state_dict()
    count = len(files)
    assert [file.name for file in files] == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    read: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= SMALL_SHARD
        assert all(index["weight_map"][name] == file.name for name in tensors)
        read |= tensors
    assert all(torch.equal(tensor, read[name]) for name, tensor in state.items())


def test_the_hubs_own_reader_reads_them(sharded: tuple[str, AnyOrderModel], tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    model = AnyOrderModel(sharded[1].spec)
    hub.load_torch_model(model, tmp_path, strict=True)
    expected = sharded[1].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_single_file_says_that_it_is_of_torch(tmp_path: Path) -> None:
    save_model(str(tmp_path / "model.safetensors"), small_model())
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"


def test_one_flipped_bit_in_any_of_the_files_is_found(sharded: tuple[str, AnyOrderModel], tmp_path: Path) -> None:
    uri, _ = sharded
    for file in parts(tmp_path):
        intact = file.read_bytes()
        damaged = bytearray(intact)
        damaged[-100] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{file}: damaged"):
            load_model(uri)
        assert str(file) in (file_damage(uri) or "")
        file.write_bytes(intact)
    assert file_damage(uri) is None


def test_a_part_that_is_missing_or_of_another_export_is_named(sharded: tuple[str, AnyOrderModel], tmp_path: Path) -> None:
    uri, _ = sharded
    other = tmp_path / "other"
    other.mkdir()
    save_model(str(other / "model.safetensors"), small_model(seed=1), shard_bytes=SMALL_SHARD)
    first = parts(tmp_path)[0]
    first.write_bytes(parts(other)[0].read_bytes())
    with pytest.raises(UserError, match=f"{first}: is of another export"):
        load_model(uri)
    first.unlink()
    with pytest.raises(Missing, match=str(first)):
        load_model(uri)


def test_a_copy_in_several_files_keeps_the_models_id(tmp_path: Path) -> None:
    """Order heads and order tables name their model by its id."""
    single, copy = str(tmp_path / "single.safetensors"), str(tmp_path / "copy" / "model.safetensors")
    save_model(single, small_model(), half=True)
    copy_weights(open_model(single)[1], copy, shard_bytes=SMALL_SHARD)
    assert model_id(copy) == model_id(single)
    again = str(tmp_path / "again" / "model.safetensors")
    copy_weights(open_model(copy)[1], again, shard_bytes=SMALL_SHARD // 2)
    assert model_id(again) == model_id(single)
    stored, copied = (load_weights(uri, "any-order model")[0] for uri in (single, again))
    assert all(torch.equal(tensor, copied[name]) and tensor.dtype == copied[name].dtype for name, tensor in stored.items())


def test_weights_in_several_files_go_to_s3_and_come_back(s3_root: str, tmp_path: Path) -> None:
    uri, model = join(s3_root, "sharded", "model.safetensors"), small_model()
    save_tensors(uri, model.spec, model.state_dict().items(), shard_bytes=SMALL_SHARD, scratch=str(tmp_path / "scratch"))
    loaded = load_model(uri).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    assert os.listdir(tmp_path / "scratch") == []


def test_an_unfinished_model_leaves_nothing(tmp_path: Path) -> None:
    model, uri = small_model(), str(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor tok_embeddings\.weight was not written"):
        save_tensors(uri, model.spec, ((name, tensor) for name, tensor in model.state_dict().items() if "tok_emb" not in name))
    assert os.listdir(tmp_path) == []


def test_parts_of_a_checksum_combine_in_any_order() -> None:
    """The checksum of files that were written before is the same: over names and values, in the order of the names."""
    tensors = {"b": torch.arange(5.0), "a": torch.arange(7, dtype=torch.int64), "empty": torch.zeros(0)}
    reference = bytearray()
    for name in sorted(tensors):
        reference += name.encode() + tensors[name].numpy().tobytes()
    parts = {name: (tensor_crc(tensor), tensor.nbytes) for name, tensor in tensors.items()}
    assert combined_checksum(parts) == f"{zlib.crc32(reference):08x}"


class Counted:
    """Tensors that count how many of them are alive."""

    def __init__(self, shapes: Mapping[str, Tensor]) -> None:
        self.shapes, self.most = shapes, 0
        self._alive = weakref.WeakSet[Tensor]()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, shape in self.shapes.items():
            self.most = max(self.most, len(self._alive))
            tensor = torch.zeros(shape.shape)
            self._alive.add(tensor)
            yield name, tensor
            del tensor


@pytest.mark.parametrize("half", [False, True])
def test_one_tensor_at_a_time_is_kept_while_writing(tmp_path: Path, half: bool) -> None:
    spec = small_spec()
    tensors = Counted(meta_model(spec).state_dict())
    save_tensors(str(tmp_path / "model.safetensors"), spec, tensors, half=half, shard_bytes=SMALL_SHARD)
    assert len(tensors.shapes) > 10 and tensors.most <= 1


def big_spec() -> ModelSpec:
    """About 27 M parameters, 108 MB in float32; the largest tensor has 4 MB."""
    return small_spec(dim=512, layers=8, heads=8, ffn_hidden=1408, vocab_size=2048)


MEASURED = """
import json, resource, sys, torch
from test_large_weights import big_spec, small_spec
from oar_scale.model.weights import copy_weights, fresh_weights, load_model, model_id, open_model, save_tensors
torch.set_num_threads(1)
folder = sys.argv[1]
work = {
    "first weights": lambda spec, uri: save_tensors(uri, spec, fresh_weights(spec)),
    "id": lambda spec, uri: model_id(uri),
    "copy": lambda spec, uri: copy_weights(open_model(uri)[1], uri + ".copy", shard_bytes=25_000_000),
    "load": lambda spec, uri: load_model(uri),
}
growth = {}
for name, spec in (("small", small_spec()), ("big", big_spec())):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what, do in work.items():
        do(spec, f"{folder}/{name}.safetensors")
        growth[what] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(json.dumps(growth))
"""


@pytest.fixture(scope="module")
def growth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """By how much the peak memory of a process has grown after each work with a large model, as share of the model in float32."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-c", MEASURED, str(tmp_path_factory.mktemp("large"))]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size_mb = sum(tensor.nbytes for tensor in meta_model(big_spec()).state_dict().values()) / MEGABYTE
    return {what: mb / size_mb for what, mb in json.loads(done.stdout).items()}


def test_first_weights_are_never_whole_in_memory(growth: dict[str, float]) -> None:
    assert growth["first weights"] < 0.4


def test_a_models_id_and_its_copy_take_no_memory(growth: dict[str, float]) -> None:
    """A model's id is the hash of its file, which is not read whole."""
    assert growth["id"] < 0.5 and growth["copy"] < 0.5


def test_loading_holds_a_model_once(growth: dict[str, float]) -> None:
    assert growth["load"] < 1.6
