"""Trains a Transformer: python scripts/train.py configs/small.yaml [key=value ...]"""

import sys

from mutransformer.launch import launch


def main(config):
    from mutransformer.metrics import setup_logging
    from mutransformer.train import train

    setup_logging()
    return train(config)


if __name__ == "__main__":
    sys.exit(launch(main, __doc__ or ""))
