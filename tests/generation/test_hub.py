"""Models on the Hugging Face hub: what is pushed is what is loaded, and nothing else of a repository is touched. The hub is a fake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drawing_run import CAPTIONS, small_run
from hostile import hostile_files
from hub_server import WRITER, FakeHub, fake_hub
from huggingface_hub import constants
from PIL import Image

import oar_scale
from oar_scale.cli import main
from oar_scale.errors import UserError
from oar_scale.generation.pretrained import Pretrained


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_run(tmp_path_factory.mktemp("hub") / "run", {"type": "sentencepiece", "max_tokens": 4}, None)


@pytest.fixture(scope="module")
def local(run: str) -> Pretrained:
    return oar_scale.load(run)


@pytest.fixture(scope="module")
def exported(run: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an exported folder."""
    folder = tmp_path_factory.mktemp("exported") / "folder"
    assert main(["checkpoint", "export", run, "--out", str(folder)]) == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pixels(model: Pretrained) -> list[bytes]:
    return [picture.tobytes() for picture in model.sample(CAPTIONS, seed=3)]


# -- there and back -----------------------------------------------------------------------------------------------------------


def test_what_is_pushed_draws_the_same_pictures(hub: FakeHub, local: Pretrained) -> None:
    pushed = local.push_to_hub("me/small", private=True, license="cc-by-sa-4.0")
    repo = hub.repos["me/small"]
    assert repo.private and len(repo.commits) == 2, "the empty repository, and one commit"
    assert repo.head.keys() >= {"config.json", "model.safetensors", "vq.safetensors", "text.model", "README.md", "model_index.json"}
    model = oar_scale.load("hf://me/small")
    assert pushed == model.where == f"hf://me/small@{repo.branches['main']}"
    assert pixels(model) == pixels(local) and model.defaults == local.defaults
    assert "license: cc-by-sa-4.0" in repo.head["README.md"].decode()


def test_what_is_published_names_no_place_of_this_machine(hub: FakeHub, run: str, local: Pretrained) -> None:
    local.push_to_hub("me/small")
    for name, data in hub.repos["me/small"].head.items():
        assert os.path.dirname(run).encode() not in data, name


def test_a_loaded_revision_stays_what_it_was(hub: FakeHub, local: Pretrained, exported: dict[str, bytes]) -> None:
    first = local.push_to_hub("me/small")
    branch = local.push_to_hub("me/small", revision="try/two")
    assert hub.repos["me/small"].branches.keys() == {"main", "try/two"}
    newer = {**exported, "config.json": exported["config.json"].replace(b'"top_k": 5', b'"top_k": 1')}
    hub.repos["me/small"].commit("main", newer)
    assert oar_scale.load("hf://me/small").defaults.top_k == 1
    for uri in (first, branch, "hf://me/small@try%2Ftwo"):
        assert oar_scale.load(uri).defaults.top_k == 5
    again = oar_scale.load(first)
    assert again.where == first and pixels(again) == pixels(local)


def test_several_models_are_folders_of_one_repository(hub: FakeHub, run: str, local: Pretrained) -> None:
    assert main(["checkpoint", "push", run, "hf://me/zoo/small", "--license", "mit"]) == 0
    assert main(["checkpoint", "push", run, "hf://me/zoo/other"]) == 0
    assert {name.partition("/")[0] for name in hub.repos["me/zoo"].head} == {".gitattributes", "small", "other"}
    hub.downloads.clear()
    assert pixels(oar_scale.load("hf://me/zoo/small")) == pixels(local)
    assert all(name.startswith("small/") for name in hub.downloads)


def test_the_command_line_takes_models_on_the_hub(hub: FakeHub, exported: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("me/small", exported)
    Image.new("RGB", (12, 12), "red").save(tmp_path / "red.png")
    edit = ["edit", str(tmp_path / "red.png"), "--box", "0,0,6,12", "--prompt", CAPTIONS[0], "--out", str(tmp_path / "out.png")]
    assert main([*edit, "--model", "hf://me/small"]) == 0
    assert Image.open(tmp_path / "out.png").size == (12, 12)
    assert main(["sample", "hf://me/small", CAPTIONS[0], "--count", "1", "--out", str(tmp_path / "drawn.png")]) == 0
    assert Image.open(tmp_path / "drawn.png").size == (12, 12)
    assert main(["checkpoint", "export", "hf://me/small", "--out", str(tmp_path / "copy")]) == 0
    copied = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    different = {name for name in exported if copied[name] != exported[name]}
    assert different == {"config.json"}, "which says where it comes from"


def test_a_second_push_removes_what_is_no_part_any_more(hub: FakeHub, local: Pretrained) -> None:
    local.push_to_hub("me/small")
    repo = hub.repos["me/small"]
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "mean-order.json": b"{}"}
    repo.commit("main", {**repo.head, **old, "photo.jpg": b"the owner's", "more/model.safetensors": b"another"})
    before = len(repo.commits)
    local.push_to_hub("me/small")
    assert len(repo.commits) == before + 1
    assert not old.keys() & repo.head.keys() and {"photo.jpg", "more/model.safetensors"} <= repo.head.keys()


