"""Pieces of a flexibility report on models that brute force can check: likelihoods, what is kept, and what is no number."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from small_models import random_codes, random_text, small_model

from oar_scale.errors import UserError
from oar_scale.evaluation.extractors import ExtractorSpec
from oar_scale.evaluation.flexibility import pieces as pieces_module
from oar_scale.evaluation.flexibility.comparison import arm_differences, arm_figures
from oar_scale.evaluation.flexibility.features import FeatureNetwork
from oar_scale.evaluation.flexibility.likelihood import (
    NllPiece,
    OwnOrdersPiece,
    likelihood_measures,
    likelihood_sources,
    own_order_pieces,
    own_orders,
)
from oar_scale.evaluation.flexibility.pieces import NetworkFile, PieceFolder, piece_id
from oar_scale.evaluation.flexibility.sampling import sample_measures
from oar_scale.evaluation.flexibility.subjects import Arm, ArmModel, MeasuredImages, Source, by_measure, values_of
from oar_scale.model import AnyOrderModel, save_model
from oar_scale.orders.extraction import brute_force_orders
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.results.seed_spread import pooled_spread
from oar_scale.results.statistics import Comparison, compare, holm

IMAGES = 5


def stored(model: AnyOrderModel, folder: Path, name: str) -> NetworkFile:
    save_model(str(folder / f"{name}.safetensors"), model)
    return NetworkFile(name, str(folder / f"{name}.safetensors"), name)


def images_of(model: AnyOrderModel, vq: NetworkFile) -> MeasuredImages:
    return MeasuredImages(random_codes(model, IMAGES).numpy(), np.zeros((IMAGES, 12, 12, 3), np.uint8), np.arange(IMAGES), vq, 3)


@pytest.fixture
def two_arms(tmp_path: Path) -> tuple[list[Arm], MeasuredImages, dict[str, AnyOrderModel]]:
    """An arm of two seeds, and one of one."""
    models = {"a0": small_model(seed=0), "a1": small_model(seed=1), "b0": small_model(seed=2)}
    files = {name: stored(model, tmp_path, name) for name, model in models.items()}
    text = random_text(models["a0"], IMAGES).numpy()
    arms = [
        Arm("a", (ArmModel("a", 0, files["a0"], text), ArmModel("a", 1, files["a1"], text))),
        Arm("b", (ArmModel("b", 0, files["b0"], text),)),
    ]
    return arms, images_of(models["a0"], files["a0"]), models


@torch.no_grad()
def by_hand(model: AnyOrderModel, codes_N: torch.Tensor, order_N: torch.Tensor, text_1T: torch.Tensor) -> float:
    """A fresh forward pass for each cell, of the cells before it alone."""
    total = 0.0
    for step in range(len(order_N)):
        logits = model(codes_N[None], order_N[None, : step + 1], model.condition(text_1T))[0, -1].double()
        total -= float(logits.log_softmax(-1)[codes_N[order_N[step]]])
    return total / len(order_N)


def test_likelihoods_are_those_of_brute_force(
    two_arms: tuple[list[Arm], MeasuredImages, dict[str, AnyOrderModel]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own orders, those of the other arm, and a fixed one; gap and accuracy from the logits themselves."""
    arms, images, models = two_arms
    folder = PieceFolder(str(tmp_path / "pieces"))
    raster = np.tile(np.arange(9, dtype=np.uint16), (IMAGES, 1))
    found = own_order_pieces(arms, images, 0, "fp32")
    orders = own_orders(found, folder.run([piece for each in found.values() for piece in each], ["cpu"], 1, None, lambda: None))
    sources = likelihood_sources(arms, images, {"raster": raster}, orders)
    needed, reads, read, done = [piece for source in sources for piece in source.pieces], list[str](), PieceFolder.read, list[None]()
    folder.run(needed, ["cpu"], 1, None, lambda: None)

    def counted(uri: str) -> pieces_module.Arrays | None:
        reads.append(uri)
        return read(uri)

    monkeypatch.setattr(PieceFolder, "read", staticmethod(counted))
    results = folder.run(needed, ["cpu"], 1, None, lambda: done.append(None))
    assert len(done) == len(results) > 5 and not reads, "a call that goes on opens nothing that is there"
    values = by_measure(sources, values_of(sources, results))
    assert sorted(reads) == sorted(map(folder.file, {piece_id(piece): piece for piece in needed}.values())), "each is read once"

    codes, text = torch.from_numpy(images.codes_SN), torch.from_numpy(arms[0].models[0].cond_inputs_S)
    with torch.no_grad():
        brute = {
            name: brute_force_orders(model, codes, model.condition(text), ExtractionSettings()).order_BN for name, model in models.items()
        }
    wanted = {
        ("nll/raster", "b", 0): ("b0", torch.from_numpy(raster.astype(np.int64))),
        ("nll/own", "a", 1): ("a1", brute["a1"]),
        ("nll/own of a", "a", 0): ("a0", brute["a0"]),
        ("nll/own of a", "b", 0): ("b0", brute["a0"]),
        ("nll/own of b", "a", 1): ("a1", brute["b0"]),
    }
    for (measure, label, seed), (name, order) in wanted.items():
        by_brute_force = [by_hand(models[name], codes[i], order[i], text[i : i + 1]) for i in range(IMAGES)]
        assert values[measure][label][seed] == pytest.approx(by_brute_force, rel=1e-4), (measure, label, seed)
    with torch.no_grad():
        log_p = models["b0"](codes, brute["b0"], models["b0"].condition(text)).double().log_softmax(-1)
    nll = -log_p.gather(2, codes.gather(1, brute["b0"])[:, :, None])[..., 0].mean(1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean(1)
    assert values["calibration/gap"]["b"][0] == pytest.approx((nll - entropy).numpy(), rel=1e-3, abs=1e-5)
    right = log_p.argmax(-1) == codes.gather(1, brute["b0"])
    assert values["calibration/top accuracy"]["b"][0] == pytest.approx(right.double().mean(1).numpy())


FAMILIES = np.repeat(np.arange(6), 2)


def test_primary_differences_are_corrected_for_their_own_number(
    two_arms: tuple[list[Arm], MeasuredImages, dict[str, AnyOrderModel]],
) -> None:
    """Own orders and one distance are asked beforehand; all else is corrected in its chapter. In other arms' orders nothing is tested."""
    network = FeatureNetwork("0", ExtractorSpec(), "efflite0")
    measures = [
        *likelihood_measures(two_arms[0], {"raster": "raster", "random": "random"}),
        *sample_measures({"max_prob": "max_prob", "best": "best"}, network, "best"),
    ]
    assert {each.name for each in measures if each.role == "primary"} == {"nll/own", "samples/best/heldout"}
    rng = np.random.default_rng(0)
    values = {
        each.name: {label: list(rng.normal(size=(seeds, 12))) for label, seeds in (("a", 2), ("c", 2), ("b", 2))} for each in measures
    }
    found = {(each.measure, each.first): each for each in arm_differences(measures, values, "b", FAMILIES)}
    assert list(found) == [(each.name, label) for each in measures for label in ("a", "c")]

    def alone(measure: str, label: str) -> Comparison:
        of_measure = {arm: np.stack(of_seeds) for arm, of_seeds in values[measure].items()}
        spread = pooled_spread(of_measure)
        assert spread is not None
        return compare(
            of_measure[label], of_measure["b"], families_S=FAMILIES, spread=None if {label, "b"} & {*spread.unstable} else spread
        )

    def corrected(names: list[str]) -> None:
        rows = [(name, label) for name in names for label in ("a", "c")]
        assert [found[row].comparison.p_both for row in rows] == [alone(*row).p_both for row in rows]
        assert [found[row].p_holm for row in rows] == holm([alone(*row).p_both or 0.0 for row in rows])
        assert [found[row].p_seeds_holm for row in rows] == holm([alone(*row).p_seeds or 0.0 for row in rows])
        assert [found[row].p_images_holm for row in rows] == holm([alone(*row).p_images for row in rows])

    corrected(["nll/own", "samples/best/heldout"])
    corrected(["nll/raster", "nll/random"])
    corrected(["samples/max_prob/heldout", "samples/max_prob/decoded", "samples/best/decoded"])
    assert all(found[f"nll/own of {arm}", "a"].p_holm is None for arm in ("a", "b"))


def test_arms_of_other_seeds_are_not_paired(two_arms: tuple[list[Arm], MeasuredImages, dict[str, AnyOrderModel]]) -> None:
    """Nor do they tell how much differences of paired arms vary."""
    (measure,) = [each for each in likelihood_measures(two_arms[0], {}) if each.name == "nll/own"]
    values = {measure.name: {label: list(np.random.default_rng(seed).normal(size=(3, 12))) for seed, label in enumerate("abcd")}}
    found = {each.first: each.comparison for each in arm_differences([measure], values, "b", FAMILIES, unpaired=["a"])}
    means = {label: np.mean(of_arm, axis=1) for label, of_arm in values[measure.name].items()}
    assert found["a"].p_seeds == pytest.approx(stats.ttest_ind(means["a"], means["b"], equal_var=False).pvalue)
    assert found["c"].seed_freedom == (3 - 1) * (3 - 1), "of b, c and d"


def test_an_unstable_arm_is_judged_by_its_own_spread(two_arms: tuple[list[Arm], MeasuredImages, dict[str, AnyOrderModel]]) -> None:
    (measure,) = [each for each in likelihood_measures(two_arms[0], {}) if each.name == "nll/own"]
    rng = np.random.default_rng(3)
    arms = {label: rng.normal(size=(3, 1)) * (30 if label == "e" else 1) + np.zeros(12) for label in "abcdef"}
    found = {each.first: each for each in arm_differences([measure], {measure.name: {k: list(v) for k, v in arms.items()}}, "b", FAMILIES)}
    assert {label: row.unstable for label, row in found.items()} == {"a": (), "c": (), "d": (), "e": ("e",), "f": ()}
    assert found["e"].comparison.p_seeds == pytest.approx(stats.ttest_rel(arms["e"].mean(1), arms["b"].mean(1)).pvalue)
    assert found["a"].comparison.seed_freedom == (5 - 1) * (3 - 1), "of all but e"
    against = {
        each.first: each for each in arm_differences([measure], {measure.name: {k: list(v) for k, v in arms.items()}}, "e", FAMILIES)
    }
    assert all(row.unstable == ("e",) and row.comparison.seed_freedom == 2 for row in against.values())


def test_of_one_seed_each_images_alone_count(two_arms: tuple[list[Arm], MeasuredImages, dict[str, AnyOrderModel]]) -> None:
    measures = likelihood_measures(two_arms[0], {"raster": "raster"})
    values = {each.name: {label: [np.random.default_rng(1).normal(size=12)] for label in "ab"} for each in measures}
    assert all(each.p_holm == each.p_images_holm for each in arm_differences(measures, values, "b", FAMILIES))
    figures = {(each.measure, each.label): each.figure for each in arm_figures(measures, values, FAMILIES)}
    assert figures["nll/raster", "b"].over_seeds is None and figures["nll/raster", "b"].over_both is None
    assert figures["nll/raster", "a"].mean == pytest.approx(np.mean(values["nll/raster"]["a"]))


def nll_piece(model: AnyOrderModel, file: NetworkFile) -> NllPiece:
    order = np.tile(np.arange(9, dtype=np.uint16), (IMAGES, 1))
    return NllPiece(file, random_codes(model, IMAGES).numpy(), random_text(model, IMAGES).numpy(), order)


def test_a_piece_is_named_by_all_that_its_result_depends_on(tmp_path: Path) -> None:
    model = small_model()
    piece = nll_piece(model, stored(model, tmp_path, "m"))
    elsewhere = replace(piece, model=NetworkFile("m", "/elsewhere.safetensors", "another name"))
    assert piece_id(piece) == piece_id(replace(piece)) == piece_id(elsewhere)
    others = [
        replace(piece, model=replace(piece.model, id="n")),
        replace(piece, codes_SN=piece.codes_SN[:, ::-1]),
        replace(piece, order_SN=piece.order_SN[:, ::-1]),
        replace(piece, cond_inputs_S=piece.cond_inputs_S + 1),
        OwnOrdersPiece(piece.model, piece.codes_SN, piece.cond_inputs_S, 0, 0, "fp32"),
    ]
    assert len({piece_id(each) for each in [piece, *others]}) == 1 + len(others)


def test_the_arrays_of_a_piece_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many figures rest on it, and whoever runs it."""
    model = small_model()
    piece, hashed = nll_piece(model, stored(model, tmp_path, "m")), list[object]()
    fingerprint = pieces_module.fingerprint
    monkeypatch.setattr(pieces_module, "fingerprint", lambda given: hashed.append(given) or fingerprint(given))
    folder = PieceFolder(str(tmp_path / "pieces"))
    results = folder.run([piece, piece], ["cpu"], 1, None, lambda: None)
    sources = [Source(f"nll/{place}", "m", 0, (piece,), "nll") for place in range(3)]
    assert len(values_of(sources, results)) == 3 and len(hashed) == 1
    assert piece_id(pickle.loads(pickle.dumps(piece))) == piece_id(replace(piece)) == piece_id(piece) and len(hashed) == 2


def test_what_is_kept_is_not_computed_again_and_damage_is_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    file, folder, done = stored(model, tmp_path, "m"), PieceFolder(str(tmp_path / "pieces")), list[str]()
    first, second = (
        nll_piece(model, file),
        OwnOrdersPiece(file, random_codes(model, 5).numpy(), random_text(model, 5).numpy(), 0, 0, "fp32"),
    )

    def run(*pieces: NllPiece | OwnOrdersPiece, until: float | None = None) -> set[str]:
        return set(folder.run(pieces, ["cpu"], 1, until, lambda: None))

    monkeypatch.setattr(pieces_module, "load_model", lambda uri: done.append(uri) or model)
    pieces_module._opened_model.cache_clear()
    assert run(first, second, until=0.0) == set() and not done, "no time: nothing begins"
    assert run(first) == {piece_id(first)}
    assert run(first, second, until=0.0) == {piece_id(first)}, "what is there counts"
    kept = Path(folder.file(first))
    kept.write_bytes(kept.read_bytes()[:-40])
    results = folder.run([first], ["cpu"], 1, None, lambda: None)
    with pytest.raises(UserError, match=rf"{kept.name}: is damaged, or removed\. Run the same command again"):
        results[piece_id(first)]
    assert not kept.exists()
    assert run(first, second) == {piece_id(first), piece_id(second)} and folder.read(folder.file(first)) is not None
    pieces_module._opened_model.cache_clear()


def test_a_model_whose_answers_are_no_numbers_is_named(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.output.weight[3] = torch.nan
    file, folder = stored(model, tmp_path, "broken"), PieceFolder(str(tmp_path / "pieces"))
    piece = nll_piece(model, file)
    with pytest.raises(UserError, match=r"broken: likelihood: nll of image 0 .* no finite number"):
        folder.run([piece], ["cpu"], 1, None, lambda: None)
    own = OwnOrdersPiece(file, piece.codes_SN, piece.cond_inputs_S, 0, 0, "fp32")
    with pytest.raises(UserError, match="broken: own orders: the model's scores are not numbers"):
        folder.run([own], ["cpu"], 1, None, lambda: None)
    assert folder.read(folder.file(piece)) is None and folder.read(folder.file(own)) is None
