"""Rows and batches: which rows come, in which order, on any number of processes."""

import dataclasses
import hashlib
from typing import Any

import numpy as np
import pytest
from tokens import EOS, loss_mask, mixture, whole_row

from mutransformer.config.data import DataConfig
from mutransformer.data.batches.pipeline import Batch, Batches, eval_batches, fingerprint, train_batches
from mutransformer.data.batches.rows import ConcatRows
from mutransformer.data.cache.dataset import TokenSplit
from mutransformer.errors import ConfigError

T, B = 5, 4
N_ROWS = 37
N_VOCAB = 1000


def token_file(n_tokens: int = N_ROWS * T + 3) -> TokenSplit:
    """Token i is i, so that every token tells its place."""
    return mixture([list(range(n_tokens))])


def config(**settings: Any) -> DataConfig:
    return dataclasses.replace(DataConfig(seq_len=T, batch_size=B, prefetch=0), **settings)


def take(batches: Any, n: int) -> list[Batch]:
    return [next(batches) for _ in range(n)]


def global_batches(n: int, n_process: int, seed: int = 0, **settings: Any) -> np.ndarray:
    """[batch, row, T], the processes' rows joined."""
    iterators = [train_batches(token_file(), config(**settings), seed, n_process, (p,), N_VOCAB) for p in range(n_process)]
    batches = np.stack([np.concatenate([next(it).tokens for it in iterators]) for _ in range(n)])
    for iterator in iterators:
        iterator.close()
    return batches


def test_rows_are_consecutive_and_the_rest_is_left_out() -> None:
    rows = ConcatRows(token_file().sources[0], T)
    assert len(rows) == N_ROWS
    tokens = whole_row(rows, 2, T).tokens
    assert tokens.tolist() == [10, 11, 12, 13, 14] and tokens.dtype == np.int32


def test_a_batch_is_int32_with_every_target_counted() -> None:
    (batch,) = take(train_batches(token_file(), config(), 0, 2, (1,), N_VOCAB), 1)
    assert batch.tokens.shape == batch.mask.shape == (B // 2, T)
    assert batch.tokens.dtype == np.int32 and batch.mask.dtype == np.bool_ and batch.mask.all()


@pytest.mark.parametrize("prefetch", [0, 3])
def test_any_number_of_processes_makes_the_same_batches(prefetch: int) -> None:
    hashes = {hashlib.sha256(global_batches(50, n_process, prefetch=prefetch).tobytes()).hexdigest() for n_process in (1, 2, 4)}
    assert len(hashes) == 1
    assert hashes == {hashlib.sha256(global_batches(50, 1).tobytes()).hexdigest()}


def test_every_epoch_has_each_row_once_in_an_order_of_its_own() -> None:
    rows = global_batches(N_ROWS, 2).reshape(-1, T)
    epochs = (rows[:, 0] // T).reshape(B, N_ROWS)
    np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(T))
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(N_ROWS))
        assert epoch.tolist() != list(range(N_ROWS))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == B


