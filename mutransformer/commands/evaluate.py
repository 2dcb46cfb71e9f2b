"""Score a checkpoint on the whole validation or test split, and on other texts.

Example: mutransformer evaluate runs/small eval.split=test eval.sets.notes.files=[notes.txt]

Of each text: loss in nats per token, perplexity, bits per byte, and the loss by position in a row. All tokens count, except those
that data.packing=pad truncates. If all tokens of the split count, the losses of a unigram and a bigram model of the same training
tokens are given for comparison.

With --tasks the tasks of lm-evaluation-harness are scored instead, by an export to transformers, and printed as JSON. Needs the
extra lm-eval.
"""

import json
from argparse import ArgumentParser, Namespace
from typing import Any

from mutransformer.commands import RUN_KEYS, messages_on_stderr, start
from mutransformer.config.schema import Config
from mutransformer.errors import FINISHED

KEYS = ("eval.split", "eval.sets", "eval.checkpoint", *RUN_KEYS, "data.batch_size", "data.cache_dir", "mesh.x", "mesh.y")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    tasks = "tasks of lm-evaluation-harness, or YAML files of tasks, to score instead"
    parser.add_argument("--tasks", metavar="NAME,...", help=tasks)


def run(args: Namespace) -> int:
    with messages_on_stderr():
        config = start(args.settings)
        result = _evaluate_tasks(config, args.tasks.split(",")) if args.tasks else _evaluate(config)
    print(json.dumps(result, indent=2, default=str) if args.json or args.tasks else tables(result))
    return FINISHED


def _evaluate_tasks(config: Config, tasks: list[str]) -> dict[str, Any]:
    from mutransformer.exchange.tasks import evaluate_tasks

    return evaluate_tasks(config, tasks)["results"]


def _evaluate(config: Config) -> dict[str, Any]:
    """The results of evaluate_run, with a progress bar for each text in a terminal."""
    import rich
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from mutransformer.training.evaluate import evaluate_run
    from mutransformer.training.program import build_with_data

    program, corpus = build_with_data(config)
    console, tasks = rich.get_console(), dict[str, TaskID]()
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}% "), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def report(name: str, scored: int, tokens: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=tokens)
            progress.update(tasks[name], completed=scored)

        return evaluate_run(program, corpus, report)


def tables(result: dict[str, Any]) -> str:
    """The results of evaluate_run as lines of text: the scores of each text, then the loss by position."""
    texts = {result["split"]: result, **result["sets"]}
    width = max(12, *map(len, texts))
    lines = [f"{result['run']}, step {result['step']}", ""]
    lines += [f"{'':{width}} {'tokens':>11} {'bytes/token':>11} {'loss':>8} {'perplexity':>11} {'bits/byte':>9}"]

    def row(name: str, scores: dict[str, float], counts: str) -> str:
        loss, perplexity, bits = scores["loss"], scores["perplexity"], scores["bits_per_byte"]
        return f"{name:{width}} {counts:>23} {loss:8.4f} {perplexity:11.5g} {bits:9.4f}"

    for name, text in texts.items():
        lines.append(row(name, text["model"], f"{text['scored']:11,} {text['bytes'] / text['tokens']:11.2f}"))
        lines += [row(f"  {model}", text[model], "") for model in ("unigram", "bigram") if model in text]
        if text["scored"] < text["tokens"]:
            lines.append(f"  {text['tokens'] - text['scored']:,} tokens are truncated and do not count")
    spans = dict.fromkeys((one["first"], one["last"]) for text in texts.values() for one in text["by_position"])
    columns = {name: max(8, len(name)) for name in texts}
    lines += ["", "loss by position in a row (tokens read before)", ""]
    lines.append(f"{'':12}" + "".join(f" {name:>{size}}" for name, size in columns.items()))
    for span in sorted(spans):
        title = str(span[0]) if span[0] == span[1] else f"{span[0]}-{span[1]}"
        losses = ({(one["first"], one["last"]): one["loss"] for one in text["by_position"]}.get(span) for text in texts.values())
        cells = zip(losses, columns.values(), strict=True)
        lines.append(f"{title:12}" + "".join(f" {'' if loss is None else f'{loss:.4f}':>{size}}" for loss, size in cells))
    return "\n".join(lines)
