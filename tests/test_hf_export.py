"""Export to Hugging Face: the logits of `transformers` are ours for every model that a class can hold, and no others get out."""

import dataclasses
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import slow_unless
from hf import FAMILIES
from short_runs import ROOT
from short_runs import settings as run_settings
from test_sharding import params

from mutransformer.cli import main
from mutransformer.config.load import load
from mutransformer.data.tokenizers.registry import convert_hf, saved_tokenizer
from mutransformer.data.tokenizers.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer
from mutransformer.errors import FINISHED, USAGE_ERROR, ConfigError
from mutransformer.exchange import folds
from mutransformer.exchange.classes import GRANITE, class_of
from mutransformer.exchange.parity import TOLERANCE, Parity, compare, load_model, logits, on_cpu, random_rows
from mutransformer.exchange.tokenizer import write_tokenizer
from mutransformer.generation.generate import generate
from mutransformer.generation.sampling import Sampling
from mutransformer.training.program import Program, Vocabulary

torch = pytest.importorskip("torch", reason="needs the extra hf-export")
transformers = pytest.importorskip("transformers")
from mutransformer.exchange.to_hf import write_model  # noqa: E402

V = 253  # not a multiple of vocab_multiple: rows that pad it must not get out
TINY = [
    "model.d_model=32",
    "model.d_base=16",
    "model.d_head=8",
    "model.n_layer=2",
    "model.ff_multiple=2.5",
    f"model.n_vocab={V}",
    "model.vocab_multiple=128",
    "data.seq_len=24",
    "data.batch_size=4",
]
HEADS = {"MHA": [], "GQA": ["model.n_kv_head=2"], "MQA": ["model.n_kv_head=1"]}
RULES = {
    "mup": ["optim.rule=mup"],
    "mup_table8": ["optim.rule=mup_table8"],
    "completep": ["optim.rule=completep", "model.n_layer_base=1"],
}
ACTIVATIONS = ("relu", "sqrelu", "gelu", "silu", "swiglu")
GRID = list(product(ACTIVATIONS, HEADS, ("none", "vector", "scalar"), RULES, (False, True)))
FEW = [
    ("relu", "MHA", "none", "mup", False),
    ("sqrelu", "GQA", "vector", "mup_table8", False),
    ("gelu", "MQA", "scalar", "completep", True),
    ("silu", "GQA", "scalar", "completep", False),
    ("swiglu", "MQA", "vector", "completep", False),
    ("swiglu", "GQA", "none", "mup_table8", True),
]


IDS = {"bos_token_id": 3, "eos_token_id": 2, "pad_token_id": 2}


def program(*settings: str) -> Program:
    return on_cpu(load([*TINY, *settings]), Vocabulary(V, IDS["bos_token_id"], IDS["eos_token_id"]))


def weights(made: Program) -> Any:
    """Weights of which no gain is one and no bias zero, but for the bias that no class has."""
    drawn = params(made.config)
    return drawn if drawn.b_unembed is None else dataclasses.replace(drawn, b_unembed=np.zeros_like(drawn.b_unembed))


def parity(made: Program, folder: Path, keep_multipliers: bool = False) -> Parity:
    hf, drawn = class_of(made.config.model, keep_multipliers), weights(made)
    write_model(made, drawn, hf, IDS, folder, torch, transformers, made.config.data.seq_len)
    return compare(made, drawn, load_model(transformers, folder), random_rows(made), "random rows")


def settings(activation: str, heads: str, norm_scale: str, rule: str, qk_norm: bool) -> list[str]:
    return [
        f"model.activation={activation}",
        f"model.norm_scale={norm_scale}",
        *HEADS[heads],
        *RULES[rule],
        f"model.qk_norm={str(qk_norm).lower()}",
    ]


@pytest.mark.parametrize(("activation", "heads", "norm_scale", "rule", "qk_norm"), slow_unless(FEW, GRID))
def test_logits_are_the_same(activation: str, heads: str, norm_scale: str, rule: str, qk_norm: bool, tmp_path: Path) -> None:
    found = parity(program(*settings(activation, heads, norm_scale, rule, qk_norm)), tmp_path)
    assert found.difference <= 1e-5 and found.largest > 0.1, found


MULTIPLIERS = ["model.embed_multiplier=3", "model.residual_multiplier=0.3", "model.logits_multiplier=1.7"]
MORE = {
    "biases of Llama": ["model.activation=swiglu", "model.biases=true"],
    "biases of Arcee": ["model.activation=sqrelu", "model.biases=true", "optim.rule=completep", "model.n_layer_base=1"],
    "biases of Qwen3": ["model.activation=swiglu", "model.qk_norm=true", "model.biases=true", "model.biases_in=attention"],
    "biases of the feed-forward layer": ["model.biases=true", "model.biases_in=feed_forward"],
    "embedding norm": ["model.activation=swiglu", "model.embed_norm=true", "model.norm_scale=vector"],
    "embedding norm without gains": ["model.embed_norm=true"],
    "attention scale": ["model.qk_scale=0.7", "model.qk_norm=true", "model.norm_scale=scalar"],
    "wide heads of Llama": ["model.attention_multiple=2", "model.activation=swiglu", "model.n_kv_head=2", "model.biases=true"],
    "wide heads of Qwen3": ["model.attention_multiple=1.5", "model.activation=swiglu", "model.n_kv_head=3", "model.qk_norm=true"],
    "narrow heads of Arcee": ["model.attention_multiple=0.5", "optim.rule=completep", "model.n_layer_base=1"],
    "multipliers": [*MULTIPLIERS, "model.biases=true", "model.activation=swiglu"],
    "multipliers and embedding norm": [*MULTIPLIERS, "model.embed_norm=true", "optim.rule=mup_table8"],
    "large base, other eps": ["model.rotary_base=500000", "model.norm_eps=1e-3"],
}


