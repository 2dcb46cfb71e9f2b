"""A run's tokenizer as the files that `transformers` and the servers read; its ids are compared before they are trusted."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mutransformer.data.tokenizers.tokenizer import ByteTokenizer, HFTokenizer, SentencePieceTokenizer, Tokenizer
from mutransformer.errors import check

_SPACE = "\u2581"  # SentencePiece's symbol for a space
# Texts in which conversions differ first: spaces, lines, digits, other scripts, SentencePiece's own symbol, byte pieces.
PROBES = (
    "",
    "the cat sat on the mat",
    " two  spaces and a tab\t, then a line\n\n    indented = 12345\r\n",
    "na\u00efve \u00c4rger \u4e2d\u6587 \U0001f600 e\u0301",
    f"a{_SPACE}b {_SPACE}",
    "<0x41>",
)
# A unigram model of Hugging Face's library finds its special tokens where a text spells them; HFTokenizer replaces them.
SPELLED = "<s> </s> <pad> <unk> <bos> <|endoftext|>"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, add_bos: bool, max_positions: int, texts: Iterable[str] = ()) -> None:
    """Writes tokenizer.json and tokenizer_config.json, and tokenizer.model if there is one.

    A text is encoded behind the bos that begins every row in training; with add_bos behind that of a document too.

    Raises ConfigError if the files would give other ids than the run's tokenizer, for PROBES or the given texts.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = _backend(tokenizer)
    bos, eos, pad = (str(backend.id_to_token(i)) for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id))
    n_bos = 1 + add_bos
    single = " ".join([bos] * n_bos + ["$A"])
    pair = " ".join([bos] * n_bos + ["$A"] + [bos] * add_bos + ["$B"])
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[(bos, tokenizer.bos_id)])
    special = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    if tokenizer.unk_id is not None:
        special["unk_token"] = str(backend.id_to_token(tokenizer.unk_id))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # a text that spells a special token gets ordinary ids
        **special,
    )
    fast.save_pretrained(folder)
    # transformers takes bos from the template in tokenizer.json; other readers, such as llama.cpp's converter, look here.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"add_bos_token": True, "add_eos_token": False}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, file in tokenizer.files().items():
        if name == "tokenizer.model":
            shutil.copyfile(file, folder / name)
    written = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, model_max_length=2**31)
    spelled = [] if isinstance(tokenizer, HFTokenizer) else [SPELLED]
    _check_ids(tokenizer, written, n_bos, [*PROBES, *spelled, *texts])


def _check_ids(tokenizer: Tokenizer, written: Any, n_bos: int, texts: list[str]) -> None:
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        expected = [*[tokenizer.bos_id] * n_bos, *ids.tolist()]
        found = written(text)["input_ids"]
        i = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found)))
        why = f"as tokenizer.json it gives other ids for {text[:40]!r}: {found[i : i + 4]}, not {expected[i : i + 4]}"
        check(expected == found, f"data.tokenizer: {why}; --without-tokenizer exports the model alone")


def _backend(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    if isinstance(tokenizer, ByteTokenizer):
        return _bytes(tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece(tokenizer)
    assert isinstance(tokenizer, HFTokenizer)
    return tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"].read_text(encoding="utf-8"))


def _bytes(tokenizer: ByteTokenizer) -> tokenizers.Tokenizer:
    """Each byte an id, in the alphabet that byte-level BPE spells bytes with; no merges."""
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {spelling: byte for byte, spelling in enumerate(_byte_alphabet())}
    special = {"<bos>": tokenizer.bos_id, "<eos>": tokenizer.eos_id, "<pad>": tokenizer.pad_id}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab | special, merges=[]))
    backend.pre_tokenizer, backend.decoder = spelled, decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return backend


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte: itself if it is printable, else the next free one from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(0x100 + others.index(byte)) if byte in others else chr(byte) for byte in range(256)]


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """The pieces of a byte-pair model, with a plain space where they have SentencePiece's symbol.

    So the symbol itself, where a text has it, is spelled in bytes, as SentencePieceTokenizer does.
    """
    from transformers.tokenization_utils_base import generate_merges

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.files()["tokenizer.model"]))
    n = model.get_piece_size()
    pieces = [model.id_to_piece(i).replace(_SPACE, " ") for i in range(n)]
    check(len(set(pieces)) == n, "data.tokenizer_file: two of its pieces differ in spaces only; use --without-tokenizer")
    no_text = {i for i in range(n) if model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or model.is_unused(i)}
    scores = {piece: model.get_score(i) for i, piece in enumerate(pieces) if i not in no_text}
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = generate_merges(vocab, scores, skip_tokens={pieces[i] for i in no_text})
    has_bytes = any(map(model.is_byte, range(n)))
    unk = pieces[model.unk_id()]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=has_bytes))
    (first,) = np.array(model.encode(["a"])[0][:1])
    prefixed = pieces[int(first)].startswith(" ")
    backend.normalizer = normalizers.Prepend(" ") if prefixed else None
    steps = [decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if prefixed else [])]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([pieces[i] for i in range(n) if model.is_control(i) or model.is_unknown(i)])
    return backend
