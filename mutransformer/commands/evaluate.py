"""Score a checkpoint on the whole validation or test split, as JSON.

Example: mutransformer evaluate runs/small/config.yaml eval.split=test eval.checkpoint=best

All tokens of the split count, except those that data.packing=pad truncates. If all count, the losses of a unigram and a bigram
model of the same training tokens are given for comparison.
"""

import json
from argparse import Namespace

from mutransformer.commands import RUN_KEYS, start
from mutransformer.errors import FINISHED

KEYS = ("eval.split", "eval.checkpoint", *RUN_KEYS, "data.batch_size", "data.cache_dir", "mesh.x", "mesh.y")


def run(args: Namespace) -> int:
    config = start(args.settings)
    from mutransformer.training.evaluate import evaluate_run
    from mutransformer.training.program import build_with_data

    print(json.dumps(evaluate_run(*build_with_data(config)), indent=2))
    return FINISHED
