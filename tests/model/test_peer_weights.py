"""Peers' models in and out: the same bits under every wrapping, and a clear word about what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import peer_case
from safetensors.torch import save_file
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.model import AnyOrderModel, ModelSpec, load_model, save_model
from oar_scale.model.peer_weights import Family, export_peer, import_peer
from oar_scale.model.spec import ClassSpec, TextSpec
from oar_scale.tokenizers.peer_files import read_peer_file

CASES: list[tuple[str, Family]] = [
    ("randar_c2i", "randar"),
    ("llamagen_c2i", "llamagen-c2i"),
    ("llamagen_t2i", "llamagen-t2i"),
    ("arpg_c2i", "arpg"),
]
ARPG_SIZES = [(1024, 24, 16, 2816, 319_845_376), (1280, 36, 20, 3584, 718_997_760), (1536, 48, 24, 4096, 1_302_449_664)]
WRAPPINGS = ["safetensors", "bare", "model", "module", "state_dict", "module.", "_orig_mod."]


def write_as(folder: Path, tensors: dict[str, Tensor], wrapping: str) -> str:
    path = folder / ("peer.safetensors" if wrapping == "safetensors" else "peer.pt")
    if wrapping == "safetensors":
        save_file(tensors, path)
    elif wrapping.endswith("."):
        torch.save({"model": {wrapping + name: tensor for name, tensor in tensors.items()}}, path)
    else:
        torch.save(tensors if wrapping == "bare" else {wrapping: tensors, "steps": 3}, path)
    return str(path)


def options(name: str) -> dict[str, Any]:
    config = peer_case(name).config
    return {"grid": 4, "heads": config["n_head"], **({"text_rows": config["cls_token_num"]} if name == "llamagen_t2i" else {})}


def assert_same_bits(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].dtype == expected[name].dtype and torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize(("name", "family"), CASES)
def test_what_is_imported_comes_back_bit_for_bit(tmp_path: Path, name: str, family: Family, wrapping: str, dtype: torch.dtype) -> None:
    tensors = {each: tensor.to(dtype) for each, tensor in peer_case(name).tensors.items()}
    peer = read_peer_file(write_as(tmp_path, tensors, wrapping))
    model = import_peer(peer.tensors, family, peer.where, **options(name))
    assert_same_bits(export_peer(model, family), tensors)
    save_model(str(tmp_path / "ours.safetensors"), model)
    again = load_model(str(tmp_path / "ours.safetensors"), as_stored=True)
    assert again.spec == model.spec
    assert_same_bits(export_peer(again, family), tensors)


@pytest.mark.parametrize(
    ("name", "shape", "fault"),
    [
        ("layers.1.feed_forward.w2.weight", (64, 255), r"layers\.1\.feed_forward\.w2\.weight is \(64, 255\) .*has \(64, 256\)"),
        ("tok_embeddings.weight", (96, 32), r"tok_embeddings\.weight is \(96, 32\) .*has \(96, 64\)"),
        ("norm.weight", (32,), r"norm\.weight is \(32,\) .*has \(64,\)"),
        ("layers.0.attention.wqkv.weight", (64, 64), r"wqkv\.weight is \(64, 64\) .*has \(192, 64\)"),
        ("layers.0.attention.wqkv.weight", (10, 64), r"wqkv\.weight is \(10, 64\) .*has \(192, 64\)"),
        ("layers.0.feed_forward.w1.weight", (128, 64), r"layers\.0\.feed_forward\.w1\.weight is \(128, 64\) .*has \(256, 64\)"),
        ("cls_embedding.embedding_table.weight", (11,), r"cls_embedding\.embedding_table\.weight is \(11,\) .*has \(11, 64\)"),
        ("pos_instruct_embeddings", (2, 64), r"pos_instruct_embeddings is \(2, 64\) .*has \(1, 64\)"),
    ],
)
def test_a_tensor_of_the_wrong_shape_has_the_files_name(name: str, shape: tuple[int, ...], fault: str) -> None:
    """A tensor of the wrong shape is named as the file calls it."""
    tensors = {**peer_case("randar_c2i").tensors, name: torch.zeros(shape)}
    with pytest.raises(UserError, match=rf"peer\.pt: tensor .*{fault}"):
        import_peer(tensors, "randar", "peer.pt", grid=4, heads=4)


@pytest.mark.parametrize("name", list(peer_case("llamagen_t2i").tensors))
def test_whichever_tensor_is_missing_it_is_named(name: str) -> None:
    tensors = {each: tensor for each, tensor in peer_case("llamagen_t2i").tensors.items() if each != name}
    with pytest.raises(UserError, match=rf"peer\.pt: .*{name}"):
        import_peer(tensors, "llamagen-t2i", "peer.pt", **options("llamagen_t2i"))


@pytest.mark.parametrize("name", list(peer_case("arpg_c2i").tensors))
@pytest.mark.parametrize("shape", [None, (5, 3), (64,), (0, 64), ()], ids=str)
def test_every_tensor_of_arpgs_must_be_there_and_fit(name: str, shape: tuple[int, ...] | None) -> None:
    """The error names it, whatever it holds in place of what belongs there."""
    tensors = dict(peer_case("arpg_c2i").tensors)
    tensors.pop(name)
    if shape == (64,) and name.endswith("norm.weight"):
        shape = (64, 1)
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    with pytest.raises(UserError, match=rf"peer\.pt: (has no )?tensor {name}"):
        import_peer(tensors, "arpg", "peer.pt", grid=4, heads=4)


@pytest.mark.parametrize("name", ["freqs_cis", "layers.self_dec.7.attn_norm.weight", "layers.cross_dec.0.attn.to_k.weight", "layers.to_q"])
def test_a_tensor_that_arpg_does_not_have_is_refused(name: str) -> None:
    tensors = {**peer_case("arpg_c2i").tensors, name: torch.zeros(64, 64)}
    with pytest.raises(UserError, match=r"peer\.pt: tensor \S+ is (\(64, 64\) .*has absent|absent .*has \()"):
        import_peer(tensors, "arpg", "peer.pt", grid=4, heads=4)


def test_arpgs_halves_must_be_equally_deep() -> None:
    tensors = {name: tensor for name, tensor in peer_case("arpg_c2i").tensors.items() if not name.startswith("layers.cross_dec.1.")}
    with pytest.raises(UserError, match=r"tensor layers\.cross_dec\.1\.attn\.proj\.weight is absent"):
        import_peer(tensors, "arpg", "peer.pt", grid=4, heads=4)


@pytest.mark.parametrize(("dim", "layers", "heads", "hidden", "count"), ARPG_SIZES)
def test_arpgs_published_sizes_are_read_off_their_shapes(dim: int, layers: int, heads: int, hidden: int, count: int) -> None:
    """All tensors, as many numbers as are published, and the number of heads."""
    with torch.device("meta"):
        spec = ModelSpec(
            layout="decoupled",
            dim=dim,
            layers=layers,
            heads=heads,
            ffn_hidden=hidden,
            vocab_size=16384,
            grid=16,
            condition=ClassSpec(classes=1000),
            condition_rotation="zero",
            step_attention="mutual",
        )
        tensors = export_peer(AnyOrderModel(spec), "arpg")
        assert len(tensors) == 8 * layers + 6
        assert sum(tensor.numel() for tensor in tensors.values()) == count
        assert import_peer(tensors, "arpg", "peer.pt").spec == spec


@pytest.mark.parametrize("name", ["freqs_cis", "layers.7.attention_norm.weight", "layers.999999999.norm", "cls_embedding.other"])
def test_an_unknown_tensor_is_named(name: str) -> None:
    tensors = {**peer_case("llamagen_c2i").tensors, name: torch.zeros(3, 4)}
    with pytest.raises(UserError, match=r"peer\.pt: tensor \S+ is (\(3, 4\) .*has absent|absent .*has \()"):
        import_peer(tensors, "llamagen-c2i", "peer.pt", grid=4, heads=4)


@pytest.mark.parametrize(
    ("name", "family", "remedy"),
    [
        ("llamagen_c2i", "randar", "no tensor pos_instruct_embeddings.*llamagen-c2i"),
        ("randar_c2i", "llamagen-c2i", "pos_instruct_embeddings.*Import it as randar"),
        ("llamagen_t2i", "llamagen-c2i", r"cls_embedding\.cap_proj\.fc1\.weight.*Import it as llamagen-t2i"),
        ("arpg_c2i", "randar", r"layers\.self_dec\.\*, which no randar model has\. Import it as arpg"),
        ("randar_c2i", "arpg", r"no tensor layers\.self_dec\.\*.*RandAR's \(randar\)"),
        ("llamagen_c2i", "llamagen-t2i", r"cls_embedding\.embedding_table\.weight.*Import it as llamagen-c2i"),
    ],
)
def test_a_file_of_the_sister_project_is_sent_to_the_right_kind(name: str, family: Family, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        import_peer(peer_case(name).tensors, family, "peer.pt", grid=4, heads=4)


def test_other_checkpoints_and_odd_heads_are_refused() -> None:
    """Another kind of checkpoint and heads that do not divide are refused."""
    with pytest.raises(UserError, match=r"peer\.pt: has no tensor tok_embeddings\.weight"):
        import_peer({"encoder.weight": torch.zeros(3)}, "randar", "peer.pt")
    with pytest.raises(UserError, match=r"64 channels do not divide into 5 heads.*--heads"):
        import_peer(peer_case("randar_c2i").tensors, "randar", "peer.pt", grid=4, heads=5)
    with pytest.raises(UserError, match=r"uncond_embedding has 120 rows, fewer than the 121.*--text-rows"):
        import_peer(peer_case("llamagen_t2i").tensors, "llamagen-t2i", "peer.pt", heads=4, text_rows=121)


@pytest.mark.parametrize(("dim", "heads"), [(768, 12), (1024, 16), (1280, 20), (1536, 24), (2560, 40), (3200, 32), (4096, 32)])
def test_published_sizes_get_their_number_of_heads(dim: int, heads: int) -> None:
    with torch.device("meta"):
        spec = ModelSpec(
            layout="raster",
            dim=dim,
            layers=1,
            heads=heads,
            ffn_hidden=256,
            vocab_size=16,
            grid=16,
            condition=ClassSpec(classes=1000),
            condition_rotation="zero",
        )
        assert import_peer(export_peer(AnyOrderModel(spec), "llamagen-c2i"), "llamagen-c2i", "peer.pt").spec == spec


def test_grouped_query_attention_is_read_off_the_shapes() -> None:
    spec = ModelSpec(
        layout="instructed",
        dim=64,
        layers=1,
        heads=8,
        kv_heads=2,
        ffn_hidden=32,
        vocab_size=7,
        grid=3,
        condition=ClassSpec(classes=4),
        condition_rotation="zero",
    )
    assert import_peer(export_peer(AnyOrderModel(spec), "randar"), "randar", "peer.pt", grid=3, heads=8).spec == spec


@pytest.mark.parametrize(("name", "family"), CASES[1:3])
def test_a_raster_checkpoint_warm_starts_a_model_of_any_order(name: str, family: Family) -> None:
    case = peer_case(name)
    model, again = (import_peer(case.tensors, family, name, start_instructed=True, **options(name)) for _ in range(2))
    assert model.spec.layout == "instructed"
    instruction = model.state_dict()["layout.pos_instruct_embeddings"]
    assert torch.equal(instruction, again.state_dict()["layout.pos_instruct_embeddings"])
    assert 0.01 < float(instruction.std()) < 0.03
    order_BN = torch.rand(len(case.arrays["idx"]), 16, generator=torch.Generator().manual_seed(0)).argsort(1)
    loss, _ = model.loss(case.arrays["idx"], order_BN, model.condition(case.arrays["cond"]))
    loss.backward()
    assert torch.isfinite(loss) and model.get_parameter("layout.pos_instruct_embeddings").grad is not None
    if family == "llamagen-c2i":
        exported = export_peer(model, "randar")
        assert torch.equal(exported["output.weight"], case.tensors["output.weight"])


def test_arpg_has_no_grouped_queries() -> None:
    spec = ModelSpec(
        layout="decoupled",
        dim=16,
        layers=2,
        heads=4,
        kv_heads=2,
        ffn_hidden=16,
        vocab_size=7,
        grid=3,
        condition=ClassSpec(classes=4),
        condition_rotation="zero",
    )
    with pytest.raises(UserError, match="as many heads of keys and values as of queries, this model 2 and 4"):
        export_peer(AnyOrderModel(spec), "arpg")


def test_llamagens_frozen_null_stays_frozen() -> None:
    model = import_peer(peer_case("llamagen_t2i").tensors, "llamagen-t2i", "peer.pt", **options("llamagen_t2i"))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["conditioner.uncond_embedding"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"condition": ClassSpec(classes=4)}, "multiplies the condition's queries and keys by zero"),
        ({"condition": TextSpec(vocab=9, rows=3)}, "condition text"),
        ({"layout": "dual", "condition": ClassSpec(classes=4)}, "layout dual"),
    ],
)
def test_a_model_the_peers_code_cannot_compute_stays_here(changes: dict[str, Any], fault: str) -> None:
    """A model that the peers code would compute otherwise is not exported."""
    spec = ModelSpec(dim=16, layers=1, heads=2, ffn_hidden=16, vocab_size=7, grid=3, **changes)
    with pytest.raises(UserError, match=fault):
        export_peer(AnyOrderModel(spec), "randar")
