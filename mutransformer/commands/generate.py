"""Continue texts with a run's model.

Example: mutransformer generate runs/small --prompt 'def ' --prompt 'class ' --tokens 100

Reads only the run's folder. Without a prompt a new document begins. All texts are computed together, and shown as they come, one
after another. The same options give the same texts; a text does not depend on the other prompts. Times are on standard error.
"""

import codecs
import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mutransformer.commands import RUN_KEYS, messages_on_stderr, start_jax
from mutransformer.config.load import load
from mutransformer.errors import FINISHED, ConfigError, check

KEYS = ("eval.checkpoint", *RUN_KEYS, "mesh.x", "mesh.y")


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    # One list, in the order of the command line.
    for option, metavar, about in (
        ("--prompt", "TEXT", "text to continue; may be given several times, like the two options below"),
        ("--prompt-file", "FILE", "a UTF-8 file with a text to continue"),
        ("--prompt-lines", "FILE", "a UTF-8 file with a text to continue in each line; blank lines are left out"),
    ):
        kind = option.removeprefix("--")
        add(option, dest="prompts", action="append", type=lambda given, kind=kind: (kind, given), metavar=metavar, help=about)
    add("--samples", type=int, default=1, metavar="N", help="continuations to draw of each prompt (default: 1)")
    add("--tokens", type=int, metavar="N", help="maximum number of new tokens (default: 200, or what data.seq_len leaves)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a text before this string; may be given several times")
    add("--temperature", type=float, default=0.8, metavar="T", help="0: always the most probable token (default: 0.8)")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable tokens; 0: from all (default: 0)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens of joint probability P (default: 1.0)")
    add("--seed", type=int, default=0, metavar="N", help="random seed of the draws (default: 0)")
    add("--batch", type=int, default=32, metavar="N", help="texts computed at a time, for memory (default: 32)")
    add("--json", action="store_true", help="print prompts, texts, tokens and why each text ended, as JSON at the end")


def run(args: Namespace) -> int:
    began = time.perf_counter()
    config = load(args.settings)
    prompts = read_prompts(args.prompts)
    from mutransformer.generation.generate import generate
    from mutransformer.generation.sampling import Sampling

    options = args.samples, args.tokens, args.temperature, args.top_k, args.top_p, args.seed, tuple(args.stop), args.batch
    sampling = Sampling(*options)
    screen = Screen(len(prompts), sampling.samples, began, quiet=args.json)
    with messages_on_stderr():
        start_jax(config)
        result = generate(config, prompts, sampling, screen.show)
    if args.json:
        print(json.dumps(result, indent=2))
    print(screen.speed(), file=sys.stderr)
    return FINISHED


class Screen:
    """Shows texts as they grow: the first that has not ended, then the next one. Keeps the times of their tokens."""

    def __init__(self, n_prompts: int, n_samples: int, began: float, quiet: bool) -> None:
        self._n_prompts, self._n_samples, self._began, self._quiet = n_prompts, n_samples, began, quiet
        self._at, self._shown = 0, -1  # the text that is shown, and how many of its characters; -1: its heading is missing
        self._first: tuple[float, int] | None = None  # when the first tokens came, and how many
        self._last = began, 0

    def show(self, texts: Sequence[Any]) -> None:
        """The texts as generation.text.Continuation, all of them each time."""
        self._last = time.perf_counter(), sum(len(text.tokens) + (text.end == "eos") for text in texts)
        if self._first is None and self._last[1]:
            self._first = self._last
        while not self._quiet and self._at < len(texts):
            text = texts[self._at]
            if self._shown < 0:
                print(self._heading(), end="")
                print(text.prompt, end="")
                self._shown = 0
            print(text.settled[self._shown :], end="", flush=True)
            self._shown = max(self._shown, len(text.settled))
            if text.end is None:
                break
            print(flush=True)
            self._at, self._shown = self._at + 1, -1

    def _heading(self) -> str:
        prompt, sample = divmod(self._at, self._n_samples)
        if self._n_prompts == 1:
            return f"--- {sample + 1} of {self._n_samples}\n" if self._n_samples > 1 else ""
        of_prompt = f", sample {sample + 1} of {self._n_samples}" if self._n_samples > 1 else ""
        return f"--- prompt {prompt + 1} of {self._n_prompts}{of_prompt}\n"

    def speed(self) -> str:
        """The times until the first token, and the rate of those after it, as a line."""
        (end, total), (start, first) = self._last, self._first or self._last
        n_texts = self._n_prompts * self._n_samples
        texts = "1 text" if n_texts == 1 else f"{n_texts} texts"
        tokens = "1 token" if total == 1 else f"{total} tokens"
        line = f"{texts}, {tokens}; the first after {start - self._began:.1f} s"
        return line + (f", then {(total - first) / (end - start):,.0f} tokens/s" if total > first else "")


def read_prompts(given: Sequence[tuple[str, str]] | None) -> list[str]:
    """The texts that options name, as pairs of an option's name without dashes and its value; None: one empty text.

    Raises:
        ConfigError: a file is not UTF-8, or has only blank lines.
        OSError: a file cannot be read.
    """
    prompts: list[str] = []
    for kind, value in given or [("prompt", "")]:
        if kind == "prompt":
            prompts.append(value)
        elif kind == "prompt-file":
            prompts.append(read_prompt(Path(value)))
        else:
            lines = [line.removesuffix("\r") for line in read_prompt(Path(value)).split("\n")]
            check(any(map(str.strip, lines)), f"--prompt-lines {value}: has no line with text")
            prompts += filter(str.strip, lines)
    return prompts


def read_prompt(file: Path) -> str:
    """The text of a file as training reads it: without a byte-order mark, and with its own line ends.

    Raises:
        ConfigError: it is not UTF-8.
        OSError: it cannot be read.
    """
    data = file.read_bytes()
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 at byte {len(data) - len(error.object) + error.start}") from None
