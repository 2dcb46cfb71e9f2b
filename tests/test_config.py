"""Settings: defaults, bounds, YAML files and overrides, and what is refused with which message."""

import copy
import dataclasses
import math
import re
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest

from mutransformer.config.load import RENAMED, check_not_renamed, describe, load, to_yaml
from mutransformer.config.schema import Config, all_settings, flatten, may_change_on_resume
from mutransformer.config.setting import Setting, check_settings, setting
from mutransformer.errors import ConfigError

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


def test_no_arguments_give_the_defaults():
    assert load([]) == Config()


def test_every_default_can_be_written_as_an_override():
    overrides = [f"{key}={value}" for key, value in flatten(Config()).items() if value not in (None, [])]
    assert len(overrides) > 80 and load(overrides) == Config()


def test_files_and_overrides_merge_left_to_right(write):
    a, b = write("steps: 1\nseed: 1\nmodel: {d_model: 64, n_layer: 1}"), write("steps: 2\nmodel: {d_model: 192}", "b.yaml")
    config = load([a, b])
    assert (config.steps, config.seed, config.model.d_model, config.model.n_layer) == (2, 1, 192, 1)
    assert load([b, a]).model.d_model == 64
    assert load([a, "steps=3", b]).steps == 2
    assert load(["steps=3", a, b, "steps=4", "steps=5"]).steps == 5
    assert load([a, "data.source=text", "data.files=[x,y]"]).data.files == ["x", "y"]
    assert load(["data.source=text", "data.files=[x,y]", "data.files=[z]"]).data.files == ["z"]


def test_the_later_of_two_warmups_has_precedence(write):
    share = write("optim: {warmup_fraction: 0.1}")
    steps = write("optim: {warmup_steps: 7}", "steps.yaml")
    both = write("optim: {warmup_steps: 7, warmup_fraction: 0.1}", "both.yaml")  # as a run's config.yaml has them
    for args, want in (
        ([share], 10),
        ([share, steps], 7),
        ([share, "optim.warmup_steps=5"], 5),
        ([share, "optim.lr=0.1"], 10),
        ([steps, share], 10),
        (["optim.warmup_steps=5", "optim.warmup_fraction=0.2"], 20),
        ([both], 10),
        ([both, "optim.warmup_steps=5"], 5),
    ):
        assert load([*args, "steps=100"]).optim.warmup(100) == want, args


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", ".001"])
def test_scientific_notation_is_a_number(write, text):
    for config in (load([write(f"optim: {{lr: {text}}}")]), load([f"optim.lr={text}"])):
        assert config.optim.lr == 0.001 and isinstance(config.optim.lr, float)


def test_whole_numbers_become_floats():
    assert isinstance(load(["model.ff_multiple=3"]).model.ff_multiple, float)


@pytest.mark.parametrize("text", ["{}\n", "\ufeffsteps: 1000\n", "--- {}\n"])
def test_a_file_may_set_nothing_if_it_says_so(write, text):
    assert load([write(text), "name=run"]) == Config()


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "---\n# a: 1\n...\n", "null\n", " \n", "\ufeff"])
def test_a_file_without_settings_is_refused(write, text):
    path = write(text)
    assert refused(path, "steps=5") == f"{path}: holds no settings; write `key: value` lines, or leave it out"


# What YAML 1.1 takes for a number, a boolean, a date or null where a text is meant.
TYPED = ["001", "yes", "No", "on", "true", "1e3", "010", "0x10", "0o17", "0b11", "1:30", "1_000", "12e4567", "2026-11-27", ".5"]
TYPED += ["-1", "+1", "1.", "1.0", ".inf", "nan", "=", "<<", "2026-11-27 10:20:30", "190:20:30.15", "0123", "Null0", "1,000", "y"]


@pytest.mark.parametrize("text", TYPED)
def test_text_stays_as_typed(write, text):
    """In overrides and in files, on its own and in lists, dictionaries and sources."""
    rest = f"data.sources.a.source=text data.sources.a.files=['{text}',b] data.sources.a.column={text}".split(" data", 1)
    config = load([f"workdir={text}", f"xla.option={text}", f"log.wandb={text}", f"checkpoint.allow=['{text}', b]"])
    assert (config.workdir, config.xla, config.log.wandb, config.checkpoint.allow) == (text, {"option": text}, text, [text, "b"])
    config = load([rest[0], *(f"data{one}" for one in rest[1].split(" data"))])
    assert (config.data.sources["a"].column, config.data.sources["a"].files) == (text, [text, "b"])
    key = f'"{text}"' if text in ("<<", "1,000") else text
    config = load([write(f"workdir: {text}\nxla: {{option: '{text}', {key}: x}}\nlog:\n  wandb: {text}\n")])
    assert (config.workdir, config.xla, config.log.wandb) == (text, {"option": text, text: "x"}, text)
    config = load([write(f"data:\n  source: text\n  files:\n  - {text}\n  - 0{text}\n  revision: null\n  column: {text}\n")])
    assert (config.data.files, config.data.column, config.data.revision) == ([text, f"0{text}"], text, None)
    assert load([write(to_yaml(config), "again.yaml"), "name=a"]).data == config.data


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("data.column=no", "no"),
        ("data.column=a #b", "a #b"),
        ("data.column=a: b", "a: b"),
        ("data.column=- a", "- a"),
        ("data.column=*a", "*a"),
        ("data.column=a, b", "a, b"),
        ("data.column=a=b", "a=b"),
        ("data.column= a ", "a"),
        ("data.column=a\nb", "a\nb"),
        ('data.column="yes"', "yes"),
        ("data.column='010'", "010"),
        ('data.column="a\\tb"', "a\tb"),
        ("data.column='null'", "null"),
        ('data.column="~"', "~"),
        ("data.column=!!str 010", "010"),
        ("data.column=~/a", "~/a"),
        ("data.column=nullable", "nullable"),
        ("data.column=[a]*", "[a]*"),
        ("distributed.coordinator=[::1]:80", "[::1]:80"),
    ],
)
def test_the_text_of_an_override_needs_no_quotes(override, text):
    assert attrgetter(override.partition("=")[0])(load([override])) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("'yes'", "yes"),
        ("a # b", "a"),
        ("a\n    b", "a b"),
        ("|-\n    01\n    02", "01\n02"),
        (">-\n    01\n    02", "01 02"),
        ("!!str 010", "010"),
        ("!!int 010", "010"),
        ("!!timestamp 2026-11-27", "2026-11-27"),
        ('"\\x41"', "A"),
    ],
)
def test_the_text_of_a_file_is_yaml(write, value, text):
    assert load([write(f"data:\n  column: {value}\n")]).data.column == text


