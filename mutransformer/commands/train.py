"""Train a Transformer, or resume a run that was stopped.

Example: mutransformer train small steps=2000 optim.lr=0.01

The run's folder, WORKDIR/NAME, gets checkpoints, metrics.jsonl, TensorBoard events and the resolved config.yaml. The same command
resumes from the latest checkpoint. Exit code: 0 finished; 75 stopped by a signal with a checkpoint saved; 1 the loss or the
weights are not finite, or the run diverged; 2 a mistake in the settings, a full disk, or a folder that is in use.
"""

import shutil
import sys
from argparse import Namespace

from mutransformer.commands import RUN_KEYS, SIZE_KEYS, start_jax
from mutransformer.config.load import list_configs, load
from mutransformer.errors import USAGE_ERROR
from mutransformer.sharding.stopping import stop_on_signals

KEYS = (*RUN_KEYS, "steps", *SIZE_KEYS, "data.source", "data.files", "mesh.x", "mesh.y")


def run(args: Namespace) -> int:
    if not args.settings:
        print("error: train needs a config; for the first one: mutransformer train small", file=sys.stderr)
        print(f"\nshipped configs:\n{list_configs(shutil.get_terminal_size().columns)}", file=sys.stderr)
        print("\nA YAML file, a run's folder or settings, KEY=VALUE, will do as well.", file=sys.stderr)
        return USAGE_ERROR
    with stop_on_signals() as stop:
        with stop.at_once():
            config = load(args.settings)
            print(f"{config.name}: starting", flush=True)  # JAX alone takes seconds to import
            start_jax(config, trains=True)
            from mutransformer.generation.samples import make_sampler
            from mutransformer.training import loop

        return loop.run(config, stop, make_sampler)
