"""Passwords and access tokens in settings: used to open files, and neither printed nor stored."""

import json
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mutransformer import cli
from mutransformer.config.load import load, to_yaml
from mutransformer.config.schema import flatten
from mutransformer.data.cache.prepare import dry_run
from mutransformer.data.cache.store import from_json, to_json
from mutransformer.errors import USAGE_ERROR, ConfigError, redact
from mutransformer.study.sweep.grid import configs
from mutransformer.training import metrics
from mutransformer.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
CANARY = "s3cr3tCANARY"

# Each holds the canary as its only secret; what must be left.
SECRET = {
    f"https://user:{CANARY}@host/a b.txt": "https://REDACTED@host/a b.txt",
    f"HTTPS://{CANARY}:@host/a": "HTTPS://REDACTED@host/a",
    f"https://{CANARY}@host/a": "https://REDACTED@host/a",
    f"ftp://:{CANARY}@host": "ftp://REDACTED@host",
    f"sftp://user:p@ss:{CANARY}@host:22/a@b": "sftp://REDACTED@host:22/a@b",
    f"https://user:p%40{CANARY}@host": "https://REDACTED@host",
    f"https://user:a {CANARY}@host/a": "https://REDACTED@host/a",
    f"https://user:a?b#{CANARY}@host/a": "https://REDACTED@host/a",
    f"s3://KEY:ab/c+{CANARY}@bucket/**/a": "s3://REDACTED@bucket/**/a",
    f"zip://a.txt::https://user:{CANARY}@host/a.zip": "zip://a.txt::https://REDACTED@host/a.zip",
    f"https://host/a?token={CANARY}": "https://host/a?token=REDACTED",
    f"https://host/a?x=1&Access_Token={CANARY}/b'c)&y=2": "https://host/a?x=1&Access_Token=REDACTED&y=2",
    f"https://host/a?X-Amz-Signature={CANARY}&X-Amz-Date=1": "https://host/a?X-Amz-Signature=REDACTED&X-Amz-Date=1",
    f"https://host/a?sv=1&sig={CANARY}%3D": "https://host/a?sv=1&sig=REDACTED",
    f"https://host/a?api_key={CANARY}#{'x'}": "https://host/a?api_key=REDACTED#x",
    f"https://host/a?code={CANARY}": "https://host/a?code=REDACTED",
    f"hf_{CANARY}0123456789": "hf_REDACTED",
    f"https://host/hf_{CANARY}/a": "https://host/hf_REDACTED/a",
}
PLAIN = [
    "https://host:8080/a@b?version=3&design=x&author=me",
    "gs://bucket/**/*.txt",
    "~/hf_tokenizers/x",
    "sftp://me@host/a",
    "run",
]
PLAIN += [
    "github://org:repo@main/a",
    "hf://datasets/a/b@main/x",
    "a@b:c",
    "http://[::1]:80/a@b",
    "[::1]:80",
    "",
    "x=1&y=2",
    "REDACTED",
]


@pytest.mark.parametrize(("text", "left"), SECRET.items())
def test_what_is_redacted(text, left):
    assert redact(text) == left == redact(left)
    nested = redact({"a": [text, 1, None], "b": {"c": (f"cannot read {text}", 0.5)}})
    assert nested == {"a": [left, 1, None], "b": {"c": (f"cannot read {left}", 0.5)}}
    assert redact(f"['{text}']").find(CANARY) < 0


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_not(text):
    assert redact(text) == text


@pytest.mark.parametrize("text", SECRET)
def test_a_config_keeps_the_secret_and_its_output_does_not(text, capsys):
    for args in (
        ["data.source=jsonl", f'data.files=["{text}", b]'],
        ["data.source=tokens", f"data.path={text}"],
        [f"data.cache_dir={text}", f"log.wandb={text}", f"xla.option={text}"],
        ["data.sources.a.source=text", f'data.sources.a.files=["{text}"]', f"data.sources.a.column={text}"],
    ):
        config = load(args)
        assert CANARY in repr(config)
        assert CANARY not in to_yaml(config) + repr(flatten(config)) and "REDACTED" in to_yaml(config)
        assert cli.main(["train", "--print-config", *args]) == 0
        assert CANARY not in capsys.readouterr().out


@pytest.mark.parametrize("text", SECRET)
def test_errors_hold_no_secret(text, capsys):
    for args in ([f"steps={text}"], [f"workdir={text}"], [f"name={text}"], [f"nothing={text}"], [text], ["a=1", f"x{text}"]):
        assert cli.main(["train", *args]) == USAGE_ERROR
        assert re.fullmatch(r"error: .+\n", err := capsys.readouterr().err) and CANARY not in err
    with pytest.raises(SystemExit):
        cli.main(["train", f"--option={text.replace(' ', '_')}"])
    assert CANARY not in capsys.readouterr().err
    error = ConfigError(f"data.files: {text}")
    assert CANARY not in repr(error) and str(pickle.loads(pickle.dumps(error))) == str(error)
    for other in (OSError(2, "No such file", text), FloatingPointError(text)):
        cli.run_cli(lambda other=other: raises(other))
        assert CANARY not in capsys.readouterr().err


