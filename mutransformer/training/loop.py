"""A training run: resume or start, loop, close."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import jax
from jax import Array

from mutransformer import __version__
from mutransformer.config.load import to_yaml
from mutransformer.config.schema import Config
from mutransformer.data.batches import pipeline
from mutransformer.data.batches.pipeline import Batches
from mutransformer.data.batches.rows import Batch
from mutransformer.data.cache.dataset import Corpus
from mutransformer.errors import FINISHED, STOPPED, check, translate_errors
from mutransformer.model.weights import Transformer
from mutransformer.mup.checks.runs import has_diverged
from mutransformer.sharding.mesh import data_share, put_batch
from mutransformer.sharding.peers import Watch
from mutransformer.sharding.processes import all_processes
from mutransformer.sharding.stopping import Stopped, StopRequest, stop_on_signals
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.evaluate import evaluate
from mutransformer.training.layer_sizes import LayerSizes
from mutransformer.training.metrics import Diverged, Metrics
from mutransformer.training.preflight import (
    check_before_data,
    check_before_training,
    final_result,
    warn_of_another_schedule,
)
from mutransformer.training.profile import Profile
from mutransformer.training.program import Program, TrainState, build_with_data
from mutransformer.training.run_folder import RunFolder, owned_by_all
from mutransformer.training.sinks import Sample
from mutransformer.training.skipped_steps import NonFiniteLoss, SkippedSteps
from mutransformer.training.step import make_eval_step, make_train_step
from mutransformer.training.url_folder import run_folder

CONTINUOUS = 0.01  # relative difference of a loss that other devices or another mesh may make, in bfloat16 too

Sampler = Callable[[Transformer[Array]], list[Sample]]  # the same prompts every time, continued by these weights

_log = logging.getLogger(__name__)


def run(config: Config, stop: StopRequest, make_sampler: Callable[[Program, Corpus], Sampler | None]) -> int:
    """Prepares the data of a run and trains it, as train() does. Raises Stopped if asked to before there is a step to save."""
    folder = run_folder(config)
    with stop.at_once():
        check_before_data(config, folder)
        program, corpus = build_with_data(config)
        sampler = make_sampler(program, corpus)
    return train(program, corpus, stop, folder, sampler)


def train(
    program: Program,
    corpus: Corpus,
    stop: StopRequest | None = None,
    folder: RunFolder | None = None,
    sampler: Sampler | None = None,
) -> int:
    """Trains until `steps` updates are completed, or until asked to stop.

    stop: None: by the signals of stop_on_signals. folder: of the run; None: the one that the config names.
    sampler: gives the texts that are shown at evaluations; None: no texts.

    Returns the exit code: FINISHED, or STOPPED with a checkpoint of the last step.

    Raises:
        ConfigError: a setting does not fit the data, the checkpoints or the disk; the folder is in use, or was removed.
        NonFiniteLoss: the loss or the weights became NaN or infinite; the latest checkpoint is from before.
        Diverged: the final loss is far above that of equal probabilities for all ids.
    """
    with ExitStack() as stack:
        stop = stop or stack.enter_context(stop_on_signals())
        folder = folder or run_folder(program.config)
        stack.enter_context(owned_by_all(folder))
        return _train(program, corpus, stop, folder, sampler)


def _train(program: Program, corpus: Corpus, stop: StopRequest, folder: RunFolder, sampler: Sampler | None) -> int:
    config, split = program.config, corpus.splits["train"]
    fingerprint = pipeline.fingerprint(split, config.data, config.seed)
    share = data_share(program.mesh)
    batches = pipeline.train_batches(split, config.data, config.seed, *share, program.vocabulary.n_vocab)
    with closing(Checkpoints(config, folder)) as checkpoints, closing(batches):
        latest = checkpoints.latest(program.state)
        start = latest or 0
        check_before_training(program, corpus, folder.path, start)
        if latest is not None:  # it may be of step 0: an imported model, or a run that was stopped before its first step
            check(config.checkpoint.resume, f"checkpoint.resume = false: {folder.name} holds a run; choose another name=...")
            checkpoints.check_same(start, fingerprint)
            if start == config.steps and (result := final_result(folder.path, start)) is not None:
                _log.info("%s: finished, step %d/%d, validation loss %.5g", folder.name, start, start, result)
                return FINISHED
            state, position = checkpoints.restore(start, program.state)
            warn_of_another_schedule(program, checkpoints.settings(start), start)
            batches.set_state(position)
        else:
            state = program.init_state()
        with all_processes().first_in_process_0("the files of the run"):
            _write_run_files(program, corpus, folder)
        with Watch(config.watchdog, folder.path, folder.publish).running() as watch:
            if jax.process_count() > 1:
                stop.agree = watch.agree
            with Metrics(config, folder, program.flops_per_token, program.mesh.size, start) as log:
                trainer = Trainer(
                    program, corpus, checkpoints, batches, log, stop, watch, folder, fingerprint, sampler, state, start
                )
                log.note(_heading(program, corpus, folder, start))
                try:
                    trainer.check_loss(None if latest is None else checkpoints.probe(latest))
                    final = trainer.run()
                except RuntimeError:  # of JAX, perhaps because another process is gone
                    watch.explain()
                    raise
                log.flush()
                trainer.save()
                checkpoints.wait()
                log.close(final or {})
            if final is None:
                log.note(f"Stopped at step {trainer.step}; checkpoint saved. Run the same command again to resume.")
                return STOPPED
    loss, uniform = final["validation_whole/loss"], math.log(program.vocabulary.n_vocab)
    if has_diverged(uniform, loss):
        equal = f"that of equal probabilities for all {program.vocabulary.n_vocab} ids is {uniform:.3g}"
        raise Diverged(f"the run diverged: its final validation loss is {loss:.5g}, and {equal}; lower optim.lr")
    return FINISHED


@dataclass
class Trainer:
    """A run in progress: the state after `step` updates, and what the run saves to, reads, reports to, and is stopped by."""

    program: Program
    corpus: Corpus
    checkpoints: Checkpoints
    batches: Batches
    log: Metrics
    stop: StopRequest
    watch: Watch
    folder: RunFolder
    fingerprint: dict[str, object]  # of the data
    sampler: Sampler | None
    state: TrainState[Array]
    step: int  # updates completed

    def __post_init__(self) -> None:
        self._train_step, self._eval_step = make_train_step(self.program), make_eval_step(self.program)
        self._skip = jax.jit(lambda state: dataclasses.replace(state, step=state.step + 1), donate_argnums=0)
        self._layers: LayerSizes | None = None  # compiled when first needed
        self._skipped = SkippedSteps(
            self.program.config.bad_steps, self.folder, self.step, lambda step: self.batches.rows(step - 1)
        )

    def run(self) -> dict[str, float] | None:
        """All remaining steps, then the final evaluation. Returns its results by tag, or None if asked to stop.

        A step is saved before it is evaluated: what can fail comes last.
        """
        config = self.program.config
        with closing(Profile(config.profile, self.folder.path, wait_for=lambda: self.state.step)) as profile:
            try:
                if self.step and self.checkpoints.loss(self.step) is None:  # stopped before this step was evaluated
                    self.validate_if_due()
                while self.step < config.steps:
                    profile.step(self.step)
                    self.update()
                    if self.stop.poll():
                        return None
                    if _due(self.step, config.checkpoint.every) or self.step == config.steps:
                        with self.log.pause():
                            self.save()
                    self.validate_if_due()
                with self.log.pause():
                    return self.evaluate("validation_whole", config.eval.final_batches)
            except Stopped:  # while it waited for a batch, or evaluated: the state is complete
                return None

    def check_loss(self, before: float | None) -> None:
        """Evaluates one batch before any training, and compares a restored state with the saved one. A difference is logged.

        before: the loss that was saved with the state. Raises NonFiniteLoss if the loss is not finite.
        """
        loss = self.probe()
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"after step {self.step}: the loss on the first validation batch is {loss}")
        if before is not None and abs(loss - before) > CONTINUOUS * abs(before):
            text = "the restored state differs from the saved one: its loss on the first validation batch is %.5g, it was %.5g"
            _log.warning(text, loss, before)

    def probe(self) -> float:
        """The loss of the state on the first batch of the validation split."""
        return self._score(1)["loss"]

    def update(self) -> None:
        """One update. Raises Stopped if asked to stop before it has its batch."""
        self.watch.step_begins()
        self.watch.doing(f"waiting for the batch of step {self.step + 1}")
        with self.stop.at_once():  # a batch may never come
            batch = next(self.batches)
        self.watch.doing(f"computing step {self.step + 1}")
        self.step += 1
        if self.step in self._skipped.known:
            self.state = self._skip(self.state)
            _log.info("step %d is skipped, as it was before the run was resumed", self.step)
            return
        placed = put_batch(batch, self.program.mesh)
        measured = _due(self.step, self.program.config.log.layers)
        layers = self._layer_sizes(placed) if measured else None
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step):  # a profiler's tools report by step
            before = layers.before(self.state, placed) if layers else None
            self.state, scalars = self._train_step(self.state, placed)
        self._skipped.record(self.step, scalars)
        self.log.record(self.step, scalars)
        if layers and before:
            self.log.layers(self.step, layers.after(before, self.state, scalars), layers.layout)
        self.checkpoints.poll()

    def _layer_sizes(self, batch: Batch) -> LayerSizes:
        """What measures the layers with log.layers, compiled at the first call."""
        if self._layers is None:
            with self.log.pause():
                self.log.note(f"step {self.step}: compiling what measures the layers (log.layers), once")
                self.watch.doing("compiling what measures the layers", slow=True)
                self._layers = LayerSizes(self.program, self.state, batch)
                self.watch.doing(f"computing step {self.step}")
        return self._layers

    def validate_if_due(self) -> None:
        """Evaluates this step, if it is to be. Raises Stopped if asked to stop meanwhile."""
        config = self.program.config
        if not (_due(self.step, config.eval.every) or self.step == config.steps):
            return
        with self.log.pause():
            results = self.evaluate("validation", config.eval.batches)
            self.log.heat_maps()
        self.log.scalars(self.step, results)
        loss = results["validation/loss"]
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"step {self.step}: the validation loss is {loss}")
        self.checkpoints.record_loss(self.step, loss)
        if self.sampler is not None:
            with self.log.pause():
                self.watch.doing(f"sampling texts after step {self.step}", slow=True)
                self.log.texts(self.step, self.sampler(self.state.params))

    def evaluate(self, group: str, n_batches: int | None) -> dict[str, float]:
        """Results on the validation split by tag, group/name. Raises Stopped if asked to stop meanwhile."""
        return {f"{group}/{key}": value for key, value in self._score(n_batches, stop=self.stop.poll).items()}

    def _score(self, n_batches: int | None, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        split, data, mesh = self.corpus.splits["validation"], self.program.config.data, self.program.mesh
        rows = pipeline.eval_batches(split, data, n_batches, *data_share(mesh), self.program.vocabulary.n_vocab)
        return evaluate(self._eval_step, self.state.params, self._watched(rows), mesh, split, stop).results

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for i, batch in enumerate(batches):
            self.watch.doing(f"evaluating batch {i + 1} after step {self.step}")
            yield batch

    def save(self) -> None:
        self._skipped.read()
        self.folder.check_present()
        loss = self.probe()
        self.watch.doing(f"saving step {self.step}", slow=True)
        self.checkpoints.save(self.state, self.batches.get_state(), self.fingerprint, loss)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _write_run_files(program: Program, corpus: Corpus, folder: RunFolder) -> None:
    """The resolved config and the tokenizer, beside the checkpoints."""
    if jax.process_index() == 0:
        with translate_errors(f"{folder.name}: cannot hold a run", OSError):
            folder.write("config.yaml", to_yaml(program.config).encode())
            for name, path in corpus.tokenizer.files().items():
                folder.write(name, Path(path).read_bytes())


def _heading(program: Program, corpus: Corpus, folder: RunFolder, start: int) -> str:
    """The first lines of a run on the console: the program, its data and its length."""
    config, split = program.config, corpus.splits["train"]
    sources = " + ".join(config.data.sources) or config.data.source
    epochs = config.steps * config.tokens_per_step / split.n_tokens
    rows = {
        "data": f"{sources}, {split.n_tokens:,} tokens to train on, {split.n_bytes / split.n_tokens:.2f} bytes each",
        "run": f"{config.steps:,} steps of {config.tokens_per_step:,} tokens, {epochs:.2f} epochs",
        "folder": folder.name + (f"; resumes after step {start}" if start else ""),
    }
    lines = [f"mutransformer {__version__}, JAX {jax.__version__}", str(program)]
    return "\n".join([*lines, *(f"{name:<12}{value}" for name, value in rows.items())])