@pytest.mark.parametrize("null", ["null", "~", "Null", "NULL", ""])
def test_null_is_no_text(write, null):
    """It unsets what may be unset, and is refused elsewhere."""
    assert load(["log.wandb=a", "model.n_kv_head=1", f"log.wandb={null}", f"model.n_kv_head={null}"]) == Config()
    assert load(["log.wandb=a", write(f"log:\n  wandb: {null}\n"), "name=run"]) == Config()
    for key in ("name", "workdir", "data.column", "data.sources.a.split", "xla.option"):
        assert re.match(rf"{key}={null}: must be text, not null; if that is the text, put it in quotes", refused(f"{key}={null}"))
    path = write(f"xla:\n  option: {null}\n")
    assert refused(path).startswith(f"{path}: xla.option: must be text, not null")


@pytest.mark.parametrize("value", ["[a]", "{a: b}", "[]", "[[a]"])
def test_a_list_is_no_text(write, value):
    if value == "[[a]":  # nor is it YAML
        assert load([f"data.column={value}"]).data.column == value
    else:
        assert re.match(r"data.column=\S+.*: must be text, not a (list|mapping)", refused(f"data.column={value}"))
        assert "data.column: must be text, not a" in refused(write(f"data: {{column: {value}}}"))


NO_INTEGER = ["010", "00", "-07", "0x10", "0o10", "0b11", "1:30", "1_000", "1e3", "1.0", "1,000", "yes", "\u0663", "1 0", "--1"]
NO_FLOAT = [
    "010",
    "00.5",
    "0x10",
    "0o10",
    "1:30",
    "1:30.5",
    "1_000.5",
    "1e",
    "e3",
    ".",
    "1,5",
    "on",
    "1e3.5",
    "\u0663",
    "0x1p3",
    "1/64",
]


@pytest.mark.parametrize("text", NO_INTEGER)
def test_an_integer_is_decimal(write, text):
    for message in (refused(f"steps={text}"), refused(write(f"steps: {text}")), refused(write(f"steps: '{text}'"))):
        assert "must be an integer in decimal digits" in message
    assert "must be an integer in decimal digits" in refused(f"model.n_kv_head={text}")


@pytest.mark.parametrize("text", NO_FLOAT)
def test_a_float_is_decimal(write, text):
    for message in (refused(f"optim.lr={text}"), refused(write(f"optim: {{lr: '{text}'}}")), refused(f"model.qk_scale={text}")):
        assert "must be a decimal number" in message


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("5e-4", 5e-4), ("1E3", 1000.0), ("+.5", 0.5), ("1.", 1.0), ("1.e+2", 100.0), ("0.1e1", 1.0), ("2", 2.0)],
)
def test_numbers_as_yaml_1_2_writes_them(write, text, value):
    for config in (load([f"optim.lr={text}"]), load([write(f"optim: {{lr: {text}}}")])):
        assert config.optim.lr == value and isinstance(config.optim.lr, float)


def test_integers_have_signs():
    config = load(["mesh.x=-1", "steps=+7", "data.prefetch=-0"])
    assert (config.mesh.x, config.steps, config.data.prefetch) == (-1, 7, 0)


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "y", "1", "0", "t", "tRUE", "truE", "null", "true false", "TRUe"])
def test_a_boolean_is_true_or_false(write, text):
    for message in (refused(f"model.qk_norm={text}"), refused(write(f"model: {{qk_norm: {text}}}"))):
        assert "must be true or false" in message


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "false", "False", "FALSE"])
def test_the_usual_capitals_of_booleans(write, text):
    expected = text.lower() == "true"
    assert load([f"model.qk_norm={text}"]).model.qk_norm == expected
    assert load([write(f"mesh: {{reduce_scatter_via_all_to_all: {text}}}")]).mesh.reduce_scatter_via_all_to_all == expected


# ${...}


