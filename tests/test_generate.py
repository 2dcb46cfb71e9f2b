"""Sampling beside a cache: the logits of a pass over the whole text, on every mesh; draws by their settings; the script."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_unless
from hf import t5
from runs import settings
from test_ops import distance
from test_sharding import params

from mutransformer.cli import main
from mutransformer.commands.generate import read_prompt
from mutransformer.config.load import load
from mutransformer.data.tokenizers.registry import convert_hf, saved_tokenizer
from mutransformer.data.tokenizers.tokenizer import ByteTokenizer
from mutransformer.errors import FINISHED, USAGE_ERROR, ConfigError
from mutransformer.generation import (
    Sampling,
    choose,
    continuation,
    filter_logits,
    make_decode,
    make_prefill,
    make_sampler,
    prompt_tokens,
)
from mutransformer.model.ops import shift_right
from mutransformer.sharding import devices as hardware
from mutransformer.sharding.mesh import put_batch
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.loop import train
from mutransformer.training.program import Program, Vocabulary, build, build_with_data
from mutransformer.training.step import make_logits

BOS, NONE = 3, -1  # NONE: no token, and so an eos that never comes
B, T, V, PADDED = 4, 12, 90, 96
TINY = [
    *("model.d_model=32", "model.d_base=16", "model.d_head=8", "model.n_layer=2", "model.ff_multiple=2"),
    *(f"model.n_vocab={V}", "model.vocab_multiple=32", "precision.compute=float32"),
    *(f"data.seq_len={T}", "data.batch_size=8"),
]
MODELS = {
    "relu": [],
    "multi-query, all options": [
        *("model.activation=swiglu", "model.n_kv_head=1", "model.norm_scale=vector", "model.biases=true", "model.qk_norm=true"),
        "model.embed_norm=true",
    ],
    # Three key/value heads, which y = 2 does not divide.
    "grouped, completep, scalar gains": [
        *("model.d_model=48", "model.n_kv_head=3", "optim.rule=completep", "model.n_layer_base=1", "model.norm_scale=scalar"),
        *("model.qk_norm=true", "model.remat=full"),
    ],
    "no positions, mup_table8": ["model.rotary_base=0", "model.n_kv_head=2", "optim.rule=mup_table8", "model.activation=gelu"],
    "sqrelu, completed_p": [
        *("model.attention_activation=sqrelu", "optim.rule=completed_p", "model.n_layer_base=1", "model.activation=sqrelu"),
    ],
    "elu, sp": ["model.attention_activation=elu", "optim.rule=sp", "model.activation=silu", "model.n_kv_head=2"],
    "norm_sqrelu, abs_mup": ["model.attention_activation=norm_sqrelu", "optim.rule=abs_mup", "model.qk_scale=1"],
    "norm_elu": ["model.attention_activation=norm_elu", "model.biases=true"],
}
MESHES = {"1 x 1": (1, 1), "2 x 1": (2, 1), "1 x 2": (1, 2), "4 x 2": (4, 2), "2 of 1 x 2": (1, 2, 2)}


def make(model: str, on: str = "1 x 1", *more: str) -> Program:
    x, y, *z = MESHES[on]
    config = load([*TINY, *MODELS[model], f"mesh.x={x}", f"mesh.y={y}", *(f"mesh.replicas={n}" for n in z), *more])
    return build(config, jax.devices()[: x * y * config.mesh.replicas], Vocabulary(V, BOS, NONE))


FIRST = 4  # tokens of the prompt


@cache
def texts() -> np.ndarray:
    """Rows that differ behind the prompt."""
    rows = np.random.default_rng(0).integers(0, V, (B, T), dtype=np.int32)
    rows[:, :FIRST] = rows[0, :FIRST]
    return rows


def from_scratch(program: Program) -> list[np.ndarray]:
    """Logits of each token after the prompt, by a pass over the row in which the token and those after it are 0."""
    logits, weights = make_logits(program), params(program.config)
    rows = (put_batch(np.where(np.arange(T) < t, texts(), 0), program.mesh) for t in range(FIRST, T))
    return [np.asarray(logits(weights, row)[:, t]) for t, row in enumerate(rows, start=FIRST)]


@cache
def jitted(model: str, on: str, *more: str) -> tuple[Any, Any]:
    made = make(model, on, *more)
    return jax.jit(make_prefill(made, B)), jax.jit(make_decode(made))


def beside_a_cache(model: str, on: str = "1 x 1", *more: str, off: int = 0) -> list[np.ndarray]:
    """The same, token by token. off: by how much positions are wrong."""
    prefill, decode = jitted(model, on, *more)
    weights, row = params(make(model).config), np.where(np.arange(T) < FIRST, texts()[0], 0)
    inputs = np.asarray(shift_right(jnp.asarray(texts()), BOS))
    kept, found = prefill(weights, shift_right(jnp.asarray(row[None]), BOS)[0]), []
    for t in range(FIRST, T - off):
        logits, kept = decode(weights, kept, inputs[:, t], np.int32(t + off))
        assert logits.dtype == jnp.float32
        found.append(np.asarray(logits))
    return found


@cache
def on_one_device(model: str) -> list[np.ndarray]:
    return from_scratch(make(model))


CASES = [
    *((model, "1 x 1") for model in MODELS),
    *((model, "4 x 2") for model in list(MODELS)[:3]),
    *(("relu", on) for on in ("2 x 1", "1 x 2")),
]


@pytest.mark.parametrize(("model", "on"), slow_unless([case for case in CASES if case[1] == "4 x 2"], CASES))
def test_logits_beside_a_cache_are_those_of_a_pass_from_scratch(model: str, on: str) -> None:
    for ours, theirs in zip(beside_a_cache(model, on), on_one_device(model), strict=True):
        assert distance(ours, theirs) < 1e-5
        assert np.array_equal(ours.argmax(1), theirs.argmax(1))


@pytest.mark.parametrize("model", ["relu", "no positions, mup_table8", "norm_elu"])
def test_a_cache_that_is_off_by_one_is_seen(model: str) -> None:
    """The control."""
    ours = beside_a_cache(model, off=1)
    assert all(distance(a, b) > 1e-3 for a, b in zip(ours, on_one_device(model)[:-1], strict=True))


def test_in_bfloat16() -> None:
    model = "multi-query, all options"
    found = beside_a_cache(model, "1 x 2", "precision.compute=bfloat16")
    apart = [distance(a, b) for a, b in zip(found, on_one_device(model), strict=True)]
    assert 1e-4 < max(apart) < 0.03  # roundings to eight bits, in two layers


@cache
def sampler(how: Sampling, on: str, eos: int, n_vocab: int) -> Any:
    return make_sampler(replace(make("relu", on), vocabulary=Vocabulary(n_vocab, BOS, eos)), how)


def sampled(how: Sampling, on: str = "1 x 1", eos: int = NONE, n_vocab: int = V, first: int = FIRST) -> Any:
    row = np.where(np.arange(T) < first, texts()[0], 0)
    weights = params(make("relu").config)
    return np.asarray(sampler(how, on, eos, n_vocab)(weights, row, np.int32(first), np.int32(T)))


GREEDY = Sampling(temperature=0.0)


@pytest.mark.parametrize("first", [0, FIRST, T - 1])
def test_greedy_sampling_takes_the_largest_logit_of_a_pass_from_scratch(first: int) -> None:
    made = make("relu")
    logits, weights = make_logits(made), params(made.config)
    rows = np.where(np.arange(T) < first, texts()[:1], 0)
    for t in range(first, T):
        rows[:, t] = np.asarray(logits(weights, rows))[:, t, :V].argmax(1)
    assert np.array_equal(sampled(GREEDY, first=first), rows)


def test_of_one_token_the_choice_is_greedy() -> None:
    assert np.array_equal(sampled(Sampling(temperature=3.0, top_k=1)), sampled(GREEDY))
    assert not np.array_equal(drawn()[:1], sampled(GREEDY))


@cache
def drawn() -> np.ndarray:
    return sampled(Sampling(samples=3, temperature=1.0))


@pytest.mark.parametrize("on", ["4 x 2", "2 of 1 x 2"])
def test_samples_depend_on_neither_their_number_nor_the_mesh(on: str) -> None:
    more = sampled(Sampling(samples=6, temperature=1.0), on=on)
    assert np.array_equal(more[:3], drawn())
    assert len({row.tobytes() for row in more}) == 6


def test_samples_depend_on_the_seed() -> None:
    assert np.array_equal(sampled(Sampling(samples=3, temperature=1.0)), drawn())
    other = sampled(Sampling(samples=3, temperature=1.0, seed=1))
    assert np.array_equal(other[:, :FIRST], drawn()[:, :FIRST])
    assert (other[:, FIRST:] != drawn()[:, FIRST:]).mean() > 0.5


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    how = Sampling(samples=64, temperature=1e6)  # all that may be drawn is equally likely
    found = sampled(how)[:, FIRST:]
    assert found.max() < V and len(np.unique(found)) > 80
    assert sampled(how, n_vocab=PADDED)[:, FIRST:].max() >= V, "the control draws none either"


def test_sampling_ends_when_all_have_come_to_an_eos() -> None:
    greedy = sampled(GREEDY)[0]
    t = next(t for t in range(FIRST + 1, T) if greedy[t] not in greedy[FIRST:t])
    found = sampled(GREEDY, eos=int(greedy[t]))[0]
    assert np.array_equal(found[: t + 1], greedy[: t + 1]) and not found[t + 1 :].any()
    before = drawn()[0]
    found = sampled(Sampling(samples=3, temperature=1.0), eos=int(drawn()[1, FIRST + 1]))
    assert np.array_equal(found[0], before), "another sample's end changes this one"


def test_a_text_ends_before_its_first_eos() -> None:
    tokenizer, eos = ByteTokenizer(), ByteTokenizer.eos_id
    found = continuation([*b"caf"], [*"é!".encode(), eos, 65, eos], tokenizer)
    assert found == {"text": "é!", "tokens": [*"é!".encode()], "ended": True}
    assert continuation([65], [66, 67], tokenizer) == {"text": "BC", "tokens": [66, 67], "ended": False}
    assert continuation([], [eos], tokenizer) == {"text": "", "tokens": [], "ended": True}


def plain_filter(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Ids that may be drawn, one after another from the most probable on; of equals the first."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    power = np.exp(logits[order].astype(np.float64))
    total, kept = 0.0, set[int]()
    for i, p in zip(order, power / power.sum(), strict=True):
        if total >= top_p:
            break
        kept.add(i)
        total += p
    return kept


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (99, 1.0), (0, 0.5), (0, 0.999), (0, 1e-9), (7, 0.6)])
def test_which_tokens_may_be_drawn(top_k: int, top_p: float) -> None:
    rng = np.random.default_rng(0)
    spread = jax.jit(partial(filter_logits, top_k=top_k, top_p=top_p))
    for scale in (0.0, 1.0, 5.0):
        logits = np.round(scale * rng.normal(size=40), 1).astype(np.float32) + 0.0  # some are equal; no -0.0, which is less
        found = np.asarray(spread(logits))
        kept = set(np.flatnonzero(found > -np.inf).tolist())
        assert kept == plain_filter(logits, top_k, top_p)
        assert all(found[i] == logits[i] for i in kept)


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    logits, how = jnp.array([0.0, 1.0, -1.0, 0.5, 3.0]), Sampling(temperature=2.0, top_k=4)
    draws = jax.jit(jax.vmap(lambda key: choose(logits, key, how)))(jax.random.split(jax.random.key(0), 20000))
    expected = np.exp([0, 0.5, -np.inf, 0.25, 1.5])
    assert np.bincount(draws, minlength=5) / 20000 == pytest.approx(expected / expected.sum(), abs=0.012)


def test_the_tokenizer_is_read_from_the_runs_folder(tmp_path: Path) -> None:
    hub = t5(tmp_path / "hub")
    config = load(["data.tokenizer=hf", f"data.tokenizer_file={hub}", f"workdir={tmp_path}", "name=run"])
    with pytest.raises(ConfigError, match="run: no run here"):
        saved_tokenizer(config.data, config.rundir)
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"run: lacks the tokenizer's tokenizer\.json and special_ids\.json"):
        saved_tokenizer(config.data, config.rundir)
    convert_hf(str(hub), None, tmp_path / "run")
    shutil.rmtree(hub)
    tokenizer = saved_tokenizer(config.data, config.rundir)
    given, new = (ids.tolist() for ids in tokenizer.encode(["the cat", "sat"]))
    assert tokenizer.decode([*given, *new]) == "the cat sat" and tokenizer.decode(new) == "sat"
    assert continuation(given, new, tokenizer)["text"] == " sat"


def test_a_prompt_begins_as_a_document_does() -> None:
    tokenizer = ByteTokenizer()
    assert prompt_tokens("ab", tokenizer, load([])) == [97, 98]
    assert prompt_tokens("ab", tokenizer, load(["data.add_bos=true"])) == [tokenizer.bos_id, 97, 98]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run that was trained with a tokenizer of its own, and whose data is gone."""
    folder = tmp_path_factory.mktemp("generate")
    shutil.copy(__file__, folder / "text.txt")
    args = [
        "data.tokenizer=sentencepiece",
        "data.vocab_size=400",
        "model.n_vocab=null",
        "model.n_layer=1",
        "log.tensorboard=false",
        "name=tiny",
    ]
    args += ["log.tensorboard=false", "steps=4", "checkpoint.every=2", "eval.every=2", "mesh.x=4", "mesh.y=2"]
    assert train(*build_with_data(load(settings(folder, *args)))) == FINISHED
    shutil.rmtree(folder / "cache")
    (folder / "text.txt").unlink()
    return folder / "runs/tiny/config.yaml"


