"""The logits of a run and of `transformers` for the same rows, in float32 on the CPU."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int32

from mutransformer.config.run import MeshConfig
from mutransformer.config.schema import Config, PrecisionConfig
from mutransformer.data.tokenizers.tokenizer import Tokenizer
from mutransformer.errors import ConfigError
from mutransformer.model.weights import Transformer
from mutransformer.training.program import Program, Vocabulary, build
from mutransformer.training.step import make_logits

TOLERANCE = 1e-5  # of the largest logit, or of 1 if that is larger: float32 has 6e-8
ROWS, POSITIONS = 4, 256  # compared at most


class Parity(NamedTuple):
    difference: float  # the largest, over all positions and ids
    largest: float  # logit, by its absolute value
    rows: str  # what was compared

    @property
    def holds(self) -> bool:
        return self.difference <= TOLERANCE * max(1.0, self.largest)

    def __str__(self) -> str:
        return f"largest difference of a logit {self.difference:.2g}, largest logit {self.largest:.3g}, on {self.rows}"


def on_cpu(config: Config, vocabulary: Tokenizer | Vocabulary) -> Program:
    """A run's program for one CPU in float32, which can restore the run's checkpoints."""
    model = dataclasses.replace(config.model, attention_kernel="xla")
    allow = [*config.checkpoint.allow, "precision.compute"]
    config = dataclasses.replace(
        config,
        model=model,
        mesh=MeshConfig(x=1, y=1),
        precision=PrecisionConfig("float32", config.precision.grad_reduce_dtype, config.precision.mu_dtype),
        checkpoint=dataclasses.replace(config.checkpoint, allow=allow),
    )
    return build(config, jax.devices("cpu")[:1], vocabulary)


def random_rows(program: Program, seed: int = 0) -> Int32[np.ndarray, "B T"]:
    n_vocab, T = program.config.model.n_vocab, min(POSITIONS, program.config.data.seq_len)
    assert n_vocab is not None
    return np.random.default_rng(seed).integers(0, n_vocab, (ROWS, T), dtype=np.int32)


def compare(program: Program, params: Transformer[Any], model: Any, tokens: Int32[np.ndarray, "B T"], rows: str) -> Parity:
    """Compares the logits of weights, and of a model of transformers, before each token of the rows. rows: their description."""
    ours = np.asarray(make_logits(program)(params, tokens))[:, :, : program.config.model.n_vocab]
    inputs = np.concatenate([np.full((len(tokens), 1), program.bos_id, np.int32), tokens[:, :-1]], axis=1)
    theirs = logits(model, inputs)
    difference = float(np.max(np.abs(ours - theirs)))
    return Parity(difference if np.isfinite(difference) else np.inf, float(np.max(np.abs(ours))), rows)


def logits(model: Any, inputs: Int32[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
    torch = import_module("torch")
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(inputs.astype(np.int64))).logits.float().numpy()


@contextmanager
def libraries() -> Iterator[tuple[Any, Any]]:
    """torch and transformers, which print neither bars nor advice meanwhile. Raises ConfigError if one is not installed."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        torch, transformers, logging = map(import_module, ("torch", "transformers", "transformers.utils.logging"))
    except ImportError as error:
        raise ConfigError(f"needs {error.name}: pip install 'mutransformer[hf-export]'") from None
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield torch, transformers
    finally:
        if enabled:
            logging.enable_progress_bar()


def load_model(transformers: Any, folder: Path) -> Any:
    """A model in float32 for inference, from safetensors only. Raises OSError or ValueError if there is none."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), trust_remote_code=False, use_safetensors=True, dtype="float32", attn_implementation="eager"
    )