def raises(error: Exception) -> int:
    raise error


@pytest.mark.parametrize("text", SECRET)
def test_other_outputs_hold_no_secret(text, capsys, monkeypatch):
    record = logging.LogRecord("mutransformer", logging.WARNING, "", 0, "%s: cannot read it", (text,), None)
    metrics._ConsoleHandler().emit(record)
    assert "cannot read it" in (out := capsys.readouterr().out) and CANARY not in out
    stored = to_json({"first_skipped": f"{text}, line 3", "shards": [{"file": text}]})
    assert CANARY.encode() not in stored and from_json("a", stored)["shards"] == [{"file": redact(text)}]
    if "," not in text:
        (variant,) = configs([], "width", [64], [f"log.wandb={text}"], None)
        assert CANARY not in variant.name and CANARY in str(variant.config.log.wandb)


def test_wandb_gets_no_secret(tmp_path, monkeypatch):
    given: dict[str, Any] = {}
    run = SimpleNamespace(log=lambda *_, **__: None, define_metric=lambda *_, **__: None, summary={}, finish=lambda **_: None)
    wandb = SimpleNamespace(init=lambda **settings: given.update(settings) or run, Image=None, Table=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = [f"workdir={tmp_path}", f"data.cache_dir=https://u:{CANARY}@host/a", "log.wandb=project"]
    with metrics.Metrics(load(args), RunFolder(load(args).rundir), 1.0, 1, 0):
        assert given["config"]["data"]["cache_dir"] == "https://REDACTED@host/a"


def test_what_a_run_saved_asks_for_the_secret_again(tmp_path):
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(load(["data.source=text", f"data.files=[https://u:{CANARY}@host/a]", f"workdir={tmp_path}"])))
    with pytest.raises(ConfigError, match="^data.files: lacks a secret, .* give data.files again"):
        dry_run(load([str(saved)]).data)


# A store behind URLs of the form web://USER:PASSWORD@HOST/..., which is a folder.
WEB = """
import sys
from pathlib import Path
from fsspec import register_implementation
from fsspec.implementations.local import LocalFileSystem
from mutransformer.cli import main

class Web(LocalFileSystem):
    protocol = "web"
    def __init__(self, **settings):
        super().__init__(auto_mkdir=True, **settings)
    @classmethod
    def _strip_protocol(cls, path):
        head, found, rest = str(path).partition("://")
        assert not found or rest.startswith("user:CANARY@host/"), path
        return super()._strip_protocol(f"{Path.cwd()}/web/{rest.partition('/')[2]}" if found else path)
    def unstrip_protocol(self, name):
        return f"web://user:CANARY@host{name}"

register_implementation("web", Web)
sys.exit(main())
""".replace("CANARY", CANARY)


@pytest.mark.slow
def test_a_run_leaves_no_secret(tmp_path):
    """A password, tokens in queries and an access token: what the runs print, store and cache holds none of them."""
    (web := tmp_path / "web").mkdir()
    lines = [json.dumps({f"hf_{CANARY}0000": f"line {i} of a small text, number {i * i}"}) for i in range(400)]
    (web / f"a.jsonl?token={CANARY}").write_text("\n".join([*lines[:200], "{bad", *lines[200:]]))
    url = f"web://user:{CANARY}@host"
    args = ["data.source=jsonl", f"data.files=['{url}/a.jsonl?token={CANARY}']", f"data.column=hf_{CANARY}0000"]
    args += [
        "data.on_bad_record=skip",
        "data.tokenizer=bytes",
        f"data.cache_dir={url}/cache",
        "data.local_dir=local",
        "workdir=runs",
    ]
    args += ["model.d_model=64", "model.n_layer=1", "data.seq_len=16", "data.batch_size=8", "steps=2"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}

    def run(name: str, *more: str, code: int = 0) -> str:
        command = (sys.executable, "-c", WEB, name, *args, *more)
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    printed = run("prepare-data", "--dry-run") + run("train") + run("train", "steps=3", "checkpoint.allow=[steps]")
    assert re.search(r"1 of 401 records skipped, the first: web://REDACTED@host/\S*/a.jsonl\?token=REDACTED", printed)
    assert "resumes after step 2" in printed and "to web://REDACTED@host/cache/" in printed
    printed += run("prepare-data", "data.on_bad_record=error", code=USAGE_ERROR)
    assert "data: web://REDACTED@host/" in printed
    stored = [path for where in ("runs", "web/cache", "local") for path in tmp_path.glob(f"{where}/**/*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "manifest.json"} <= {path.name for path in stored} and len(stored) > 10
    assert any("tfevents" in path.name for path in stored) and any("checkpoints" in str(path) for path in stored)
    assert CANARY not in printed
    assert not [path for path in stored if CANARY.encode() in path.read_bytes() or CANARY in path.name]