@pytest.mark.parametrize("case", MORE)
def test_further_options(case: str, tmp_path: Path) -> None:
    made = program(*MORE[case])
    found = parity(made, tmp_path)
    assert found.difference <= 1e-5 and found.largest > 0.1, found
    if "model.biases_in" in str(MORE[case]):
        folds.fold(made, params(made.config), class_of(made.config.model))  # with no bias that is zero


@pytest.mark.parametrize("rule", RULES)
def test_granite_keeps_the_multipliers(rule: str, tmp_path: Path) -> None:
    made = program("model.activation=swiglu", "model.biases=true", "model.norm_scale=vector", *RULES[rule])
    found = parity(made, tmp_path, keep_multipliers=True)
    assert found.difference <= 1e-5 and found.largest > 0.1, found
    config = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    assert config.attention_multiplier == 1 / 8 and config.architectures == [GRANITE.name]
    of_logits, of_branches = (made.forward.multipliers.unembed, made.forward.multipliers.blocks.w_o)
    assert (config.logits_scaling, config.residual_multiplier) == (1 / of_logits, of_branches)
    assert (of_logits, of_branches) == {"mup": (1, 1), "mup_table8": (0.5, 1), "completep": (0.5, 0.5)}[rule]


def test_granite_keeps_the_multipliers_of_the_config(tmp_path: Path) -> None:
    sizes = ["model.activation=swiglu", "model.attention_multiple=0.5", "model.qk_scale=0.3"]
    made = program(*sizes, *MULTIPLIERS, *RULES["mup_table8"])
    found = parity(made, tmp_path, keep_multipliers=True)
    assert found.difference <= 1e-5 and found.largest > 0.1, found
    config = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    assert (config.embedding_multiplier, config.residual_multiplier, config.attention_multiplier) == (3, 0.3, 0.3)
    assert config.logits_scaling == pytest.approx(1 / (0.5 * 1.7))


# What must not go unnoticed.

