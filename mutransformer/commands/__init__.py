"""The commands of the command line, a module each, and what several of them share.

A command's docstring is its help: a summary line, an example, details. The module has run(args) -> exit code, and
add_arguments(parser) if it has options, and KEYS, the settings that its help lists, if it takes a config. None imports JAX before
it has checked its arguments.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mutransformer.config.load import load
from mutransformer.config.schema import Config
from mutransformer.sharding import processes

RUN_KEYS = ("name", "workdir")
DATA_KEYS = ("data.source", "data.files", "data.path", "data.tokenizer", "data.vocab_size", "data.cache_dir")
SIZE_KEYS = ("model.d_model", "model.n_layer", "data.seq_len", "data.batch_size", "optim.lr", "optim.rule")


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Within it log messages and progress go to standard error, so that standard output holds a command's results alone."""
    import rich

    console = rich.get_console()
    before, console.stderr = console.stderr, True
    try:
        yield
    finally:
        console.stderr = before


def start(settings: Sequence[str]) -> Config:
    """Loads a config, then starts JAX and logging. Raises ConfigError as `load` and `start_jax` do."""
    config = load(settings)
    start_jax(config)
    return config


def start_jax(config: Config, trains: bool = False) -> None:
    """Starts JAX and logging; a command that trains also warns of settings that are unlikely to be intended.

    Raises ConfigError if another process of the run cannot be reached.
    """
    processes.prepare_jax(config)
    from mutransformer.training import metrics

    metrics.setup_logging()
    for text in config.warnings() if trains else []:
        logging.getLogger(__name__).warning("%s", text)
