"""Files of prompts in their three forms, and what is said about a line that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oar_scale.data.prompt_files import read_prompts
from oar_scale.errors import UserError


def write(folder: Path, name: str, content: str | bytes) -> str:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


def read(path: str) -> list[tuple[object, int, int]]:
    return [each[:3] for each in read_prompts(path, seed=9)]


APPLE_CAT = [("a red apple", 0, 9), ("قطة 😺", 1, 9)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a red apple\nقطة 😺\n"),
        ("a.txt", "\n  a red apple \r\n\r\nقطة 😺\r\n\n"),
        ("a.TXT", "a red apple\nقطة 😺".encode("utf-16")),
        ("a.txt", "a red apple\nقطة 😺".encode("utf-8-sig")),
        ("a.csv", "prompt\na red apple\n\nقطة 😺\n"),
        ("a.csv", '"caption";"n"\n"a red apple";1\n"قطة 😺";2\n'.encode("utf-8-sig")),
        ("a.tsv", "id\tcaption\n1\ta red apple\n2\tقطة 😺"),
        ("a.jsonl", '{"prompt": "a red apple"}\n\n{"caption": "قطة \\ud83d\\ude3a", "x": []}\n'),
    ],
)
def test_prompts_of_every_form_are_the_same(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert read(write(tmp_path, name, content)) == APPLE_CAT


def test_numbers_and_seeds_are_those_of_the_file(tmp_path: Path) -> None:
    wanted = [("a, b", 7, -3), ("c", 1, 9), ("5", 2, 2**62)]
    table = write(tmp_path, "a.csv", f'prompt,number,seed\n"a, b",7,-3\nc,,\n5, 2,{2**62}\n')
    rows = [{"prompt": "a, b", "number": 7, "seed": -3}, {"prompt": "c", "seed": None}, {"prompt": 5, "number": "2", "seed": 2**62}]
    lines = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert read(table) == read(lines) == wanted


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "", "a.txt: there is no prompt in it"),
        ("a.txt", b"one\ntwo\n\xff\xfa", "a.txt:3: is not UTF-8"),
        ("a.txt", "x\n" + "y" * 100_001, "a.txt:2: its prompt has 100001 characters"),
        ("a.pdf", "x", "read from .txt, .csv, .tsv, .jsonl"),
        ("a.csv", "text\nx", "a.csv: has neither prompt nor caption, but 'text'"),
        ("a.csv", "prompt,seed\nx,1\ny,1.5\n", "a.csv row 3: its seed '1.5' is no whole number"),
        ("a.csv", "prompt,seed\nx,1\n,2\n", "a.csv row 3: no prompt"),
        ("a.csv", b"prompt,seed\nx,1\n\xff,2\n", "a.csv row 3: its prompt is not UTF-8"),
        ("a.csv", "prompt,number,id\nx,1,0\ny,2,0,0\n", "a.csv row 3: has more cells than the header"),
        ("a.csv", "prompt,number\nx,1\ny,1\n", "a.csv row 3: the number 1 is that of .*a.csv row 2"),
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": "y"', "a.jsonl:3: not a JSON object"),
        ("a.jsonl", '["x"]', "a.jsonl:1: not a JSON object"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: not a JSON object"),
        ("a.jsonl", '{"text": "x"}', "a.jsonl:1: has neither prompt nor caption, but 'text'"),
        ("a.jsonl", '{"prompt": ["x"]}', "a.jsonl:1: no prompt, or one that is no text"),
        ("a.jsonl", '{"prompt": true}', "a.jsonl:1: no prompt, or one that is no text"),
        ("a.jsonl", '{"prompt": "x", "number": -1}', "a.jsonl:1: its number -1 is no whole number from 0"),
        ("a.jsonl", '{"prompt": "x", "number": 1.0}', "a.jsonl:1: its number 1.0 is no whole number"),
        ("a.jsonl", '{"prompt": "x", "number": 1}\n{"prompt": "y"}', "a.jsonl:2: the number 1 is that of .*a.jsonl:1"),
    ],
)
def test_wrong_line_is_named(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_prompts(write(tmp_path, name, content))


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        read_prompts(str(tmp_path / "none.txt"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match=r"folder\.txt"):
        read_prompts(str(tmp_path / "folder.txt"))
