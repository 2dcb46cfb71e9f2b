"""Train a Transformer, or resume a run that was stopped.

Example: mutransformer train small steps=2000 optim.lr=0.01

The run's folder, WORKDIR/NAME, gets checkpoints, metrics.jsonl, TensorBoard events and the resolved config.yaml. The same command
resumes from the latest checkpoint. Exit code: 0 finished; 75 stopped by a signal with a checkpoint saved; 1 the loss or the
weights are not finite; 2 a mistake in the settings.
"""

from argparse import Namespace

from mutransformer.commands import RUN_KEYS, SIZE_KEYS, start

KEYS = (*RUN_KEYS, "steps", *SIZE_KEYS, "data.source", "data.files", "mesh.x", "mesh.y")


def run(args: Namespace) -> int:
    config = start(args.settings)
    from mutransformer.training.loop import train
    from mutransformer.training.program import build_with_data

    return train(*build_with_data(config))
