"""Rows: joined documents, and one document each as the reference system had them."""

import random
from pathlib import Path

import numpy as np
import pytest
from hf import FAMILIES
from tokens import EOS, loss_mask, source, whole_row
from transformers import AutoTokenizer

from mutransformer.config.data import DataConfig
from mutransformer.data.batches.rows import ConcatRows, PadRows, RowReader
from mutransformer.data.cache.dataset import ShardWriter, TokenDataset, open_shard
from mutransformer.data.tokenizers.registry import convert_hf
from mutransformer.data.tokenizers.tokenizer import HFTokenizer
from mutransformer.errors import ConfigError

T = 8


@pytest.mark.parametrize("n_shards", [1, 2, 5])
def test_rows_run_over_the_ends_of_shards(n_shards: int) -> None:
    lengths = [3, 1, 20, 8, 2, 40, 7, 9]
    documents = [[100 * k + i for i in range(n - 1)] + [EOS] for k, n in enumerate(lengths)]
    tokens = source(documents, n_shards)
    flat = np.array(sum(documents, []))
    rows = ConcatRows(tokens, T)
    assert (len(rows), rows.n_eval, tokens.n_tokens) == (90 // T, 12, 90)
    for i in range(len(rows)):
        row = whole_row(rows, i, T)
        assert row.tokens.tolist() == flat[i * T : (i + 1) * T].tolist() and row.mask.all()
    last = whole_row(rows, 11, T)
    assert last.tokens.tolist() == [*flat[88:], *[EOS] * 6] and last.mask.tolist() == [True] * 2 + [False] * 6
    assert [tokens.read(*tokens.document(k)).tolist() for k in range(len(documents))] == documents
    padded = PadRows(tokens, T, truncated_eos=False)
    assert len(padded) == padded.n_eval == len(lengths)
    for k, document in enumerate(documents):
        assert whole_row(padded, k, T).tokens.tolist() == (document + [EOS] * T)[:T]
        assert whole_row(padded, k, T).mask.sum() == min(T, lengths[k])
        assert whole_row(PadRows(tokens, T, truncated_eos=True), k, T).tokens[-1] == EOS


@pytest.mark.parametrize("n_shards", [1, 2, 5, 8])
@pytest.mark.parametrize("seq_len", [2, 8, 9, 33, 200])
def test_segments_are_the_documents_of_a_slow_reading(n_shards: int, seq_len: int) -> None:
    """Ids repeat, and documents hold the id of eos: only the ends of documents tell them apart."""
    lengths = [3, 1, 1, 20, 8, 2, 40, 7, 9, 1]
    documents = [[EOS if i % 5 == 3 else i for i in range(n - 1)] + [EOS] for n in lengths]
    tokens = source(documents, n_shards)
    document_of = [k for k, document in enumerate(documents) for _ in document]
    rows = ConcatRows(tokens, seq_len)
    for i in range(rows.n_eval):
        inside = [*document_of, *[len(documents)] * seq_len][i * seq_len : (i + 1) * seq_len]
        slow, segment = [], 0
        for t in range(seq_len):
            segment += t > 0 and inside[t] != inside[t - 1]
            slow.append(segment)
        row, joined = whole_row(rows, i, seq_len, apart=True), whole_row(rows, i, seq_len)
        assert row.segments.dtype == np.int32 and row.segments.tolist() == slow
        assert row.tokens.tolist() == joined.tokens.tolist() and row.mask.tolist() == joined.mask.tolist()
        assert joined.segments is None


def test_segments_of_a_split_with_empty_shards() -> None:
    tokens = source([[1, EOS], [2, 3, EOS]], n_shards=5)
    assert [whole_row(ConcatRows(tokens, 5), 0, 5, apart=True).segments] == [pytest.approx([0, 0, 1, 1, 1])]


@pytest.mark.parametrize(("family", "truncated_eos"), [("t5", True), ("gpt2", False)])
def test_pad_rows_and_mask_are_the_references(family: str, truncated_eos: bool, tmp_path: Path) -> None:
    """The reference lets the tokenizer pad with eos and cut off, with its template; then counts up to the first eos or pad."""
    folder = FAMILIES[family](tmp_path / "hub")
    (tmp_path / "ours").mkdir()
    convert_hf(str(folder), None, tmp_path / "ours")
    ours = HFTokenizer(tmp_path / "ours/tokenizer.json", tmp_path / "ours/special_ids.json")
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "mat", "naïve", "中文", "x + 12345"]
    texts = [" ".join(rng.choices(words, k=k)) for k in [*range(1, 40), 400]]

    seq_len = 32
    theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    theirs.pad_token = theirs.eos_token
    expected = np.array(theirs(texts, padding="max_length", truncation=True, max_length=seq_len)["input_ids"], np.int32)
    counts = np.ones((len(texts), seq_len), int)
    for row in range(len(texts)):
        for t in range(1, seq_len):
            counts[row, t] = counts[row, t - 1] * (expected[row, t - 1] != theirs.eos_token_id)

    writer = ShardWriter(tmp_path / "shard", "<u2")
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        writer.add("train", [ids, np.array([ours.eos_id])], len(text.encode()), ends=True)
    found = open_shard(tmp_path / "shard", "<u2", writer.finish())["train"]
    tokens = TokenDataset("data", "train", (found,), 0, "", "", ours.eos_id)
    rows = PadRows(tokens, seq_len, truncated_eos)
    found = RowReader([rows], [len(rows)], DataConfig(seq_len=seq_len, packing="pad"), ours.n_vocab).read(range(len(rows)))
    np.testing.assert_array_equal(found.tokens, expected)
    np.testing.assert_array_equal(found.mask, counts == 1)
    np.testing.assert_array_equal(loss_mask(expected, ours.eos_id, ours.eos_id), counts == 1)
    other = PadRows(tokens, seq_len, not truncated_eos)
    cut_off = [whole_row(other, i, seq_len).tokens.tolist() != expected[i].tolist() for i in range(len(rows))]
    assert any(cut_off), "no text is cut off: nothing is shown"


def test_an_id_outside_the_vocabulary_is_found_in_either_kind() -> None:
    tokens = source([[1, 2, 3, EOS], [4, 5, 1200, EOS]])
    for rows in (ConcatRows(tokens, 4), PadRows(tokens, 4, False)):
        table = RowReader([rows, rows], [2, 2], DataConfig(seq_len=4), n_vocab=1000)
        assert table.read([0, 2, 4]).tokens.tolist() == [[1, 2, 3, EOS], [1, 2, 3, EOS], [EOS] * 4]
        with pytest.raises(ConfigError, match=r"shard, train token 6: id 1200 is outside the vocabulary of 1000"):
            table.read([0, 3, 1])


def test_truncated_eos_needs_pad_rows() -> None:
    with pytest.raises(ConfigError, match=r"data\.truncated_eos = true: it needs data\.packing=pad"):
        DataConfig(truncated_eos=True)


def test_documents_apart_need_concat_rows() -> None:
    with pytest.raises(ConfigError, match=r"^data\.intra_document_mask = true: it needs data\.packing=concat$"):
        DataConfig(intra_document_mask=True, packing="pad")
    assert not DataConfig().intra_document_mask
