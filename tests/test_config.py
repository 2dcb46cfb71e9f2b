"""Settings: defaults, YAML files and overrides, what is refused and how it is told, before JAX is imported."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mutransformer.config.load import describe, load, to_yaml
from mutransformer.config.schema import Config, flatten, to_dict
from mutransformer.errors import USAGE_ERROR, ConfigError
from mutransformer.sharding.processes import launch

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file and returns its path as an argument."""

    def write(text: str | bytes, name: str = "a.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def refused(*args: str) -> str:
    """The message, which must be one line."""
    with pytest.raises(ConfigError) as error:
        load(args)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def unused(_: Config) -> int:
    raise AssertionError("the run must not start")


def test_no_arguments_give_the_defaults():
    assert load([]) == Config()


@pytest.mark.parametrize("key", [key for key, value in flatten(Config()).items() if value not in (None, [])])
def test_every_default_can_be_written_as_an_override(key):
    assert load([f"{key}={flatten(Config())[key]}"]) == Config()


def test_files_and_overrides_merge_left_to_right(write):
    a, b = write("steps: 1\nseed: 1\nmodel: {d_model: 64, n_layer: 1}"), write("steps: 2\nmodel: {d_model: 192}", "b.yaml")
    config = load([a, b])
    assert (config.steps, config.seed, config.model.d_model, config.model.n_layer) == (2, 1, 192, 1)
    assert load([b, a]).model.d_model == 64
    assert load([a, "steps=3", b]).steps == 2
    assert load(["steps=3", a, b, "steps=4", "steps=5"]).steps == 5
    assert load([a, "data.source=text", "data.files=[x,y]"]).data.files == ["x", "y"]
    assert load(["data.source=text", "data.files=[x,y]", "data.files=[z]"]).data.files == ["z"]


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", ".001"])
def test_scientific_notation_is_a_number(write, text):
    for config in (load([write(f"optim: {{lr: {text}}}")]), load([f"optim.lr={text}"])):
        assert config.optim.lr == 0.001 and isinstance(config.optim.lr, float)


def test_whole_numbers_become_floats():
    assert isinstance(load(["model.ff_multiple=3"]).model.ff_multiple, float)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "{}\n", "\ufeffsteps: 1000\n"])
def test_a_file_may_be_empty(write, text):
    assert load([write(text), "name=run"]) == Config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_survive_a_round_trip(path, write):
    config = load([str(path)])
    assert config.name == path.stem
    assert load([write(to_yaml(config), "other-name.yaml")]) == config
    for key, value in flatten(config).items():
        section, _, name = key.rpartition(".")
        assert value == getattr(getattr(config, section) if section else config, name)


def test_a_config_of_every_kind_of_value_survives_a_round_trip(write):
    args = ["name=run", "data.source=text", "data.files=['a b.txt', 'ü/*.txt']", "model.n_kv_head=1", "log.wandb='on'"]
    config = load([*args, "distributed.enabled=true", "distributed.coordinator='[::1]:80'", "optim.eps=1e-30", "workdir=~/r:1"])
    assert config.log.wandb == "on"
    assert load([write(to_yaml(config), "other-name.yaml")]) == config
    assert flatten(config)["data.files"] == to_dict(config)["data"]["files"] == ["a b.txt", "ü/*.txt"]


def test_shipped_sizes_differ_in_width_only():
    """What makes a learning rate tuned on the small one hold for the large one."""
    sizes = [load([str(ROOT / "configs" / f"{name}.yaml")]) for name in ("small", "medium", "large", "huge")]
    free = {"name", "model.d_model", "model.remat"}
    first, *others = ({key: value for key, value in flatten(size).items() if key not in free} for size in sizes)
    assert all(other == first for other in others)
    assert [size.model.d_model for size in sizes] == [128, 512, 2048, 8192]


def test_the_name_is_that_of_the_first_file(write):
    a, b = write("", "first.yaml"), write("", "second.yaml")
    assert load(["steps=2", a, b]).name == "first"
    assert load([a, "name=mine"]).name == "mine"
    assert load(["name=mine", a]).name == "mine"
    assert load([a, "name=run"]).name == "run"  # given, though it is the default
    assert load([a, write("name: in-file", "c.yaml")]).name == "in-file"