def test_without_a_network_the_cache_serves(hub: FakeHub, local: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = local.push_to_hub("me/small")
    oar_scale.load("hf://me/small")
    hub.downloads.clear()
    for name, value in (("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")):
        with monkeypatch.context() as patch:
            patch.setattr(constants, name, value)
            for uri in ("hf://me/small", pushed):
                assert oar_scale.load(uri).where == pushed
            with pytest.raises(UserError, match=r"hf://me/other: .*(HF_HUB_OFFLINE is set|127\.0\.0\.1:9 cannot be reached)"):
                oar_scale.load("hf://me/other")
    assert not hub.downloads


def test_a_killed_push_leaves_no_half_of_a_model(hub: FakeHub, run: str) -> None:
    hub.hold.clear()
    code = "import sys, oar_scale.cli; oar_scale.cli.main(['checkpoint', 'push', sys.argv[1], 'hf://me/small'])"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITER}
    with subprocess.Popen([sys.executable, "-c", code, run], env=env) as push:
        assert hub.uploading.wait(300)
        push.send_signal(signal.SIGKILL)
    hub.hold.set()
    assert hub.repos["me/small"].head == {".gitattributes": b""}
    with pytest.raises(UserError, match=r"hf://me/small@\w+: not a model of oar_scale: there is no config\.json"):
        oar_scale.load("hf://me/small")
    assert main(["checkpoint", "push", run, "hf://me/small"]) == 0
    assert oar_scale.load("hf://me/small").vq is not None


# -- errors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("hf://me/missing", r"hf://me/missing: no such repository at http.*, or a private one\. .*hf auth login"),
        ("hf://me/secret", r"hf://me/secret: no such repository at http.*, or a private one\. .*hf auth login"),
        ("hf://me/gated", r"hf://me/gated: this repository asks for agreement to its terms"),
        ("hf://me/small@gone", r"hf://me/small@gone: the repository has no such revision"),
        ("hf://me/small/gone", r"small@\w{40}/gone: not a model of oar_scale: there is no config\.json"),
        ("hf://me/llama", r"hf://me/llama@\w{40}/config\.json: not the configuration of an exported folder \(library"),
        ("hf://me/part", r"hf://me/part@\w{40}: vq\.safetensors is missing"),
        ("hf://me", r"hf://me: .* A model on the hub is hf://owner/name"),
        ("hf://datasets/me/small", r"this is a dataset of the hub, not a model"),
        ("hf://me/small/../../x", r"does not lead to a file below this folder"),
    ],
)
def test_what_cannot_be_loaded_says_why(
    hub: FakeHub, exported: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, uri: str, message: str
) -> None:
    """To somebody who is not logged in; and of somebody else's model no weights are fetched to find that out."""
    hub.add("me/small", exported)
    hub.add("me/secret", exported, private=True)
    hub.add("me/gated", exported, gated=True)
    hub.add("me/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"gigabytes"})
    hub.add("me/part", {name: data for name, data in exported.items() if name != "vq.safetensors"})
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=message):
        oar_scale.load(uri)
    assert uri == "hf://me/part" or "model.safetensors" not in hub.downloads


def test_a_private_repository_opens_with_a_token(hub: FakeHub, exported: dict[str, bytes]) -> None:
    hub.add("me/secret", exported, private=True)
    assert oar_scale.load("hf://me/secret").vq is not None


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_files_are_refused_and_fetched_anew(hub: FakeHub, exported: dict[str, bytes], local: Pretrained, name: str) -> None:
    hub.add("me/small", exported)
    hub.damaged.add(name)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"hf://me/small@\w{{40}}: {name} is damaged: its hash"):
            oar_scale.load("hf://me/small")
    hub.damaged.clear()
    assert pixels(oar_scale.load("hf://me/small")) == pixels(local)


def test_files_in_the_shared_store_are_compared_too(hub: FakeHub, exported: dict[str, bytes], tmp_path: Path) -> None:
    """There a file has another hash for a name: that of Xet."""
    hub.add("me/small", exported)
    oar_scale.load("hf://me/small")
    (pointer,) = (tmp_path / "cache").glob("models--me--small/snapshots/*/vq.safetensors")
    blob, stored = (pointer.parent / os.readlink(pointer)), tmp_path / ("c" * 64)
    blob.rename(stored)
    blob.symlink_to(stored)
    assert oar_scale.load("hf://me/small").vq is not None
    stored.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"vq\.safetensors is damaged"):
        oar_scale.load("hf://me/small")
    assert not stored.exists() and oar_scale.load("hf://me/small").vq is not None