def test_a_reference_gets_the_final_value(write):
    a, b = write("name: w${model.d_model}\nmodel: {d_model: 64}\n"), write("seed: 5\neval: {every: '${steps}'}", "b.yaml")
    assert load([a]).name == "w64" and load([a, "model.d_model=192"]).name == "w192"
    assert load(["name=w${model.d_model}", "model.d_model=64"]).name == "w64"
    assert load(["model.d_model=64", "name=w${model.d_model}-${ seed }", b]).name == "w64-5"
    assert load([b, "steps=7"]).eval.every == 7 and load([b]).eval.every == 1000
    assert load(["name=lr${optim.lr}-${model.qk_norm}-${optim.rule}"]).name == "lr0.015625-false-mup"
    assert load(["name=lr${optim.lr}", "optim.lr=1e-3"]).name == "lr0.001"
    assert load(["optim.lr=1e-${seed}", "seed=3"]).optim.lr == 1e-3
    assert load(["log.wandb=${name}", "name=${optim.schedule}${data.seq_len}"]).log.wandb == "linear256"
    assert load(["model.n_kv_head=${model.n_vocab}"]).model.n_kv_head is None
    assert load(["xla.option=${steps}", "checkpoint.allow=['${name}', b]"]).checkpoint.allow == ["run", "b"]
    assert load([a, "name=plain"]).name == "plain", "a reference that is overridden does not count"


def test_a_reference_within_sources():
    args = ["data.sources.a.source=text", "data.sources.a.files=[x]", "data.sources.b.source=text", "data.sources.a.column=c"]
    sources = load(
        [*args, "data.sources.b.files=${data.sources.a.files}", "data.sources.b.split=${data.sources.a.split}"]
    ).data.sources
    assert sources["b"].files == ["x"] and sources["b"].split == "train" and sources["a"].column == "c"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["steps=${name}", "name=010"], r"steps=\${name}: must be an integer in decimal digits, such as 1000, not 010$"),
        (["model.qk_norm=${name}", "name=yes"], r"model.qk_norm=\${name}: must be true or false, not yes$"),
        (["steps=${optim.lr}"], r"steps=\${optim.lr}: must be an integer .*, not 0.015625$"),
        (["steps=${model.d_modle}"], r"steps=\${model.d_modle}: model.d_modle: no such key; did you mean model.d_model\?$"),
        (["steps=${steps}"], r"steps=\${steps}: refers to itself$"),
        (["steps=${seed}", "seed=${eval.every}", "eval.every=${steps}"], r"seed=\${eval.every}: refers to itself$"),
        (["name=${model}"], r"name=\${model}: model is a group$"),
        (["name=a${data.files}"], r"name=a\${data.files}: data.files is a list$"),
        (["name=a${log.wandb}"], r"name=a\${log.wandb}: log.wandb is null$"),
        (["seed=${model.n_vocab}"], r"seed=\${model.n_vocab}: must be an integer in decimal digits, such as 1000, not null$"),
        (["name=${log.wandb}"], r"name=\${log.wandb}: must be text, not null"),
        (["data.files=${name}"], r"data.files=\${name}: must be a list, \[a, b\]"),
        (["steps=${seed}"], r"steps = 0: must be at least 1$"),
        (["model=${data}"], r"model=\${data}: is a group of settings"),
        (["name=${}"], r"name=\${}: only \${KEY}, the value of another setting, is replaced"),
        (["name=a${${seed}}"], r"name=a.*: only \${KEY}"),
        (["name=${oc.select:seed}"], r"name=.*: only \${KEY}"),
        (["optim.lr=${oc.decode:'1'}"], r"optim.lr=.*: only \${KEY}"),
    ],
)
def test_references_that_are_refused(args, message):
    assert re.match(message, refused(*args))


def test_the_environment_is_not_read(write, monkeypatch):
    """What it holds may be secret, and settings are saved with the run."""
    monkeypatch.setenv("CANARY", "canary")
    for text in (
        "${oc.env:CANARY}",
        "a${ oc.env : CANARY }",
        "${env:CANARY,b}",
        "${oc.env:CANARY,${name}}",
        "${oc.${name}:CANARY}",
    ):
        for message in (refused(f"log.wandb={text}"), refused(write(f"data: {{files: ['{text}']}}"))):
            assert "settings are saved with the run" in message and "canary" not in message
    assert refused("log.wandb=${oc.env:CANARY}").endswith('for an environment variable write KEY="$CANARY" in the shell')


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_survive_a_round_trip(path, write):
    config = load([str(path)])
    assert config.name == path.stem
    assert load([write(to_yaml(config), "other-name.yaml")]) == config
    for key, value in flatten(config).items():
        assert value == attrgetter(key)(config)


def test_a_config_of_every_kind_of_value_survives_a_round_trip(write):
    args = ["name=run", "data.source=text", "data.files=['a b.txt', 'ü/*.txt']", "model.n_kv_head=1", "log.wandb='on'"]
    config = load([*args, "distributed.enabled=true", "distributed.coordinator='[::1]:80'", "optim.eps=1e-30", "workdir=~/r:1"])
    assert config.log.wandb == "on"
    assert load([write(to_yaml(config), "other-name.yaml")]) == config
    assert flatten(config)["data.files"] == dataclasses.asdict(config)["data"]["files"] == ["a b.txt", "ü/*.txt"]


def test_shipped_sizes_differ_in_width_only():
    """What makes a learning rate tuned on the small one hold for the large one."""
    sizes = [load([str(ROOT / "configs" / f"{name}.yaml")]) for name in ("small", "medium", "large", "huge")]
    free = {"name", "model.d_model", "model.remat"}
    first, *others = ({key: value for key, value in flatten(size).items() if key not in free} for size in sizes)
    assert all(other == first for other in others)
    assert [size.model.d_model for size in sizes] == [128, 512, 2048, 8192]


