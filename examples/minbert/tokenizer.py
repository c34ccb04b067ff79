"""Text to token ids, with the tokenizer that comes with the checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import BertWordPieceTokenizer, Tokenizer

from .errors import InputError


class SentenceTokenizer:
    """`[CLS] words [SEP]`, cut to a length, without padding (batches are padded to their own longest sentence).

    Args:
        folder: holds `tokenizer.json`, or an older checkpoint's `vocab.txt` (then read as an uncased word-piece
            vocabulary unless `tokenizer_config.json` says `"do_lower_case": false`).
        max_length: tokens a sentence may have, `[CLS]` and `[SEP]` included.
    """

    def __init__(self, folder: Path, max_length: int) -> None:
        self.tokenizer = _read(folder)
        # The embedded checkpoint's file pads everything to 128 tokens; batches here are padded dynamically.
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length)
        self.max_length = max_length

    def __call__(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids of each sentence."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(sentences))]

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json`, from which the same tokenizer can be built again."""
        self.tokenizer.save(str(folder / "tokenizer.json"))


def _read(folder: Path) -> Tokenizer:
    file, vocabulary = folder / "tokenizer.json", folder / "vocab.txt"
    if not file.is_file() and not vocabulary.is_file():
        raise InputError(f"{file}: no such file, and no vocab.txt beside it; the checkpoint has no tokenizer")
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        return BertWordPieceTokenizer(str(vocabulary), lowercase=_lowercase(folder))._tokenizer
    except Exception as error:  # the tokenizers library raises bare Exception for a file that it cannot parse
        raise InputError(f"{folder}: unreadable tokenizer ({error})") from None


def _lowercase(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    return bool(json.loads(file.read_text(encoding="utf-8")).get("do_lower_case", True)) if file.is_file() else True