@pytest.fixture
def script(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command within this process; gives the exit code."""
    monkeypatch.setattr(hardware, "keep_freed_memory", lambda: None)  # a setting of the whole process

    def call(*args: str) -> int:
        return main(["generate", str(run), "checkpoint.keep=1", *args])

    return call


def test_the_script(script: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("12: the", encoding="utf-8")
    args = ["--prompt-file", str(tmp_path / "prompt.txt"), "--samples", "2", "--tokens", "9", "--seed", "5"]
    assert script(*args, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["step"]) == ("12: the", 4) and len(found["samples"]) == 2
    for sample in found["samples"]:
        assert isinstance(sample["text"], str) and len(sample["tokens"]) + sample["ended"] <= 9
        assert sample["ended"] or len(sample["tokens"]) == 9
    assert script(*args) == 0
    one, two = (sample["text"] for sample in found["samples"])
    assert capsys.readouterr().out == f"--- 1 of 2\n12: the{one}\n--- 2 of 2\n12: the{two}\n"


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"\xef\xbb\xbf12: the\r\n", "12: the\r\n"),
        (b"a\rb\n", "a\rb\n"),
        (b"\xef\xbb\xbf\xef\xbb\xbf", "\ufeff"),
        ("é\u2028\x85".encode(), "é\u2028\x85"),
    ],
)
def test_a_prompt_file_is_read_as_training_reads_text(data: bytes, prompt: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(data)
    assert read_prompt(tmp_path / "prompt.txt") == prompt
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(ConfigError, match=r"prompt\.txt: not UTF-8 at byte 5$"):
        read_prompt(tmp_path / "prompt.txt")


def test_the_best_checkpoint(
    script: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "best", lambda self: 2)
    assert script("--tokens", "1", "--temperature", "0", "--json", "eval.checkpoint=best") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["prompt"]) == (2, "") and len(found["samples"]) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["name=none"], "none: no run here"),
        (["--prompt", "1" * 32], "the prompt has 32 tokens: data.seq_len = 32 leaves none to add"),
        (["--prompt", "1" * 30, "--tokens", "3"], "tokens = 3: data.seq_len = 32 leaves 2 after the prompt"),
        (["--temperature", "-1"], "temperature = -1.0: must be 0, or lie in 1e-6 ... 1e6"),
        (["--top-p", "0"], "top_p = 0.0: must be above 0, and at most 1"),
        (["--top-p", "1.1"], "top_p = 1.1: must be above 0, and at most 1"),
        (["--top-k", "-1"], "top_k = -1: must not be negative; 0 is all"),
        (["--samples", "0"], "samples = 0: must be at least 1"),
        (["--prompt", "\udcff"], "the prompt is not UTF-8"),
        (["--prompt-file", "/none"], "/none: No such file or directory"),
        (["model.d_model=128"], "model.d_model was 64, is 128"),
    ],
)
def test_mistakes_are_one_line(args: list[str], message: str, script: Callable[..., int], capsys: Any) -> None:
    assert script(*args) == USAGE_ERROR
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err and not out


def test_a_run_without_a_checkpoint(script: Callable[..., int], tmp_path: Path, run: Path, capsys: Any) -> None:
    (tmp_path / "new").mkdir()
    shutil.copy(run.parent / "tokenizer.model", tmp_path / "new")
    assert script(f"workdir={tmp_path}", "name=new") == USAGE_ERROR
    assert "new/checkpoints: no checkpoints here" in capsys.readouterr().err
