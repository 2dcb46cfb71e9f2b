"""A training run: assemble, restore or start, loop, close. The order of events, and nothing else."""

import math
import shutil
from contextlib import closing

import jax
from jax.sharding import Mesh

from mutransformer import __version__
from mutransformer.config.load import to_yaml
from mutransformer.config.schema import Config, check
from mutransformer.data.batches import pipeline
from mutransformer.data.cache.prepare import Corpus, prepare
from mutransformer.model.flags import compiler_options
from mutransformer.model.transformer import flops_per_token, specs
from mutransformer.sharding.devices import Profile
from mutransformer.sharding.mesh import check_fits, data_share, make_mesh, put
from mutransformer.sharding.processes import FINISHED, STOPPED, agreed, stop_on_signals
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.evaluate import Interrupted, evaluate
from mutransformer.training.metrics import Metrics, NonFiniteLoss
from mutransformer.training.state import init_state, plan
from mutransformer.training.step import make_eval_step, make_train_step


def train(config: Config) -> int:
    """Trains until `steps` updates are done, or until it is asked to stop.

    Returns:
        The exit code: FINISHED, or STOPPED with a checkpoint of the last step.

    Raises:
        ConfigError: a setting does not fit the devices, the data or the checkpoints.
        NonFiniteLoss: the loss or the weights became NaN or infinite; the newest checkpoint is from before.
    """
    mesh = make_mesh(config.mesh)
    corpus = prepare(config.data, jax.process_count(), jax.process_index())
    agreed("data", corpus.fingerprints)
    config = config.with_vocab(corpus.tokenizer.n_vocab)
    check_fits(config, mesh)
    share, n_vocab, bos = data_share(mesh), corpus.tokenizer.n_vocab, corpus.tokenizer.bos_id
    held_out = corpus.splits["validation"]
    fingerprint = pipeline.fingerprint(corpus.splits["train"], config.data, config.seed)
    batches = pipeline.train_batches(corpus.splits["train"], config.data, config.seed, *share, n_vocab)

    with closing(Checkpoints(config)) as checkpoints, closing(batches):
        start = checkpoints.latest() or 0
        if start:
            check(config.checkpoint.resume, f"checkpoint.resume = false: {config.rundir} holds a run; choose another name=...")
            checkpoints.check_same(start, fingerprint)
            state, position = checkpoints.restore(start, plan(config, mesh).shapes)
            batches.set_state(position)
        else:
            state = init_state(config, mesh)
        train_step, eval_step = make_train_step(config, mesh, bos), make_eval_step(config, mesh, bos)
        profile = Profile(config.profile, config.rundir / "tensorboard")
        step, loss, final = start, None, dict[str, float]()

        def validate(n_batches: int | None) -> dict[str, float]:
            rows = pipeline.eval_batches(held_out, config.data, n_batches, *share, n_vocab)
            return evaluate(eval_step, state.params, rows, mesh, held_out, stop=lambda: stop.requested).results

        def validate_if_due() -> float | None:
            if not (_due(step, config.eval.every) or step == config.steps):
                return None
            with log.pause():
                result = validate(config.eval.batches)
            log.scalars(step, _tagged("validation", result))
            if not math.isfinite(result["loss"]):
                raise NonFiniteLoss(f"step {step}: the loss on held-out text is {result['loss']}")
            return result["loss"]

        with stop_on_signals() as stop, Metrics(config, flops_per_token(config), mesh.size, start) as log:
            _describe(config, mesh, corpus, start, log)
            try:
                if start and checkpoints.loss(start) is None:  # a signal came before this step was evaluated
                    validate_if_due()
                while step < config.steps and not stop.requested:
                    profile.step(step, wait_for=state.step)
                    state, scalars = train_step(state, put(next(batches), mesh))
                    step, loss = step + 1, None
                    log.record(step, scalars)
                    checkpoints.poll()
                    if jax.process_count() > 1:  # by SIGTERM to one of them from the job's scheduler; they agree on the step
                        stop.requested = checkpoints.stop_requested(step)
                    if stop.requested:
                        break
                    loss = validate_if_due()
                    if _due(step, config.checkpoint.every):
                        with log.pause():
                            checkpoints.save(state, batches.get_state(), fingerprint, loss)
                if not stop.requested:
                    with log.pause():
                        final = _tagged("validation_whole", validate(config.eval.final_batches))
            except Interrupted:
                pass  # the signal came within an evaluation: the state is whole, and is saved like after any other
            profile.close(wait_for=state.step)
            log.flush()
            checkpoints.save(state, batches.get_state(), fingerprint, loss)
            checkpoints.wait()
            log.close(final)
            if not final:
                log.note(f"stopped after step {step}, all is saved; the same command goes on from there")
    return FINISHED if final else STOPPED


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _tagged(group: str, result: dict[str, float]) -> dict[str, float]:
    return {f"{group}/{key}": value for key, value in result.items()}


def _describe(config: Config, mesh: Mesh, corpus: Corpus, start: int, log: Metrics) -> None:
    """What is run on what, for the console; and the resolved config and the tokenizer beside the checkpoints."""
    if jax.process_index() == 0:
        (config.rundir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        for name, path in corpus.tokenizer.files().items():
            shutil.copyfile(path, config.rundir / name)
    weights = specs(config)
    total, layers = (sum(w.size for w in jax.tree.leaves(tree)) for tree in (weights, weights.blocks))
    kind = mesh.devices.flat[0].device_kind
    text = corpus.splits["train"]
    sources = " + ".join(config.data.sources) or config.data.source
    epochs = config.steps * config.tokens_per_step / text.n_tokens
    shape = " x ".join(map(str, mesh.shape.values()))
    log.note(f"mutransformer {__version__}, JAX {jax.__version__}, {mesh.size} x {kind} as mesh {shape}")
    log.note(f"model: width {config.model.d_model}, {config.model.n_layer} layers, {total:,} parameters ({layers:,} in layers)")
    log.note(f"rule: {config.optim.rule}, learning rate {config.optim.lr:g} at width {config.model.d_base}")
    log.note(f"data: {sources}, {text.n_tokens:,} tokens to train on, {text.n_bytes / text.n_tokens:.2f} bytes each")
    log.note(f"run: {config.steps:,} steps of {config.tokens_per_step:,} tokens, {epochs:.2f} epochs")
    options = compiler_options(config, kind)
    if options:
        log.note("XLA: " + " ".join(f"{name}={value}" for name, value in options.items()))
    log.note(f"folder: {config.rundir}" + (f"; goes on after step {start}" if start else ""))
