"""Files that would take for ever, or all memory: recipes and profiles have one reader, which refuses them with one error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ruamel.yaml.scanner import Scanner

from oar_scale.cli import main
from oar_scale.config.layers import DEEPEST, MOST_BYTES, read_layers
from oar_scale.errors import UserError
from oar_scale.json_object import parse_json, parse_object


def bomb(levels: int, width: int = 9) -> str:
    """Aliases of aliases: ``width ** levels`` values in a few lines."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]" for level in range(1, levels + 1)]
    return "\n".join(lines)


def mapping_bomb(levels: int, width: int = 9) -> str:
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels + 1):
        lines.append(f"a{level}: &a{level} {{{', '.join(f'k{number}: *a{level - 1}' for number in range(width))}}}")
    return "\n".join(lines)


def deep(depth: int, opening: str, closing: str) -> str:
    return f"x: {opening * depth}1{closing * depth}"


HOSTILE = {
    "hexadecimal number of thousands of digits": ("x: 0x" + "f" * 5000, "larger than any number here"),
    "path with a NUL": ('extends: "a\\0b"', "NUL in it"),
    "control character": ("x: a line with a bell\x07 in it", "special characters are not allowed"),
    "aliases of lists": (bomb(9), "more than 20000 values"),
    "aliases of mappings": (mapping_bomb(9), "more than 20000 values"),
    "deep list": (deep(3000, "[", "]"), "deep"),
    "very deep list": (deep(60_000, "[", "]"), "deep"),
    "deep mapping": (deep(3000, "{a: ", "}"), "deep"),
    "deep blocks": ("\n".join(f"{' ' * level}a:" for level in range(400)), "deep"),
    "a little too deep": (deep(DEEPEST, "[", "]"), "deep"),
    "too long": ("name: x\n" + "# comment\n" * (MOST_BYTES // 10 + 1), "is longer than"),
    "a key twice": ("name: x\nname: y\n", "is set twice"),
    "a key twice in a list": ("x: [{a: 1, a: 2}]", "is set twice"),
    "an alias of itself": ("a: &a [*a]", "alias of something that contains it"),
    "a long number": (f"x: {'9' * 5000}", "not a valid int|not valid YAML"),
    "a tag": ("x: !!python/object/apply:os.system [ls]", "has no meaning"),
    "no character": ('x: "\\U00110000"', "not valid YAML"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_would_take_for_ever_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a recipe, as a profile, as what a recipe extends, and as the value of an override."""
    text, why = HOSTILE[kind]
    path, base = tmp_path / "mine.yaml", tmp_path / "base.yaml"
    path.write_text(text)
    base.write_text("extends: mine.yaml\n")
    profile = ["submit", "recipes/smoke.yaml", "--dry-run", "--cluster"]
    for command in (["recipe", str(path)], ["recipe", str(base)], ["doctor", "--cluster", str(path)], [*profile, str(path)]):
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert "Traceback" not in error
    with pytest.raises(UserError, match=why):
        read_layers(str(path))
    if len(text) < 20_000:
        assert main(["recipe", "recipes/smoke.yaml", "-o", f"data={text.partition(': ')[2]}"]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_of_open_brackets_only_the_first_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each the library looks for the end of every key that may have begun: seconds for a thousand of them."""
    begun, save = [], Scanner.save_possible_simple_key
    monkeypatch.setattr(Scanner, "save_possible_simple_key", lambda scanner: (begun.append(1), save(scanner))[1])
    (tmp_path / "deep.yaml").write_text(HOSTILE["deep list"][0])
    with pytest.raises(UserError, match="deep"):
        read_layers(str(tmp_path / "deep.yaml"))
    assert DEEPEST <= len(begun) < 2 * DEEPEST


def test_what_people_write_stays_far_below_the_bounds(tmp_path: Path) -> None:
    anchors = tmp_path / "anchors.yaml"
    anchors.write_text("a: &a {b: [1, 2, 3]}\n" + "".join(f"c{number}: *a\n" for number in range(1000)) + deep(30, "[", "]"))
    assert len(str(read_layers(str(anchors)).plain())) > 10_000


def test_files_that_extend_one_another_are_bounded(tmp_path: Path) -> None:
    """Nine files, each of which extends the next nine times, would be read 387 million times."""
    for level in range(9):
        (tmp_path / f"{level}.yaml").write_text(f"extends: [{', '.join([f'{level + 1}.yaml'] * 9)}]\n")
    (tmp_path / "9.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match="more than 100 files extend one another"):
        read_layers(str(tmp_path / "0.yaml"))
    with pytest.raises(UserError, match="an override is KEY=VALUE"):
        read_layers(str(tmp_path / "9.yaml"), [f"{'.'.join('a' * 3000)}=1"])


def test_deep_json_is_no_json() -> None:
    for text in ("[" * 100_000, '{"a":' * 100_000, "[" * 5000 + "]" * 5000):
        with pytest.raises(ValueError):
            parse_json(text)
        with pytest.raises(ValueError):
            parse_object(text.encode())
    assert parse_json(json.dumps([[[1]]])) == [[[1]]]
