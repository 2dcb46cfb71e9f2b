"""Hugging Face tokenizers as T5, GPT-2 and Llama have them: ids, special tokens, and folders that are none or are hostile."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf import FAMILIES, t5
from transformers import AutoTokenizer

from mutransformer.config.data import DataConfig
from mutransformer.data.cache.prepare import prepare
from mutransformer.data.tokenizers.registry import convert_hf
from mutransformer.data.tokenizers.tokenizer import HFTokenizer, Tokenizer
from mutransformer.errors import ConfigError

TEXTS = ["the cat sat", "a naïve Ärger of 中文", "def f(x):\n\treturn x\n", " two  spaces ", ""]


def converted(folder: Path, into: Path, eos_token: str | None = None) -> HFTokenizer:
    into.mkdir()
    convert_hf(str(folder), eos_token, into)
    return HFTokenizer(into / "tokenizer.json", into / "special_ids.json")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_ids_are_the_librarys_without_its_template(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "hub")
    theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    ours = converted(folder, tmp_path / "ours")
    assert isinstance(ours, Tokenizer)
    for text, ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
        assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"] and ids.dtype == np.int32
    with_template = theirs("the cat")["input_ids"]
    (plain,) = ours.encode(["the cat"])
    expected = {"t5": [*plain, ours.eos_id], "gpt2": [*plain], "llama": [ours.bos_id, *plain]}
    assert with_template == expected[family], "the family's template is not the real one's"


def test_special_tokens(family: str, tmp_path: Path) -> None:
    tokenizer = converted(FAMILIES[family](tmp_path / "hub"), tmp_path / "ours")
    names = json.loads((tmp_path / "ours/tokenizer.json").read_text())["added_tokens"]
    by_name = {token["content"]: token["id"] for token in names}
    eos = by_name["<|endoftext|>" if family == "gpt2" else "</s>"]
    assert tokenizer.eos_id == eos
    assert tokenizer.bos_id == {"t5": eos, "gpt2": eos, "llama": by_name.get("<s>")}[family]
    assert tokenizer.pad_id == {"t5": by_name.get("<pad>"), "gpt2": eos, "llama": eos}[family]
    assert family != "t5" or tokenizer.n_vocab - 1 == by_name["<extra_id_2>"], "added tokens are not counted"


def test_a_text_that_spells_special_tokens_gets_ordinary_ids(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "hub")
    tokenizer = converted(folder, tmp_path / "ours")
    text = "the </s> <s> <pad> <|endoftext|> <extra_id_0> cat"
    special = {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id}
    assert not special & set(tokenizer.encode([text])[0].tolist())
    theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    assert special & set(theirs(text, add_special_tokens=False)["input_ids"]), "the library alone would have given none"


def test_decoding_leaves_special_ids_out(family: str, tmp_path: Path) -> None:
    tokenizer = converted(FAMILIES[family](tmp_path / "hub"), tmp_path / "ours")
    (ids,) = tokenizer.encode(["the cat sat"])
    assert tokenizer.decode([tokenizer.bos_id, *ids.tolist(), tokenizer.eos_id, tokenizer.pad_id]).strip() == "the cat sat"


def test_the_whole_way_from_a_folder(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "hub")
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": f"the cat {i} sat on the mat"}) + "\n" for i in range(200)))
    given: dict[str, Any] = {"source": "jsonl", "files": [f"{tmp_path}/docs.jsonl"], "cache_dir": f"{tmp_path}/cache"}
    corpus = prepare(DataConfig(**given, tokenizer="hf", tokenizer_file=str(folder)))
    text = corpus.splits["train"]
    ids = text.first(text.n_tokens)
    assert text.n_documents > 150 and (ids == corpus.tokenizer.eos_id).sum() == text.n_documents
    assert corpus.tokenizer.decode(ids[: text.sources[0].document(0)[1]]).strip().startswith("the cat ")
    changed = json.loads((folder / "tokenizer.json").read_text())
    changed["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(changed))
    again = prepare(DataConfig(**given, tokenizer="hf", tokenizer_file=str(folder)))
    assert again.tokenizer.fingerprint != corpus.tokenizer.fingerprint, "a changed folder goes unnoticed"


def test_an_eos_that_is_missing_must_be_named(tmp_path: Path) -> None:
    folder = t5(tmp_path / "hub")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer_file = .*hub: its eos token is missing; name the token .* data\.eos_token"
    ):
        converted(folder, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"data\.eos_token = nothing is missing"):
        converted(folder, tmp_path / "b", "nothing")
    assert converted(folder, tmp_path / "c", "</s>").eos_id == 1


def test_a_path_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{")
    (tmp_path / "file").write_text("")
    for name, message in {
        "none": "no such folder",
        "file": "a file; for data.tokenizer=hf name the folder",
        "empty": "",
        "broken": "",
    }.items():
        with pytest.raises(ConfigError, match=rf"data\.tokenizer_file = .*{name}: .*{message}") as error:
            converted(tmp_path / name, tmp_path / f"{name}-ours")
        assert "\n" not in str(error.value)


def test_code_that_a_tokenizer_brings_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    folder = tmp_path / "hostile"
    folder.mkdir()
    canary = tmp_path / "canary"
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w')\nclass T: pass\n")
    auto = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto))
    with pytest.raises(ConfigError, match=r"data\.tokenizer_file = .*hostile: it comes with code of its own, which is never run"):
        converted(folder, tmp_path / "ours")
    assert not canary.exists()
