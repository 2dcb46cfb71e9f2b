"""Documents kept apart in a row: each is read as if it stood in a row alone; where they are joined, nothing of it is computed."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cases import slow_unless
from jax.sharding import Mesh
from programs import program
from short_runs import finish, start
from test_sharding import MODELS, TINY, params, worst

from mutransformer.commands.inspect_data import _locate
from mutransformer.config.load import load
from mutransformer.config.schema import Config
from mutransformer.data.batches.pipeline import Batch
from mutransformer.sharding.mesh import make_mesh, put_batch
from mutransformer.study.sweep.parallel_runs import ParallelRuns, mean_losses
from mutransformer.training.program import Vocabulary
from mutransformer.training.step import make_eval_step, make_logits, make_loss_and_grads

BOS, EOS, T = 1, 2, 128  # T takes attention in two blocks
LENGTHS = [[5, 1, 66, 56], [100, 28]]  # of the documents in each row
CASES = {
    "relu": [],
    "all options": MODELS["all options"],
    "norm_sqrelu, in parts": ["model.attention_activation=norm_sqrelu", "model.remat=full", "optim.grad_accumulation_steps=2"],
}


def setting(case: str, x: int = 1, y: int = 1) -> Config:
    return load([*TINY, *CASES[case], f"data.seq_len={T}", f"mesh.x={x}", f"mesh.y={y}"])


@cache
def rows(case: str) -> tuple[Batch, Batch]:
    """Documents, of which a few targets do not count: several in a row, twice over, and each in a row alone, filled with eos."""
    rng = np.random.default_rng(0)
    times = setting(case).optim.grad_accumulation_steps or 1
    lengths = LENGTHS * times
    tokens = rng.integers(3, 250, (len(lengths), T), dtype=np.int32)
    mask = rng.random(tokens.shape) < 0.9
    segments = np.stack([np.repeat(np.arange(len(row), dtype=np.int32), row) for row in lengths])
    n = sum(map(len, lengths))
    alone = Batch(np.full((n, T), EOS, np.int32), np.zeros((n, T), np.bool_))
    for k, (row, segment) in enumerate((i, j) for i, documents in enumerate(lengths) for j in range(len(documents))):
        here = segments[row] == segment
        alone.tokens[k, : here.sum()], alone.mask[k, : here.sum()] = tokens[row, here], mask[row, here]
    return Batch(tokens, mask, segments), alone


@cache
def functions(case: str, x: int, y: int) -> tuple[Mesh, Any, Any]:
    config = setting(case, x, y)
    mesh = make_mesh(config.mesh, jax.devices()[: x * y])
    return mesh, jax.jit(make_loss_and_grads(program(config, mesh, BOS))), make_logits(program(config, mesh, BOS))


def results(case: str, batch: Batch, x: int = 1, y: int = 1) -> tuple[Any, Any, np.ndarray]:
    """Metrics, gradients, logits."""
    mesh, loss_and_grads, logits = functions(case, x, y)
    weights, placed = params(setting(case, x, y)), put_batch(batch, mesh)
    metrics, grads = jax.device_get(loss_and_grads(weights, placed))
    return metrics, grads, np.asarray(logits(weights, placed.tokens, placed.segments))


@cache
def alone(case: str) -> tuple[Any, Any, np.ndarray]:
    return results(case, rows(case)[1])


def in_rows(logits: np.ndarray, lengths: list[list[int]]) -> np.ndarray:
    """Those of documents alone -> of the rows that hold them."""
    left = iter(logits)
    return np.stack([np.concatenate([next(left)[:n] for n in row]) for row in lengths])


def far(ours: tuple[Any, Any, np.ndarray], case: str) -> dict[str, float]:
    """How far from documents alone: the loss, the gradient that is farthest, the logits that are farthest."""
    metrics, grads, logits = ours
    want, want_grads, want_logits = alone(case)
    want_logits = in_rows(want_logits, LENGTHS * (setting(case).optim.grad_accumulation_steps or 1))
    return {
        "loss": abs(metrics["loss"] / want["loss"] - 1),
        "gradient": worst(grads, want_grads),
        "logits": np.abs(logits - want_logits).max() / np.abs(want_logits).max(),
    }


# The model with most parts on a mesh; the others are slow.
FEW = [("all options", 2, 4)]
ALL = [(case, x, y) for case in CASES for x, y in [(1, 1), (2, 4)]]


@pytest.mark.parametrize(("case", "x", "y"), slow_unless(FEW, ALL))
def test_a_document_is_read_as_if_it_stood_alone(case: str, x: int, y: int) -> None:
    found = far(results(case, rows(case)[0], x, y), case)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(
    ("case", "change"),
    slow_unless(
        [("relu", "off by one"), ("relu", "joined")], [("relu", "off by one"), ("all options", "off by one"), ("relu", "joined")]
    ),
)
def test_joined_or_shifted_documents_are_not_as_alone(case: str, change: str) -> None:
    """The control."""
    batch, _ = rows(case)
    segments = None if change == "joined" else np.roll(batch.segments, 1, axis=1)
    found = far(results(case, batch._replace(segments=segments)), case)
    assert min(found.values()) > 1e-4, found


def test_joined_nothing_of_it_is_computed() -> None:
    config = setting("relu")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    apart, _ = rows("relu")
    joined = apart._replace(segments=None)

    def traced(settings: Config, batch: Batch) -> tuple[int, str]:
        jaxpr = jax.make_jaxpr(make_loss_and_grads(program(settings, mesh, BOS)))(params(config), batch)
        return len(jaxpr.jaxpr.invars) - len(jax.tree.leaves(params(config))), str(jaxpr)

    plain, masked = traced(config, joined), load([*TINY, f"data.seq_len={T}", "mesh.x=1", "data.intra_document_mask=true"])
    assert plain[0] == 2 and Batch(apart.tokens, apart.mask).segments is None
    assert traced(masked, joined) == plain, "the batch alone decides, not the setting"
    compared = f"bool[2,64,{T}]"  # a query and a key of each row; the causal mask knows no rows
    assert compared not in plain[1]
    n_inputs, text = traced(masked, apart)
    assert n_inputs == 3 and compared in text


@pytest.mark.slow
@pytest.mark.parametrize("one_by_one", [True, False])
def test_runs_of_a_sweep_keep_them_apart_too(one_by_one: bool) -> None:
    config = load(
        [*TINY, f"data.seq_len={T}", "data.batch_size=2", "mesh.x=1", "data.intra_document_mask=true", "model.n_layer=1"]
    )
    batch, _ = rows("relu")
    runs = ParallelRuns(config, Vocabulary(250, BOS, EOS), [(0.01, 0), (0.02, 0)], jax.devices()[:1], one_by_one)
    runs.compile()
    state = runs.init()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    score, weights = make_eval_step(program(config, mesh, BOS)), program(config, mesh).init_state().params
    apart, joined = (
        float(total) / int(count) for total, count in (score(weights, b) for b in (batch, batch._replace(segments=None)))
    )
    assert mean_losses(runs, state, [batch]) == pytest.approx([apart] * 2, rel=1e-6)
    _, losses = runs.step(state, [batch])
    assert runs.read([losses])[0] == pytest.approx([apart] * 2, rel=1e-6)
    assert abs(apart / joined - 1) > 1e-4


def test_inspect_data_shows_them(tmp_path: Path) -> None:
    for k in range(20):
        (tmp_path / f"{k}.txt").write_text(f"{k} one two three")
    args = [f"data.files=[{tmp_path}/*.txt]", "data.source=text", "data.tokenizer=bytes", f"data.cache_dir={tmp_path}/cache"]
    small = ["data.seq_len=64", "data.batch_size=2"]
    shown = finish(start("scripts/inspect_data.py", [*args, *small, "data.intra_document_mask=true"]))
    assert "segment 0: " in shown and "segment 1: " in shown, shown
    mixed = [f"data.sources.{name}.{key}" for name in ("a", "b") for key in ("source=text", f"files=[{tmp_path}/*.txt]")]
    shown = finish(start("scripts/inspect_data.py", [*args[2:], *mixed, *small, "--rows", "2", "--batch", "1", "--tokens", "3"]))
    assert "segment" not in shown
    rows = re.findall(r"^batch 1, row (\d): row \d of ([ab]), 64 of 64 tokens count$", shown, re.MULTILINE)
    assert [row for row, _ in rows] == ["0", "1"] and {source for _, source in rows} == {"a", "b"}
    texts, pieces = (re.findall(pattern, shown, re.MULTILINE) for pattern in (r"^ +0-\d+ +'(.*?)'", r"^  tokens: (.*)$"))
    for text, line in zip(texts, pieces, strict=True):
        ids = [int(one.partition(":")[0]) for one in line.split()]
        assert len(ids) == 3 and bytes(ids[: len(text)]).decode() == text[:3], "ids of the text"


def test_the_source_of_a_row() -> None:
    assert [_locate(i, {"a": 2, "none": 0, "b": 3}) for i in range(5)] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2)]
