"""Peers' models in and out: the same bits under every wrapping, and a clear word about what does not fit."""

from __future__ import annotations

import argparse
import re
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
    ("lpd_c2i", "lpd"),
]
ARPG_SIZES = [(1024, 24, 16, 2816, 319_845_376), (1280, 36, 20, 3584, 718_997_760), (1536, 48, 24, 4096, 1_302_449_664)]
LPD_SIZES = [
    (1024, 24, 16, 16, 337_157_120),
    (1280, 36, 20, 16, 751_947_520),
    (1536, 48, 24, 16, 1_412_184_576),
    (1024, 24, 16, 32, 337_943_552),
    (1280, 36, 20, 32, 752_930_560),
    (1536, 48, 24, 32, 1_413_364_224),
]
WRAPPINGS = ["safetensors", "bare", "model", "module", "state_dict", "module.", "_orig_mod."]
DAILY = [("randar_c2i", wrapping, torch.float32) for wrapping in WRAPPINGS]
DAILY += [(name, wrapping, dtype) for name, _ in CASES for wrapping, dtype in (("safetensors", torch.float32), ("model", torch.bfloat16))]
"""Wrappings are undone before anybody looks whose model it is."""


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
    if name == "lpd_c2i":
        return {"heads": config["decoder_num_heads"]}
    return {"grid": 4, "heads": config["n_head"], **({"text_rows": config["cls_token_num"]} if name == "llamagen_t2i" else {})}


def assert_same_bits(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].dtype == expected[name].dtype and torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "family", "wrapping", "dtype"),
    [
        pytest.param(name, family, wrapping, dtype, marks=[] if (name, wrapping, dtype) in DAILY else [pytest.mark.slow])
        for name, family in CASES
        for wrapping in WRAPPINGS
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
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


def test_whichever_tensor_is_missing_it_is_named() -> None:
    whole, given = peer_case("llamagen_t2i").tensors, options("llamagen_t2i")
    for name in whole:
        with pytest.raises(UserError, match=rf"peer\.pt: .*{name}"):
            import_peer({each: tensor for each, tensor in whole.items() if each != name}, "llamagen-t2i", "peer.pt", **given)


@pytest.mark.parametrize("shape", [None, (5, 3), (64,), (0, 64), ()], ids=str)
def test_every_tensor_of_arpgs_must_be_there_and_fit(shape: tuple[int, ...] | None) -> None:
    """The error names it, whatever it holds in place of what belongs there."""
    whole = peer_case("arpg_c2i").tensors
    for name in whole:
        tensors = {each: tensor for each, tensor in whole.items() if each != name}
        if shape is not None:
            tensors[name] = torch.zeros((64, 1) if shape == (64,) and name.endswith("norm.weight") else shape)
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


@pytest.mark.parametrize("shape", [None, (5, 3), (7,), (0, 64), ()], ids=str)
def test_every_tensor_of_lpds_must_be_there_and_fit(shape: tuple[int, ...] | None) -> None:
    """The error names it, whatever it holds in place of what belongs there."""
    whole = peer_case("lpd_c2i").tensors
    for name in whole:
        tensors = {each: tensor for each, tensor in whole.items() if each != name}
        if shape is not None:
            tensors[name] = torch.zeros(shape)
        with pytest.raises(UserError, match=rf"peer\.pt: (has no )?tensor {name}"):
            import_peer(tensors, "lpd", "peer.pt", heads=4)


@pytest.mark.parametrize("name", ["freqs_cis", "blocks.7.norm1.weight", "blocks.999999999.norm", "mask"])
def test_a_tensor_that_lpd_does_not_have_is_refused(name: str) -> None:
    tensors = {**peer_case("lpd_c2i").tensors, name: torch.zeros(64, 64)}
    with pytest.raises(UserError, match=r"peer\.pt: tensor \S+ is (\(64, 64\) .*has absent|absent .*has \()"):
        import_peer(tensors, "lpd", "peer.pt", heads=4)


@pytest.mark.parametrize(("dim", "layers", "heads", "grid", "count"), LPD_SIZES)
def test_lpds_published_sizes_are_read_off_their_shapes(dim: int, layers: int, heads: int, grid: int, count: int) -> None:
    """All tensors, as many numbers as are published, the number of heads and the grid."""
    with torch.device("meta"):
        tensors = export_peer(AnyOrderModel(lpd_spec(dim=dim, layers=layers, heads=heads, grid=grid, vocab_size=16384)), "lpd")
        assert len(tensors) == 12 * layers + 10
        assert sum(tensor.numel() for tensor in tensors.values()) == count
        assert import_peer(tensors, "lpd", "peer.pt").spec == lpd_spec(dim=dim, layers=layers, heads=heads, grid=grid, vocab_size=16384)


def lpd_spec(**changes: Any) -> ModelSpec:
    sizes: dict[str, Any] = {"dim": 64, "layers": 1, "heads": 4, "vocab_size": 7, "grid": 3, "norm_eps": 1e-6, **changes}
    return ModelSpec(**{"layout": "grouped", "ffn_hidden": 4 * sizes["dim"], "condition": ClassSpec(classes=1000), **sizes})


def test_lpds_positions_are_drawn_out_for_another_grid_only_if_asked() -> None:
    """Row 0 is no cell's; the others are a picture, whose cells' middles are where those of the larger grid lie, by cubic convolution."""
    tensors = dict(peer_case("lpd_c2i").tensors)
    along, across = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    tensors["pos_embed"] = torch.cat([tensors["pos_embed"][0, :1], (along[:, None] + across).flatten(0, 1)])[None]
    same = import_peer(tensors, "lpd", "peer.pt", heads=4)
    assert same.spec.grid == 4 and torch.equal(export_peer(same, "lpd")["pos_embed"], tensors["pos_embed"])
    larger = import_peer(tensors, "lpd", "peer.pt", heads=4, grid=8)
    table = export_peer(larger, "lpd")["pos_embed"][0]
    assert larger.spec.grid == 8 and table.shape == (65, 64)
    assert torch.equal(table[0], tensors["pos_embed"][0, 0])
    # Rows 3 and 4 of 8 lie at 1.25 and 1.75 of 0 .. 3; these are the four weights of the kernel (a = -0.75) at a quarter between two.
    quarter = torch.tensor([-27, 225, 67, -9]) / 256
    weights = torch.stack([quarter, quarter.flip(0)])
    expected = (weights @ along)[:, None] + weights @ across
    torch.testing.assert_close(table[1:].unflatten(0, (8, 8))[3:5, 3:5], expected, rtol=1e-5, atol=1e-5)
    tensors["pos_embed"] = tensors["pos_embed"][:, :-1]
    with pytest.raises(UserError, match=r"peer\.pt: tensor pos_embed has 16 rows, one and those of a square grid are expected"):
        import_peer(tensors, "lpd", "peer.pt", heads=4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"ffn_hidden": 100},
            "a feed-forward of four times the width and norms with an epsilon of 1e-06, this model 1.5625 times and 1e-06",
        ),
        ({"norm_eps": 1e-5}, "this model 4 times and 1e-05"),
        ({"kv_heads": 2}, "lpd's code has as many heads of keys and values as of queries, this model 2 and 4"),
        (
            {"condition": TextSpec(vocab=9, rows=2)},
            "lpd models have layout grouped and condition class; this one has layout grouped and condition text",
        ),
        ({"layout": "raster"}, "this one has layout raster"),
    ],
)
def test_what_lpds_code_would_compute_otherwise_is_refused(changes: dict[str, Any], reason: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=re.escape(reason)):
        export_peer(AnyOrderModel(lpd_spec(**changes)), "lpd")


