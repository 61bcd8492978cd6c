"""SentencePiece models that others trained: no padding piece, unknown = 0, start and end pieces, bytes for unknown signs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
import torch

from oar_scale.errors import UserError
from oar_scale.tokenizers.text import TextTokenizer

KNOWN = ["a red apple", "a green car", "a blue house", "two red cats", "one green apple and a blue car"]
UNKNOWN = ["naïve café", "猫 and 🙂", "<s> a red </s> <unk>", "line\tbreak"]


@pytest.fixture(scope="module")
def foreign() -> TextTokenizer:
    """What the Llama family ships: byte pairs, pad -1, unk 0, bos 1, eos 2, 256 byte pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(KNOWN * 20),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        pad_id=-1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return TextTokenizer(model.getvalue(), 48)


def test_foreign_ids_are_shifted_by_one_so_that_zero_is_free(foreign: TextTokenizer) -> None:
    token_ids = foreign.processor.encode(KNOWN + UNKNOWN)
    for ids, own in zip(foreign.encode(KNOWN + UNKNOWN), token_ids, strict=True):
        assert ids[: len(own)].tolist() == [piece + 1 for piece in own]
        assert ids[len(own) :].eq(0).all()


def test_foreign_ids_stay_inside_the_vocabulary(foreign: TextTokenizer) -> None:
    assert foreign.vocab_size == foreign.processor.vocab_size() + 1
    assert int(foreign.encode(KNOWN + UNKNOWN).max()) < foreign.vocab_size
    foreign.processor.id_to_piece(foreign.vocab_size - 2)  # the last piece, under its own number, exists


@pytest.mark.parametrize("caption", KNOWN + UNKNOWN)
def test_a_caption_comes_back_from_its_ids(foreign: TextTokenizer, caption: str) -> None:
    """Even with characters that the vocabulary does not have."""
    ids = foreign.encode([caption])[0]
    assert foreign.processor.decode((ids[ids != 0] - 1).tolist()) == caption


def test_captions_bring_no_start_end_or_unknown_piece(foreign: TextTokenizer) -> None:
    special = {foreign.processor.unk_id() + 1, foreign.processor.bos_id() + 1, foreign.processor.eos_id() + 1}
    assert not special & set(foreign.encode(KNOWN + UNKNOWN).flatten().tolist())


def test_empty_captions_are_all_zeros(foreign: TextTokenizer) -> None:
    assert foreign.encode([""]).eq(0).all()
    assert foreign.encode([]).shape == (0, 48)


def test_an_unknown_character_is_the_unknown_piece() -> None:
    """Not padding, where the vocabulary has no byte pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(KNOWN * 20), model_writer=model, vocab_size=60, pad_id=-1, unk_id=0, hard_vocab_limit=False, minloglevel=2
    )
    ids = TextTokenizer(model.getvalue(), 8).encode(["猫"])[0]
    assert 1 in ids.tolist()


def test_half_a_surrogate_pair_counts_as_a_question_mark(foreign: TextTokenizer) -> None:
    assert torch.equal(foreign.encode(["a \ud83d apple"]), foreign.encode(["a ? apple"]))


def test_an_empty_model_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"text\.model: not a SentencePiece model \(the file is empty\)"):
        TextTokenizer.load(str(tmp_path / "text.model"), 6)
