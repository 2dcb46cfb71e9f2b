"""Trains a Transformer: python scripts/train.py configs/small.yaml [key=value ...]"""

import sys

from mutransformer.sharding.processes import launch


def main(config):
    from mutransformer.training.loop import train
    from mutransformer.training.metrics import setup_logging

    setup_logging()
    return train(config)


if __name__ == "__main__":
    sys.exit(launch(main, __doc__ or ""))