def test_a_training_checkpoint_of_lpds_is_read_with_its_arguments(tmp_path: Path) -> None:
    """Their trainer writes optimizer, scaler and an ``argparse.Namespace`` beside the weights; any other object is refused."""
    tensors = peer_case("lpd_c2i").tensors
    content = {"model": tensors, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "epoch": 3, "scaler": {"scale": 2.0}}
    torch.save({**content, "args": argparse.Namespace(model="lpd_l", img_size=64)}, tmp_path / "lpd.pth")
    peer = read_peer_file(str(tmp_path / "lpd.pth"))
    assert_same_bits(peer.tensors, tensors)
    torch.save({**content, "args": Path("a")}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth"):
        read_peer_file(str(tmp_path / "other.pth"))


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
        ("lpd_c2i", "arpg", r"blocks\.\*, which no arpg model has\. Import it as lpd"),
        ("lpd_c2i", "llamagen-c2i", r"blocks\.\*, which no llamagen-c2i model has\. Import it as lpd"),
        ("arpg_c2i", "lpd", r"layers\.self_dec\.\*, which no lpd model has\. Import it as arpg"),
        ("randar_c2i", "lpd", r"no tensor blocks\.\*, which every lpd model has"),
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
    with pytest.raises(UserError, match=r"peer\.pt: sizes that no randar model has \(vocab_size: .* Copy the file again"):
        import_peer({**peer_case("randar_c2i").tensors, "tok_embeddings.weight": torch.zeros(0, 64)}, "randar", "peer.pt", grid=4, heads=4)
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
