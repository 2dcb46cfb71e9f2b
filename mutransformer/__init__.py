"""mutransformer: the muP training stack for JAX. Tune small, train large.

The functions here import what they need when they are called: `import mutransformer` does not start JAX.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from mutransformer import mup
    from mutransformer.config.schema import Config
    from mutransformer.errors import ConfigError
    from mutransformer.planning.plan import Plan
    from mutransformer.training.program import Program

try:
    __version__ = version("mutransformer")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.1.0"

__all__ = ["Config", "ConfigError", "Program", "mup"]
__all__ += ["build", "evaluate", "generate", "load_config", "plan", "sweep", "train"]

_LAZY = {"Config": "config.schema", "ConfigError": "errors", "Program": "training.program"}


def __getattr__(name: str) -> Any:
    if name == "mup":
        return import_module(f"{__name__}.mup")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def load_config(*args: str) -> "Config":
    """Reads YAML files, names of shipped configs and `key=value` overrides, merged left to right over the defaults.

    >>> load_config("small", "optim.lr=0.01").optim.lr
    0.01

    Raises:
        ConfigError: a file, key or value is wrong.
    """
    from mutransformer.config.load import load

    return load(args)


def build(config: "Config", devices: Sequence[Any] | None = None) -> "Program":
    """Resolves a config for devices (None: all): specs, mesh, shardings, execution settings, optimizer, abstract state.

    >>> program = build(load_config("small", "data.tokenizer=bytes"))
    >>> program.specs.blocks.w_q.shape
    (6, 128, 2, 64)

    Raises:
        ConfigError: the config does not fit the devices or the tokenizer.
    """
    from mutransformer.training import program

    return program.build(config, devices)


def train(program: "Program") -> str | Path:
    """Trains a program from its latest checkpoint, if there is one, and returns the run's folder, or its URL.

    >>> text = ["data.source=text", "data.files=[notes.txt]", "data.tokenizer=bytes", "data.seq_len=32"]
    >>> folder = train(build(load_config("small", "model.n_layer=1", "steps=2", *text)))  # doctest: +ELLIPSIS
    mutransformer ...
    >>> (folder / "config.yaml").exists()
    True

    Raises:
        ConfigError: a setting does not fit the data or the checkpoints.
        FloatingPointError: the loss or the weights became NaN or infinite.
    """
    from mutransformer.generation.samples import make_sampler
    from mutransformer.training import loop
    from mutransformer.training.program import prepare_data

    corpus = prepare_data(program.config)
    loop.train(program, corpus, sampler=make_sampler(program, corpus))
    return program.config.run_url or program.config.rundir


def evaluate(run: str | Path, *args: str) -> dict[str, Any]:
    """Evaluates a checkpoint of the run in a folder on a full split: loss in nats per token, perplexity, bits per byte.

    The further arguments are overrides, such as eval.split=test or eval.checkpoint=best.

    >>> results = evaluate("runs/small", "eval.split=test")
    >>> sorted(results["model"])
    ['bits_per_byte', 'loss', 'perplexity']

    Raises:
        ConfigError: the run or its checkpoint is missing or does not fit the overrides.
    """
    from mutransformer.training.evaluate import evaluate_run
    from mutransformer.training.program import build_with_data

    return evaluate_run(*build_with_data(load_config(str(run), *args)))


@overload
def generate(run: str | Path, prompts: str = "", *args: str, stop: str | Sequence[str] = (), **sampling: Any) -> list[str]: ...
@overload
def generate(
    run: str | Path, prompts: Sequence[str], *args: str, stop: str | Sequence[str] = (), **sampling: Any
) -> list[list[str]]: ...
def generate(
    run: str | Path, prompts: str | Sequence[str] = "", *args: str, stop: str | Sequence[str] = (), **sampling: Any
) -> list[str] | list[list[str]]:
    """Continuations of prompts, without the prompts, by the model of the run in a folder. With an empty prompt a new text begins.

    Of one prompt a list of its samples; of several, which are computed together, a list of such lists. The further arguments are
    overrides, such as eval.checkpoint=best; stop, strings before which a text ends; and fields of generation.sampling.Sampling:
    samples, tokens, temperature, top_k, top_p, seed, batch.

    >>> texts = generate("runs/small", "def ", samples=2, tokens=8)
    >>> len(texts)
    2
    >>> generate("runs/small", ["def ", "class "], samples=2, tokens=8)[0] == texts
    True

    Raises:
        ConfigError: the run or its checkpoint is missing; a text does not fit data.seq_len; a number is out of range.
    """
    from mutransformer.generation import generate
    from mutransformer.generation.sampling import Sampling

    config = load_config(str(run), *args)
    one = isinstance(prompts, str)
    how = Sampling(stop=(stop,) if isinstance(stop, str) else tuple(stop), **sampling)
    found = generate.generate(config, [prompts] if one else prompts, how)["prompts"]
    texts = [[sample["text"] for sample in prompt["samples"]] for prompt in found]
    return texts[0] if one else texts


def sweep(
    args: Sequence[str], widths: Sequence[int], lrs: Sequence[float], seeds: Sequence[int] = (0,), out: str | Path = ""
) -> Path:
    """Trains every learning rate and seed of every width, as many at once as fit on the devices.

    The first argument is as in load_config. Writes to the folder `out` (default: WORKDIR/NAME-sweep), and returns the file of
    results in it: a line of JSON for each run, which `mutransformer report` reads.

    >>> text = ["data.source=text", "data.files=[notes.txt]", "data.tokenizer=bytes", "data.seq_len=16"]
    >>> results = sweep(["study", "model.n_layer=1", "steps=8", *text], widths=[64], lrs=[2**-6, 2**-5])
    >>> len(results.read_text().splitlines())
    2

    Raises:
        ConfigError: a setting is wrong, or does not fit a width.
    """
    from mutransformer.study.sweep import grid, records, run

    configs = grid.configs(args, "width", sorted(widths))
    folder = Path(out) if out else configs[0].config.rundir.with_name(f"{configs[0].config.name}-sweep")
    run.sweep(configs, [(lr, seed) for lr in sorted(lrs) for seed in seeds], folder, None)
    return folder / records.FILE


def plan(config: "Config", topology: str) -> "Plan":
    """What a step will cost on hardware that is not at hand: memory, lower bounds of time, traffic between chips.

    The topology is a slice of TPU chips, such as v5p:4x4x4 or v5p-128.

    >>> found = plan(load_config("large", "data.batch_size=256"), "v5e:4x4")
    >>> found.estimate.fits, found.estimate.bound
    (True, 'HBM')

    Raises:
        ConfigError: no such slice; the mesh does not cover it, or cannot divide the model or the batch.
    """
    from mutransformer.planning.plan import plan

    return plan(config, topology)