def test_a_push_replaces_nothing_of_others(hub: FakeHub, local: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights", "README.md": b"mine"})
    hub.add("me/open", {".gitattributes": b""})
    refused = {
        "me/llama": (r"hf://me/llama: something else is in this repository \(config\.json, model\.safetensors\)", {}),
        "me/open": (r"hf://me/open: the repository exists already, and is public", {"private": True}),
        "me/small@" + "a" * 40: (r"a commit never changes\. Push to a branch", {}),
        "me/new": (r"license 'CC BY': the hub has names such as", {"license": "CC BY"}),
    }
    for repo, (message, choices) in refused.items():
        with pytest.raises(UserError, match=message):
            local.push_to_hub(repo, **choices)  # type: ignore[arg-type]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"hf://me/new: the hub does not know who is asking: log in with `hf auth login`"):
        local.push_to_hub("me/new")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"only somebody who is logged in can write to the hub: log in with `hf auth login`"):
        local.push_to_hub("me/new")
    assert {name: len(repo.commits) for name, repo in hub.repos.items()} == {"me/llama": 1, "me/open": 1}


def test_two_pushes_at_once_do_not_mix(hub: FakeHub, local: Pretrained) -> None:
    """The one whose commit comes second finds the repository changed, and says so."""
    local.push_to_hub("me/small")
    repo, changed = hub.repos["me/small"], {}

    class Waiting(type(hub.hold)):  # type: ignore[misc]
        def wait(self, timeout: float | None = None) -> bool:
            changed["oid"] = repo.commit("main", dict(repo.head))
            return True

    hub.hold = Waiting()
    with pytest.raises(UserError, match=r"hf://me/small: somebody else has changed the repository in the meantime"):
        local.push_to_hub("me/small")
    assert repo.branches["main"] == changed["oid"]


# -- hostile repositories -----------------------------------------------------------------------------------------------------


def test_a_hostile_repository_runs_and_writes_nothing(hub: FakeHub, exported: dict[str, bytes], tmp_path: Path, local: Pretrained) -> None:
    ran = tmp_path / "ran"
    pickled = hostile_files(str(ran))["protocol 2"]
    code = f"open({str(ran)!r}, 'w')".encode()
    others = dict.fromkeys(("pytorch_model.bin", "model.pt", "text.pt", "vq.pth", "optimizer.pkl", "../../../escaped"), pickled)
    others |= {"pipeline.py": code, "setup.py": code, "__init__.py": code, "tokenizer.json": b"{", "a/../../b": b"x", "/etc/x": b"x"}
    hub.add("me/hostile", {**exported, **others})
    assert pixels(oar_scale.load("hf://me/hostile")) == pixels(local)
    assert not set(hub.downloads) & others.keys()
    assert not ran.exists() and not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("damage", [b"{}", b'{"order": "01"}', b'{"order": [0, 1, 2, 3, 4, 5, 6, 7, 1e999]}', b'{"order": [[0]]}', b"[]"])
def test_a_damaged_mean_order_is_one_clear_error(hub: FakeHub, exported: dict[str, bytes], tmp_path: Path, damage: bytes) -> None:
    hub.add("me/hostile", {**exported, "mean-order.json": damage})
    model = oar_scale.load("hf://me/hostile")
    with pytest.raises(UserError, match=r"mean-order\.json: (not an order of 3 x 3 cells|this is not JSON)"):
        model.sample(CAPTIONS, order="mean")
    assert main(["checkpoint", "export", "hf://me/hostile", "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("tower.pt", r"tower\.pt may hold code\. From the hub, weights are read as \.safetensors alone"),
        ("../../tower.safetensors", r"text\.weights: .* is not the name of a file: it must lie beside the model"),
        ("/etc/tower.safetensors", r"text\.weights: .* is not the name of a file"),
    ],
)
def test_a_text_tower_from_the_hub_is_safetensors(hub: FakeHub, exported: dict[str, bytes], weights: str, message: str) -> None:
    config: dict[str, Any] = json.loads(exported["config.json"])
    config["text"] = {"type": "open_clip", "architecture": "ViT-B-32", "weights": weights}
    hub.add("me/hostile", {**exported, "config.json": json.dumps(config).encode()})
    with pytest.raises(UserError, match=message):
        oar_scale.load("hf://me/hostile")
    assert hub.downloads == ["config.json"]
