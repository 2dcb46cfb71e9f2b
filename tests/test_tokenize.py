"""Tokenizers: exact round trips, training, and models that are none."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hf import gpt2

from mutransformer.config.data import DataConfig
from mutransformer.data.cache.prepare import prepare
from mutransformer.data.cache.store import Store
from mutransformer.data.sources.registry import open_source
from mutransformer.data.sources.source import held_out_fractions
from mutransformer.data.tokenizers.registry import open_tokenizer, train_sentencepiece, training_texts
from mutransformer.data.tokenizers.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer
from mutransformer.errors import ConfigError

SOURCE = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text(encoding="utf-8")
TEXTS = [
    "",
    " ",
    "\n",
    "\n\n\n",
    "def f(x):\n\treturn x\n\n\n    # four\n  \n",
    "  leading and trailing  ",
    "dos\r\nlines\r\n",
    "naïve Ärger 中文 日本 😀👩‍👩‍👧 e\u0301 \u00a0\u3000|",
    "a NUL \0 and \x01\x7f controls",
    "the space sign \u2581\u2581 of SentencePiece\u2581",
    "<s>spelled</s><unk><pad><0x41>",
    "\ufeffa mark",
    "1234567890",
    SOURCE,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([SOURCE], 800, path)
    return SentencePieceTokenizer(path)


@pytest.fixture(params=["bytes", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue("trained")


def test_every_text_comes_back_exactly(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode(TEXTS)
    assert [tokenizer.decode(ids) for ids in encoded] == TEXTS
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert len(special) == 3 and max(special) < tokenizer.n_vocab
    for ids in encoded:
        assert ids.dtype == np.int32 and not special & set(ids.tolist())
        assert all(0 <= i < tokenizer.n_vocab for i in ids.tolist())


def test_special_ids_decode_to_nothing(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode(["some text"])
    framed = [tokenizer.bos_id, *ids.tolist(), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(framed) == "some text"


def test_bytes_that_are_no_text_decode_to_a_replacement() -> None:
    assert ByteTokenizer().decode([97, 0xFF, 98]) == "a\ufffdb"


def test_training_is_deterministic_and_compresses(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    train_sentencepiece([SOURCE], 800, tmp_path / "again.model")
    again = SentencePieceTokenizer(tmp_path / "again.model")
    assert again.fingerprint == trained.fingerprint and again.n_vocab == 800
    train_sentencepiece([SOURCE], 801, tmp_path / "other.model")
    assert SentencePieceTokenizer(tmp_path / "other.model").fingerprint != trained.fingerprint
    (ids,) = trained.encode([SOURCE])
    assert len(SOURCE) / len(ids) > 2.5
    # Indentation is one piece, line ends join what they follow.
    pieces = [trained.decode([i]) for i in range(trained.n_vocab)]
    assert " " * 8 in pieces and ":\n" in pieces


def test_a_trained_tokenizer_sees_the_train_split_only(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(SOURCE)
    config = DataConfig(source="text", files=[f"{tmp_path}/text.txt"], cache_dir=str(tmp_path / "cache"), vocab_size=500)
    corpus = prepare(config)
    tokenizer = corpus.tokenizer
    assert isinstance(tokenizer, SentencePieceTokenizer)
    texts = {split: tokenizer.decode(text.first(text.n_tokens)) for split, text in corpus.splits.items()}
    assert sum(map(len, texts.values())) == len(SOURCE)
    train = training_texts(config, [open_source(config.mixture["data"], "data", held_out_fractions(config))])
    assert sorted(map(len, train)) and sum(map(len, train)) == len(texts["train"]) < len(SOURCE)
    train_sentencepiece(train, 500, tmp_path / "expected.model")
    assert (tmp_path / "expected.model").read_bytes() == tokenizer.files()["tokenizer.model"].read_bytes()
    assert all(file.tokenizer_fingerprint == tokenizer.fingerprint for file in corpus.splits.values())


def test_a_given_model_without_bos_and_pad_uses_eos(tmp_path: Path) -> None:
    path = tmp_path / "given.model"
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(SOURCE.splitlines()),
        model_prefix=str(path.with_suffix("")),
        vocab_size=300,
        hard_vocab_limit=False,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "text.txt").write_text(SOURCE)
    config = DataConfig(
        source="text", files=[f"{tmp_path}/text.txt"], tokenizer_file=str(path), cache_dir=str(tmp_path / "cache")
    )
    tokenizer = prepare(config).tokenizer
    assert tokenizer.bos_id == tokenizer.pad_id == tokenizer.eos_id
    assert not list((tmp_path / "cache").glob("tokenizer-*"))
    assert tokenizer.decode(tokenizer.encode(["some text"])[0]) == "some text"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "cannot read it: No such file or directory"),
        (b"", "an empty file"),
        (b"no model at all " * 40, "not a SentencePiece model"),
        (b"\x80\x04cos\nsystem\n", "not a SentencePiece model"),
    ],
)
def test_a_tokenizer_file_that_is_none(tmp_path: Path, contents: bytes | None, message: str) -> None:
    path = tmp_path / "broken.model"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(ConfigError, match=rf"^data\.tokenizer_file = .*broken\.model: {message}$"):
        SentencePieceTokenizer(path)


def test_weights_beside_a_tokenizer_are_not_read(tmp_path: Path) -> None:
    folder, cached = gpt2(tmp_path / "gpt2"), tmp_path / "cache"
    config = DataConfig(tokenizer="hf", tokenizer_file=str(folder))

    def entries(name: str, contents: str) -> int:
        (folder / name).write_text(contents)
        open_tokenizer(config, Store(str(cached), str(cached)), [])
        return len(list(cached.glob("tokenizer-*")))

    assert [entries("model.safetensors", "1"), entries("model.safetensors", "2"), entries("pytorch_model.bin", "3")] == [1] * 3
    assert entries("added.txt", "4") == 2


def test_a_truncated_model_is_refused(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "cut.model"
    path.write_bytes(trained.files()["tokenizer.model"].read_bytes()[:2000])
    with pytest.raises(ConfigError, match=r"data\.tokenizer_file = .*: not a SentencePiece model"):
        SentencePieceTokenizer(path)


def test_a_vocabulary_too_large_names_the_largest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.vocab_size = 60000: the train split gives at most (\d+) pieces") as error:
        train_sentencepiece([SOURCE], 60_000, tmp_path / "model")
    most = int(str(error.value).split("at most ")[1].split()[0])
    train_sentencepiece([SOURCE], most, tmp_path / "model")
    assert SentencePieceTokenizer(tmp_path / "model").n_vocab == most


def test_a_vocabulary_too_small_names_the_smallest(tmp_path: Path) -> None:
    characters = "".join(map(chr, range(0x4E00, 0x4F00))) * 2
    with pytest.raises(ConfigError, match=r"^data\.vocab_size = 300: the characters of the train split need at least 5\d\d"):
        train_sentencepiece([characters], 300, tmp_path / "model")


LEAST = "300 is the least: the text is too short or too uniform, add some"
LITTLE = {
    "\0" * 1000: r"1,000 bytes of text, which give no pieces at all \(only line ends or NULs\?\)",
    "\n" * 500: r"500 bytes of text, which give no pieces at all \(only line ends or NULs\?\)",
    "": r"0 bytes of text",
    "中" * 300: rf"gives at most 268 pieces, of 900 bytes of text; {LEAST}",
    "abc def\n" * 100: rf"gives at most 277 pieces, of 800 bytes of text; {LEAST}",
}


@pytest.mark.parametrize(("text", "message"), LITTLE.items(), ids=["nul", "line ends", "none", "one character", "few words"])
def test_too_little_text_is_said_in_our_words(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"^data\.vocab_size = 300: the train split .*{message}.*data\.tokenizer=bytes$"
    ) as error:
        train_sentencepiece([text], 300, tmp_path / "model")
    assert "INTERNAL" not in str(error.value) and "lower" not in str(error.value)
