"""Continue a text with a run's model.

Example: mutransformer generate runs/small/config.yaml --prompt 'def ' --tokens 100

Reads only the run's folder. Without a prompt a new document begins. The same options give the same text.
"""

import codecs
import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mutransformer.commands import RUN_KEYS, start_jax
from mutransformer.config.load import load
from mutransformer.errors import FINISHED, ConfigError

KEYS = ("eval.checkpoint", *RUN_KEYS, "mesh.x", "mesh.y")


def add_arguments(parser: ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", metavar="TEXT", help="text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file with the text to continue")
    add = parser.add_argument
    add("--samples", type=int, default=1, metavar="N", help="continuations to draw (default: 1)")
    add("--tokens", type=int, metavar="N", help="maximum number of new tokens (default: 200, or what data.seq_len leaves)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0: always the most probable token (default: 0.8)")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable tokens; 0: from all (default: 0)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens of joint probability P (default: 1.0)")
    add("--seed", type=int, default=0, metavar="N", help="random seed of the draws (default: 0)")
    add("--json", action="store_true", help="print prompt, texts, tokens and whether an eos ended each text, as JSON")


def run(args: Namespace) -> int:
    config = load(args.settings)
    from mutransformer.generation import Sampling, generate

    sampling = Sampling(args.samples, args.tokens, args.temperature, args.top_k, args.top_p, args.seed)
    prompt = args.prompt if args.prompt_file is None else read_prompt(args.prompt_file)
    start_jax(config)
    result = generate(config, prompt, sampling)
    if args.json:
        print(json.dumps(result, indent=2))
        return FINISHED
    n = len(result["samples"])
    for i, sample in enumerate(result["samples"], start=1):
        if n > 1:
            print(f"--- {i} of {n}")
        print(prompt + sample["text"])
    return FINISHED


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