def test_configs_cannot_be_changed():
    config: Any = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.d_model = 3


def test_sizes_that_follow_from_others():
    model = load(["model.d_model=192", "model.d_head=64", "model.ff_multiple=2.5", "model.n_vocab=259"]).model
    assert (model.n_head, model.kv_heads, model.d_ff, model.logit_scale, model.padded_vocab) == (3, 3, 480, 1 / 64, 384)
    assert load(["model.n_kv_head=1", "model.qk_scale=0.5"]).model.kv_heads == 1
    with pytest.raises(ConfigError, match="model.n_vocab is not known yet"):
        _ = Config().model.padded_vocab


def test_the_tokenizer_fills_in_the_vocabulary():
    assert Config().with_vocab(259).model.n_vocab == 259
    assert load(["model.n_vocab=300"]).with_vocab(259).model.n_vocab == 300
    with pytest.raises(ConfigError, match="model.n_vocab = 100: the tokenizer gives ids up to 258; set 259"):
        load(["model.n_vocab=100"]).with_vocab(259)


# Every check in a __post_init__: overrides, and what the message must say.
RANGES: list[tuple[str, str]] = [
    *((f"model.{key}=0", rf"model.{key} = 0: must be at least 1") for key in ("d_model", "d_base", "d_head", "n_layer")),
    *((f"model.{key}=-1", rf"model.{key} = -1: must be at least 1") for key in ("vocab_multiple", "head_chunk")),
    ("model.d_model=100", r"model.d_model = 100: not divisible by model.d_head = 64; the nearest that fit are 64 and 128"),
    ("model.d_model=32", r"model.d_model = 32: not divisible by model.d_head = 64; the nearest that fit are 64 and 128"),
    ("model.n_kv_head=3", r"model.n_kv_head = 3: must divide the 2 heads"),
    ("model.n_kv_head=0", r"model.n_kv_head = 0: must divide"),
    ("model.n_kv_head=-1", r"model.n_kv_head = -1: must divide"),
    ("model.d_head=1", r"model.d_head = 1: rotary positions need an even size"),
    ("model.ff_multiple=0", r"model.ff_multiple = 0.0: must be positive and finite"),
    ("model.ff_multiple=-1", r"model.ff_multiple = -1.0: must be positive and finite"),
    ("model.ff_multiple=inf", r"model.ff_multiple = inf: must be positive and finite"),
    ("model.ff_multiple=nan", r"model.ff_multiple = nan: must be positive and finite"),
    ("model.ff_multiple=0.001", r"model.ff_multiple = 0.001: gives a feed-forward width of 0"),
    ("model.n_vocab=1", r"model.n_vocab = 1: must be at least 2"),
    ("model.qk_scale=0", r"model.qk_scale = 0.0: must be positive"),
    ("model.rotary_base=-1", r"model.rotary_base = -1.0: must be positive, or 0"),
    ("model.norm_eps=0", r"model.norm_eps = 0.0: must be positive"),
    ("data.batch_size=0", r"data.batch_size = 0: must be at least 1"),
    ("data.threads=0", r"data.threads = 0: must be at least 1"),
    ("data.seq_len=1", r"data.seq_len = 1: must be at least 2"),
    ("data.prefetch=-1", r"data.prefetch = -1: must not be negative"),
    ("data.vocab_size=256", r"data.vocab_size = 256: must be at least 300"),
    *((f"data.{key}={value}", rf"data.{key} = .*: must lie between 0 and 0.5") for key in ("validation_fraction", "test_fraction")
      for value in ("0", "0.5", "-0.1", "nan")),
    ("data.source=text", r"data.files is empty: data.source = text needs at least one"),
    ("data.files=[a.txt]", r"data.files is set: it needs data.source=text"),
    ("data.source=text data.files=[a,[b]]", r"data.files: must be a list of strings"),
    ("data.source=text data.files=[{a:b}]", r"data.files: must be a list of strings"),
    ("data.source=text data.files=[~no-such-user/a]", r"data.files = ~no-such-user/a: there is no such user"),
    ("data.cache_dir=~no-such-user", r"data.cache_dir = ~no-such-user: there is no such user"),
    ("data.tokenizer_file=~no-such-user/a", r"data.tokenizer_file = ~no-such-user/a: there is no such user"),
    ("optim.lr=0", r"optim.lr = 0.0: must be positive"),
    *((f"optim.eps={value}", r"optim.eps = .*: must be positive") for value in (0, -1)),
    ("optim.lr=nan", r"optim.lr = nan: must be positive"),
    ("optim.lr=inf", r"optim.lr = inf: must be a finite number"),
    ("model.qk_scale=inf", r"model.qk_scale = inf: must be a finite number"),
    *((f"optim.{key}={value}", rf"optim.{key} = {value}.*: must lie in \[0, 1\)") for key in ("beta1", "beta2")
      for value in ("1", "-0.1")),
    *((f"optim.{key}=-1", rf"optim.{key} = -1.*: must not be negative")
      for key in ("weight_decay", "clip_norm", "warmup_steps")),
    ("optim.min_lr_ratio=1.1", r"optim.min_lr_ratio = 1.1: must lie in \[0, 1\]"),
    ("optim.grad_accumulation_steps=0", r"optim.grad_accumulation_steps = 0: must be at least 1"),
    ("optim.grad_accumulation_steps=3", r"optim.grad_accumulation_steps = 3: must divide data.batch_size = 16"),
    ("optim.eps_scaling=true optim.rule=sp", r"optim.eps_scaling = true: the rule sp has an eps of its own"),
    ("optim.eps_scaling=true optim.rule=completed_p", r"optim.eps_scaling = true: the rule completed_p has"),
    ("model.n_layer_base=2", r"model.n_layer_base = 2: the rule mup does not scale with depth; use optim.rule=completep or"),
    ("model.n_layer_base=0 optim.rule=completep", r"model.n_layer_base = 0: must be at least 1"),
    ("model.unembed_init=sp optim.rule=mup_table8", r"model.unembed_init = sp: the rule mup_table8 scales .* multiplier"),
    ("optim.batch_base=4096", r"optim.batch_base = 4096: needs optim.rule=completed_p"),
    ("optim.tokens_base=0 optim.rule=completed_p", r"optim.tokens_base = 0: must be at least 1"),
    ("optim.batch_base=16 optim.rule=completed_p", r"optim.beta1 = 0.9: 1 - beta1 grows .* by 256 to more than 1"),
    ("optim.depth_alpha=-1", r"optim.depth_alpha = -1.0: must not be negative"),
    ("optim.muon_lr=0", r"optim.muon_lr = 0.0: must be positive"),
    ("optim.muon_beta=1", r"optim.muon_beta = 1.0: must lie in \[0, 1\)"),
    ("mesh.x=0", r"mesh.x = 0: must be at least 1, or -1"),
    ("mesh.x=-2", r"mesh.x = -2: must be at least 1, or -1"),
    ("mesh.y=0", r"mesh.y = 0: must be at least 1"),
    *((f"distributed.coordinator={value}", rf"distributed.coordinator = {value}: must be host:port")
      for value in ("host", "host:http", ":80")),
    ("distributed.timeout=0", r"distributed.timeout = 0: must be at least 1"),
    ("distributed.n_process=0", r"distributed.n_process = 0: must be at least 1"),
    ("distributed.process_id=-1", r"distributed.process_id = -1: must not be negative"),
    ("distributed.n_process=2 distributed.process_id=2", r"distributed.process_id = 2: must lie in 0 ... 1"),
    ("eval.every=-1", r"eval.every = -1: must not be negative"),
    ("eval.batches=0", r"eval.batches = 0: must be at least 1"),
    ("eval.final_batches=0", r"eval.final_batches = 0: must be at least 1"),
    ("log.every=0", r"log.every = 0: must be at least 1"),
    ("checkpoint.every=-1", r"checkpoint.every = -1: must not be negative"),
    ("checkpoint.keep=0", r"checkpoint.keep = 0: must be at least 1"),
    ("checkpoint.keep_best=-1", r"checkpoint.keep_best = -1: must not be negative"),
    ("checkpoint.allow=[[steps]]", r"checkpoint.allow: must be a list of strings"),
    ("profile.start=-1", r"profile.start = -1: must not be negative"),
    ("profile.start=5 profile.stop=5", r"profile.stop = 5: must be above profile.start = 5"),
    *((f"name={name}", r"name = .*: must be a plain folder name") for name in ("''", "..", ".hidden", "../x", "a/b", "a\\b")),
    ("workdir=~no-such-user", r"workdir = ~no-such-user: there is no such user"),
    ("workdir=gs://bucket/runs", r"workdir = gs://bucket/runs: only local paths can be read and written so far"),
    *((f"data.sources.a.weight=2 data.{key}={value}", rf"data.{key} is set: with data.sources put it below a source's name")
      for key, value in {"source": "hub", "files": "[a]", "validation_files": "[a]", "test_files": "[a]", "column": "c",
                         "path": "a", "subset": "en", "split": "s", "revision": "r", "max_parts": "1"}.items()),
    ("data.max_parts=0", r"data.max_parts = 0: must be at least 1"),
    ("data.max_parts=1", r"data.max_parts is set: it needs data.source=text\|jsonl\|parquet\|arrow\|hub$"),
    ("data.source=tokens data.path=a data.max_parts=1", r"data.max_parts is set: it needs data.source=text"),
    ("seed=-1", r"seed = -1: must lie in 0 ... 2\^31 - 1"),
    ("seed=2147483648", r"seed = 2147483648: must lie"),
    ("steps=0", r"steps = 0: must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), RANGES, ids=[overrides for overrides, _ in RANGES])
def test_out_of_range(overrides, message):
    assert re.match(message, refused(*overrides.split()))


def test_a_limit_itself_is_fine():
    load(["model.d_model=2", "model.d_head=2", "model.rotary_base=0", "model.n_vocab=2", "data.seq_len=2", "data.prefetch=0"])
    load(
        [
            "model.d_head=1",
            "model.rotary_base=0",
            "optim.beta1=0",
            "optim.min_lr_ratio=1",
            "optim.grad_accumulation_steps=16",
            "seed=0",
        ]
    )
    load(["seed=2147483647", "distributed.n_process=2", "distributed.process_id=1", "profile.start=4", "profile.stop=5"])


WRONG: list[tuple[str, str]] = [
    ("model.d_modle=3", r"model.d_modle=3: Key 'd_modle' not in 'ModelConfig'. Did you mean: 'd_model'\?"),
    ("stepz=3", r"stepz=3: .*Did you mean: 'steps'\?"),
    ("model.d_model.x=3", r"model.d_model.x=3: .*could not be converted to Integer"),
    ("steps=abc", r"steps=abc: Value 'abc' of type 'str' could not be converted to Integer"),
    ("steps=1.5", r"steps=1.5: .*could not be converted to Integer"),
    ("steps=true", r"steps=true: .*could not be converted to Integer"),
    ("steps=", r"steps=: Incompatible value 'None' for field of type 'int'"),
    ("steps=[1]", r"steps=\[1\]: .*could not be converted to Integer"),
    ("optim.lr=fast", r"optim.lr=fast: .*could not be converted to Float"),
    ("optim.lr=2**-6", r"optim.lr=2\*\*-6: .*could not be converted to Float"),
    ("model.qk_norm=maybe", r"model.qk_norm=maybe: .*not a valid bool"),
    ("model.activation=tanh", r"model.activation=tanh: Invalid value 'tanh', expected one of \['relu', "),
    ("precision.compute=float64", r"precision.compute=float64: Invalid value"),
    ("precision.compute=float16", r"precision.compute=float16: Invalid value"),
    ("model=3", r"model=3: .*ModelConfig"),
    ("model=", r"model=: .*not Optional"),
    ("data.files=a.txt", r"data.files=a.txt: must be a list, \[a, b\]"),
    ("data.files={a: 1}", r"data.files={a: 1}: must be a list"),
    ("data.files=[null]", r"data.files=\[null\]: "),
    ("steps=???", r"steps=\?\?\?: no value for steps"),
    ("steps=${nope}", r"steps=\$\{nope\}: .*'nope' not found|steps: .*'nope' not found"),
    ("name=${oc.env:NO_SUCH_VARIABLE}", r"name.*NO_SUCH_VARIABLE"),
    ("steps=${", r"steps=\$\{: "),
    ("steps=[1", r"steps=\[1: not valid YAML"),
    ("=3", r"=3: "),
    ("steps", r"steps: cannot read it: No such file or directory; an override is written key=value"),
    ("configs/smal.yaml", r"configs/smal.yaml: cannot read it: No such file or directory$"),
    ("/", r"/: cannot read it: Is a directory"),
    ("", r": cannot read it"),
]


@pytest.mark.parametrize(("arg", "message"), WRONG, ids=[arg for arg, _ in WRONG])
def test_wrong_arguments(arg, message):
    assert re.match(message, refused(arg))


WRONG_FILES: list[tuple[str | bytes, str]] = [
    ("model:\n  d_modle: 3\n", r": model.d_modle: Key 'd_modle' not in 'ModelConfig'. Did you mean: 'd_model'\?"),
    ("model.d_model: 64\n", r": model.d_model: Key 'model.d_model' not in 'Config'"),
    ("1: 2\n", r": 1: Key '1' not in 'Config'"),
    ("steps: 3\nsteps: 4\n", r":2: not valid YAML: found duplicate key steps"),
    ("model:\n  d_model: 64\n  d_model: 128\n", r":3: not valid YAML: found duplicate key d_model"),
    ("steps: abc\n", r": steps: Value 'abc' of type 'str' could not be converted to Integer"),
    ("optim:\n  lr: fast\n", r": optim.lr: .*could not be converted to Float"),
    ("data:\n  files: a.txt\n", r": data.files: must be a list, \[a, b\]"),
    ("model: 3\n", r": .*ModelConfig"),
    ("model:\n", r": model: .*not Optional"),
    ("- a\n- b\n", r": must hold `key: value` lines"),
    ("3\n", r": cannot read it: .*int"),
    ("some text\n", r": some text: Key 'some text' not in 'Config'"),
    ("steps: ???\n", r": no value for steps"),
    ("model:\n\td_model: 64\n", r":2: not valid YAML: "),
    ("model: [\n", r":2: not valid YAML: "),
    ("steps: 3\n---\nsteps: 4\n", r":2: not valid YAML: but found another document"),
    ("steps: *other\n", r":1: not valid YAML: found undefined alias"),
    ("model: &a {model: *a}\n", r":1: not valid YAML: "),
    (b"\xff\xfe\x00", r": cannot read it: .*(codec|character)"),
    ("name: \0\n", r": cannot read it: .*character"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_FILES, ids=[repr(text) for text, _ in WRONG_FILES])
def test_wrong_files(write, text, message):
    path = write(text)
    assert re.match(re.escape(path) + message, refused("steps=5", path))


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "..", "a\\b", '"a\\0b"'])
def test_a_name_in_a_file_cannot_leave_the_work_directory(write, name):
    assert "must be a plain folder name" in refused(write(f"name: {name}\n"))


def test_a_run_is_a_folder_of_the_work_directory(tmp_path):
    config = load([f"workdir={tmp_path}", "name=a=b c"])
    assert config.rundir == tmp_path / "a=b c"
    assert load(["workdir=~/runs"]).rundir == Path.home() / "runs/run"


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:pathlib.Path.touch [{}]",
        "name: !!python/object/apply:os.system ['touch {}']",
        "name: !!python/object/new:os.system ['touch {}']",
        "name: !!python/name:os.system",
        "name: !!python/module:antigravity",
        "? !!python/object/apply:os.system ['touch {}']\n: 3",
    ],
)
def test_yaml_executes_nothing(tmp_path, write, text):
    canary = tmp_path / "canary"
    message = refused(write(text.format(canary)))
    assert "could not determine a constructor for the tag" in message
    if text.startswith("name: "):
        refused("name=" + text.removeprefix("name: ").format(canary))
    assert not canary.exists() and "antigravity" not in sys.modules


