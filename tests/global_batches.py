"""Writes a hash of each of a run's first 50 global batches: python global_batches.py FOLDER ORDER key=value ...

ORDER is of the devices in the mesh, a digit each.

Into a file per process and not to standard output, where Gloo's threads write into each other's lines.
"""

import hashlib
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mutransformer.config.load import load
from mutransformer.data.batches import pipeline
from mutransformer.data.cache.prepare import prepare
from mutransformer.sharding.mesh import data_share, make_mesh, put_batch
from mutransformer.sharding.processes import all_processes, join_processes

config = load(sys.argv[3:])
join_processes(config.distributed)
mesh = make_mesh(config.mesh, [jax.devices()[int(i)] for i in sys.argv[2]])
corpus = prepare(config.data, all_processes())
n_vocab = corpus.tokenizer.n_vocab
batches = pipeline.train_batches(corpus.splits["train"], config.data, config.seed, *data_share(mesh), n_vocab)
lines = []
for _ in range(50):
    batch = [a for a in put_batch(next(batches), mesh) if a is not None]
    whole = [np.ascontiguousarray(multihost_utils.process_allgather(a, tiled=True)) for a in batch]
    lines.append(f"{hashlib.sha256(b''.join(a.tobytes() for a in whole)).hexdigest()} {[a.shape for a in whole]}")
batches.close()
(Path(sys.argv[1]) / f"process{jax.process_index()}").write_text("\n".join(lines))
if jax.process_count() > 1:
    jax.distributed.shutdown()
