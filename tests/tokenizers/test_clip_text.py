"""The frozen text tower gives open_clip's own numbers, whatever file they come from, and refuses what would give others."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from small_models import random_codes, random_orders, small_model
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.model.spec import FeatureSpec
from oar_scale.tokenizers.clip_spec import ClipTextSpec
from oar_scale.tokenizers.clip_text import ClipText
from oar_scale.tokenizers.prompts import FeatureReader, conditioning_inputs
from oar_scale.training import engine

SMALL = "ViT-S-16-alt"  # the smallest text tower open_clip has: 10 layers, 256 wide
CAPTIONS = ["a red apple", "", "a !( b", "two green cars on a blue road", "Ünïcode 🙂 & <b>html</b>", "word " * 200, "  \n"]


@pytest.fixture(scope="session")
def clip() -> Any:
    """open_clip's whole model with seeded random weights; frozen, for torch's attention rounds otherwise where a gradient is wanted."""
    import open_clip  # seconds, in each process that collects tests

    torch.manual_seed(0)
    return open_clip.create_model(SMALL, pretrained=None).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def checkpoint(clip: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clip") / "open_clip_pytorch_model.bin"
    torch.save(clip.state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def tokens(checkpoint: str) -> ClipText:
    return ClipText.load(SMALL, checkpoint)


@pytest.fixture(scope="session")
def pooled(checkpoint: str) -> ClipText:
    return ClipText.load(SMALL, checkpoint, features="pooled")


def text_tower(clip: Any) -> dict[str, Tensor]:
    return {name: value for name, value in clip.state_dict().items() if not name.startswith(("visual.", "logit_"))}


def test_ids_are_those_of_open_clip_plus_one(tokens: ClipText) -> None:
    """And zero stands only after the end of the text."""
    import open_clip

    ids_BT, theirs_BT = tokens.encode(CAPTIONS), open_clip.get_tokenizer(SMALL)(CAPTIONS)
    assert ids_BT.shape == (len(CAPTIONS), tokens.max_tokens) == (7, 77)
    for caption, ids, theirs in zip(CAPTIONS, ids_BT, theirs_BT, strict=True):
        if not caption.strip():
            assert ids.eq(0).all()
            continue
        length = int(theirs.argmax()) + 1  # the end token is the last of the vocabulary
        assert torch.equal(ids[:length], theirs[:length] + 1)
        assert ids[:length].ne(0).all() and ids[length:].eq(0).all()
    assert int(theirs_BT[2][2]) == 0  # this caption has CLIP's piece 0 in its middle
    assert int(ids_BT.max()) == tokens.vocab_size - 1


def test_a_long_caption_is_cut_and_keeps_its_end(tokens: ClipText) -> None:
    ids = tokens.encode(["word " * 200])[0]
    assert ids.ne(0).all() and int(ids[-1]) == tokens.vocab_size - 1


def test_half_a_surrogate_pair_counts_as_a_question_mark(tokens: ClipText) -> None:
    assert torch.equal(tokens.encode(["a \ud83d apple"]), tokens.encode(["a ? apple"]))


def test_pooled_features_are_what_open_clip_returns(clip: Any, pooled: ClipText) -> None:
    import open_clip

    features = pooled.features(pooled.encode(CAPTIONS))
    expected = clip.encode_text(open_clip.get_tokenizer(SMALL)(CAPTIONS))
    assert features.shape == (len(CAPTIONS), 1, pooled.width) and not features.requires_grad
    for caption, row, own in zip(CAPTIONS, features[:, 0], expected, strict=True):
        assert torch.equal(row, own if caption.strip() else torch.zeros_like(own))
    assert not torch.allclose(expected.norm(dim=-1), torch.ones(1), atol=0.1)  # not normalised


def test_token_features_are_the_normed_rows_from_start_to_end(clip: Any, tokens: ClipText, pooled: ClipText) -> None:
    ids_BT = tokens.encode(CAPTIONS)
    features_BTF = tokens.features(ids_BT)
    assert features_BTF.shape == (len(CAPTIONS), 77, tokens.width) and not features_BTF.requires_grad
    present_BT = ids_BT != 0
    assert features_BTF[~present_BT].eq(0).all() and features_BTF[present_BT].ne(0).any(-1).all()
    unscaled = (features_BTF[present_BT] - clip.ln_final.bias) / clip.ln_final.weight
    assert torch.allclose(unscaled.mean(-1), torch.zeros(1), atol=1e-4) and torch.allclose(unscaled.std(-1), torch.ones(1), atol=0.01)
    end_BF = features_BTF[torch.arange(len(ids_BT)), ids_BT.argmax(-1)]
    assert torch.allclose(end_BF @ clip.text_projection, pooled.features(ids_BT)[:, 0], atol=1e-5)


def test_a_captions_features_do_not_depend_on_the_other_captions(tokens: ClipText) -> None:
    first = tokens.features(tokens.encode(["a red apple", "", "x"]))[0]
    second = tokens.features(tokens.encode(["a red apple", "word " * 200, "two cars"]))[0]
    alone = tokens.features(tokens.encode(["a red apple"]))[0]
    assert torch.equal(first, second)
    assert torch.allclose(first, alone, atol=1e-5)


def test_token_features_do_not_depend_on_what_follows(tokens: ClipText) -> None:
    ids_BT = tokens.encode(["a red apple", "a red apple and much more"])
    features_BTF = tokens.features(ids_BT)
    assert torch.equal(features_BTF[0, :4], features_BTF[1, :4])  # start, a, red, apple
    assert not torch.allclose(features_BTF[0, 4], features_BTF[1, 4], atol=1e-3)  # the end against "and"


def test_no_captions_give_no_features(tokens: ClipText, pooled: ClipText) -> None:
    assert tokens.features(tokens.encode([])).shape == (0, 77, 256)
    assert pooled.features(pooled.encode(["", ""])).eq(0).all()


def test_every_layout_of_a_checkpoint_gives_the_same_tower(clip: Any, tokens: ClipText, tmp_path: Path) -> None:
    whole, tower = clip.state_dict(), text_tower(clip)
    custom = {f"text.{name}": value for name, value in tower.items()} | {"visual.proj": torch.zeros(2), "logit_scale": torch.ones(())}
    layouts = {
        "trainer.pt": {"epoch": 3, "name": "run", "state_dict": {f"module.{name}": value for name, value in whole.items()}},
        "custom.pt": custom,
        "wrapped.pt": {f"module.{name}": value for name, value in custom.items()},
        "tower.bin": tower,
        "half.pt": {name: value.double() for name, value in tower.items()},
    }
    ids = tokens.encode(["a red apple"])
    for name, content in (layouts | {"custom.safetensors": custom}).items():
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in custom.items()}, path)
        else:
            torch.save(content, path)
        again = ClipText.load(SMALL, str(path))
        path.unlink()
        assert again.content_id == tokens.content_id, name
        assert torch.equal(again.features(ids), tokens.features(ids)), name


def test_an_object_in_a_bucket_is_read_like_a_file(s3_root: str, checkpoint: str, tokens: ClipText) -> None:
    from oar_scale.storage import join, open_storage

    uri = join(s3_root, "clip.bin")
    open_storage(uri).upload(checkpoint, uri)
    assert ClipText.load(SMALL, uri).content_id == tokens.content_id


def test_other_weights_have_another_id(clip: Any, tokens: ClipText, tmp_path: Path) -> None:
    tower = text_tower(clip)
    tower["ln_final.bias"] = tower["ln_final.bias"] + 1e-3
    torch.save(tower, tmp_path / "tower.pt")
    assert ClipText.load(SMALL, str(tmp_path / "tower.pt")).content_id != tokens.content_id
    assert len(tokens.content_id) == 16 and int(tokens.content_id, 16) >= 0


def test_loading_keeps_the_text_tower_without_gradients(clip: Any, checkpoint: str) -> None:
    """No vision tower is left in memory, and the random state is as it was."""
    torch.manual_seed(7)
    state = torch.get_rng_state()
    text = ClipText.load(SMALL, checkpoint)
    assert torch.equal(torch.get_rng_state(), state)
    weights = text._tower.state_dict()
    assert set(weights) == set(text_tower(clip)) and not any(value.requires_grad or value.is_meta for value in weights.values())


def test_half_precision_stays_close_and_keeps_the_id(checkpoint: str, tokens: ClipText) -> None:
    ids = tokens.encode(CAPTIONS)
    half = ClipText.load(SMALL, checkpoint).to("cpu", torch.bfloat16)
    features = half.features(ids)
    assert features.dtype == torch.bfloat16 and half.content_id == tokens.content_id
    assert torch.allclose(features.float(), tokens.features(ids), atol=0.15)


def test_half_the_precision_for_a_while_keeps_the_weights(tokens: ClipText) -> None:
    """Matrix products are in bfloat16, norms and the tower itself stay in float32, and the next features have the same bits as before."""
    ids, seen = tokens.encode(CAPTIONS), dict[str, set[torch.dtype]]()
    before = tokens.features(ids)

    def note(name: str) -> Any:
        return lambda module, inputs, output: seen.setdefault(name, set()).add(output.dtype)

    tower = tokens._tower
    hooks = [tower.get_submodule(f"transformer.resblocks.0.{name}").register_forward_hook(note(name)) for name in ("mlp.c_fc", "ln_1")]
    features = tokens.features(ids, half=True)
    for hook in hooks:
        hook.remove()
    assert seen == {"mlp.c_fc": {torch.bfloat16}, "ln_1": {torch.float32}}
    assert features.dtype == torch.float32 and torch.allclose(features, before, atol=0.15) and not torch.equal(features, before)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    assert torch.equal(tokens.features(ids), before)


class Recorded(ClipText):
    """A tower without weights that notes in which precision it is asked to compute."""

    def __init__(self) -> None:
        self.half: bool | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ClipText:
        return self

    def features(self, ids_BT: Tensor, *, half: bool = False) -> Tensor:
        self.half = half
        return torch.zeros(1)


@pytest.mark.parametrize(
    ("device", "dtype", "half"),
    [("cuda", torch.bfloat16, True), ("cuda", torch.float32, False), ("cpu", torch.bfloat16, False), ("cpu", torch.float32, False)],
)
def test_the_tower_computes_as_its_model_does_on_a_gpu(device: str, dtype: torch.dtype, half: bool) -> None:
    tower = Recorded()
    conditioning_inputs(tower, cast("Tensor", SimpleNamespace(device=torch.device(device))), dtype)
    assert tower.half is half


def test_training_asks_for_the_precision_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def note(encoder: object, encoded_prompts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        asked.append(dtype)
        return encoded_prompts

    monkeypatch.setattr(engine, "conditioning_inputs", note)
    for dtype in (torch.float32, torch.bfloat16):
        model = small_model(condition=FeatureSpec(width=6, rows=3)).to(dtype)
        codes, order = random_codes(model, 2), random_orders(model, 2)
        objective = engine.Objective(model, FeatureReader(3, 6))
        objective(codes, order, torch.randn(2, 3, 6), torch.tensor([False, False]))
    assert asked == [torch.float32, torch.bfloat16]


def test_ids_of_another_length_are_refused(tokens: ClipText) -> None:
    with pytest.raises(ValueError, match=r"\(2, 12\), the text tower takes \[B, 77\]"):
        tokens.features(torch.zeros(2, 12, dtype=torch.long))


def test_a_typing_error_in_the_architecture_gets_near_names(checkpoint: str) -> None:
    with pytest.raises(UserError, match=r"ViT-L14: open_clip has no model.*ViT-L-14"):
        ClipText.load("ViT-L14", checkpoint)


@pytest.mark.parametrize(
    ("architecture", "named"),
    [("roberta-ViT-B-32", "roberta-base"), ("ViT-B-16-SigLIP", "timm/ViT-B-16-SigLIP"), ("coca_ViT-B-32", "CoCa")],
)
def test_towers_of_another_kind_are_refused_by_name(architecture: str, named: str, checkpoint: str) -> None:
    with pytest.raises(UserError, match=rf"{architecture}: its text tower .*{named}.*not supported"):
        ClipText.load(architecture, checkpoint)


def test_weights_of_another_architecture_are_refused(checkpoint: str) -> None:
    """The error names the tensor and both shapes."""
    with pytest.raises(UserError, match=r"model\.bin for ViT-B-32: tensor \S+ is \(77, 256\) .* and \(77, 512\) in the text tower"):
        ClipText.load("ViT-B-32", checkpoint)


def test_a_missing_and_a_superfluous_tensor_are_named(clip: Any, tmp_path: Path) -> None:
    tower, path = text_tower(clip), tmp_path / "tower.pt"
    torch.save({name: value for name, value in tower.items() if name != "ln_final.bias"}, path)
    with pytest.raises(UserError, match=r"tensor ln_final\.bias is absent in the weights and \(256,\) in the text tower"):
        ClipText.load(SMALL, str(path))
    torch.save(tower | {"transformer.resblocks.10.ln_1.bias": torch.zeros(256)}, path)
    with pytest.raises(UserError, match=r"resblocks\.10\.ln_1\.bias is \(256,\) in the weights and absent"):
        ClipText.load(SMALL, str(path))


class Trap:
    """A pickle of this creates the file it names, if it is ever executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_never_executed(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    torch.save({"state_dict": {"x": Trap(proof)}}, tmp_path / "new.pt")
    (tmp_path / "old.bin").write_bytes(pickle.dumps({"x": Trap(proof)}, protocol=2))
    for name in ("new.pt", "old.bin"):
        with pytest.raises(UserError, match=rf"{name}: not a checkpoint that can be read without running code"):
            ClipText.load(SMALL, str(tmp_path / name))
    assert not proof.exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize("content", [b"", b"no tensors in here"])
def test_a_file_that_is_no_checkpoint_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: not a checkpoint"):
        ClipText.load(SMALL, str(tmp_path / name))


def test_a_file_that_is_not_there_and_an_unknown_tag_are_named() -> None:
    with pytest.raises(UserError, match=r"nowhere/clip\.pt: there is nothing here"):
        ClipText.load(SMALL, "nowhere/clip.pt")
    with pytest.raises(UserError, match=r"opena1: there is no such file, and ViT-L-14 has no pretrained tag.*openai"):
        ClipText.load("ViT-L-14", "opena1")
    with pytest.raises(UserError, match=r"ViT-S-16-alt has no pretrained tag.*no tags: name a checkpoint file"):
        ClipText.load(SMALL, "openai")


def test_a_tag_of_another_activation_is_not_loaded() -> None:
    """Weights that were trained with another activation would load without an error."""
    with pytest.raises(UserError, match=r"openai: .*Use ViT-L-14-quickgelu with this tag"):
        ClipText.load("ViT-L-14", "openai")


def test_tags_of_another_activation_have_the_architecture_named() -> None:
    """The remedy is true for all models whose text tower is supported."""
    import open_clip

    for architecture, tag in open_clip.list_pretrained():
        config = open_clip.get_model_config(architecture)
        differs = bool(config.get("quick_gelu")) != bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu"))
        if differs and not set(config["text_cfg"]) & {"hf_model_name", "hf_tokenizer_name"}:
            assert open_clip.get_model_config(f"{architecture}-quickgelu")["quick_gelu"] is True


def test_a_tag_without_a_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"(?s)openai: open_clip could not fetch .*timm/vit_large.*name the file instead of the tag"):
        ClipText.load("ViT-L-14-quickgelu", "openai")


def test_a_spec_survives_json() -> None:
    spec = ClipTextSpec(architecture="ViT-L-14", features="pooled")
    assert ClipTextSpec.model_validate_json(spec.model_dump_json()) == spec
