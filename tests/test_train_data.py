"""From files to a trained model: every kind of tokenizer, of rows, and a mixture, through the whole program."""

import json
from pathlib import Path

import pytest
from cases import slow_unless
from hf import gpt2
from test_sources import TEXTS, write

from mutransformer.config.load import load
from mutransformer.training.loop import train
from mutransformer.training.program import build_with_data

TEXT = [f"{k}: {text}" for k in range(6) for text in TEXTS]


def settings(kind: str, folder: Path) -> list[str]:
    match kind:
        case "text, hf":
            for i, text in enumerate(TEXT):
                (folder / f"{i}.txt").write_text(text)
            hf = f"data.tokenizer_file={gpt2(folder / 'hf')}"
            return ["data.source=text", f"data.files=[{folder}/*.txt]", "data.tokenizer=hf", hf]
        case "jsonl.gz, sentencepiece":
            write(folder / "a.jsonl.gz", TEXT)
            return ["data.source=jsonl", f"data.files=[{folder}/a.jsonl.gz]", "data.vocab_size=320"]
        case "a mixture in padded rows, bytes":
            write(folder / "a.parquet", TEXT)
            write(folder / "b.jsonl.zst", TEXT[::-1])
            one = ["data.sources.one.source=parquet", f"data.sources.one.files=[{folder}/a.parquet]"]
            two = ["data.sources.two.source=jsonl", f"data.sources.two.files=[{folder}/b.jsonl.zst]", "data.sources.two.weight=3"]
            return [*one, *two, "data.tokenizer=bytes", "data.packing=pad"]
    raise AssertionError(kind)


KINDS = {
    "text, hf": ["special_ids.json", "tokenizer.json"],
    "jsonl.gz, sentencepiece": ["tokenizer.model"],
    "a mixture in padded rows, bytes": [],
}


@pytest.mark.parametrize(("kind", "kept"), slow_unless(list(KINDS.items())[:1], list(KINDS.items())))
def test_the_whole_way(kind: str, kept: list[str], tmp_path: Path) -> None:
    small = ["model.d_model=64", "model.d_head=16", "model.n_layer=1", "data.seq_len=32", "data.batch_size=8", "steps=4"]
    quiet = [
        "eval.batches=1",
        "eval.final_batches=1",
        "log.tensorboard=false",
        "checkpoint.every=2",
        "optim.warmup_steps=1",
        "log.every=1",
    ]
    config = load([*small, *quiet, *settings(kind, tmp_path), f"data.cache_dir={tmp_path}/cache", f"workdir={tmp_path}/runs"])
    assert train(*build_with_data(config)) == 0
    run = tmp_path / "runs/run"
    losses = [json.loads(line).get("train/loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert sorted(path.name for path in run.glob("*token*")) + sorted(path.name for path in run.glob("special*")) == kept[::-1]
    assert load([str(run / "config.yaml")]).data == config.data