BROKEN: dict[str, tuple[Any, list[str]]] = {
    "factor on attention logits": ("query", ["model.qk_scale=0.2"]),
    "factor on attention logits with qk_norm": ("query", ["model.qk_scale=0.2", "model.qk_norm=true"]),
    "multiplier of the embedding": ("embedding", MULTIPLIERS),
    "multiplier of attention": ("attention_branch", RULES["completep"]),
    "multiplier of the feed-forward layer": ("mlp_branch", RULES["completep"]),
    "multiplier of the logits": ("logits", RULES["mup_table8"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_fold_that_is_left_out_is_seen(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, settings = BROKEN[case]
    made = program("model.biases=true", *settings) if "qk_norm" not in case else program(*settings)
    real = folds.factors
    assert real(made)[name] != 1
    monkeypatch.setattr(folds, "factors", lambda of: {**real(of), name: 1.0})
    found = parity(made, tmp_path)
    assert not found.holds and found.difference > 100 * TOLERANCE, found


TABLE = {
    "MHA": ["model.norm_scale=vector", "model.activation=swiglu", "model.biases=true"],
    "GQA": ["model.norm_scale=scalar", "model.n_kv_head=2", "model.qk_norm=true"],
}


@pytest.mark.parametrize("case", TABLE)
def test_a_weight_that_is_not_ours_is_seen(case: str, tmp_path: Path) -> None:
    """Every tensor of the folder matters: a change of it changes the logits by more than is allowed."""
    made = program(*TABLE[case])
    found = parity(made, tmp_path)
    assert found.difference <= 1e-5
    model, rows = load_model(transformers, tmp_path), random_rows(made)
    before, tensors = logits(model, rows), dict(model.named_parameters())
    assert len(tensors) > 20
    for name, tensor in tensors.items():
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
            changed = np.max(np.abs(logits(model, rows) - before))
            tensor.copy_(kept)
        assert changed > 10 * TOLERANCE * max(1.0, found.largest), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.attention_activation=sqrelu"], "model.attention_activation = sqrelu: every class to export to computes softmax"),
        (["model.attention_activation=norm_elu"], "model.attention_activation = norm_elu: "),
        (["model.rotary_base=0"], "model.rotary_base = 0: every class to export to has rotary positions"),
        (
            ["model.biases=true"],
            "model.biases = true: ArceeForCausalLM has no place for the unembedding's bias, which is not zero",
        ),
        (["model.biases=true", "model.qk_norm=true"], "model.biases = true: ApertusForCausalLM has no place for the bias b_"),
    ],
)
def test_what_no_class_computes_is_refused_by_its_key(settings: list[str], message: str) -> None:
    made = program(*settings)
    drawn = params(made.config)
    if "qk_norm" in message or len(settings) == 2:
        drawn = weights(made)
    with pytest.raises(ConfigError) as error:
        folds.fold(made, drawn, class_of(made.config.model))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [["model.activation=relu"], ["model.activation=swiglu", "model.qk_norm=true"]])
def test_granite_is_refused_by_key(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^model\.(activation = relu|qk_norm = true): --keep-multipliers exports to Granite"):
        class_of(load([*TINY, *settings]).model, keep_multipliers=True)


# The command, on a run from the terminal to the folder.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a SentencePiece model, on the paragraphs of the README."""
    folder = tmp_path_factory.mktemp("run")
    paragraphs = (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs), encoding="utf-8")
    data = ["data.source=jsonl", f"data.files=[{folder}/docs.jsonl]", "data.tokenizer=sentencepiece", "data.vocab_size=400"]
    model = ["model.n_vocab=405", "model.activation=swiglu", "model.norm_scale=vector"]
    assert main(["train", *run_settings(folder), *data, *model, "steps=3", "name=r", "optim.warmup_steps=1"]) == FINISHED
    return folder / "runs/r"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    out = run.parent / "exported"
    assert main(["export", str(run), "--to", "hf", str(out)]) == FINISHED
    return out


def test_a_run_becomes_a_folder(run: Path, exported: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=False)
    ours = saved_tokenizer(load([str(run)]).data, run)
    text = "12: the \u2581 of </s> 144 \u4e2d\n\tis  9"
    ids = tokenizer(text)["input_ids"]
    assert ids == [ours.bos_id, *ours.encode([text])[0].tolist()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (model.config.vocab_size, model.config.bos_token_id, model.generation_config.eos_token_id) == (405, 1, 2)
    found = model.generate(torch.tensor([tokenizer("12: the")["input_ids"]]), do_sample=False, max_new_tokens=8)[0].tolist()
    greedy = generate(load([str(run)]), ["12: the"], Sampling(tokens=8, temperature=0.0))["prompts"][0]["samples"][0]
    new = found[len(tokenizer("12: the")["input_ids"]) :]
    assert (new[:-1] if greedy["end"] == "eos" else new) == greedy["tokens"]
    names = {path.name for path in exported.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    card = (exported / "README.md").read_text()
    assert '| `model.activation` | `"swiglu"` |' in card and "validation_whole/loss" in card and "held-out rows" in card
    assert not [path for path in exported.parent.iterdir() if path.name.startswith(".")], "something was left"
    assert model.config.max_position_embeddings == tokenizer.model_max_length == load([str(run)]).data.seq_len


def test_rows_that_a_run_was_trained_on_fit(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--to", "hf", str(tmp_path / "out"), "--max-positions", "31"]) == USAGE_ERROR
    assert capsys.readouterr().err == "error: --max-positions 31: the run was trained on rows of data.seq_len = 32\n"
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(run: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in exported.iterdir()}
    assert main(["export", str(run), "--to", "hf", str(exported)]) == USAGE_ERROR
    assert capsys.readouterr().err == f"error: {exported}: exists, and is not an empty folder\n"
    assert before == {path.name: path.stat().st_mtime_ns for path in exported.iterdir()}


def test_other_logits_leave_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = folds.factors
    monkeypatch.setattr(folds, "factors", lambda of: dict.fromkeys(real(of), 1.0))
    assert main(["export", str(run), "--to", "hf", str(tmp_path / "out"), "--random-rows"]) == USAGE_ERROR
    assert "not written, since the logits differ from the run's by more than 1e-05" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", [*FAMILIES, "bytes"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_tokenizers_give_the_same_ids(family: str, add_bos: bool, tmp_path: Path) -> None:
    ours: Tokenizer = ByteTokenizer()
    if family != "bytes":
        (tmp_path / "ours").mkdir()
        convert_hf(str(FAMILIES[family](tmp_path / "hub")), None, tmp_path / "ours")
        ours = HFTokenizer(tmp_path / "ours/tokenizer.json", tmp_path / "ours/special_ids.json")
    texts = ["the cat sat", "def f(x):\n\treturn x\n", "na\u00efve \u4e2d\u6587 \U0001f600"]
    write_tokenizer(ours, tmp_path / "out", add_bos, 32, texts)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    for text in texts:
        assert theirs(text)["input_ids"] == [ours.bos_id] * (1 + add_bos) + ours.encode([text])[0].tolist()
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (ours.bos_id, ours.eos_id, 32)


def test_a_tokenizer_that_gives_other_ids_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, texts, threads=1: [np.zeros(1, np.int32) for _ in texts])
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: as tokenizer\.json it gives other ids for .*--without-tokenizer"):
        write_tokenizer(ByteTokenizer(), tmp_path, False, 32)
