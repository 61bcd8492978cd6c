"""Captions into SentencePiece ids: [B, T] with 0 = padding.

Piece 0 of our own models is the padding piece; a foreign ``.model`` without one has its ids shifted up by one, so that 0
is free in either case.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import sentencepiece
import torch
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.storage import open_storage
from oar_scale.text import clean_text

LONGEST = 4192
"""Bytes of the longest caption that SentencePiece takes by default: what is longer it leaves out without a word."""


class TextTokenizer:
    """A SentencePiece model and the length captions are cut to."""

    field: ClassVar[Literal["txt"]] = "txt"

    def __init__(self, model: bytes, max_tokens: int) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._shift = 0 if self.processor.pad_id() == 0 else 1

    @property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size); 0 is padding."""
        return int(self.processor.vocab_size()) + self._shift

    def check(self, caption: str) -> None:
        """Any text can be encoded."""

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Ids int64 [B, T] of captions, cut after ``max_tokens`` pieces, padded with 0 on the right."""
        ids_BT = torch.zeros(len(captions), self.max_tokens, dtype=torch.long)
        for row, ids in enumerate(self.processor.encode([clean_text(caption) for caption in captions])):
            ids = ids[: self.max_tokens]
            ids_BT[row, : len(ids)] = torch.tensor(ids, dtype=torch.long) + self._shift
        return ids_BT

    def save(self, uri: str) -> None:
        """Write the SentencePiece ``.model`` file."""
        open_storage(uri).write(uri, self.model)

    @classmethod
    def load(cls, uri: str, max_tokens: int) -> TextTokenizer:
        """Read a ``.model`` file.

        Raises:
            UserError: not a SentencePiece model.
        """
        data = open_storage(uri).read(uri)
        if not data:  # SentencePiece would take it for "no model yet" and fail at the first caption
            raise UserError(f"{uri}: not a SentencePiece model (the file is empty). Copy it again, or train one.")
        try:
            return cls(data, max_tokens)
        except RuntimeError as error:
            raise UserError(f"{uri}: not a SentencePiece model ({error})") from error


def train_text_tokenizer(captions: Sequence[str], vocab_size: int, max_tokens: int) -> TextTokenizer:
    """Train a unigram SentencePiece model on all captions, however long; a vocabulary larger than they support is reduced."""
    model = io.BytesIO()
    texts = [clean_text(caption) for caption in captions]
    longest = max((len(text.encode()) for text in texts), default=0)
    options: dict[str, Any] = {"max_sentence_length": longest} if longest > LONGEST else {}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            **options,
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            character_coverage=1.0,
            hard_vocab_limit=False,
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:  # most often: more different characters than pieces
        raise UserError(
            f"tokenizer.text.vocab_size {vocab_size}: no SentencePiece model could be trained on the captions ({error})"
        ) from error
    return TextTokenizer(model.getvalue(), max_tokens)
