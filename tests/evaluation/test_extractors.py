"""Extractors with random weights in the layouts of the published files: against independent networks, and against files that are none."""

from __future__ import annotations

import hashlib
import pickle
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oar_scale.errors import UserError
from oar_scale.evaluation.extractors import ExtractorSpec, extractor_id, load_extractor
from oar_scale.evaluation.extractors.fid_inception import FidInception
from oar_scale.evaluation.extractors.inception import resize_as_tensorflow

IMAGES = torch.randint(0, 256, (2, 20, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def torchvision_network() -> nn.Module:
    """torchvision's InceptionV3, made FID's by exchanging its pooling: the independent network."""
    from torchvision.models import inception

    network = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("conv.weight", "fc.weight")):
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=random)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=random)
            elif name.endswith(("running_mean", "bias")):
                tensor.normal_(0, 0.1, generator=random)
    return network.eval()


@pytest.fixture(scope="module")
def weights(torchvision_network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> ExtractorSpec:
    """A file in pytorch-fid's layout."""
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(torchvision_network.state_dict(), path)
    return ExtractorSpec("inception", str(path), hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def fid_pooling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torchvision's blocks call ``F.avg_pool2d``: for them it does not count the padding, and in the last block it is the maximum."""
    from torchvision.models import inception

    def pooled(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
        if x.shape[1] == 2048:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)

    patched = types.SimpleNamespace(**{**vars(F), "avg_pool2d": pooled})
    monkeypatch.setattr(inception, "F", patched)
    yield


@pytest.mark.usefixtures("fid_pooling")
def test_inception_is_the_network_of_fid(torchvision_network: nn.Module, weights: ExtractorSpec) -> None:
    """All three layers within 1e-4 of features of size 1, through another implementation of every block."""
    extractor, middle = load_extractor(weights), []
    hook = torchvision_network.Mixed_6d.register_forward_hook(lambda _, __, output: middle.append(output))  # type: ignore[union-attr]
    pooled = []
    pool = torchvision_network.avgpool.register_forward_hook(lambda _, __, output: pooled.append(output))  # type: ignore[union-attr]
    pixels = (resize_as_tensorflow(IMAGES.permute(0, 3, 1, 2).float(), 299) - 128) / 128
    with torch.inference_mode():
        logits = torchvision_network(pixels)
    hook.remove()
    pool.remove()
    layers = extractor.images(IMAGES)
    assert layers["pooled"].shape == (2, 2048) and layers["spatial"].shape == (2, 2023)
    torch.testing.assert_close(layers["pooled"], pooled[0].flatten(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layers["spatial"].reshape(2, 17, 17, 7), middle[0][:, :7].permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layers["logits"], logits - torchvision_network.fc.bias, rtol=1e-3, atol=1e-3)  # type: ignore[operator]


def test_images_are_resized_as_tensorflow_1_did() -> None:
    """Pixel by pixel in plain Python: output i lies at input ``i * in / out``, with no half a pixel and no smoothing."""
    image = np.random.default_rng(0).uniform(0, 255, size=(4, 6))
    resized = resize_as_tensorflow(torch.from_numpy(image).float()[None, None], 5)[0, 0]
    for row in range(5):
        for column in range(5):
            y, x = row * 4 / 5, column * 6 / 5
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 3), min(left + 1, 5)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            assert float(resized[row, column]) == pytest.approx(upper + (lower - upper) * (y - top), abs=1e-3)


def test_only_the_published_weights_give_a_fid(weights: ExtractorSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (load_extractor(weights).standard, load_extractor(weights).label) == (False, f"inception_{str(weights.sha256)[:8]}")
    with pytest.raises(UserError, match=r"(?s)not the weights that FID is defined with.*--sha256 " + str(weights.sha256)):
        load_extractor(ExtractorSpec("inception", weights.weights))
    monkeypatch.setattr("oar_scale.evaluation.extractors.KNOWN", weights.sha256)
    monkeypatch.setattr("oar_scale.evaluation.extractors.inception.KNOWN", weights.sha256)
    published = load_extractor(ExtractorSpec("inception", weights.weights))
    assert (published.standard, published.label) == (True, "inception")


class Program:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("open('/tmp/pwned', 'w')",))


def damaged(kind: str, path: Path, whole: dict[str, Tensor]) -> None:
    if kind == "a program":
        path.write_bytes(pickle.dumps(Program()))
    elif kind == "cut":
        torch.save(whole, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "another network":
        torch.save({"conv1.weight": torch.zeros(3, 3)}, path)
    elif kind == "a NaN":
        torch.save({**whole, "fc.bias": torch.full((1008,), torch.nan)}, path)
    elif kind == "1000 classes":
        torch.save({**whole, "fc.weight": torch.zeros(1000, 2048)}, path)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("a program", "run code|without running code"),
        ("cut", "damaged, cut off|cannot be read|Copy it again"),
        ("another network", "tensor Conv2d_1a_3x3.conv.weight is absent in the file"),
        ("a NaN", "tensor fc.bias holds values that are no numbers"),
        ("1000 classes", r"tensor fc.weight is \(1000, 2048\) in the file and \(1008, 2048\)"),
    ],
)
def test_files_that_are_no_weights_are_named(kind: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with torch.device("meta"):
        tensors = FidInception().state_dict()
    damaged(kind, path, {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=says) as error:
        load_extractor(ExtractorSpec("inception", str(path), digest))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (ExtractorSpec("vgg"), "no such extractor. There are: efflite0, inception, openclip:MODEL, timm:MODEL"),
        (ExtractorSpec("openclip"), "no such extractor"),
        (ExtractorSpec("inception:v3"), "no such extractor"),
        (ExtractorSpec("inception"), "the weights are not shipped"),
        (ExtractorSpec("inception", "/nowhere.pth"), "/nowhere.pth: there is no such file"),
        (ExtractorSpec("efflite0", "/nowhere.pth"), "come with their weights"),
        (ExtractorSpec("timm:resnet_nein"), "name the file of its weights"),
        (ExtractorSpec("timm:resnet_18", __file__), "no model of this name. Near it: resnet18"),
        (ExtractorSpec("openclip:ViT-B-23", __file__), "no model of this name. Near it: .*ViT-B-32"),
    ],
)
def test_extractors_that_there_are_not_are_explained(spec: ExtractorSpec, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_extractor(spec)


def test_another_hash_than_the_one_named_is_refused(weights: ExtractorSpec) -> None:
    with pytest.raises(UserError, match=f"its SHA-256 is {weights.sha256}, and 00ff was asked for"):
        extractor_id(ExtractorSpec("inception", weights.weights, "00ff"))
    assert str(weights.sha256) in extractor_id(weights)


def test_a_model_of_timm_sees_as_timm_does(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False)  # with its classifier, as files have it
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    extractor = load_extractor(ExtractorSpec("timm:test_vit", str(tmp_path / "vit.pth")))
    square = torch.randint(0, 256, (2, 160, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    model.eval().reset_classifier(0)
    with torch.inference_mode():
        expected = model((square.permute(0, 3, 1, 2) / 255 - mean) / std)
    torch.testing.assert_close(extractor.images(square)["pooled"], expected, rtol=1e-5, atol=1e-5)
    assert extractor.captions(["a cat"]) is None and extractor.label == "test_vit"
