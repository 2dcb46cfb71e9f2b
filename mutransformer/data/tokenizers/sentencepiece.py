"""SentencePiece: a model read from a file, and the training of one."""

import hashlib
import io
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from jaxtyping import Int32, Integer

from mutransformer.data.sources.text import cut
from mutransformer.errors import ConfigError, check, translate_errors

TRAINING_VERSION = 1  # of train_sentencepiece; another number trains cached tokenizers again

_TRAINING_BYTES = 3_000_000  # more text takes longer and gives the same compression within 0.2 %
_SENTENCE_BYTES = 1024  # a training sentence: complete lines, below SentencePiece's limit of 4192 bytes
_SPACE = "\u2581"  # SentencePiece's own symbol for a space


class SentencePieceTokenizer:
    """A SentencePiece model. If it has no bos or pad, eos takes their place.

    Raises ConfigError if the file cannot be read, is not a SentencePiece model, or has no eos.
    """

    def __init__(self, model_file: Path):
        where = f"data.tokenizer_file = {model_file}"
        with translate_errors(f"{where}: cannot read it", OSError):
            proto = model_file.read_bytes()
        check(bool(proto), f"{where}: an empty file")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError:
            raise ConfigError(f"{where}: not a SentencePiece model") from None
        check(self._model.eos_id() >= 0, f"{where}: it has no end-of-sentence piece, which separates documents")
        self.model_file = model_file
        self.n_vocab: int = self._model.get_piece_size()
        self.eos_id: int = self._model.eos_id()
        self.bos_id: int = self._model.bos_id() if self._model.bos_id() >= 0 else self.eos_id
        self.pad_id: int = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
        self.fingerprint = hashlib.sha256(proto).hexdigest()
        bytes_of_space = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        has_bytes = all(map(self._model.is_byte, bytes_of_space))
        self._space_ids = np.array(bytes_of_space, np.int32) if has_bytes else None

    def __reduce__(self) -> Any:  # the file name only: workers are started one after another, each waits for its data
        return SentencePieceTokenizer, (self.model_file,)

    def encode(self, texts: list[str], threads: int = 1) -> list[Int32[np.ndarray, " _"]]:
        # SentencePiece would decode its symbol for a space as a space; spelled in bytes the symbol survives.
        split = [[text] if self._space_ids is None else text.split(_SPACE) for text in texts]
        flat = [part for parts in split for part in parts]
        encoded = iter(self._model.encode(flat, num_threads=threads, return_type="numpy"))
        ids: list[Int32[np.ndarray, " _"]] = []
        for parts in split:
            joined = [next(encoded)]
            for part in islice(encoded, len(parts) - 1):
                joined += [self._space_ids, part]
            ids.append(joined[0] if len(joined) == 1 else np.concatenate(joined))
        return ids

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> str:
        return self._model.decode([int(i) for i in ids])

    def files(self) -> dict[str, Path]:
        return {"tokenizer.model": self.model_file}


def train_sentencepiece(texts: list[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-pair SentencePiece model whose decoding is exact, and writes it to path.

    The same texts give the same model. Spaces, tabs and line ends are ordinary text; characters outside the vocabulary are
    spelled in bytes. Text beyond a few megabytes is sampled evenly. vocab_size counts unk, bos, eos, pad (0 to 3) and 256 bytes.

    Raises:
        ConfigError: the texts give fewer pieces, or have more characters, than vocab_size.
        OSError: path cannot be written.
    """
    data = [text.encode() for text in texts]
    every = max(1, sum(map(len, data)) // _TRAINING_BYTES)
    sentences = islice((sentence for d in data for sentence in cut(d, _SENTENCE_BYTES)), 0, None, every)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence.decode() for sentence in sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            split_digits=True,  # so that every number is spelled the same way
            pad_id=3,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        if most := re.search(r"too high .*<= (\d+)", str(error)):
            reason = f"the train split gives at most {most[1]} pieces; lower it, add text, or set data.tokenizer=bytes"
        elif least := re.search(r"required_chars. \d+ vs (\d+)", str(error)):
            reason = f"the characters of the train split need at least {least[1]}"
        else:
            reason = f"SentencePiece: {' '.join(str(error).split())}"
        raise ConfigError(f"data.vocab_size = {vocab_size}: {reason}") from None
    path.write_bytes(model.getvalue())
