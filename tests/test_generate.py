"""Sampling beside a cache: the logits of a pass over the whole text, on every mesh; draws by their settings; the command."""

import json
import re
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
from short_runs import settings
from test_ops import distance
from test_sharding import params

from mutransformer.cli import main
from mutransformer.commands.generate import Screen, read_prompt, read_prompts
from mutransformer.config.load import load
from mutransformer.data.tokenizers.registry import convert_hf, saved_tokenizer
from mutransformer.data.tokenizers.tokenizer import ByteTokenizer
from mutransformer.errors import FINISHED, USAGE_ERROR, ConfigError
from mutransformer.generation import decoding
from mutransformer.generation.decoding import Decoder, Request, make_decode, make_prefill, padded_length
from mutransformer.generation.sampling import Sampling, choose, draw, filter_logits
from mutransformer.generation.text import Continuation, prompt_tokens
from mutransformer.model.ops import shift_right
from mutransformer.sharding import devices as hardware
from mutransformer.sharding.mesh import n_row_groups, put_batch
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.loop import train
from mutransformer.training.program import Program, Vocabulary, build, build_with_data
from mutransformer.training.step import make_logits

BOS, NONE = 3, -1  # NONE: no token, and so an eos that never comes
B, T, V, PADDED = 4, 12, 90, 96
TINY = [
    "model.d_model=32",
    "model.d_base=16",
    "model.d_head=8",
    "model.n_layer=2",
    "model.ff_multiple=2",
    f"model.n_vocab={V}",
    "model.vocab_multiple=32",
    "precision.compute=float32",
    f"data.seq_len={T}",
    "data.batch_size=8",
]
MODELS = {
    "relu": [],
    "multi-query, all options": [
        "model.activation=swiglu",
        "model.n_kv_head=1",
        "model.norm_scale=vector",
        "model.biases=true",
        "model.qk_norm=true",
        "model.embed_norm=true",
    ],
    # Three key/value heads, which y = 2 does not divide.
    "grouped, completep, scalar gains": [
        "model.d_model=48",
        "model.n_kv_head=3",
        "optim.rule=completep",
        "model.n_layer_base=1",
        "model.norm_scale=scalar",
        "model.qk_norm=true",
        "model.remat=full",
    ],
    "no positions, mup_table8": ["model.rotary_base=0", "model.n_kv_head=2", "optim.rule=mup_table8", "model.activation=gelu"],
    "sqrelu, completed_p": [
        "model.attention_activation=sqrelu",
        "optim.rule=completed_p",
        "model.n_layer_base=1",
        "model.activation=sqrelu",
    ],
    "elu, sp": ["model.attention_activation=elu", "optim.rule=sp", "model.activation=silu", "model.n_kv_head=2"],
    "norm_sqrelu, abs_mup": ["model.attention_activation=norm_sqrelu", "optim.rule=abs_mup", "model.qk_scale=1"],
    "norm_elu": ["model.attention_activation=norm_elu", "model.biases=true"],
    "wide heads, multipliers": [
        "model.attention_multiple=1.5",
        "model.n_kv_head=3",
        "model.qk_norm=true",
        "model.norm_scale=vector",
        "model.embed_multiplier=3",
        "model.residual_multiplier=0.5",
        "model.logits_multiplier=2",
    ],
}
MESHES = {"1 x 1": (1, 1), "2 x 1": (2, 1), "1 x 2": (1, 2), "4 x 2": (4, 2), "2 of 1 x 2": (1, 2, 2)}


def make(model: str, on: str = "1 x 1", *more: str) -> Program:
    x, y, *z = MESHES[on]
    config = load([*TINY, *MODELS[model], f"mesh.x={x}", f"mesh.y={y}", *(f"mesh.replicas={n}" for n in z), *more])
    return build(config, jax.devices()[: x * y * config.mesh.replicas], Vocabulary(V, BOS, NONE))


FIRST = 4  # tokens of the shortest prompt
FIRSTS = np.arange(B) + FIRST  # of each row's prompt


@cache
def texts() -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (B, T), dtype=np.int32)


STEPS = T - int(FIRSTS[-1])


def from_scratch(program: Program) -> list[np.ndarray]:
    """Logits of each token after the prompt of its row, by a pass over the rows in which the token and those after it are 0."""
    logits, weights, found = make_logits(program), params(program.config), []
    for at in (FIRSTS + k for k in range(STEPS)):
        row = put_batch(np.where(np.arange(T) < at[:, None], texts(), 0), program.mesh)
        found.append(np.asarray(logits(weights, row))[np.arange(B), at])
    return found


@cache
def jitted(model: str, on: str, *more: str) -> tuple[Any, Any]:
    made = make(model, on, *more)
    return jax.jit(make_prefill(made, T)), jax.jit(make_decode(made))


