"""Hugging Face fast tokenizers, from a folder or the Hub: the ids of their library, special tokens by our rules."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32, Integer

from mutransformer.data.sources.hub import describe_error
from mutransformer.errors import ConfigError, check, translate_errors

FILES = ["tokenizer.json", "special_ids.json"]  # that convert() writes

_CACHED_WORDS = 1 << 16  # words whose ids the library caches: 5 % faster than its default of 10,000, about 20 MB


class HFTokenizer:
    """A tokenizer in the two FILES that convert() writes. If it names no bos or pad, as most do, eos takes their place.

    Its template of special tokens (T5 ends with an eos, Llama begins with a bos) is not used: with data.add_bos documents begin
    with a bos, and each ends with one eos.
    """

    def __init__(self, tokenizer: Path, special_ids: Path):
        text = tokenizer.read_text(encoding="utf-8")
        ids = json.loads(special_ids.read_text(encoding="utf-8"))
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if resize := getattr(self._tokenizer.model, "_resize_cache", None):
            resize(_CACHED_WORDS)
        self._tokenizer.encode_special_tokens = True  # a text that spells one gets ordinary ids
        self.n_vocab: int = ids["n_vocab"]
        self.eos_id: int = ids["eos"]
        self.bos_id: int = ids["eos"] if ids["bos"] is None else ids["bos"]
        self.pad_id: int = ids["eos"] if ids["pad"] is None else ids["pad"]
        self._unk_id: int | None = ids["unk"]
        self._special = {self.eos_id, self.bos_id, self.pad_id} - {self._unk_id}
        self.fingerprint = hashlib.sha256(json.dumps([text, ids], sort_keys=True).encode()).hexdigest()
        self._files = dict(zip(FILES, (tokenizer, special_ids), strict=True))

    def __reduce__(self) -> Any:  # the file names only: workers are started one after another, each waits for its data
        return HFTokenizer, tuple(self._files.values())

    def encode(self, texts: list[str], threads: int = 1) -> list[Int32[np.ndarray, " _"]]:
        """As Tokenizer.encode. The library takes its number of threads from RAYON_NUM_THREADS when it first starts them."""
        encoded = [np.array(e.ids, np.int32) for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        joined = np.concatenate(encoded) if encoded else np.empty(0, np.int32)
        if any((joined == special).any() for special in self._special):
            return [self._ordinary(ids) for ids in encoded]
        return encoded

    def _ordinary(self, ids: Int32[np.ndarray, " _"]) -> Int32[np.ndarray, " _"]:
        """Replaces special tokens by unk: a unigram model (T5) has them as pieces and finds them where they are spelled."""
        for special in self._special:
            if (spelled := ids == special).any():
                ids = ids[~spelled] if self._unk_id is None else np.where(spelled, np.int32(self._unk_id), ids)
        return ids

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def files(self) -> dict[str, Path]:
        return self._files


def convert(name: str, eos_token: str | None, folder: Path) -> dict[str, Any]:
    """Reads a fast tokenizer by Hub id or from a folder, and writes FILES to another folder.

    Raises ConfigError if it is missing, is not a fast tokenizer, needs code of its own, or has no eos.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns that PyTorch is missing
    import transformers

    local = Path(name).expanduser()
    where = f"data.tokenizer_file = {name}"
    check(local.is_dir() or not local.exists(), f"{where}: a file; for data.tokenizer=hf name the folder that contains it")
    looks_local = name.startswith(("/", "~", ".")) or name.count("/") > 1
    check(local.is_dir() or not looks_local, f"{where}: no such folder")
    with translate_errors(where, describe=describe_error):
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(str(local) if local.is_dir() else name, trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise ConfigError(f"{where}: it comes with code of its own, which is never run") from None
            raise
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"{where}: not a fast tokenizer (one with a tokenizer.json)")
    eos = loaded.eos_token_id if eos_token is None else backend.token_to_id(eos_token)
    wanted = "its eos token" if eos_token is None else f"data.eos_token = {eos_token}"
    check(eos is not None, f"{where}: {wanted} is missing; name the token that ends each document by data.eos_token")
    n_vocab = 1 + max(backend.get_vocab(with_added_tokens=True).values())
    ids = {"n_vocab": n_vocab, "eos": eos, "bos": loaded.bos_token_id, "pad": loaded.pad_token_id, "unk": loaded.unk_token_id}
    (folder / FILES[0]).write_text(backend.to_str(), encoding="utf-8")
    (folder / FILES[1]).write_text(json.dumps(ids), encoding="utf-8")
    return {"name": name}
