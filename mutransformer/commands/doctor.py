"""Check what a run needs, without training: folder, data, devices, disk, checkpoints, evaluation. A verdict on each.

Example: mutransformer doctor small name=mine

The checks are those that `train` makes before its first step, and besides the checksums of every checkpoint, and the loss on
held-out text. Text that is not tokenized yet is tokenized. Exit code: 0 all passed; 1 a check failed.
"""

import platform
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import metadata
from typing import TYPE_CHECKING

from mutransformer.commands import RUN_KEYS, SIZE_KEYS, start_jax
from mutransformer.config.load import load
from mutransformer.config.schema import Config
from mutransformer.errors import FAILED, FINISHED, ConfigError

if TYPE_CHECKING:
    from mutransformer.training.run_folder import RunFolder

KEYS = (*RUN_KEYS, "steps", *SIZE_KEYS, "data.source", "data.files", "mesh.x", "mesh.y")
VERSIONS = ("mutransformer", "jax", "jaxlib", "equinox", "optax", "orbax-checkpoint", "grain")


def run(args: Namespace) -> int:
    config = load(args.settings)
    start_jax(config, trains=True)
    from mutransformer.training.url_folder import run_folder

    checks, folder = _Checks(), run_folder(config)
    try:
        _examine(config, folder, checks)
    finally:
        folder.discard()
    return FAILED if checks.failed else FINISHED


class _Checks:
    """Prints a line for each check, and remembers whether one failed."""

    def __init__(self) -> None:
        self.failed = False

    @contextmanager
    def __call__(self, name: str) -> Iterator[list[str]]:
        """The block is the check; it appends what it found to the list, or raises."""
        found: list[str] = []
        try:
            yield found
        except (ConfigError, OSError, FloatingPointError) as error:
            self.failed = True
            print(f"FAIL  {name}: {error}")
        else:
            print(f"PASS  {name}: {'; '.join(found)}")


def _examine(config: Config, folder: "RunFolder", check: _Checks) -> None:
    """All checks; those that need what another one failed to give are left out."""
    import jax

    from mutransformer.data.batches import pipeline
    from mutransformer.model.execution import with_compute
    from mutransformer.sharding.mesh import data_share
    from mutransformer.training.checkpoint import Checkpoints
    from mutransformer.training.evaluate import evaluate
    from mutransformer.training.preflight import check_before_data, check_before_training
    from mutransformer.training.program import Program, Vocabulary, build, prepare_data
    from mutransformer.training.step import make_eval_step

    with check("versions") as found:
        found += [f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in VERSIONS)]
    with check("folder") as found:
        check_before_data(config, folder)
        found.append(f"{folder.name} can be written to, and no run has it")
    with check("devices") as found:
        for_any_text = build(config, vocabulary=Vocabulary(config.model.n_vocab or 256))
        found.append(" ".join(str(for_any_text).splitlines()[0].split()[1:]))
    corpus, start = None, 0
    folder.pull()
    with check("data") as found:
        corpus = prepare_data(config)
        found += [f"{split} {text.n_tokens:,} tokens" for split, text in corpus.splits.items()]
    if (folder.path / "checkpoints").is_dir():
        resolved = with_compute(config if corpus is None else config.with_vocab(corpus.tokenizer.n_vocab), jax.local_devices()[0])
        with check("checkpoints") as found, closing(Checkpoints(resolved, folder, read_only=True)) as checkpoints:
            faults = checkpoints.faults()
            found += [f"step {step} intact" for step, fault in faults.items() if fault is None]
            corrupt = [f"step {step} is corrupt: {fault}" for step, fault in faults.items() if fault is not None]
            if corrupt:
                raise ConfigError("; ".join([*found, *corrupt]))
            start = checkpoints.latest() or 0
            if start and corpus is not None:
                checkpoints.check_same(start, pipeline.fingerprint(corpus.splits["train"], config.data, config.seed))
                found.append("its settings and its data are those of this run")
    if corpus is None:
        return
    program: Program | None = None
    with check("model") as found:
        program = build(config, vocabulary=corpus.tokenizer)
        found.append(f"{program.n_params:,} parameters, which the mesh divides")
    if program is None:
        return
    with check("disk and splits") as found:
        check_before_training(program, corpus, folder.path, start)
        found.append("the checkpoints of the run fit; validation gives a batch")
    with check("evaluation") as found:
        share, mesh, split = data_share(program.mesh), program.mesh, corpus.splits["validation"]
        rows = pipeline.eval_batches(split, config.data, 1, *share, program.vocabulary.n_vocab)
        loss = evaluate(make_eval_step(program), program.init_state().params, rows, mesh, split).results["loss"]
        found.append(f"loss {loss:.4f} on a batch of held-out text, before any training")
        if not loss < float("inf"):
            raise FloatingPointError(f"the loss on held-out text is {loss}")
