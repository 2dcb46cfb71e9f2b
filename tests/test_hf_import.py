"""Import from Hugging Face: the logits of `transformers`, weights that come back bit for bit, and training that goes on."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cases import slow_unless
from short_runs import metrics
from short_runs import settings as run_settings
from test_hf_export import V, program, weights

from mutransformer.cli import main
from mutransformer.config.load import load
from mutransformer.data.tokenizers.registry import saved_tokenizer
from mutransformer.errors import FINISHED, USAGE_ERROR
from mutransformer.exchange.classes import class_of
from mutransformer.exchange.folds import NotInvertible, fold, same, unfold
from mutransformer.exchange.parity import compare, load_model, on_cpu, random_rows
from mutransformer.generation.generate import generate, restore_params
from mutransformer.generation.sampling import Sampling
from mutransformer.training.run_folder import RunFolder

torch = pytest.importorskip("torch", reason="needs the extra hf-export")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 256, "eos_token_id": 257}
SIZES |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "initializer_range": 0.1}
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, tied": ("llama", {"tie_word_embeddings": True}),
    "Llama, biases": ("llama", {"attention_bias": True}),
    "Llama, narrow heads": ("llama", {"head_dim": 8}),
    "Qwen3": ("qwen3", {}),
    "Qwen3, wide heads": ("qwen3", {"head_dim": 24, "num_attention_heads": 6, "tie_word_embeddings": True}),
    "Arcee": ("arcee", {"mlp_bias": True}),
}


def hf_folder(folder: Path, kind: str, **settings: Any) -> Path:
    """A model of transformers with random weights, of which no gain is one and no bias zero."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **(SIZES | settings)))
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn(tensor.shape))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("case",), slow_unless([("Llama, tied",), ("Qwen3, wide heads",)], [(case,) for case in FOLDERS]))
def test_a_folder_becomes_a_run(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, more = FOLDERS[case]
    folder, run = hf_folder(tmp_path / "hf", kind, **more), tmp_path / "runs/imported"
    settings = [*run_settings(tmp_path)[4:], "data.tokenizer=bytes", "optim.lr=0.01", "steps=12", "eval.every=0"]
    settings = [one for one in settings if not one.startswith(("workdir", "model."))]
    assert main(["import", str(folder), "--out", str(run), *settings]) == FINISHED
    assert "whose own width is the base" in capsys.readouterr().out
    config = load([str(run)])
    tokenizer = saved_tokenizer(config.data, config.rundir)
    made = on_cpu(config, tokenizer)
    step, restored = restore_params(made, tokenizer, RunFolder(config.rundir))
    rows = random_rows(made, seed=1)
    found = compare(made, restored, load_model(transformers, folder), rows, "other rows")
    assert step == 0 and found.difference <= 1e-5 and found.largest > 1, found

    assert main(["evaluate", str(run), "--json"]) == FINISHED
    printed = capsys.readouterr().out
    before = json.loads(printed[printed.index("{") :])
    assert before["step"] == 0
    assert len(generate(config, ["12"], Sampling(tokens=4))["prompts"][0]["samples"][0]["tokens"]) <= 4
    assert main(["train", str(run)]) == FINISHED
    losses = [line["train/loss"] for _, line in sorted(metrics(run).items())]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.3
    uniform = before["model"]["loss"]
    assert abs(losses[0] - uniform) < 0.5, "training did not begin with the imported weights"


ROUND_TRIP = {
    "swiglu": ["model.activation=swiglu", "model.norm_scale=vector", "model.qk_scale=0.125", "model.d_head=16"],
    "scalar gains, multipliers": ["model.norm_scale=scalar", "optim.rule=completep", "model.n_layer_base=1", "model.d_head=16"],
    "no gains, qk_norm": ["model.activation=swiglu", "model.qk_norm=true", "model.d_head=16", "optim.rule=mup_table8"],
    "biases": ["model.biases=true", "model.n_kv_head=1", "model.d_head=16", "model.activation=sqrelu"],
}


@pytest.mark.parametrize("case", ROUND_TRIP)
def test_the_round_trip_is_the_identity(case: str) -> None:
    """Bit for bit, since the factors are powers of two; but for rows that pad the vocabulary, which have no meaning."""
    made = program(*ROUND_TRIP[case])
    drawn, hf = weights(made), class_of(made.config.model)
    tensors = fold(made, drawn, hf)
    back = unfold(made, tensors, hf)
    cut = {"embed": np.s_[:V], "unembed": np.s_[:, :V], "b_unembed": np.s_[:V]}
    leaves = zip(jax.tree_util.tree_leaves_with_path(drawn), jax.tree.leaves(back), strict=True)
    for (path, a), b in leaves:
        part = cut.get(path[-1].name, ...)
        assert a.shape == b.shape and np.array_equal(np.asarray(a)[part], np.asarray(b)[part]), path
    assert same(fold(made, back, hf), tensors)
    changed = {**tensors, "model.norm.weight": 1.01 * tensors["model.norm.weight"]}
    assert not same(fold(made, back, hf), changed)


@pytest.mark.parametrize("norm_scale", ["none", "scalar"])
def test_gains_that_a_run_cannot_have_are_seen(norm_scale: str) -> None:
    made = program(f"model.norm_scale={norm_scale}")
    hf = class_of(made.config.model)
    tensors = fold(made, weights(made), hf)
    gain = tensors["model.norm.weight"].copy()
    gain[3] += 0.5
    with pytest.raises(NotInvertible, match=r"model\.norm\.weight is not"):
        unfold(made, {**tensors, "model.norm.weight": gain}, hf)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    more = ["steps=3", "name=r", "optim.warmup_steps=1", "model.d_base=32", "optim.rule=mup_table8", "model.activation=swiglu"]
    assert main(["train", *run_settings(folder, *more)]) == FINISHED
    assert main(["export", str(folder / "runs/r"), "--to", "hf", str(folder / "hf")]) == FINISHED
    return folder


def params_of(run: Path) -> Any:
    config = load([str(run)])
    tokenizer = saved_tokenizer(config.data, config.rundir)
    return jax.device_get(restore_params(on_cpu(config, tokenizer), tokenizer, RunFolder(config.rundir))[1])


def test_an_exported_run_comes_back_as_it_was(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "text.txt").rename(trained / "moved.txt")  # the data are not needed
    again = trained / "runs/again"
    assert main(["import", str(trained / "hf"), "--out", str(again)]) == FINISHED
    assert "with the settings of the run that it was exported from" in capsys.readouterr().out
    (trained / "moved.txt").rename(trained / "text.txt")
    before, after = load([str(trained / "runs/r")]), load([str(again)])
    assert after.model == before.model and after.optim == before.optim
    n = before.model.n_vocab
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(params_of(trained / "runs/r")), jax.tree.leaves(params_of(again)), strict=True
    ):
        cut = {"embed": np.s_[:n], "unembed": np.s_[:, :n]}.get(path[-1].name, ...)
        assert np.array_equal(a[cut], b[cut]), path
    assert main(["train", str(again), "steps=5", "optim.lr=0.001"]) == FINISHED
    assert max(metrics(again)) == 5


