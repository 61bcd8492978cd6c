"""``oar checkpoint``: peers' weights in and out on the command line, and models out of runs and of real training checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import run_workers
from parity import peer_case
from safetensors.torch import load_file, save_file
from small_run import prepare_small_run, pretraining, small_recipe
from torch import Tensor

import oar_scale
from oar_scale.cli import main
from oar_scale.commands import checkpoint_export
from oar_scale.commands.checkpoint_export import export_checkpoint
from oar_scale.commands.checkpoint_import import ImportOptions, import_checkpoint
from oar_scale.errors import UserError
from oar_scale.generation import exported_folder
from oar_scale.model import load_model, model_id
from oar_scale.model.spec import ClassSpec
from oar_scale.pipeline import bind_run_dir
from oar_scale.run.context import Run
from oar_scale.storage import join, open_storage, read_json
from oar_scale.tokenizers.maskgit_vq import MaskGITSpec, MaskGITVQ
from oar_scale.tokenizers.peer_vq import export_llamagen_vq
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, load_vq, vq_id
from oar_scale.training.job import TrainingJob

TRUNKS = {
    "randar": ("randar_c2i", ["--grid", "4", "--heads", "4"]),
    "llamagen-c2i": ("llamagen_c2i", ["--grid", "4", "--heads", "4"]),
    "llamagen-t2i": ("llamagen_t2i", ["--grid", "4", "--heads", "4", "--text-rows", "6"]),
}
SMALL = {"image_size": 16, "channels": 32, "multipliers": (1, 1, 1), "res_blocks": 1, "latent_channels": 32, "codebook_size": 96}
"""A tokenizer of 4 x 4 codes, for the models of the parity cases."""


def small_vq(kind: str, **changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    if kind == "maskgit-vq":
        return dict(MaskGITVQ(MaskGITSpec(**{**SMALL, **changes})).state_dict())
    return export_llamagen_vq(VQTokenizer(VQSpec(**{**SMALL, **changes}, codebook_dim=4)))


def save_as(path: Path, tensors: dict[str, Tensor], **beside: Any) -> str:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model": tensors, **beside}, path)
    return str(path)


def read_back(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    tensors = torch.load(path, weights_only=True)
    return dict(tensors.get("model", tensors))


def assert_same_bits(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].dtype == expected[name].dtype and torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.fixture
def randar(tmp_path: Path) -> Path:
    """A folder with RandAR's parity case and a small tokenizer that fits it."""
    folder = tmp_path / "randar"
    import_checkpoint(
        "randar", save_as(tmp_path / "randar.safetensors", peer_case("randar_c2i").tensors), str(folder), ImportOptions(heads=4, grid=4)
    )
    import_checkpoint("llamagen-vq", save_as(tmp_path / "small_vq.pt", small_vq("llamagen-vq")), str(folder), ImportOptions())
    return folder