def beside_a_cache(model: str, on: str = "1 x 1", *more: str, off: int = 0) -> list[np.ndarray]:
    """The same, token by token, of prompts of different lengths. off: by how much positions are wrong."""
    prefill, decode = jitted(model, on, *more)
    weights, rows = params(make(model).config), np.where(np.arange(T) < FIRSTS[:, None], texts(), 0)
    of_text = np.arange(B, dtype=np.int32) % (B // n_row_groups(make(model, on).mesh))
    inputs = np.asarray(shift_right(jnp.asarray(texts()), BOS))
    kept, found = prefill(weights, shift_right(jnp.asarray(rows), BOS), of_text), []
    for at in (FIRSTS + k for k in range(STEPS - off)):
        logits, kept = decode(weights, kept, inputs[np.arange(B), at], (at + off).astype(np.int32))
        assert logits.dtype == jnp.float32
        found.append(np.asarray(logits))
    return found


@cache
def on_one_device(model: str) -> list[np.ndarray]:
    return from_scratch(make(model))


CASES = [
    *((model, "1 x 1") for model in MODELS),
    *((model, "4 x 2") for model in list(MODELS)[:3]),
    ("wide heads, multipliers", "4 x 2"),
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


PROMPT = tuple(int(token) for token in np.random.default_rng(1).integers(0, V, T))


def sampled(how: Sampling, on: str = "1 x 1", eos: int = NONE, n_vocab: int = V, first: int = FIRST) -> np.ndarray:
    """Rows of a prompt and its samples, then padding."""
    return decoded([PROMPT[:first]], how, on, eos, n_vocab)


def decoded(
    prompts: list[tuple[int, ...]], how: Sampling, on: str = "1 x 1", eos: int = NONE, n_vocab: int = V, model: str = "relu"
) -> np.ndarray:
    """Rows of prompts and their samples, then padding: prompt by prompt."""
    made = replace(make(model, on), vocabulary=Vocabulary(n_vocab, BOS, eos))
    asked = [Request(prompt, number, T) for prompt in prompts for number in range(how.samples)]
    rows = [list(request.prompt) for request in asked]
    for first, new in Decoder(made, how, asked).decode(params(make(model).config)):
        for row, tokens in zip(rows[first:], new.tolist(), strict=False):
            row += [token for token in tokens if token != NONE]
    return np.array([row + [0] * (T - len(row)) for row in rows])


GREEDY = Sampling(temperature=0.0)


@pytest.mark.parametrize("first", [0, FIRST, T - 1])
def test_greedy_sampling_takes_the_largest_logit_of_a_pass_from_scratch(first: int) -> None:
    made = make("relu")
    logits, weights = make_logits(made), params(made.config)
    rows = np.zeros((1, T), np.int32)
    rows[0, :first] = PROMPT[:first]
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


def test_samples_do_not_depend_on_how_many_tokens_are_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CHUNK", 3)
    assert np.array_equal(sampled(Sampling(samples=3, temperature=1.0)), drawn())


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


# Several prompts


PROMPTS = [PROMPT[:n] for n in (0, 1, FIRST, T - 1)]


@cache
def alone() -> np.ndarray:
    return np.concatenate([decoded([prompt], Sampling(samples=2, temperature=1.0)) for prompt in PROMPTS])


@pytest.mark.parametrize(("on", "batch"), [pytest.param("1 x 1", 3, marks=pytest.mark.slow), ("4 x 2", 5)])
def test_a_text_does_not_depend_on_the_others(on: str, batch: int) -> None:
    how = Sampling(samples=2, temperature=1.0, batch=batch)
    together = decoded(PROMPTS, how, on)
    assert np.array_equal(together, alone())
    assert not np.array_equal(together[2:4, FIRST:], together[4:6, FIRST:]), "the control: prompts make no difference"


def test_the_first_token_comes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CHUNK", 3)
    asked = [Request(prompt, 0, T) for prompt in PROMPTS]
    program, weights = make("relu"), params(make("relu").config)
    found = [new for _, new in Decoder(program, GREEDY, asked).decode(weights)]
    assert [new.shape[1] for new in found] == [1, 3, 3, 3, 3]
    tokens = np.concatenate(found, axis=1)
    lengths = (tokens != NONE).sum(1)
    assert (found[0] != NONE).all() and lengths.tolist() == [T, T - 1, T - FIRST, 1]
    assert np.array_equal(decoded(PROMPTS, GREEDY)[:, -1], tokens[np.arange(4), lengths - 1])


def test_texts_that_have_ended_are_not_continued() -> None:
    asked = [Request(PROMPT[:1], number, T) for number in range(2)]
    decoder, weights = Decoder(make("relu"), Sampling(), asked), params(make("relu").config)
    found = [new for _, new in decoder.decode(weights, ended=lambda i: i == 0)]
    assert [(new != NONE).sum(1).tolist() for new in found] == [[1, 1], [0, T - 2]]
    assert len(list(decoder.decode(weights, ended=lambda i: True))) == 1


def test_short_texts_take_programs_of_few_positions() -> None:
    long = make("relu", "1 x 1", "data.seq_len=300")
    assert [padded_length(long, n) for n in (0, 1, 64, 65, 128, 129, 257, 300)] == [64, 64, 64, 128, 128, 256, 300, 300]
    assert padded_length(make("norm_elu", "1 x 1", "data.seq_len=300"), 1) == 300
    kernel = ("model.d_head=64", "model.d_model=64", "model.attention_kernel=splash", "data.seq_len=384")
    assert [padded_length(make("relu", "1 x 1", *kernel), n) for n in (1, 129, 257)] == [128, 256, 384]


# Where a text ends


BYTES = ByteTokenizer()


def continuation(prefix: list[int], new: list[int], *stop: str, most: int = 99, tokenizer: Any = BYTES) -> Continuation:
    made = Continuation("", prefix, most, tokenizer, stop)
    made.add(new)
    return made


def test_a_text_ends_before_its_first_eos() -> None:
    eos = ByteTokenizer.eos_id
    found = continuation([*b"caf"], [*"é!".encode(), eos, 65, eos])
    assert found.result() == {"text": "é!", "tokens": [*"é!".encode()], "end": "eos"}
    assert continuation([65], [66, 67], most=2).result() == {"text": "BC", "tokens": [66, 67], "end": "length"}
    assert continuation([65], [66, 67, 68], most=2).result() == {"text": "BC", "tokens": [66, 67], "end": "length"}
    assert continuation([65], [66, 67]).end is None
    assert continuation([], [eos]).result() == {"text": "", "tokens": [], "end": "eos"}


@pytest.mark.parametrize("chunk", [1, 2, 3, 99])
def test_a_text_ends_before_the_first_stop_string(chunk: int) -> None:
    new = [*b"one, two; three, four", ByteTokenizer.eos_id]
    for stop, text, n in (
        (["; "], "one, two", 10),
        (["three", "o; t"], "one, tw", 11),
        (["o", "one"], "", 1),
        ([" two", "two"], "one,", 8),
        (["four"], "one, two; three, ", 21),
    ):
        found = continuation([], [], *stop)
        shown = [found.settled]
        for first in range(0, len(new), chunk):
            found.add(new[first : first + chunk])
            shown.append(found.settled)
        assert (found.text, found.tokens, found.end) == (text, new[:n], "stop")
        assert all(after.startswith(before) for before, after in zip(shown, shown[1:], strict=False)) and shown[-1] == text
    assert continuation([], new, "five").end == "eos"


def test_a_character_is_shown_when_it_is_complete() -> None:
    shown, made = [], continuation([], [])
    for byte in "aé中".encode():
        made.add([byte])
        shown.append(made.settled)
    assert shown == ["a", "a", "aé", "aé", "aé", "aé中"]
    assert continuation([], [0xC3], most=1).settled == "\ufffd", "the text ends there"


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
    for scale, size in ((0.0, 40), (1.0, 40), (5.0, 40), (3.0, 5000)):
        logits = np.round(scale * rng.normal(size=size), 1).astype(np.float32) + 0.0  # some are equal; no -0.0, which is less
        found = np.asarray(spread(logits))
        kept = set(np.flatnonzero(found > -np.inf).tolist())
        assert kept == plain_filter(logits, top_k, top_p)
        assert all(found[i] == logits[i] for i in kept)


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    logits, how = jnp.array([0.0, 1.0, -1.0, 0.5, 3.0]), Sampling(temperature=2.0, top_k=4)
    draws = jax.jit(jax.vmap(lambda u: choose(how, logits, u)))(jax.random.uniform(jax.random.key(0), (20000,)))
    expected = np.exp([0, 0.5, -np.inf, 0.25, 1.5])
    assert np.bincount(draws, minlength=5) / 20000 == pytest.approx(expected / expected.sum(), abs=0.012)


@pytest.mark.parametrize("size", [1, 5, 128, 129, 1000])
def test_a_draw_is_where_the_cumulative_sum_passes_the_random_number(size: int) -> None:
    rng = np.random.default_rng(size)
    weights = np.where(rng.random(size) < 0.5, rng.random(size), 0).astype(np.float32)
    weights[size // 2] = 1
    u = np.append(rng.random(500), [0, 1 - 2**-23, 1]).astype(np.float32)
    found = np.asarray(jax.jit(jax.vmap(draw, (None, 0)))(jnp.asarray(weights), jnp.asarray(u)))
    assert (weights[found] > 0).all() and found[-3] == np.flatnonzero(weights)[0] and found[-1] == np.flatnonzero(weights)[-1]
    ends = np.cumsum(weights, dtype=np.float64)

    def apart(u: np.ndarray) -> np.ndarray:
        """How far u is from where its index was drawn, in the cumulative sum; 0: it is there."""
        x = u * ends[-1]
        return np.maximum(0, np.maximum(x - ends[found], ends[found] - weights[found] - x)) / ends[-1]

    assert apart(u).max() <= 1e-6
    assert size == 1 or (apart(u[::-1]) > 1e-3).mean() > 0.3, "the control: other numbers would do as well"


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
    assert continuation(given, new, tokenizer=tokenizer).text == " sat"


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


def test_the_command(script: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("12: the", encoding="utf-8")
    args = ["--prompt-file", str(tmp_path / "prompt.txt"), "--samples", "2", "--tokens", "9", "--seed", "5"]
    assert script(*args, "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    (prompt,) = found["prompts"]
    assert (prompt["prompt"], found["step"]) == ("12: the", 4) and len(prompt["samples"]) == 2
    for sample in prompt["samples"]:
        assert isinstance(sample["text"], str) and len(sample["tokens"]) + (sample["end"] == "eos") <= 9
        assert sample["end"] == "eos" or len(sample["tokens"]) == 9
    assert re.search(r"^2 texts, \d+ tokens; the first after \d+\.\d s, then [\d,]+ tokens/s$", err, re.MULTILINE)
    assert script(*args) == 0
    one, two = (sample["text"] for sample in prompt["samples"])
    assert capsys.readouterr().out == f"--- 1 of 2\n12: the{one}\n--- 2 of 2\n12: the{two}\n"


def test_prompts_in_one_call(script: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbf7: the\r\n\n \n8: a")
    args = ["--prompt", "1: the", "--prompt-lines", str(tmp_path / "lines.txt"), "--prompt", "", "--tokens", "6"]
    assert script(*args, "--json") == 0
    found = {one["prompt"]: one["samples"][0]["text"] for one in json.loads(capsys.readouterr().out)["prompts"]}
    assert list(found) == ["1: the", "7: the", "8: a", ""]
    assert script("--prompt", "8: a", "--tokens", "6") == 0
    assert capsys.readouterr().out == f"8: a{found['8: a']}\n"
    stop = next(c for c in found["7: the"][1:] if c not in found["7: the"][:1])
    assert script(*args, "--stop", stop) == 0
    texts = [f"{prompt}{text.split(stop)[0]}" for prompt, text in found.items()]
    assert capsys.readouterr().out == "".join(f"--- prompt {i} of 4\n{text}\n" for i, text in enumerate(texts, start=1))


def test_texts_are_shown_as_they_grow(capsys: pytest.CaptureFixture[str]) -> None:
    texts, shown = [continuation([], [], most=3) for _ in range(3)], []
    screen = Screen(3, 1, 0.0, quiet=False)

    def now() -> str:
        screen.show(texts)
        return capsys.readouterr().out

    shown.append(now())
    for tokens in ("ax ", "b", "c"):
        for text, token in zip(texts, tokens, strict=False):
            text.add([*token.encode()] if token != " " else [ByteTokenizer.eos_id])
        shown.append(now())
    assert shown[0] == "--- prompt 1 of 3\n" and shown[1:] == ["a", "b", "c\n--- prompt 2 of 3\nx"]
    texts[1].add([ByteTokenizer.eos_id])
    assert now() == "\n--- prompt 3 of 3\n\n"
    assert re.fullmatch(r"3 texts, 6 tokens; the first after .* s, then .* tokens/s", screen.speed())


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
    assert read_prompts([("prompt", "a"), ("prompt-file", str(tmp_path / "prompt.txt"))]) == ["a", prompt]
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(ConfigError, match=r"prompt\.txt: not UTF-8 at byte 5$"):
        read_prompt(tmp_path / "prompt.txt")


def test_the_best_checkpoint(
    script: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "best", lambda self, shapes=None: 2)
    assert script("--tokens", "1", "--temperature", "0", "--json", "eval.checkpoint=best") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 2 and [(one["prompt"], len(one["samples"])) for one in found["prompts"]] == [("", 1)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["name=none"], "none: no run here"),
        (["--prompt", "1" * 32], "the prompt has 32 tokens: data.seq_len = 32 leaves none to add"),
        (["--prompt", "1" * 30, "--tokens", "3"], "tokens = 3: data.seq_len = 32 leaves 2 after the prompt"),
        (["--prompt", "1", "--prompt", "1" * 32], "prompt 2 of 2 has 32 tokens: data.seq_len = 32 leaves none to add"),
        (["--stop", ""], "stop: a stop string must not be empty"),
        (["--batch", "0"], "batch = 0: must be at least 1"),
        (["--prompt-lines", "/dev/null"], "--prompt-lines /dev/null: has no line with text"),
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
