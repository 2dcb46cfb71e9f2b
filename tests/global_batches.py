"""Prints a hash of each of the first global batches of a run: python global_batches.py COUNT key=value ..."""

import hashlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from mutransformer.data import pipeline
from mutransformer.data.corpus import prepare
from mutransformer.launch import connect
from mutransformer.mesh import data_share, make_mesh, put
from mutransformer.settings import load

config = load(sys.argv[2:])
connect(config.distributed)
mesh = make_mesh(config.mesh)
corpus = prepare(config.data)
n_vocab = corpus.tokenizer.n_vocab
batches = pipeline.train_batches(corpus.splits["train"], config.data, config.seed, *data_share(mesh), n_vocab)
for _ in range(int(sys.argv[1])):
    tokens = multihost_utils.process_allgather(put(next(batches), mesh).tokens, tiled=True)
    print(hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest(), tokens.shape)
batches.close()
if jax.process_count() > 1:
    jax.distributed.shutdown()
