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
from test_hf_export import MULTIPLIERS, V, program, weights

from mutransformer.cli import main
from mutransformer.config.load import load
from mutransformer.data.tokenizers.registry import saved_tokenizer
from mutransformer.errors import FINISHED, USAGE_ERROR
from mutransformer.exchange.classes import class_of, overrides_from
from mutransformer.exchange.folds import NotInvertible, fold, same, unfold
from mutransformer.exchange.parity import compare, load_model, on_cpu, random_rows
from mutransformer.exchange.remainders import complete, remainders
from mutransformer.generation.generate import generate, restore_params
from mutransformer.generation.sampling import Sampling
from mutransformer.training.run_folder import RunFolder

torch = pytest.importorskip("torch", reason="needs the extra hf-export")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 256, "eos_token_id": 257}
SIZES |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "initializer_range": 0.1}
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 0.49}
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, tied": ("llama", {"tie_word_embeddings": True}),
    "Llama, biases": ("llama", {"attention_bias": True}),
    "Llama, narrow heads": ("llama", {"head_dim": 8}),
    "Qwen3": ("qwen3", {}),
    "Qwen3, wide heads": ("qwen3", {"head_dim": 24, "num_attention_heads": 6, "tie_word_embeddings": True}),
    "Arcee": ("arcee", {"mlp_bias": True}),
    "Granite": ("granite", GRANITE | {"attention_bias": True, "mlp_bias": True}),
    "Granite, wide heads, tied": ("granite", GRANITE | {"head_dim": 32, "tie_word_embeddings": True}),
    "Apertus": ("apertus", {"hidden_act": "relu2", "attention_bias": True}),
}


def hf_folder(folder: Path, kind: str, **settings: Any) -> Path:
    """A model of transformers with random weights, of which no gain is one and no bias zero. dtype: of its files."""
    dtype = settings.pop("dtype", "float32")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **(SIZES | settings)))
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn(tensor.shape))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
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
    keep = ["--keep-multipliers"] * (kind == "granite")
    assert main(["export", str(run), "--to", "hf", str(tmp_path / "out"), "--random-rows", *keep]) == FINISHED
    trained, before = of_file(tmp_path / "out"), of_file(folder)
    assert trained.keys() == before.keys() | {"lm_head.weight"}
    assert not any(torch.equal(trained[name], tensor) for name, tensor in before.items())


def of_file(folder: Path) -> dict[str, Any]:
    """The tensors of an exported or published folder, as they are in its file."""
    return safetensors.load_file(folder / "model.safetensors")


SAME_BITS = [(case, dtype) for case in FOLDERS for dtype in ("float32", "bfloat16")] + [("Llama", "float16")]


FEW_SAME_BITS = [("Granite, wide heads, tied", "bfloat16"), ("Arcee", "float32")]


@pytest.mark.parametrize(("case", "dtype"), slow_unless(FEW_SAME_BITS, SAME_BITS))
def test_a_folder_comes_back_bit_for_bit(case: str, dtype: str, tmp_path: Path) -> None:
    kind, more = FOLDERS[case]
    folder, run, again = hf_folder(tmp_path / "hf", kind, **more, dtype=dtype), tmp_path / "run", tmp_path / "again"
    assert main(["import", str(folder), "--out", str(run), "data.tokenizer=bytes"]) == FINISHED
    keep = ["--keep-multipliers"] * (kind == "granite")
    keep += ["--max-positions", str(json.loads((folder / "config.json").read_text())["max_position_embeddings"])]
    assert main(["export", str(run), "--to", "hf", str(again), "--random-rows", *keep]) == FINISHED
    before, after = of_file(folder), of_file(again)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == getattr(torch, dtype)
        assert tensor.view(torch.uint8).equal(after[name].view(torch.uint8)), name
    configs = [json.loads((one / "config.json").read_text()) for one in (folder, again)]
    of_training = {"pad_token_id", "initializer_range"}
    differ = {key for key in configs[0] if configs[0][key] != configs[1].get(key)} - of_training
    assert not differ, {key: (configs[0][key], configs[1].get(key)) for key in differ}