# -- peers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("target", ["ours", "ours.safetensors"])
@pytest.mark.parametrize("kind", TRUNKS)
def test_a_peers_model_comes_back_bit_for_bit(tmp_path: Path, kind: str, target: str, ending: str, dtype: torch.dtype) -> None:
    name, options = TRUNKS[kind]
    tensors = {each: tensor.to(dtype) for each, tensor in peer_case(name).tensors.items()}
    file, ours, back = save_as(tmp_path / f"peer.{ending}", tensors), str(tmp_path / target), tmp_path / f"back.{ending}"
    assert main(["checkpoint", "import", kind, file, "--out", ours, *options]) == 0
    assert main(["checkpoint", "export", ours, "--format", kind, "--out", str(back)]) == 0
    assert_same_bits(read_back(back), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", ["llamagen-vq", "maskgit-vq"])
def test_a_peers_tokenizer_comes_back_bit_for_bit(tmp_path: Path, kind: str, ending: str, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in small_vq(kind).items()}
    file, ours, back = save_as(tmp_path / f"peer.{ending}", tensors), str(tmp_path / "vq.safetensors"), tmp_path / f"back.{ending}"
    assert main(["checkpoint", "import", kind, file, "--out", ours, "--image-size", "16"]) == 0
    assert load_vq(ours).spec.image_size == 16
    assert main(["checkpoint", "export", ours, "--format", kind, "--out", str(back)]) == 0
    assert_same_bits(read_back(back), tensors)


@pytest.mark.slow  # half a gigabyte of random numbers; small ones come back above, and tests/tokenizers/test_vq_parity.py imports these
@pytest.mark.parametrize(("name", "kind"), [("vq16", "llamagen-vq"), ("maskgit_vq", "maskgit-vq")])
def test_full_size_tokenizers_come_back_bit_for_bit(tmp_path: Path, name: str, kind: str) -> None:
    tensors = peer_case(name).tensors
    file, ours, back = save_as(tmp_path / "peer.pt", tensors), str(tmp_path / "vq.safetensors"), tmp_path / "back.safetensors"
    import_checkpoint(kind, file, ours, ImportOptions())
    assert load_vq(ours).spec.grid == 16
    export_checkpoint(ours, str(back), kind)
    assert_same_bits(read_back(back), tensors)


def test_a_model_and_a_tokenizer_become_a_folder_that_draws(randar: Path, tmp_path: Path) -> None:
    config = read_json(str(randar / "config.json"))
    assert config["model"]["grid"] == 4 and config["text"] == {"type": "labels", "classes": 10} and config["source"].startswith("randar: ")
    assert config["vq"]["id"] == vq_id(load_vq(str(randar / "vq.safetensors")))
    assert config["vq"]["spec"]["image_size"] == 16, "what the model draws, not the 256 px of the published tokenizer"
    images = oar_scale.load(str(randar)).sample([3, 7])
    assert [image.size for image in images] == [(16, 16)] * 2
    export_checkpoint(str(randar), str(tmp_path / "vq.pt"), "llamagen-vq")
    assert_same_bits(read_back(tmp_path / "vq.pt"), small_vq("llamagen-vq"))


def test_an_exported_folder_exported_again_is_the_same(randar: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["checkpoint", "export", str(randar), "--out", str(again)]) == 0
    for name in ("model.safetensors", "vq.safetensors"):
        assert (again / name).read_bytes() == (randar / name).read_bytes()
    first, second = (read_json(str(folder / "config.json")) for folder in (randar, again))
    assert {**first, "source": ""} == {**second, "source": ""}


def test_a_raster_checkpoint_becomes_one_that_draws_in_any_order(tmp_path: Path) -> None:
    file, folder = save_as(tmp_path / "peer.pt", peer_case("llamagen_c2i").tensors), str(tmp_path / "ours")
    assert main(["checkpoint", "import", "llamagen-c2i", file, "--out", folder, "--grid", "4", "--heads", "4", "--instructed"]) == 0
    drawn = oar_scale.load(folder).draw([1], order="random")
    assert sorted(drawn.order_BN[0].tolist()) == list(range(16)) and drawn.order_BN[0].tolist() != list(range(16))


def test_stored_grid_and_rows_of_llamagen_are_not_contradicted(tmp_path: Path) -> None:
    stored = argparse.Namespace(image_size=64, downsample_size=16, cls_token_num=6)
    file = save_as(tmp_path / "peer.pt", peer_case("llamagen_t2i").tensors, args=stored, optimizer={"state": {0: torch.ones(2)}})
    import_checkpoint("llamagen-t2i", file, str(tmp_path / "ours.safetensors"), ImportOptions(heads=4))
    spec = load_model(str(tmp_path / "ours.safetensors")).spec
    assert spec.grid == 4 and spec.condition.rows == 6
    with pytest.raises(UserError, match=r"peer\.pt: was trained on 64 px images, which are 4 x 4 codes; --grid 16 contradicts"):
        import_checkpoint("llamagen-t2i", file, str(tmp_path / "other"), ImportOptions(heads=4, grid=16))


@pytest.mark.parametrize(
    ("kind", "arguments", "fault"),
    [
        ("randar", ["--text-rows", "5"], "--text-rows does not apply to randar, only to llamagen-t2i"),
        ("randar", ["--instructed"], "--instructed does not apply to randar"),
        ("llamagen-vq", ["--grid", "4"], "--grid does not apply to llamagen-vq"),
        ("randar", ["--image-size", "64"], "--image-size does not apply to randar"),
        ("randar", ["--grid", "0"], "--grid 0 must be at least 1"),
        ("randar", ["--heads", "5"], "do not divide into 5 heads"),
        ("llamagen-c2i", [], "Import it as randar"),
        ("maskgit-vq", [], "not the weights of such a tokenizer"),
    ],
)
def test_what_cannot_be_imported_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, arguments: list[str], fault: str
) -> None:
    file = save_as(tmp_path / "peer.pt", peer_case("randar_c2i").tensors)
    assert main(["checkpoint", "import", kind, file, "--out", str(tmp_path / "out.safetensors"), *arguments]) == 2
    assert fault in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["peer.pt"]