def test_a_folder_that_was_changed_is_imported_as_it_is(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after fine-tuning with other tools: gains that the run did not have."""
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / "hf", trust_remote_code=False)
    with torch.no_grad():
        model.model.norm.weight[5] = 2.0
    for path in (trained / "hf").iterdir():
        (tmp_path / "hf").mkdir(exist_ok=True)
        (tmp_path / "hf" / path.name).write_bytes(path.read_bytes())
    model.save_pretrained(tmp_path / "hf")
    run = tmp_path / "runs/changed"
    assert main(["import", str(tmp_path / "hf"), "--out", str(run), "data.tokenizer=bytes"]) == FINISHED
    out = capsys.readouterr().out
    assert "mutransformer.yaml in the folder is not used: model.norm.weight is not one everywhere" in out
    assert "whose own width is the base" in out and load([str(run)]).model.norm_scale == "vector"


REFUSED = {
    "another class": (
        "gpt2",
        {},
        "architectures = GPT2LMHeadModel: only LlamaForCausalLM, Qwen3ForCausalLM, ",
    ),
    "scaled positions": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        "rope_type = linear: only default rotary positions can be imported",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu: with LlamaForCausalLM it must be silu"),
    "windows": ("qwen3", {"use_sliding_window": True}, "use_sliding_window = true: there is no windowed attention here"),
    "no tokenizer": ("llama", {}, "holds no tokenizer; name one, such as data.tokenizer=bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, settings, message = REFUSED[case]
    if kind == "gpt2":
        (tmp_path / "hf").mkdir()
        transformers.GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "hf")
    else:
        hf_folder(tmp_path / "hf", kind, **settings)
    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "run")]) == USAGE_ERROR
    err = capsys.readouterr().err
    line = err.splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_settings_that_make_another_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hf_folder(tmp_path / "hf", "llama")
    for override, message in {
        "model.norm_eps=0.1": "not written, since the logits differ from the folder's",
        "model.n_layer=1": "the settings of the model are not the folder's: they give other tensors",
        "model.d_model=128": "model.embed_tokens.weight: has shape (300, 64), the settings of the model give (300, 128)",
    }.items():
        assert main(["import", str(folder), "--out", str(tmp_path / "run"), "data.tokenizer=bytes", override]) == USAGE_ERROR
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and message in line
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]