def test_the_order_is_the_one_that_saved_runs_go_on_with() -> None:
    """Written down: a version of Grain that shuffles otherwise would resume a run on other data."""
    assert (global_batches(3, 1)[..., 0] // T).tolist() == [[21, 2, 31, 14], [9, 7, 28, 6], [24, 3, 36, 15]]


def test_seeds_differ_and_are_not_each_others_later_epochs() -> None:
    one, two = (global_batches(N_ROWS, 1, seed).reshape(B, N_ROWS, T) for seed in (1, 2))
    assert not any((a == b).all() for a in one for b in two)
    np.testing.assert_array_equal(one, global_batches(N_ROWS, 1, 1).reshape(B, N_ROWS, T))


@pytest.mark.parametrize("prefetch", [0, 4])
@pytest.mark.parametrize("drawn", [0, 1, 13])
def test_a_restored_iterator_goes_on_identically(prefetch: int, drawn: int) -> None:
    def fresh() -> Batches:
        return train_batches(token_file(), config(prefetch=prefetch), 3, 2, (1,), N_VOCAB)

    first, second = fresh(), fresh()
    take(first, drawn)
    state = first.get_state()
    assert state == {"next_index": drawn}
    take(second, 5)
    second.set_state(state)
    for a, b in zip(take(first, 20), take(second, 20), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    first.close()
    second.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_id_outside_the_vocabulary_is_named(prefetch: int) -> None:
    batches = train_batches(token_file(), config(prefetch=prefetch), 0, 1, (0,), n_vocab=N_ROWS * T - 1)
    with pytest.raises(ValueError, match=r"shard, train token 184: id 184 is outside the vocabulary of 184\n"):
        take(batches, N_ROWS)
    batches.close()
    with pytest.raises(ValueError, match=r"shard, train token 187: id 187 is outside the vocabulary of 187$"):
        list(eval_batches(token_file(), config(), None, 1, (0,), n_vocab=187))


@pytest.mark.parametrize("n_process", [1, 2, 4])
@pytest.mark.parametrize("n_tokens", [1, T, B * T, B * T + 1, 188, 199, 200])
def test_evaluation_counts_every_token_once_in_order(n_process: int, n_tokens: int) -> None:
    file = token_file(n_tokens)
    processes = [list(eval_batches(file, config(), None, n_process, (p,), N_VOCAB)) for p in range(n_process)]
    assert {len(batches) for batches in processes} == {-(-n_tokens // (B * T))}
    counted = []
    for parts in zip(*processes, strict=True):
        assert all(part.tokens.shape == (B // n_process, T) and part.tokens.dtype == np.int32 for part in parts)
        tokens, mask = (np.concatenate([part[i] for part in parts]) for i in range(2))
        counted += tokens[mask].tolist()
        assert (tokens[~mask] == EOS).all()
    assert counted == list(range(n_tokens))


def test_evaluation_spreads_its_rows_or_takes_what_there_is() -> None:
    batches = list(eval_batches(token_file(), config(), 2, 1, (0,), N_VOCAB))
    starts = np.concatenate([b.tokens[:, 0] for b in batches])
    assert len(starts) == 2 * B and set(np.diff(starts).tolist()) == {4 * T, 5 * T}, "rows are not spread evenly"
    assert all(b.mask.all() for b in batches)
    assert len(list(eval_batches(token_file(), config(), 99, 1, (0,), N_VOCAB))) == 10
    assert len(list(eval_batches(token_file(2), config(), 99, 1, (0,), N_VOCAB))) == 1


def test_batches_have_segments_with_the_document_mask() -> None:
    text = mixture([[1, 2, EOS], [3, EOS], [4, 5, 6, 7, EOS]] * 7)
    for masked in (False, True):
        c = config(intra_document_mask=masked)
        train, held_out = (
            take(train_batches(text, c, 0, 2, (1,), N_VOCAB), 1),
            list(eval_batches(text, c, None, 1, (0,), N_VOCAB)),
        )
        for batch in (*train, *held_out):
            if not masked:
                assert batch.segments is None
                continue
            assert batch.segments.dtype == np.int32 and batch.segments.shape == batch.tokens.shape
            begins = np.diff(batch.segments, axis=1) == 1
            np.testing.assert_array_equal(begins & batch.mask[:, 1:], (batch.tokens[:, :-1] == EOS) & batch.mask[:, 1:])
    assert not held_out[-1].mask[-1].any(), "no row beyond the split: nothing is shown of it"


def test_too_little_text_and_batches_that_do_not_divide() -> None:
    enough = token_file(B * T)
    assert take(train_batches(enough, config(), 0, 1, (0,), N_VOCAB), 1)
    message = r"data\.batch_size = 4, data\.seq_len = 5: the train split has 19 tokens, a batch needs 20"
    with pytest.raises(ConfigError, match=message):
        train_batches(token_file(B * T - 1), config(), 0, 1, (0,), N_VOCAB)
    for make in (
        lambda: train_batches(token_file(), config(), 0, 3, (0,), N_VOCAB),
        lambda: eval_batches(token_file(), config(), None, 3, (0,), N_VOCAB),
    ):
        with pytest.raises(ConfigError, match=r"data\.batch_size = 4: must be a multiple of mesh\.x, 3"):
            make()
    with pytest.raises(ConfigError, match="the train split has no tokens"):
        eval_batches(token_file(0), config(), None, 1, (0,), N_VOCAB)


@pytest.mark.parametrize(
    ("eos", "pad", "expected"),
    [
        (1, 0, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]),
        (1, 1, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
    ],
)
def test_loss_mask_ends_with_the_document(eos: int, pad: int, expected: list[list[int]]) -> None:
    rows = [[7, 8, 1, 0, 0], [7, 8, 9, 7, 1], [1, 7, 8, 1, 9], [7, 0, 0, 0, 0], [7, 8, 9, 7, 8]]
    mask = loss_mask(np.array(rows, np.int32), eos, pad)
    assert mask.dtype == np.bool_
    assert mask.astype(int).tolist() == expected


def test_fingerprint_changes_with_what_decides_the_batches() -> None:
    base = fingerprint(token_file(), config(), 0)
    assert base.keys() == {
        "tokens",
        "tokenizer",
        "packing",
        "intra_document_mask",
        "truncated_eos",
        "seq_len",
        "batch_size",
        "seed",
    }
    padded = config(packing="pad"), config(packing="pad", truncated_eos=True)
    for other in (config(seq_len=6), config(batch_size=8), config(intra_document_mask=True), *padded):
        assert fingerprint(token_file(), other, 0) != base
    assert fingerprint(token_file(), config(), 1) != base and fingerprint(token_file(90), config(), 0) != base
    assert fingerprint(token_file(), config(prefetch=7, threads=1), 0) == base