def test_the_name_is_that_of_the_first_file(write):
    a, b = write("{}", "first.yaml"), write("{}", "second.yaml")
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
    for multiple, heads in {"2": 6, "0.333333333333333": 1, repr(7 / 3): 7}.items():
        wide = load(["model.d_model=192", "model.d_head=64", f"model.attention_multiple={multiple}"]).model
        assert (wide.n_head, wide.kv_heads) == (heads, heads)
    with pytest.raises(ConfigError, match="model.n_vocab is not known yet"):
        _ = Config().model.padded_vocab


def test_the_tokenizer_fills_in_the_vocabulary():
    assert Config().with_vocab(259).model.n_vocab == 259
    assert load(["model.n_vocab=300"]).with_vocab(259).model.n_vocab == 300
    with pytest.raises(ConfigError, match="model.n_vocab = 100: the tokenizer gives ids up to 258; set 259"):
        load(["model.n_vocab=100"]).with_vocab(259)


LEAVES = [one for one in all_settings().values() if one.field.type is not one.group]


MIXED = load(["data.sources.NAME.weight=1", "eval.sets.NAME.files=[a]"])  # has an instance of every group


def accepts(one: Setting, value: Any) -> bool:
    """Whether the validator passes a value, whatever the rules between several settings."""
    group: Any = MIXED
    *names, name = one.key.split(".")
    for outer in names:
        group = group[outer] if isinstance(group, dict) else getattr(group, outer)
    group = copy.copy(group)
    object.__setattr__(group, name, value)
    try:
        check_settings(group, one.key.removesuffix(name))
    except ConfigError as error:
        assert str(error).startswith(f"{one.key} = "), error
        return False
    return True


def is_float(one: Setting) -> bool:
    return float in (one.field.type, *get_args(one.field.type))


def beyond_and_within(one: Setting) -> Iterator[tuple[float, float]]:
    """For each bound of a setting, the nearest value that it refuses, and the nearest in float32 that it accepts."""
    for bound, limit in one.field.metadata["bounds"].items():
        up = bound in ("max", "below")
        outward = math.inf if up else -math.inf
        step = math.nextafter(limit, outward) if is_float(one) else limit + (1 if up else -1)
        inside = limit - (1 if up else -1)
        if is_float(one):
            inside = float(np.nextafter(np.float32(limit), np.float32(-outward))) if limit else float(np.finfo(np.float32).tiny)
        yield (step, limit) if bound in ("min", "max") else (limit, inside)


BOUNDED = [one for one in LEAVES if one.field.metadata["bounds"]]


@pytest.mark.parametrize("one", BOUNDED, ids=[one.key for one in BOUNDED])
def test_every_bound_refuses_the_value_beyond_it(one):
    for beyond, within in beyond_and_within(one):
        assert accepts(one, within) and not accepts(one, beyond)
        assert re.match(rf"{one.key} = \S+: must be ", refused(f"{one.key}={beyond!r}"))


def test_every_float_must_be_finite():
    floats = [one for one in LEAVES if is_float(one)]
    assert len(floats) > 15
    for one in floats:
        for value in (math.nan, math.inf, -math.inf):
            assert not accepts(one, value), one.key


def test_every_number_must_fit_the_type_that_jax_computes_with():
    floats, integers = ([one for one in LEAVES if kind in (one.field.type, *get_args(one.field.type))] for kind in (float, int))
    assert len(floats) > 15 and len(integers) > 25
    for one in floats:
        # Beyond the largest, halfway to it, far beyond as an integer; flushed to 0, also as subnormal numbers.
        for value in (1e39, -1e39, 3.4028236e38, 10**400, 1e-50, -1e-50, 1e-45, 1e-38, 5e-324):
            assert not accepts(one, value), f"{one.key} = {value}"
    for one in integers:
        most = one.field.metadata["bounds"].get("max", 2**31 - 1)
        assert accepts(one, min(most, 2**31 - 1)) and accepts(one, 2**31) == (most >= 2**31) and not accepts(one, 2**63), one.key
        assert not accepts(one, -(2**31) - 1) and not accepts(one, 10**30), one.key
    assert {one.key for one in integers if accepts(one, 2**31)} == {"optim.tokens_base"}  # only Python computes with it


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("steps=3000000000 checkpoint.every=0", r"steps = 3000000000: must be at most 2147483647$"),
        ("data.prefetch=2147483647", r"data.prefetch = 2147483647: must be at least 0 and at most 10000$"),  # all in memory
        ("data.workers=2147483647", r"data.workers = 2147483647: must be at least 0 and at most 1024$"),
        ("log.every=3000000000", r"log.every = 3000000000: must be at most 2147483647$"),
        ("data.seq_len=2147483648", r"data.seq_len = 2147483648: .*at most 2147483647"),
        (f"steps={'9' * 90}", r"steps = 9+: .*at most 2147483647"),
        (f"steps={'9' * 5000}", r"steps=9+: must be an integer"),
        ("mesh.x=-2147483649", r"mesh.x = -2147483649: must be at least 1, or -1"),
        (
            "optim.tokens_base=9007199254740993 optim.rule=completed_p",
            r"optim.tokens_base = 9.*: must be .* at most 9007199254740992",
        ),
        ("optim.lr=1e39", r"optim.lr = 1e\+39: must fit in float32, up to 3.4e38$"),
        ("optim.lr=1e400", r"optim.lr = inf: must be a finite number$"),
        ("optim.eps=1e-50", r"optim.eps = 1e-50: must fit in float32, from 1.2e-38, or be 0$"),
        ("model.norm_eps=1e-40", r"model.norm_eps = 1e-40: must fit in float32"),
        ("optim.embed_lr_exponent=-1e5", r"optim.embed_lr_exponent = -100000.0: must be at least -10 and at most 10$"),
        ("optim.beta2=0.99999999999", r"optim.beta2 = 0.99999999999: must be at least 0 and below 1 in float32, where it is 1$"),
        ("data.sources.a.weight=1e-46", r"data.sources.a.weight = 1e-46: must fit in float32"),
        ("model.ff_multiple=3e38", r"model.ff_multiple = 3e\+38: gives a feed-forward width of "),
        ("model.attention_multiple=3e38", r"model.attention_multiple = 3e\+38: gives 6e\+38 heads of model.d_head = 64 at "),
    ],
    ids=lambda value: value[:40],
)
def test_numbers_that_a_device_cannot_hold(overrides, message):
    assert re.match(message, refused(*overrides.split()))


