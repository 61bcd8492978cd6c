"""Hypothesis strategies for hostile input: values, documents and files that are valid but for something."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from PIL import Image
from ruamel.yaml import YAML

EXAMPLES = int(os.environ.get("OAR_FUZZ", "5"))
PATIENCE = pytest.mark.timeout(900 + 10 * EXAMPLES)
"""For a test of so many examples; a hang of one is the sandbox's matter."""
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="OAR_FUZZ" not in os.environ,  # the same few examples each time, until more are asked for
    phases=[Phase.explicit, Phase.generate],  # to make a failing example small takes longer than to find it
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
"""For each test with hostile input. The suite tries a few examples; ``OAR_FUZZ=1200 pytest tests/fuzz`` as many as it says."""
ESCAPED = "escaped"
"""The file that a payload makes."""
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F"]
FORMATS = ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "TGA"]

LONG = "x" * 70_000
WORDS = [
    *(
        "",
        " ",
        ".",
        "..",
        "../../escaped",
        "/escaped",
        "a/../../escaped",
        "~",
        "~root/x",
        "$HOME/x",
        "${UNSET_OF_ALL}",
        "a\x00b",
        "a\nb",
        "\r",
    ),
    *(
        "\ud83d",
        "\ufeffa",
        "\u202egnp",
        "e\u0301",
        "CON",
        "-rf",
        "--help",
        "$(touch escaped)",
        "`touch escaped`",
        "; touch escaped;",
        "'\"\\",
    ),
    *(
        "{{ 7 * 7 }}",
        "{% for x in y %}",
        "%s%n",
        "<script>alert(1)</script>",
        "file:///etc/passwd",
        "s3://",
        "s3://a",
        "http://127.0.0.1:1/x",
    ),
    *(
        "null",
        "nan",
        "inf",
        "1e999",
        "0x10",
        "True",
        "1_000",
        "\u0663",
        "1.0",
        "-0",
        "!!python/object/apply:os.system ['touch escaped']",
        LONG,
    ),
]
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=20),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**18, 10**400]),
    st.floats(),
    st.booleans(),
    st.none(),
    st.just([]),
    st.just({}),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.sampled_from(WORDS[:-1]), st.sampled_from(WORDS), max_size=2),
)
DEEP = st.sampled_from([30, 3_000, 100_000])


def document(path: Path) -> Any:
    """What a YAML file holds."""
    return YAML(typ="safe", pure=True).load(path.read_text())


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a document of mappings and lists."""
    found = [path]
    if isinstance(document, dict):
        for key, value in document.items():
            found += places(value, (*path, key))
    elif isinstance(document, list):
        for index, value in enumerate(document[:4]):
            found += places(value, (*path, index))
    return found


@st.composite
def changed(draw: st.DrawFn, document: Any, most: int = 3) -> Any:
    """A copy of a document in which up to ``most`` values are hostile, gone, or under another name."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(places(document)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(VALUES)
            continue
        parent = document
        for step in path[:-1]:
            parent = parent[step]
        action = draw(st.sampled_from(["value", "value", "value", "remove", "rename", "wrap"]))
        if action == "value":
            parent[path[-1]] = draw(VALUES)
        elif action == "wrap":
            parent[path[-1]] = [parent[path[-1]]]
        elif isinstance(parent, dict):
            value = parent.pop(path[-1])
            if action == "rename":
                parent[draw(st.sampled_from(WORDS[:-1]))] = value
        else:
            parent.pop(path[-1])
    return document


@st.composite
def damaged(draw: st.DrawFn, data: bytes, most: int = 4) -> bytes:
    """Bytes that were cut, overwritten, repeated, filled up, or are others altogether."""
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 64, 4096]))
        match draw(st.sampled_from(["cut", "zero", "ones", "write", "repeat", "insert", "other"])):
            case "cut":
                data = data[:at]
            case "zero":
                data = data[:at] + bytes(min(length, len(data) - at)) + data[at + length :]
            case "ones":
                data = data[:at] + b"\xff" * min(length, len(data) - at) + data[at + length :]
            case "write":
                new = draw(st.binary(min_size=1, max_size=16))
                data = data[:at] + new + data[at + len(new) :]
            case "repeat":
                data = data[:at] + data[at : at + length] + data[at:]
            case "insert":
                data = data[:at] + draw(st.binary(min_size=1, max_size=16)) + data[at:]
            case "other":
                data = draw(st.binary(max_size=200)) if draw(st.integers(0, 4)) == 0 else data
    return data


@st.composite
def json_files(draw: st.DrawFn, document: Any) -> bytes:
    """A JSON file that is wrong in its values, in its bytes, or nested too deep."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        depth = draw(DEEP)
        return b"[" * depth + b"]" * depth
    text = json.dumps(draw(changed(document)), ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    return draw(damaged(text)) if kind < 4 else text


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.target, "w")


def noise(size: tuple[int, int]) -> Image.Image:
    """A picture of random colours, the same each time."""
    width, height = size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    """A small picture of some mode and format, most often damaged."""
    mode, kind = draw(st.sampled_from(MODES)), draw(st.sampled_from(FORMATS))
    size = draw(st.sampled_from([(1, 1), (7, 5), (33, 1), (64, 48)]))
    buffer = io.BytesIO()
    try:
        Image.new(mode, size).save(buffer, kind)
    except (OSError, ValueError, KeyError):  # the format has no such mode
        buffer = io.BytesIO()
        noise(size).save(buffer, kind)
    return draw(damaged(buffer.getvalue())) if draw(st.integers(0, 3)) else buffer.getvalue()


@st.composite
def pickles(draw: st.DrawFn, target: Path) -> bytes:
    """A file for ``torch.load`` with a payload, in torch's zip, in its old format, or as a bare pickle."""
    buffer = io.BytesIO()
    match draw(st.sampled_from(["zip", "old", "bare"])):
        case "zip":
            torch.save({"module": {"a": torch.zeros(2)}, "x": Payload(str(target))}, buffer)
        case "old":
            torch.save({"x": Payload(str(target))}, buffer, _use_new_zipfile_serialization=False)
        case "bare":
            pickle.dump(Payload(str(target)), buffer)
    return buffer.getvalue()