ROUND_TRIP = {
    "swiglu": ["model.activation=swiglu", "model.norm_scale=vector", "model.qk_scale=0.125", "model.d_head=16"],
    "scalar gains, multipliers": ["model.norm_scale=scalar", "optim.rule=completep", "model.n_layer_base=1", "model.d_head=16"],
    "no gains, qk_norm": ["model.activation=swiglu", "model.qk_norm=true", "model.d_head=16", "optim.rule=mup_table8"],
    "biases": ["model.biases=true", "model.n_kv_head=1", "model.d_head=16", "model.activation=sqrelu"],
    "heads of 8, no gains, qk_norm": ["model.qk_norm=true", "model.activation=swiglu"],
    # Factors that are no powers of two.
    "heads of 8": ["model.n_kv_head=2", "model.activation=swiglu"],
    "gains, qk_norm": ["model.qk_norm=true", "model.norm_scale=vector", "model.qk_scale=0.37", "model.d_head=16"],
    "many factors": [*MULTIPLIERS, "model.qk_scale=0.7", "model.biases=true", "optim.rule=mup_table8", "model.d_base=12"],
    "embedding norm": [*MULTIPLIERS, "model.embed_norm=true", "model.norm_scale=vector"],
}
EXACT = list(ROUND_TRIP)[:5]


def units_apart(ours: Any, theirs: Any) -> dict[str, int]:
    """By weight, the largest difference in units of the last place; rows that pad the vocabulary left out."""
    cut = {"embed": np.s_[:V], "unembed": np.s_[:, :V], "b_unembed": np.s_[:V]}
    found = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        bits = [np.ascontiguousarray(w, np.float32).view(np.int32).astype(np.int64)[cut.get(path[-1].name, ...)] for w in (a, b)]
        found[path[-1].name] = int(np.max(np.abs(bits[0] - bits[1]), initial=0))
    return {name: units for name, units in found.items() if units}


@pytest.mark.parametrize("case", ROUND_TRIP)
def test_the_round_trip_is_the_identity(case: str) -> None:
    """Bit for bit; from the folder's tensors alone, without what is kept beside them, to a unit in the last place."""
    made = program(*ROUND_TRIP[case])
    drawn, hf = weights(made), class_of(made.config.model)
    tensors = fold(made, drawn, hf)
    alone, kept = unfold(made, tensors, hf), remainders(made, drawn, tensors, hf)
    whole = complete(made, alone, kept)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(drawn), jax.tree.leaves(whole), strict=True):
        assert a.shape == b.shape and np.array_equal(a.view(np.int32), b.view(np.int32)), path
    assert same(fold(made, whole, hf), tensors, rounding=0.0)
    apart = units_apart(drawn, alone)
    if case in EXACT:
        assert not apart and {name.split(".")[0] for name in kept} == {"padding"}
    elif not made.config.model.embed_norm:
        assert apart and max(apart.values()) == 1 and same(fold(made, alone, hf), tensors)
        assert {name.removeprefix("units.") for name in kept if name.startswith("units")} == apart.keys()
    else:
        assert not same(fold(made, alone, hf), tensors)
    changed = {**tensors, "model.norm.weight": 1.01 * tensors["model.norm.weight"]}
    assert not same(fold(made, whole, hf), changed)


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
    more = ["steps=3", "name=r", "optim.warmup_steps=1", "model.d_base=24", "optim.rule=mup_table8", "model.activation=swiglu"]
    more += ["model.attention_multiple=2", "model.qk_scale=0.3", "model.embed_multiplier=1.3"]
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
    out = capsys.readouterr().out
    assert "with the settings of the run that it was exported from" in out and "is not used" not in out
    (trained / "moved.txt").rename(trained / "text.txt")
    before, after = load([str(trained / "runs/r")]), load([str(again)])
    assert after.model == before.model and after.optim == before.optim
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(params_of(trained / "runs/r")), jax.tree.leaves(params_of(again)), strict=True
    ):
        assert np.array_equal(a.view(np.int32), b.view(np.int32)), path
    assert main(["train", str(again), "steps=5", "optim.lr=0.001"]) == FINISHED
    assert max(metrics(again)) == 5