def test_numbers_that_a_device_can_hold():
    config = load(["steps=2147483647", "optim.eps=1e-30", "optim.z_loss=0", "optim.weight_decay=0.0", "model.norm_eps=1.2e-38"])
    assert (config.steps, config.optim.eps, config.model.norm_eps) == (2147483647, 1e-30, 1.2e-38)
    assert load(["optim.tokens_base=20000000000", "optim.tokens_exponent=0.5"]).optim.tokens_base == 20_000_000_000


def test_every_choice_is_checked_without_omegaconf():
    choices = [one for one in LEAVES if get_origin(one.field.type) is Literal]
    assert len(choices) > 15
    for one in choices:
        assert all(accepts(one, value) for value in get_args(one.field.type)) and not accepts(one, "other"), one.key


def test_every_path_must_be_possible():
    paths = [one for one in LEAVES if one.field.metadata["path"]]
    assert {"workdir", "data.files", "data.cache_dir", "data.tokenizer_file"} <= {one.key for one in paths}
    for one in paths:
        for path in ("~no-such-user/a", "a\0b", "gs://bucket/a", "~/a", "a*.txt"):
            right = path[1] == "/" or path[1] == "*" or (path[:3] == "gs:" and one.field.metadata["path"] == "url")
            assert accepts(one, [path] if "list" in str(one.field.type) else path) == right, f"{one.key}: {path!r}"


