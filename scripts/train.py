"""Trains a Transformer: python scripts/train.py configs/small.yaml [key=value ...]"""

import sys

from mutransformer.sharding.processes import launch


def main(config):
    from mutransformer.training.loop import train
    from mutransformer.training.program import build_with_data
    from mutransformer.training.metrics import setup_logging

    setup_logging()
    return train(*build_with_data(config))


if __name__ == "__main__":
    sys.exit(launch(main, __doc__ or ""))