def test_a_tokenizer_that_does_not_fit_its_model_is_refused(randar: Path, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    import_checkpoint("randar", str(tmp_path / "randar.safetensors"), str(folder), ImportOptions(heads=4, grid=4))
    other = save_as(tmp_path / "other.pt", small_vq("maskgit-vq", codebook_size=50))
    with pytest.raises(UserError, match=r"other\.pt for .*50 codes, the model a vocabulary of 96"):
        import_checkpoint("maskgit-vq", other, str(folder), ImportOptions())
    with pytest.raises(UserError, match=r"8 x 8 codes of 32 px, the model draws 4 x 4.*--image-size 16"):
        import_checkpoint("llamagen-vq", str(tmp_path / "small_vq.pt"), str(folder), ImportOptions(image_size=32))
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    with pytest.raises(UserError, match="has an image tokenizer already"):
        import_checkpoint("llamagen-vq", str(tmp_path / "small_vq.pt"), str(randar), ImportOptions())
    with pytest.raises(UserError, match=r"nowhere: no model was imported here"):
        import_checkpoint("llamagen-vq", str(tmp_path / "small_vq.pt"), str(tmp_path / "nowhere"), ImportOptions())


@pytest.mark.parametrize("target", ["folder", "file.safetensors", "file.pt"])
def test_nothing_is_overwritten(randar: Path, tmp_path: Path, target: str) -> None:
    out = tmp_path / target
    if target == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        out.write_text("mine")
    attempts: list[Any] = [lambda: export_checkpoint(str(randar), str(out), "folder" if target == "folder" else "randar")]
    if target != "file.pt":
        attempts.append(lambda: import_checkpoint("randar", str(tmp_path / "randar.safetensors"), str(out), ImportOptions(heads=4)))
    for attempt in attempts:
        with pytest.raises(UserError, match=r"there is (something here|a file of this name).*choose another"):
            attempt()
    assert (out / "mine.txt" if target == "folder" else out).read_text() == "mine"
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_an_export_that_fails_half_way_leaves_nothing(randar: Path, tmp_path: Path) -> None:
    (randar / "vq.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"vq\.safetensors: not a readable"):
        export_checkpoint(str(randar), str(tmp_path / "out"))
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


@pytest.mark.parametrize(
    ("form", "fault"),
    [("llamagen-c2i", "have layout raster"), ("maskgit-vq", "no tokenizer of the kind maskgit-vq. Export it as llamagen-vq")],
)
def test_the_wrong_peers_format_is_refused(randar: Path, tmp_path: Path, form: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        export_checkpoint(str(randar), str(tmp_path / "out.pt"), form)
    assert not (tmp_path / "out.pt").exists()


def test_a_source_that_is_nothing_of_the_kind_is_explained(randar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "neither an exported folder (config.json), nor a run's folder (recipe.yaml)" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(randar), "--model", "base", "--out", str(tmp_path / "out")]) == 2
    assert "'base' would be one of the models of a run's folder" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(randar / "vq.safetensors"), "--out", str(tmp_path / "out")]) == 2
    assert "holds 'vq', expected 'any-order model'" in capsys.readouterr().err