def test_the_help_lists_every_setting_with_its_default(capsys):
    listed = dict(re.findall(r"^  (\S+) = (.*)$", describe(), re.MULTILINE))
    named = {key: value for key, value in listed.items() if ".NAME." in key}
    assert [key for key in listed if key not in named] == list(flatten(Config()))
    assert named["data.sources.NAME.source"] == "stdlib" and named["data.sources.NAME.weight"] == "1.0"
    assert load([f"{key}={value}" for key, value in listed.items() if key not in named]) == Config()
    with pytest.raises(SystemExit, match="0"):
        launch(unused, "A description.", ["--help"])
    out = capsys.readouterr().out
    assert describe() in out and "A description." in out


def test_the_help_gives_each_comment_to_its_own_setting():
    lines = describe().splitlines()
    comments = {lines[i - 1].split()[0]: line.strip() for i, line in enumerate(lines) if line.startswith("      ")}
    assert comments["steps"] == "updates of the weights"
    assert comments["model.n_kv_head"].startswith("null: one per query head")
    assert comments["distributed.enabled"].startswith("null: if a coordinator is given")
    assert comments["checkpoint.allow"].startswith("keys that may differ")
    assert not comments.keys() & {"seed", "model.d_model", "model.qk_norm", "mesh.y", "distributed.n_process", "profile.start"}