def test_what_is_kept_of_other_weights_is_not_used(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A unit in the last place more in every query projection: the run's settings hold, what was kept of its weights does not."""
    for path in (trained / "hf").iterdir():
        (tmp_path / "hf").mkdir(exist_ok=True)
        (tmp_path / "hf" / path.name).write_bytes(path.read_bytes())
    tensors = of_file(tmp_path / "hf")
    moved = {name: torch.nextafter(t, 2 * t) if "q_proj" in name else t for name, t in tensors.items()}
    safetensors.save_file(moved, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "runs/moved"
    assert main(["import", str(tmp_path / "hf"), "--out", str(run)]) == FINISHED
    out = capsys.readouterr().out
    assert "mutransformer.npz in the folder is not used: the weights are not those that it was written with" in out
    assert "with the settings of the run that it was exported from" in out
    config = load([str(run)])
    made = on_cpu(config, saved_tokenizer(config.data, config.rundir))
    again = fold(made, params_of(run), class_of(config.model))
    assert same(again, {name: t.numpy() for name, t in moved.items()})
    assert not same(again, {name: t.numpy() for name, t in tensors.items()}, rounding=0.0)

    (tmp_path / "hf/mutransformer.npz").write_bytes(b"not a zip file")
    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "run")]) == USAGE_ERROR
    assert f"error: {tmp_path}/hf/mutransformer.npz: cannot be read: " in capsys.readouterr().err


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


def test_what_a_published_config_becomes() -> None:
    """Settings by hand, of configs whose heads are wider together than the model, or that do not state a head's size."""
    sizes = {"vocab_size": 151936, "num_hidden_layers": 28, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1e6}}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 1024, "intermediate_size": 3072}
    qwen3 = sizes | heads | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "hidden_act": "silu"}
    model = load(overrides_from(qwen3, "config.json")[1]).model
    assert (model.d_model, model.n_head, model.d_head, model.kv_heads, model.d_ff) == (1024, 16, 128, 8, 3072)
    assert (model.attention_multiple, model.qk_norm, model.biases, model.qk_scale) == (2, True, False, 128**-0.5)
    granite = sizes | heads | GRANITE | {"architectures": ["GraniteForCausalLM"], "hidden_act": "silu", "mlp_bias": True}
    model = load(overrides_from(granite, "config.json")[1]).model
    assert (model.n_head, model.d_head, model.biases, model.biases_in) == (16, 64, True, "feed_forward")
    assert (model.embed_multiplier, model.residual_multiplier, model.qk_scale) == (12, 0.22, 0.1)
    assert model.logits_multiplier == 1 / 0.49
    for width, n, size in [(2560, 32, 128), (5120, 64, 128), (576, 7, 90), (1000, 3, 110)]:
        odd = qwen3 | {"hidden_size": width, "num_attention_heads": n, "num_key_value_heads": 1, "head_dim": size}
        model = load(overrides_from(odd, "config.json")[1]).model
        assert (model.n_head, model.d_head) == (n, size)


REFUSED = {
    "another class": (
        "gpt2",
        {},
        "architectures = GPT2LMHeadModel: only LlamaForCausalLM, GraniteForCausalLM, ",
    ),
    "scaled positions": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        "rope_type = linear: only default rotary positions can be imported",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu: with LlamaForCausalLM it must be silu"),
    "activation of Apertus": ("apertus", {}, "hidden_act = xielu: with ApertusForCausalLM it must be relu or relu2 or "),
    "no scale": ("granite", {"logits_scaling": 0.0}, "logits_scaling = 0.0: must be above 0"),
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
