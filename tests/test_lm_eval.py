"""lm-evaluation-harness reads an exported folder, and its loglikelihoods are ours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from short_runs import settings as run_settings

from mutransformer.cli import main
from mutransformer.config.load import load
from mutransformer.data.tokenizers.registry import saved_tokenizer
from mutransformer.errors import FINISHED, USAGE_ERROR
from mutransformer.exchange.parity import on_cpu
from mutransformer.exchange.tasks import evaluate_tasks
from mutransformer.generation.generate import restore_params
from mutransformer.training.run_folder import RunFolder
from mutransformer.training.step import make_logits

pytest.importorskip("torch", reason="needs the extra hf-export")
pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

QUESTIONS = [
    {"question": "12: the", "choices": [" 144", " of 12", "\u2581"], "label": 0},
    {"question": "7:", "choices": [" the 49", " is"], "label": 1},
    {"question": "\u4e2d", "choices": ["\n", "of the"], "label": 0},
]
TASK = """
task: squares
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval")
    assert main(["train", *run_settings(folder), "steps=5", "name=r", "optim.warmup_steps=1"]) == FINISHED
    (folder / "squares.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS), encoding="utf-8")
    (folder / "squares.yaml").write_text(TASK.format(file=folder / "squares.jsonl"), encoding="utf-8")
    return folder / "runs/r"


def loglikelihood(made: Any, params: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Of the continuation's tokens behind those of the context, which stand behind bos."""
    before, whole = (ids.tolist() for ids in tokenizer.encode([context, context + continuation]))
    row = np.zeros((1, made.config.data.seq_len), np.int32)
    row[0, : len(whole)] = whole
    logits = np.asarray(make_logits(made)(params, row))[0, :, : made.config.model.n_vocab].astype(np.float64)
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    return float(sum(log_p[t, whole[t]] for t in range(len(before), len(whole))))


@pytest.mark.filterwarnings("default")
def test_loglikelihoods_are_ours(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    config = load([str(run)])
    tokenizer = saved_tokenizer(config.data, config.rundir)
    made = on_cpu(config, tokenizer)
    _, params = restore_params(made, tokenizer, RunFolder(config.rundir))
    found = evaluate_tasks(config, [str(run.parents[1] / "squares.yaml")])
    assert set(found["results"]) == {"squares"} and 0 <= found["results"]["squares"]["acc,none"] <= 1
    samples = sorted(found["samples"]["squares"], key=lambda sample: sample["doc_id"])
    compared = 0
    for sample, doc in zip(samples, QUESTIONS, strict=True):
        assert sample["doc"]["question"] == doc["question"]
        for choice, response in zip(doc["choices"], sample["resps"], strict=True):
            theirs = float(response[0][0])
            assert abs(theirs - loglikelihood(made, params, tokenizer, doc["question"], choice)) < 1e-4
            assert abs(theirs - loglikelihood(made, params, tokenizer, "x" + doc["question"], choice)) > 1e-3, "the test is blind"
            compared += 1
    assert compared == 7


def test_a_task_that_does_not_exist_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--tasks", "no_such_task"]) == USAGE_ERROR
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --tasks no_such_task: no such task")
