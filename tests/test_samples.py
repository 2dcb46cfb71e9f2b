"""The texts that a run samples at its evaluations: which, when, and where they are seen."""

import json
from pathlib import Path

import numpy as np
import pytest
from short_runs import settings

from mutransformer.config.load import load
from mutransformer.errors import FINISHED, ConfigError
from mutransformer.generation.generate import generate
from mutransformer.generation.samples import NEW, PROMPT, make_sampler
from mutransformer.generation.sampling import Sampling
from mutransformer.training.loop import train
from mutransformer.training.program import build_with_data

SHORT = ["steps=4", "eval.every=2", "eval.samples=2", "checkpoint.keep=3"]


def run(folder: Path, *more: str) -> Path:
    """A run with samples; its folder."""
    config = load(settings(folder, *SHORT, *more))
    program, corpus = build_with_data(config)
    assert train(program, corpus, sampler=make_sampler(program, corpus)) == FINISHED
    return config.rundir


def samples(folder: Path) -> dict[int, list[dict[str, str]]]:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {line["step"]: line["samples"] for line in lines}


def texts_on_the_board(folder: Path) -> list[tuple[int, str, str]]:
    """Step, tag and Markdown of every sample in TensorBoard's files, in order."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = [event for file in sorted(folder.glob("events*")) for event in EventFileLoader(str(file)).Load()]
    values = [(event.step, value) for event in found for value in event.summary.value if value.tag.startswith("samples/")]
    return sorted((step, value.tag, value.tensor.string_val[0].decode()) for step, value in values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole"), "name=whole")


def test_each_evaluation_continues_the_same_held_out_documents(whole: Path) -> None:
    found = samples(whole)
    assert list(found) == [2, 4]
    assert [s["prompt"] for s in found[2]] == [s["prompt"] for s in found[4]] and found[2] != found[4]
    _, corpus = build_with_data(load([str(whole)]))
    source = corpus.splits["validation"].sources[0]
    for i, sample in enumerate(found[2]):
        start, _ = source.document(i)
        assert sample["prompt"] == corpus.tokenizer.decode(source.read(start, start + PROMPT))


def test_the_texts_are_those_of_generate(whole: Path) -> None:
    last = samples(whole)[4]
    T = load([str(whole)]).data.seq_len
    how = Sampling(tokens=min(NEW, T - PROMPT))
    results = generate(load([str(whole)]), [sample["prompt"] for sample in last], how)
    assert [sample["text"] for sample in last] == [one["samples"][0]["text"] for one in results["prompts"]]


def test_tensorboard_shows_them(whole: Path) -> None:
    shown = texts_on_the_board(whole)
    assert [(step, tag) for step, tag, _ in shown] == [(step, f"samples/{i}/text_summary") for step in (2, 4) for i in (0, 1)]
    for step, tag, text in shown:
        sample = samples(whole)[step][int(tag.split("/")[1])]
        assert sample["prompt"] in text and sample["text"] in text


@pytest.mark.slow
def test_a_resumed_run_has_the_texts_of_one_that_was_not_stopped(whole: Path, tmp_path: Path) -> None:
    folder = run(tmp_path, "steps=2", "optim.schedule=constant")
    run(tmp_path, "steps=4", "optim.schedule=constant", "checkpoint.allow=[steps]")
    constant = run(tmp_path, "steps=4", "optim.schedule=constant", "name=at-once")
    assert samples(folder) == samples(constant)
    assert texts_on_the_board(folder) == texts_on_the_board(constant)


def test_prompts_of_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, "eval.prompts=['7: the', '']", "steps=2")
    assert [sample["prompt"] for sample in samples(folder)[2]] == ["7: the", ""]
    assert "step 2/2  sample  '7: the' -> " in capsys.readouterr().out


def test_none(tmp_path: Path) -> None:
    folder = run(tmp_path, "eval.samples=0", "steps=2")
    assert not (folder / "samples.jsonl").exists()


def test_a_prompt_that_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    config = load(settings(tmp_path, *SHORT, f"eval.prompts=[ok, '{'x' * 40}']"))
    with pytest.raises(ConfigError, match="^eval.prompts: prompt 2, 'x*', has 40 tokens: data.seq_len = 32 leaves none"):
        make_sampler(*build_with_data(config))
    assert not config.rundir.exists()


def test_sampling_changes_nothing_of_the_run(whole: Path, tmp_path: Path) -> None:
    without = run(tmp_path, "eval.samples=0")

    def losses(folder: Path) -> list[float]:
        return [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    assert np.array_equal(losses(whole), losses(without))
