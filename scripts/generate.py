"""Continues a text by a run's model: python scripts/generate.py runs/small/config.yaml --prompt 'def ' [key=value ...]

Only the run's folder is read. Without a prompt a text begins anew. The same options give the same text.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

from mutransformer.config import load as settings
from mutransformer.config.schema import ConfigError
from mutransformer.sharding.processes import command, guarded, prepare_jax


def main() -> int:
    parser = command(__doc__ or "")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", metavar="TEXT", help="what to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file that holds it")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="continuations to draw (1)")
    parser.add_argument("--tokens", type=int, metavar="N", help="new tokens, at most (200, or what data.seq_len leaves)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: always the most probable token (0.8)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable tokens; 0: from all (0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="from the fewest that have probability P (1.0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    parser.add_argument("--json", action="store_true", help="print prompt, texts, tokens and whether an eos ended them as JSON")
    given = parser.parse_intermixed_args()
    return guarded(lambda: run(given))


def run(given: Namespace) -> int:
    config = settings.load(given.args)
    from mutransformer.generation import Sampling, generate
    from mutransformer.training.metrics import setup_logging

    how = Sampling(given.samples, given.tokens, given.temperature, given.top_k, given.top_p, given.seed)
    try:
        prompt = given.prompt if given.prompt_file is None else given.prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{given.prompt_file}: not UTF-8 at byte {error.start}") from None
    prepare_jax(config.distributed)
    setup_logging()
    found = generate(config, prompt, how)
    if given.json:
        print(json.dumps(found, indent=2))
        return 0
    for i, sample in enumerate(found["samples"], start=1):
        if len(found["samples"]) > 1:
            print(f"--- {i} of {len(found['samples'])}")
        print(prompt + sample["text"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