def test_a_folder_goes_to_s3_and_is_loaded_from_there(randar: Path, s3_root: str) -> None:
    out = f"{s3_root}/exported"
    export_checkpoint(str(randar), out)
    there = [uri.rsplit("/", 1)[1] for uri in open_storage(out).list(out)]
    assert there == ["README.md", "config.json", "model.safetensors", "model_index.json", "pipeline.py", "vq.safetensors"]
    here, there = (oar_scale.load(folder).sample([5])[0] for folder in (str(randar), out))
    assert here.tobytes() == there.tobytes()
    with pytest.raises(UserError, match="there is something here already"):
        export_checkpoint(str(randar), out)


# -- runs and training checkpoints --------------------------------------------------------------------------------------------


def train_worker(job: TrainingJob) -> None:
    from oar_scale.distributed.worker import train

    train(job)


@pytest.fixture(
    scope="module", params=[pytest.param(("bf16", 2), id="bf16-zero2"), pytest.param(("fp32", 1), id="fp32-zero1", marks=pytest.mark.slow)]
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three steps on two workers over gloo."""
    precision, stage = request.param
    changes = {"parallel": {"precision": precision, "zero_stage": stage}, "pretrain": {"steps": 3, "evaluate_every": 3}}
    run = prepare_small_run(small_recipe(str(tmp_path_factory.mktemp("trained")), **changes))
    bind_run_dir(run)
    run_workers(train_worker, 2, pretraining(run))
    return run


def checkpoint_of(run: Run) -> str:
    return join(pretraining(run).checkpoints, "step-00000003")


def test_shards_of_two_workers_are_the_model_training_exported(trained: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "exported")
    assert main(["checkpoint", "export", checkpoint_of(trained), "--out", out]) == 0
    loaded, expected = load_model(join(out, "model.safetensors")), load_model(trained.model_uri("any_order"))
    assert loaded.spec == expected.spec
    rounded = torch.bfloat16 if trained.recipe.parallel.precision == "bf16" else torch.float32
    base = load_model(trained.model_uri("base")).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.to(rounded).float(), expected.state_dict()[name]), name
        assert not torch.equal(tensor, base[name]) or name == "conditioner.null_rows", f"{name} was not trained"
    record = ["README.md", "history.json"] if Path(out, "history.json").exists() else ["README.md"]
    parts = ["config.json", "model.safetensors", "model_index.json", "pipeline.py", "text.model", "vq.safetensors"]
    assert sorted(os.listdir(out)) == sorted(parts + record)
    config = json.loads(Path(out, "config.json").read_text())
    assert config["recipe"] == "small" and config["text"]["type"] == "sentencepiece" and config["source"].endswith("step-00000003")
    assert oar_scale.load(out).sample(["a red apple"])[0].size == (32, 32)


def test_a_run_and_its_export_draw_the_same(trained: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "exported")
    export_checkpoint(trained.local(), out, name="any_order")
    assert model_id(join(out, "model.safetensors")) == model_id(trained.model_uri("any_order"))
    here, there = (
        oar_scale.load(path, model).sample(["a red apple"], seed=4)[0] for path, model in [(trained.local(), "any_order"), (out, None)]
    )
    assert here.tobytes() == there.tobytes()
    with pytest.raises(UserError, match=r"has no model 'ordered'\. It has: base, any_order"):
        export_checkpoint(trained.local(), str(tmp_path / "other"))


def test_a_large_model_is_exported_in_several_files(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the Hugging Face hub has them; they draw as one file does, are exported again, and keep the model's id."""
    for module in (checkpoint_export, exported_folder):
        monkeypatch.setattr(module, "SHARD_BYTES", 30_000)
    outs = {name: str(tmp_path / name) for name in ("run", "again", "checkpoint")}
    expected = oar_scale.load(trained.local(), "any_order").sample(["a red apple"], seed=4, steps=4)[0].tobytes()
    export_checkpoint(trained.local(), outs["run"], name="any_order")
    export_checkpoint(outs["run"], outs["again"])
    export_checkpoint(checkpoint_of(trained), outs["checkpoint"])
    for out in outs.values():
        weights = sorted(name for name in os.listdir(out) if name.startswith(("model-", "model.")))
        assert weights[-1] == "model.safetensors.index.json" and len(weights) > 3
        assert re.fullmatch(r"model-00001-of-0000\d\.safetensors", weights[0])
        drawn = oar_scale.load(out).sample(["a red apple"], seed=4, steps=4)[0]
        if out != outs["checkpoint"]:  # it has the float32 weights
            assert model_id(join(out, "model.safetensors")) == model_id(trained.model_uri("any_order"))
            assert drawn.tobytes() == expected
    loaded = load_model(join(outs["checkpoint"], "model.safetensors")).state_dict()
    monkeypatch.undo()
    export_checkpoint(checkpoint_of(trained), str(tmp_path / "whole"))
    whole = load_model(str(tmp_path / "whole" / "model.safetensors")).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in whole.items())