@pytest.mark.parametrize("args", [[], ["configs/small.yaml"], ["configs/paper/width512.yaml", "name=run", "optim.lr=1e-3"]])
def test_print_config_prints_what_loads_as_the_same(args, write, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert launch(unused, "", ["--print-config", *args]) == 0
    printed = capsys.readouterr().out
    assert load([write(printed, "other-name.yaml")]) == load(args)


@pytest.mark.parametrize("arg", ["model.d_modle=3", "steps=0", "none.yaml", "seed=1\nsteps=2", "a\nb.yaml"])
def test_a_mistake_is_one_line_and_exit_code_2(arg, capsys):
    assert launch(unused, "", [arg]) == USAGE_ERROR == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch("error: .+\n", err)


def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_1(capsys):
    def diverges(_: Config) -> int:
        raise FloatingPointError("step 3: the loss is nan")

    assert launch(diverges, "", []) == 1
    assert capsys.readouterr().err == "error: step 3: the loss is nan\n"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nat ..."),
            1,
            "error: RESOURCE_EXHAUSTED: Out of memory; less memory is ",
        ),
    ],
)
def test_an_interruption_and_a_full_memory_are_one_line(error, code, told, capsys):
    def broken(_: Config) -> int:
        raise error

    assert launch(broken, "", []) == code
    err = capsys.readouterr().err
    assert err.startswith(told) and err.count("\n") == 1


def test_a_long_override_is_no_path():
    files = ",".join(f"text-{k:04}.jsonl" for k in range(300))
    assert len(load(["data.source=jsonl", f"data.files=[{files}]"]).data.files) == 300


def test_a_fault_of_ours_is_not_taken_for_a_mistake():
    def broken(_: Config) -> int:
        raise ValueError("not the user's fault")

    with pytest.raises(ValueError, match="not the user's fault"):
        launch(broken, "", [])


def test_the_exit_code_is_that_of_main():
    assert launch(lambda config: config.steps, "", ["steps=75"]) == 75


def test_settings_do_not_need_jax():
    code = "import sys, mutransformer.config, mutransformer.launch; from mutransformer.settings import load; load(['steps=3']);"
    code += "print(*sorted({'jax', 'numpy', 'equinox', 'grain'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
