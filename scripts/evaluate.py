"""Scores a checkpoint: python scripts/evaluate.py runs/small/config.yaml [eval.split=test] [eval.checkpoint=best]

The whole split counts, but for what data.packing=pad cuts off. Beside the model's loss stand those of a unigram and a bigram
model of the same training tokens, where they have the same tokens to predict.
"""

import json
import sys

from mutransformer.sharding.processes import launch


def main(config):
    from mutransformer.training.evaluate import score
    from mutransformer.training.metrics import setup_logging

    setup_logging()
    print(json.dumps(score(config), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(launch(main, __doc__ or ""))