def test_a_checkpoint_without_its_run_is_exported_alone(trained: Run, s3_root: str, tmp_path: Path) -> None:
    uri = f"{s3_root}/{trained.recipe.parallel.precision}/step-00000003"
    for path in open_storage(checkpoint_of(trained)).list(checkpoint_of(trained)):
        open_storage(uri).upload(path, join(uri, os.path.relpath(path, checkpoint_of(trained))))
    export_checkpoint(uri, str(tmp_path / "exported"))
    assert sorted(os.listdir(tmp_path / "exported")) == ["README.md", "config.json", "model.safetensors"]
    loaded = load_model(str(tmp_path / "exported" / "model.safetensors"))
    assert loaded.spec == load_model(trained.model_uri("any_order")).spec


def test_a_damaged_or_uncommitted_checkpoint_is_never_opened(trained: Run, tmp_path: Path) -> None:
    checkpoint, marker = Path(checkpoint_of(trained)), Path(checkpoint_of(trained), "COMMITTED")
    victim = next(checkpoint.glob("*/*optim_states.pt"))
    for path, damaged, fault in [
        (victim, victim.read_bytes()[:-1], rf"step-00000003: {victim.name} is damaged"),
        (marker, b"", "COMMITTED is damaged"),
    ]:
        whole = path.read_bytes()
        try:
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=fault):
                export_checkpoint(str(checkpoint), str(tmp_path / "out"))
        finally:
            path.write_bytes(whole)
    try:
        marker.rename(tmp_path / "marker")
        with pytest.raises(UserError, match="is not committed"):
            export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    finally:
        (tmp_path / "marker").rename(marker)
    with pytest.raises(UserError, match=r"holds the checkpoints of a training.*step-00000003"):
        export_checkpoint(str(checkpoint.parent), str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"keeps no moving average.*Leave --ema out"):
        export_checkpoint(str(checkpoint), str(tmp_path / "out"), average=True)
    assert os.listdir(tmp_path) == []


def test_a_model_trained_here_does_not_pretend_to_be_a_peers(trained: Run, tmp_path: Path) -> None:
    assert not isinstance(load_model(trained.model_uri("any_order")).spec.condition, ClassSpec)
    with pytest.raises(UserError, match=r"randar models have layout instructed and condition class; this one has .* condition text"):
        export_checkpoint(trained.model_uri("any_order"), str(tmp_path / "out.safetensors"), "randar")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            ["export", "runs/a", "--out", "x.pt", "--format", "randar", "--license", "cc0-1.0"],
            "--license means nothing with --format randar",
        ),
        (["export", "runs/a", "--out", "x.pt", "--format", "llamagen-vq", "--ema"], "--ema means nothing with --format llamagen-vq"),
        (["export", "runs/a", "--out", "x.pt", "--format", "maskgit-vq", "--model", "control"], "--model means nothing with --format"),
        (
            ["export", "runs/a/checkpoints/finetune/step-00000004", "--out", "x", "--model", "control"],
            "--model means nothing of a training",
        ),
        (["push", "runs/a/checkpoints/finetune/step-00000004", "hf://me/x", "--model", "control"], "--model means nothing of a training"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is looked for: who asks for the control does not get what is in the checkpoint of another training."""
    assert main(["checkpoint", *options]) == 2
    assert f"error: {complaint}" in capsys.readouterr().err