def test_the_validator_itself():
    """The messages, and that the tests above would notice a bound that does nothing."""

    @dataclasses.dataclass
    class Group:
        rate: float = setting(0.5, "a rate", above=0, max=1)
        n: int = setting(3, "a number", min=1)

    check_settings(Group(), "group.")
    for group, message in (
        (Group(rate=0.0), "group.rate = 0.0: must be above 0 and at most 1"),
        (Group(rate=1.5), "group.rate = 1.5: must be above 0 and at most 1"),
        (Group(rate=math.nan), "group.rate = nan: must be a finite number"),
        (Group(n=0), "group.n = 0: must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            check_settings(group, "group.")
    with pytest.raises(AssertionError):
        setting(1, "a bound that does not exist", least=0)


# What may change on resume, independent of the schema.
FREE = {"name", "workdir", "model.remat", "model.head_chunk", "model.unroll_layers", "model.attention_kernel"}
FREE |= {"optim.grad_accumulation_steps", "bad_steps.limit", "optim.grad_sync", "xla", "xla_tuned", "compile_cache"}
FREE_GROUPS = {"mesh", "distributed", "eval", "log", "checkpoint", "profile", "watchdog", "xla", "data"}
FIXED = {"data.seq_len", "data.batch_size", "data.packing", "data.intra_document_mask", "data.truncated_eos"}


@pytest.mark.parametrize(
    "key", [*flatten(Config()), "xla.option", "data.sources.a.weight", "fingerprint.tokens", "new", "model.new"]
)
def test_what_may_change_on_resume(key):
    assert may_change_on_resume(key) == (key not in FIXED and (key in FREE or key.split(".")[0] in FREE_GROUPS))


# Overrides that a check refuses, and what the message must say.
RANGES: list[tuple[str, str]] = [
    *((f"model.{key}=0", rf"model.{key} = 0: must be at least 1") for key in ("d_model", "d_base", "d_head", "n_layer")),
    *((f"model.{key}=-1", rf"model.{key} = -1: must be at least 1") for key in ("vocab_multiple", "head_chunk")),
    ("model.d_model=100", r"model.d_model = 100: not divisible by model.d_head = 64; the nearest that fit are 64 and 128"),
    ("model.d_model=32", r"model.d_model = 32: not divisible by model.d_head = 64; the nearest that fit are 64 and 128"),
    ("model.n_kv_head=3", r"model.n_kv_head = 3: must divide the 2 heads"),
    ("model.n_kv_head=0", r"model.n_kv_head = 0: must be at least 1"),
    ("model.d_head=1", r"model.d_head = 1: rotary positions need an even size"),
    *((f"model.ff_multiple={value}", rf"model.ff_multiple = {value}.*: must be above 0") for value in (0, -1)),
    *((f"model.ff_multiple={value}", rf"model.ff_multiple = {value}: must be a finite number") for value in ("inf", "nan")),
    *((f"model.attention_multiple={value}", rf"model.attention_multiple = {value}.*: must be above 0") for value in (0, -1)),
    *(
        (f"model.attention_multiple={value}", rf"model.attention_multiple = {value}: gives {heads} heads of model.d_head = 64 at")
        for value, heads in {0.3: "0.6", 1.3: "2.6", 1.0000001: "2", 0.001: "0.002"}.items()
    ),
    (
        "model.d_model=96 model.attention_multiple=2 model.n_kv_head=2",
        r"model.n_kv_head = 2: must divide the 3 heads \(attention_multiple x d_model / d_head\)$",
    ),
    ("model.ff_multiple=0.001", r"model.ff_multiple = 0.001: gives a feed-forward width of 0"),
    ("model.n_vocab=1", r"model.n_vocab = 1: must be at least 2"),
    ("model.qk_scale=0", r"model.qk_scale = 0.0: must be above 0"),
    ("model.rotary_base=-1", r"model.rotary_base = -1.0: must be at least 0"),
    ("model.norm_eps=0", r"model.norm_eps = 0.0: must be above 0"),
    *((f"data.{key}=0", rf"data.{key} = 0: must be at least 1") for key in ("batch_size", "threads", "tokenize_workers")),
    ("data.seq_len=1", r"data.seq_len = 1: must be at least 2"),
    *((f"data.{key}=-1", rf"data.{key} = -1: must be at least 0") for key in ("prefetch", "workers")),
    ("data.vocab_size=256", r"data.vocab_size = 256: must be at least 300"),
    *((f"data.{key}={value}", rf"data.{key} = .*: must be above 0 and below 0.5")
      for key in ("validation_fraction", "test_fraction") for value in ("0", "0.5", "-0.1")),
    ("data.source=text", r"data.files is empty: data.source = text needs at least one"),
    ("data.source=hub", r"data.path is not set: data.source = hub needs it"),
    ("data.path=a", r"data.path is set: it needs data.source=hub\|tokens"),
    ("data.subset=en", r"data.subset is set: it needs data.source=hub"),
    ("data.files=[a.txt]", r"data.files is set: it needs data.source=text"),
    ("data.source=text data.files=[a] data.test_files=[b]", r"data.validation_files, data.test_files: give both, or neither"),
    ("data.source=text data.files=[a,[b]]", r"data.files=\[a,\[b\]\]: must be a list of strings"),
    ("data.source=text data.files=[{a:b}]", r"data.files=\[{a:b}\]: must be a list of strings"),
    ("data.source=text data.files=[~no-such-user/a]", r"data.files = ~no-such-user/a: there is no such user"),
    ("data.column=''", r"data.column is empty"),
    ("data.cache_dir=~no-such-user", r"data.cache_dir = ~no-such-user: there is no such user"),
    ("data.tokenizer_file=~no-such-user/a", r"data.tokenizer_file = ~no-such-user/a: there is no such user"),
    ("data.tokenizer=hf", r"data.tokenizer_file is not set: data.tokenizer = hf needs it"),
    ("data.tokenizer=bytes data.tokenizer_file=a", r"data.tokenizer_file is set: it needs data.tokenizer=sentencepiece or hf"),
    ("data.eos_token=a", r"data.eos_token is set: it needs data.tokenizer=hf"),
    ("data.truncated_eos=true", r"data.truncated_eos = true: it needs data.packing=pad"),
    ("data.packing=pad data.intra_document_mask=true", r"data.intra_document_mask = true: it needs data.packing=concat"),
    ("data.sources.a*b.weight=1", r"data.sources.a\*b: a source's name must consist of letters"),
    ("data.sources.a.weight=0", r"data.sources.a.weight = 0.0: must be above 0"),
    ("data.sources.a.weight=inf", r"data.sources.a.weight = inf: must be a finite number"),
    *((f"optim.{key}=0", rf"optim.{key} = 0.0: must be above 0") for key in ("lr", "eps", "muon_lr")),
    ("optim.eps=-1", r"optim.eps = -1.0: must be above 0"),
    *((f"optim.lr={value}", rf"optim.lr = {value}: must be a finite number") for value in ("inf", "nan")),
    ("model.qk_scale=inf", r"model.qk_scale = inf: must be a finite number"),
    *((f"optim.{key}={value}", rf"optim.{key} = {value}.*: must be at least 0 and below 1")
      for key in ("beta1", "beta2", "muon_beta") for value in ("1", "-0.1")),
    *((f"optim.{key}=-1", rf"optim.{key} = -1.*: must be at least 0")
      for key in ("weight_decay", "clip_norm", "warmup_steps", "z_loss", "depth_alpha")),
    ("optim.min_lr_ratio=1.1", r"optim.min_lr_ratio = 1.1: must be at least 0 and at most 1"),
    ("optim.grad_accumulation_steps=0", r"optim.grad_accumulation_steps = 0: must be at least 1"),
    ("optim.grad_accumulation_steps=3", r"optim.grad_accumulation_steps = 3: must divide data.batch_size = 16"),
    ("optim.eps_scaling=true optim.rule=sp", r"optim.eps_scaling = true: the rule sp has an eps of its own"),
    ("optim.eps_scaling=true optim.rule=completed_p", r"optim.eps_scaling = true: the rule completed_p has"),
    ("model.n_layer_base=2", r"model.n_layer_base = 2: the rule mup does not scale with depth; use optim.rule=completep or"),
    ("model.n_layer_base=0 optim.rule=completep", r"model.n_layer_base = 0: must be at least 1"),
    ("model.unembed_init=sp optim.rule=mup_table8", r"model.unembed_init = sp: the rule mup_table8 scales .* multiplier"),
    ("optim.batch_base=4096", r"optim.batch_base = 4096: needs optim.batch_exponent or optim.rule=completed_p"),
    ("optim.tokens_base=0 optim.rule=completed_p", r"optim.tokens_base = 0: must be at least 1"),
    ("optim.batch_base=16 optim.rule=completed_p", r"optim.beta1 = 0.9: 1 - beta1 grows .* by 256 to more than 1"),
    *((f"mesh.x={value}", rf"mesh.x = {value}: must be at least 1, or -1") for value in (0, -2)),
    *((f"mesh.{key}=0", rf"mesh.{key} = 0: must be at least 1") for key in ("y", "replicas", "overlap_groups")),
    *((f"distributed.coordinator={value}", rf"distributed.coordinator = {value}: must be host:port")
      for value in ("host", "host:http", ":80")),
    *((f"distributed.{key}=0", rf"distributed.{key} = 0: must be at least 1") for key in ("timeout", "n_process")),
    ("distributed.process_id=-1", r"distributed.process_id = -1: must be at least 0"),
    ("distributed.n_process=2 distributed.process_id=2", r"distributed.process_id = 2: must be below distributed.n_process = 2"),
    *((f"{key}=-1", rf"{key} = -1: must be at least 0")
      for key in ("eval.every", "checkpoint.every", "checkpoint.keep_best", "profile.start")),
    *((f"{key}=0", rf"{key} = 0: must be at least 1")
      for key in ("eval.batches", "eval.final_batches", "log.every", "checkpoint.keep", "steps", "data.max_parts")),
    ("checkpoint.allow=[[steps]]", r"checkpoint.allow=\[\[steps\]\]: must be a list of strings"),
    ("profile.start=5 profile.stop=5", r"profile.stop = 5: must be above profile.start = 5"),
    *((f"name={name}", r"name = .*: must be a plain folder name") for name in ("''", "..", ".hidden", "../x", "a/b", "a\\b")),
    ("workdir=~no-such-user", r"workdir = ~no-such-user: there is no such user"),
    ("data.local_dir=gs://bucket/x", r"data.local_dir = gs://bucket/x: must be a local path, not a URL"),
    *((f"data.sources.a.weight=2 data.{key}={value}", rf"data.{key} is set: with data.sources put it below a source's name")
      for key, value in {"source": "hub", "files": "[a]", "validation_files": "[a]", "test_files": "[a]", "column": "c",
                         "path": "a", "subset": "en", "split": "s", "revision": "r", "max_parts": "1"}.items()),
    ("data.max_parts=1", r"data.max_parts is set: it needs data.source=text\|jsonl\|parquet\|arrow\|hub$"),
    ("data.source=tokens data.path=a data.max_parts=1", r"data.max_parts is set: it needs data.source=text"),
    ("seed=-1", r"seed = -1: must be at least 0"),
    ("seed=2147483648", r"seed = 2147483648: must be at least 0 and at most 2147483647"),
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
    ("model.d_modle=3", r"model.d_modle: no such key; did you mean model.d_model\?$"),
    ("d_modle=3", r"d_modle: no such key; did you mean model.d_model\?$"),
    ("stepz=3", r"stepz: no such key; did you mean steps\?$"),
    ("lr=3", r"lr: no such key; did you mean optim.lr\?$"),
    ("keep_best=3", r"keep_best: no such key; did you mean checkpoint.keep_best\?$"),
    ("data.sources.a.colum=x", r"data.sources.a.colum: no such key; did you mean "),
    ("optim.nothing_like_it=3", r"optim.nothing_like_it: no such key$"),
    ("model.d_model.x=3", r"model.d_model.x=3: model.d_model: must be an integer in decimal digits, .*not a mapping"),
    ("steps=abc", r"steps=abc: must be an integer in decimal digits, such as 1000$"),
    ("steps=1.5", r"steps=1.5: must be an integer"),
    ("steps=true", r"steps=true: must be an integer"),
    ("steps=", r"steps=: must be an integer .*not null$"),
    ("steps=[1]", r"steps=\[1\]: must be an integer .*not a list$"),
    ("optim.lr=fast", r"optim.lr=fast: must be a decimal number, such as 0.001 or 1e-3$"),
    ("optim.lr=2**-6", r"optim.lr=2\*\*-6: must be a decimal number"),
    ("model.qk_norm=maybe", r"model.qk_norm=maybe: must be true or false$"),
    ("model.activation=tanh", r"model.activation=tanh: must be relu or sqrelu or gelu or silu or swiglu$"),
    ("precision.compute=float64", r"precision.compute=float64: must be auto or float32 or bfloat16$"),
    ("precision.compute=float16", r"precision.compute=float16: must be auto or float32 or bfloat16$"),
    ("model=3", r"model=3: is a group of settings: set those below it, such as model.d_model$"),
    ("model=", r"model=: is a group of settings"),
    ("xla=fast", r"xla=fast: is a group of settings: set those below it, such as xla.NAME$"),
    ("data.files=a.txt", r"data.files=a.txt: must be a list, \[a, b\]"),
    ("data.files={a: 1}", r"data.files={a: 1}: must be a list"),
    ("data.files=[null]", r"data.files=\[null\]: "),
    ("steps=???", r"steps=\?\?\?: must be an integer"),
    ("steps=${nope}", r"steps=\$\{nope\}: nope: no such key$"),
    ("name=${oc.env:NO_SUCH_VARIABLE}", r"name.*NO_SUCH_VARIABLE"),
    ("steps=${", r"steps=\$\{: "),
    ("steps=[1", r"steps=\[1: not valid YAML"),
    ("=3", r"=3: "),
    (
        "steps",
        r"steps: cannot read it: No such file or directory; the shipped configs are huge, .*; an override is written key=value",
    ),
    ("eval.checkpoint=newest", r"eval.checkpoint=newest: must be latest or best$"),
    ("configs/smal.yaml", r"configs/smal.yaml: cannot read it: No such file or directory$"),
    ("/", r"/: cannot read it: Is a directory"),
    ("", r": cannot read it"),
]


@pytest.mark.parametrize(("arg", "message"), WRONG, ids=[arg for arg, _ in WRONG])
def test_wrong_arguments(arg, message):
    assert re.match(message, refused(arg))


WRONG_FILES: list[tuple[str | bytes, str]] = [
    ("model:\n  d_modle: 3\n", r": model.d_modle: no such key; did you mean model.d_model\?$"),
    ("model.d_model: 64\n", r": model.d_model: in a file this is written model: {d_model: ...}$"),
    ("optim:\n  accumulate: 4\n", r": optim.accumulate: renamed to optim.grad_accumulation_steps$"),
    ("1: 2\n", r": 1: no such key$"),
    ("steps: 3\nsteps: 4\n", r":2: not valid YAML: found duplicate key steps"),
    ("model:\n  d_model: 64\n  d_model: 128\n", r":3: not valid YAML: found duplicate key d_model"),
    ("steps: abc\n", r": steps: must be an integer"),
    ("optim:\n  lr: fast\n", r": optim.lr: must be a decimal number"),
    ("data:\n  files: a.txt\n", r": data.files: must be a list, \[a, b\]"),
    ("model: 3\n", r": model: is a group of settings"),
    ("model:\n", r": model: is a group of settings"),
    ("- a\n- b\n", r": must hold `key: value` lines"),
    ("3\n", r": must hold `key: value` lines"),
    ("some text\n", r": must hold `key: value` lines"),
    ("steps: ???\n", r": steps: must be an integer"),
    (f"data: {{files: {'[' * 5000}a{']' * 5000}}}\n", r": cannot read it: nested too deeply"),
    ("? [a]\n: 3\n", r":1: not valid YAML: found unhashable key"),
    ("model: !!set {d_model}\n", r":1: not valid YAML: could not determine a constructor for the tag"),
    ("model:\n\td_model: 64\n", r":2: not valid YAML: "),
    ("model: [\n", r":2: not valid YAML: "),
    ("steps: 3\n---\nsteps: 4\n", r":2: not valid YAML: but found another document"),
    ("steps: *other\n", r":1: not valid YAML: found undefined alias"),
    ("model: &a {model: *a}\n", r":1: not valid YAML: "),
    (b"\xff\xfe\x00", r": cannot read it: not UTF-8 at byte 0$"),
    ("name: \0\n", r": cannot read it: .*character"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_FILES, ids=[repr(text)[:40] for text, _ in WRONG_FILES])
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
    assert load([f"workdir=file://{tmp_path}"]).rundir == tmp_path / "run" and load(["workdir=runs"]).run_url is None


def test_rundir_at_a_url():
    config = load(["workdir=gs://bucket/runs/", "name=x"])
    assert config.run_url == "gs://bucket/runs/x"
    with pytest.raises(ConfigError, match="workdir = gs://bucket/runs/: must be a local path here"):
        _ = config.rundir


def test_config_at_a_url(tmp_path):
    (tmp_path / "some.yaml").write_text("steps: 7\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("steps: 8\nname: other\n")
    assert load([f"file://{tmp_path}/some.yaml"]).steps == 7
    config = load([f"file://{tmp_path}/run"])
    assert config.steps == 8 and config.rundir == tmp_path / "run", "a run is where its config lies"
    with pytest.raises(ConfigError, match="file:.*/none: cannot read it: .*"):
        load([f"file://{tmp_path}/none"])


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


def test_the_reference_lists_every_setting_with_its_default():
    listed = dict(re.findall(r"^(\S+) = (.*)$", describe(), re.MULTILINE))
    named = {key: value for key, value in listed.items() if ".NAME." in key}
    assert [key for key in listed if key not in named] == list(flatten(Config()))
    assert named["data.sources.NAME.source"] == "stdlib" and named["data.sources.NAME.weight"] == "1.0"
    assert load([f"{key}={value}" for key, value in listed.items() if key not in named]) == Config()
    assert all(one.field.metadata["meaning"] for one in all_settings().values())


def test_the_reference_of_a_group():
    about = describe("optim")
    assert "optim.lr = 0.015625\n    [float, above 0] peak learning rate" in about and "model." not in about.splitlines()[0]
    assert re.search(r"^optim.rule = mup\n    \[sp \| mup \| ", about, re.MULTILINE)
    assert describe("model.n_kv_head").startswith("model.n_kv_head = null\n    [int | null, at least 1] ")
    assert "free on resume" in describe("mesh.y") and "free on resume" not in describe("seed")
    with pytest.raises(ConfigError, match="^optm: no such key; did you mean optim"):
        describe("optm")


def test_renamed_keys():
    known = set(all_settings())
    for old, new in RENAMED.items():
        assert old not in known and new.split()[0] in known
        assert refused(f"{old}=1") == f"{old}: renamed to {new}"
    assert refused("optim.accumulate=4") == "optim.accumulate: renamed to optim.grad_accumulation_steps"
    check_not_renamed(known, "checkpoint")
    with pytest.raises(ConfigError, match="^checkpoint: mesh.slices: renamed to mesh.replicas; model.gains: renamed to model"):
        check_not_renamed(["mesh.slices", "steps", "model.gains"], "checkpoint")


def test_a_long_override_is_no_path():
    files = ",".join(f"text-{k:04}.jsonl" for k in range(300))
    assert len(load(["data.source=jsonl", f"data.files=[{files}]"]).data.files) == 300
