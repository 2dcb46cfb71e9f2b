"""A Hugging Face fast tokenizer, from a folder or the Hub: ids as its library gives them, special tokens by our rules."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import tokenizers
from jaxtyping import Int32, Integer

from mutransformer.data.sources import hub
from mutransformer.errors import ConfigError, check

FILES = ["tokenizer.json", "special_ids.json"]  # what one is kept as

_CACHED_WORDS = 1 << 16  # whose ids the library keeps: 5 % faster than with the 10,000 that it keeps by itself, some 20 MB


class HFTokenizer:
    """What convert() wrote to two FILES. bos and pad fall back on eos where the tokenizer names none, as most do.

    Its template of special tokens (T5 ends with an eos, Llama begins with a bos) is not used: data.add_bos says whether documents
    begin with a bos, and each ends with one eos.
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
        self._unk_id: Optional[int] = ids["unk"]
        self._special = {self.eos_id, self.bos_id, self.pad_id} - {self._unk_id}
        self.fingerprint = hashlib.sha256(json.dumps([text, ids], sort_keys=True).encode()).hexdigest()
        self._files = dict(zip(FILES, (tokenizer, special_ids), strict=True))

    def __reduce__(self) -> Any:  # by its files: a parent writes to its children one after another, each waits until it is read
        return HFTokenizer, tuple(self._files.values())

    def encode(self, texts: list[str], threads: int = 1) -> list[Int32[np.ndarray, " _"]]:
        """As Tokenizer.encode. How many threads the library takes is decided by RAYON_NUM_THREADS when it first starts any."""
        found = [np.array(e.ids, np.int32) for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        every = np.concatenate(found) if found else np.empty(0, np.int32)
        if any((every == special).any() for special in self._special):
            return [self._ordinary(ids) for ids in found]
        return found

    def _ordinary(self, ids: Int32[np.ndarray, " _"]) -> Int32[np.ndarray, " _"]:
        """A unigram model (T5) has the special tokens among its pieces and finds them where they are spelled: they become unk."""
        for special in self._special:
            if (spelled := ids == special).any():
                ids = ids[~spelled] if self._unk_id is None else np.where(spelled, np.int32(self._unk_id), ids)
        return ids

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def files(self) -> dict[str, Path]:
        return self._files


def convert(name: str, eos_token: Optional[str], folder: Path) -> dict[str, Any]:
    """Reads a fast tokenizer by Hub id or from a folder, and writes FILES to another folder.

    Raises:
        ConfigError: there is none, it is no fast one, it would run code of its own, or it lacks an eos.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would tell that PyTorch is missing, which nobody needs
    import transformers

    local = Path(name).expanduser()
    where = f"data.tokenizer_file = {name}"
    check(local.is_dir() or not local.exists(), f"{where}: a file; for data.tokenizer=hf name the folder that it is in")
    looks_local = name.startswith(("/", "~", ".")) or name.count("/") > 1
    check(local.is_dir() or not looks_local, f"{where}: no such folder")
    with hub.told(where):
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
    given = "its eos token" if eos_token is None else f"data.eos_token = {eos_token}"
    check(eos is not None, f"{where}: {given} is missing; name one of its tokens by data.eos_token, it ends each document")
    n_vocab = 1 + max(backend.get_vocab(with_added_tokens=True).values())
    names = {"bos": loaded.bos_token_id, "pad": loaded.pad_token_id, "unk": loaded.unk_token_id}
    ids = {"n_vocab": n_vocab, "eos": eos, **names}
    (folder / FILES[0]).write_text(backend.to_str(), encoding="utf-8")
    (folder / FILES[1]).write_text(json.dumps(ids), encoding="utf-8")
    return {"name": name}
