"""``oar_scale.load``: from a folder to pictures in five lines, and a clear word where a part is missing or a prompt is of another kind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing_run import CAPTIONS, GRID, PIXELS, small_run
from PIL import Image
from small_models import small_model

import oar_scale
from oar_scale.commands.checkpoint_export import export_checkpoint
from oar_scale.commands.drawing_target import find_target
from oar_scale.config.loading import dump_recipe, load_recipe
from oar_scale.errors import UserError
from oar_scale.generation.exported_folder import complete_folder
from oar_scale.generation.hub import HubPath
from oar_scale.generation.pretrained import Pretrained
from oar_scale.model import save_model
from oar_scale.model.spec import ClassSpec, FeatureSpec, condition_spec
from oar_scale.storage import read_json, write_json
from oar_scale.tokenizers.clip_text import ClipText
from oar_scale.tokenizers.text import train_text_tokenizer


@pytest.fixture(scope="module")
def captions_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_run(tmp_path_factory.mktemp("captions") / "run", {"type": "sentencepiece", "max_tokens": 4}, None)


@pytest.fixture(scope="module")
def drawer(captions_run: str) -> Pretrained:
    return oar_scale.load(captions_run)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    run = small_run(tmp_path_factory.mktemp("classes") / "run", {"type": "labels", "classes": 10}, ClassSpec(classes=10))
    return oar_scale.load(run)


def pixels(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_importing_oar_scale_loads_no_torch() -> None:
    check = "import sys, oar_scale; oar_scale.load; assert not {'torch', 'ray', 'deepspeed', 'pydantic'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_seed_alone_decides_the_pictures(drawer: Pretrained) -> None:
    """The same seed draws the same pictures and another draws others."""
    first, again, other = (drawer.sample(CAPTIONS, seed=seed) for seed in (1, 1, 2))
    assert [(image.size, image.mode) for image in first] == [((PIXELS, PIXELS), "RGB")] * 4
    assert pixels(first) == pixels(again) != pixels(other)


def test_a_run_and_its_exported_folder_draw_the_same(captions_run: str, drawer: Pretrained, tmp_path: Path) -> None:
    export_checkpoint(captions_run, str(tmp_path / "exported"))
    exported = oar_scale.load(str(tmp_path / "exported"))
    assert exported.defaults == drawer.defaults and exported.defaults.guidance == 1.5
    assert pixels(exported.sample(CAPTIONS)) == pixels(drawer.sample(CAPTIONS))


def test_what_is_not_said_comes_from_the_recipe(drawer: Pretrained) -> None:
    drawn = drawer.draw(CAPTIONS, guidance=1.5, top_k=5, temperature=1.0, order_temperature=0.0)
    assert torch.equal(drawer.draw(CAPTIONS).codes_BN, drawn.codes_BN)
    assert not torch.equal(drawer.draw(CAPTIONS, guidance=9.0, top_k=1).codes_BN, drawn.codes_BN)


def test_an_arm_with_an_extraction_of_its_own_draws_in_the_mean_of_that(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", {"type": "sentencepiece", "max_tokens": 4}, None)
    recipe = load_recipe(
        f"{run}/recipe.yaml", ["pipeline.arms={margin: {extract: {score: margin}}, half: {random_share: 0.5}}", "sample.order=mean"]
    )
    Path(run, "recipe.yaml").write_text(dump_recipe(recipe))
    main, of_arm = list(range(GRID * GRID)), list(range(GRID * GRID))[::-1]
    write_json(f"{run}/orders/mean.json", {"order": main})
    write_json(f"{run}/arm_orders/margin/mean.json", {"order": of_arm})
    for model, order in (("half", main), ("margin", of_arm), ("ordered", main)):
        file = Path(run, "models", f"{model}.safetensors")
        if not file.exists():
            shutil.copy(Path(run, "models", "ordered.safetensors"), file)
        export_checkpoint(run, str(tmp_path / model), name=model)
        assert find_target(run, (), model).bundle.orders == oar_scale.load(run, model).bundle.orders
        for drawer in (oar_scale.load(run, model), oar_scale.load(str(tmp_path / model))):
            assert drawer.draw(CAPTIONS[:1], order="mean").order_BN.tolist() == [order], model


def test_an_order_is_followed_by_name_or_as_a_permutation(drawer: Pretrained) -> None:
    backwards = list(range(GRID * GRID))[::-1]
    assert drawer.draw(CAPTIONS[:2], order=backwards).order_BN.tolist() == [backwards] * 2
    each = torch.stack([torch.tensor(backwards), torch.arange(9)])
    assert torch.equal(drawer.draw(CAPTIONS[:2], order=each).order_BN, each)
    assert drawer.draw(CAPTIONS[:1], order="raster").order_BN[0].tolist() == list(range(9))
    orders = drawer.draw(CAPTIONS, order="random").order_BN
    assert torch.equal(orders.sort(1).values, torch.arange(9).expand(4, -1)) and len(orders.unique(dim=0)) == 4
    assert len(drawer.sample(CAPTIONS, order="random", steps=4)) == 4
    with pytest.raises(UserError, match=r"order 'diagonal': no such policy. There are: .*halton"):
        drawer.draw(CAPTIONS, order="diagonal")  # type: ignore[arg-type]


def test_a_raster_run_draws_its_own_model_in_its_own_order(tmp_path: Path) -> None:
    raster = oar_scale.load(small_run(tmp_path / "run", {"type": "sentencepiece", "max_tokens": 4}, None, layout="raster"))
    assert raster.draw(CAPTIONS[:1]).order_BN[0].tolist() == list(range(9))


def test_labels_draw_and_what_is_no_label_is_refused(classes: Pretrained) -> None:
    assert len(classes.sample([0, 9, 3])) == 3
    for wrong in (10, -1, "a red apple"):
        with pytest.raises(UserError, match=rf"{wrong!r} is no class label: this model knows the labels 0 to 9"):
            classes.sample([3, wrong])


def test_what_is_no_caption_is_refused(drawer: Pretrained) -> None:
    with pytest.raises(UserError, match="7 is not a caption: this model is conditioned on captions"):
        drawer.sample(["a red apple", 7])
    with pytest.raises(UserError, match="caption '  ' has no token"):
        drawer.sample(["a red apple", "  "])
    for none in ("a red apple", []):
        with pytest.raises(UserError, match="prompts are a list"):
            drawer.sample(none)


@pytest.mark.parametrize("method", ["sample", "draw", "variations"])
def test_captions_are_text_and_nothing_else(drawer: Pretrained, method: str) -> None:
    images = [[Image.new("RGB", (8, 8))]] if method == "variations" else []
    for wrong in (None, b"cat", 1.5, np.zeros(3), {"a": "cat"}):
        with pytest.raises(UserError, match="is not a caption: this model is conditioned on captions"):
            getattr(drawer, method)(*images, [wrong])


@pytest.mark.parametrize(
    "caption",
    ["🍎", "\u202eتفاحة حمراء", "a red apple " * 1000, "<script>alert(1)</script>", "a\0red\ud800\x1b[31m apple", np.str_("a cat")],
)
def test_captions_of_any_script_and_length_are_drawn(drawer: Pretrained, caption: str) -> None:
    (sampled,), (edited,) = drawer.sample([caption]), drawer.variations([Image.new("RGB", (8, 8))], [caption], 1, 1.0)
    assert sampled.size == (PIXELS, PIXELS) and edited.picture.size == (8, 8)


def test_a_model_file_alone_draws_codes_but_no_pictures(tmp_path: Path) -> None:
    """A model file alone draws codes and says what pictures need."""
    path = str(tmp_path / "model.safetensors")
    save_model(path, small_model(condition=ClassSpec(classes=4)))
    alone = oar_scale.load(path)
    assert alone.draw([0, 3]).codes_BN.shape == (2, 9)
    with pytest.raises(UserError, match=r"model\.safetensors: a model without an image tokenizer draws codes only.*oar checkpoint import"):
        alone.sample([0])


def test_a_class_label_of_numpy_is_recorded(classes: Pretrained) -> None:
    label, settings = np.arange(10)[3], classes.settings()
    record = classes.record(label, 0, settings, seed=1)
    assert record.prompt == 3 and classes.again(record).tobytes() == classes.sample([3], seed=1)[0].tobytes()


def test_a_model_file_of_captions_names_what_is_missing(tmp_path: Path) -> None:
    """A model file of captions alone says whose captions are missing."""
    save_model(str(tmp_path / "model.safetensors"), small_model())
    with pytest.raises(UserError, match="nobody knows what its captions are encoded with"):
        oar_scale.load(str(tmp_path / "model.safetensors")).draw(["a red apple"])


def test_precomputed_features_prompt_a_model_trained_on_them(tmp_path: Path) -> None:
    """Precomputed features are prompts of a model trained on them."""
    run = small_run(tmp_path / "run", {"type": "features", "width": 6, "rows": 2}, FeatureSpec(width=6, rows=2))
    features = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0)).numpy()
    assert len(oar_scale.load(run).sample(features)) == 3
    with pytest.raises(UserError, match=r"precomputed features \(2, 6\) .* got the caption 'a red apple'"):
        oar_scale.load(run).sample(["a red apple"])


@pytest.mark.parametrize("name", ["tower.bin", "epoch_8.ckpt", "tower"])
def test_an_export_takes_its_text_tower_along(tmp_path: Path, name: str) -> None:
    import open_clip

    weights = tmp_path / name
    torch.save(open_clip.create_model("ViT-S-16-alt").state_dict(), weights)
    tower = ClipText.load("ViT-S-16-alt", str(weights))
    text = {"type": "open_clip", "architecture": "ViT-S-16-alt", "weights": str(weights)}
    run = small_run(tmp_path / "run", text, condition_spec(tower, encoder_layers=0))
    loaded = oar_scale.load(run)
    with pytest.raises(UserError, match=rf"{name}: the text tower's weights may hold code\. From the hub"):
        complete_folder(str(tmp_path), loaded.bundle, loaded.model.spec, public=HubPath("me/emoji", None, ""))
    expected = loaded.sample(["a red apple"])
    export_checkpoint(run, str(tmp_path / "exported"))
    weights.unlink()
    shutil.move(tmp_path / "exported", tmp_path / "elsewhere")
    assert pixels(oar_scale.load(str(tmp_path / "elsewhere")).sample(["a red apple"])) == pixels(expected)


def test_a_raster_run_and_a_model_alone_do_not_edit(tmp_path: Path) -> None:
    image, box = Image.new("RGB", (PIXELS, PIXELS)), (0, 0, 4, 4)
    raster = oar_scale.load(small_run(tmp_path / "run", {"type": "sentencepiece", "max_tokens": 4}, None, layout="raster"))
    with pytest.raises(UserError, match="a raster model draws in raster order"):
        raster.edit([image], [box], ["a red apple"])
    save_model(str(tmp_path / "model.safetensors"), small_model(condition=ClassSpec(classes=4)))
    with pytest.raises(UserError, match="a model without an image tokenizer"):
        oar_scale.load(str(tmp_path / "model.safetensors")).edit([image], [box], [0])


def test_bfloat16_draws_too(captions_run: str) -> None:
    half = oar_scale.load(captions_run).to(dtype=torch.bfloat16)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert half.sample(CAPTIONS[:2])[1].size == (PIXELS, PIXELS)


def test_a_damaged_or_foreign_configuration_is_named(captions_run: str, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    export_checkpoint(captions_run, str(out))
    config = read_json(str(out / "config.json"))
    for key, value in {"format": 2, "model": {"dim": "wide"}, "text": {"type": "telepathy"}}.items():
        write_json(str(out / "config.json"), {**config, key: value})
        with pytest.raises(UserError, match=rf"config\.json: not the configuration of an exported folder \({key}"):
            oar_scale.load(str(out))
    write_json(str(out / "config.json"), {**config, "a later version's": "field"})
    assert oar_scale.load(str(out)).sample(["a red apple"])


def test_parts_that_do_not_belong_together_are_refused(captions_run: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(captions_run, run)
    train_text_tokenizer(["x y z"], 64, 4).save(str(run / "tokenizers" / "text.model"))
    with pytest.raises(UserError, match="its condition has vocab"):
        oar_scale.load(str(run))
    save_model(str(run / "models" / "ordered.safetensors"), small_model(grid=GRID, vocab=9))
    with pytest.raises(UserError, match="the image tokenizer has 7 codes, the model a vocabulary of 9"):
        oar_scale.load(str(run))


def test_nothing_to_load_and_missing_models_are_explained(captions_run: str, tmp_path: Path) -> None:
    """What is nothing to load and models a run lacks are explained."""
    with pytest.raises(UserError, match="neither an exported folder"):
        oar_scale.load(str(tmp_path))
    with pytest.raises(UserError, match=r"has no model 'base'\. It has: ordered"):
        oar_scale.load(captions_run, "base")
