"""Programs without a tokenizer, and what follows from a config without devices, for tests."""

from typing import Any

from mutransformer.config.schema import Config
from mutransformer.model.weights import Block, Transformer, transformer_specs
from mutransformer.model.weights import block_specs as specs_of_block
from mutransformer.sharding.spec import Weight
from mutransformer.training.program import Program, Vocabulary, build


def program(config: Config, devices: Any = None, bos_id: int = 0) -> Program:
    """devices: a mesh, or devices to lay config.mesh on; None: all."""
    return build(config, devices, Vocabulary(config.model.n_vocab or config.data.vocab_size, bos_id))


def specs(config: Config) -> Transformer[Weight]:
    return transformer_specs(config.model, config.mesh.y)


def block_specs(config: Config) -> Block[Weight]:
    return specs_of_block(config.model, config.mesh.y)
