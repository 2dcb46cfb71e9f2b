"""A folder of `transformers` becomes a run at step 0: it evaluates, generates and goes on training with a new optimizer state."""

import dataclasses
import json
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import numpy as np

from mutransformer.config.data import DataConfig
from mutransformer.config.load import RUN_CONFIG, load, to_yaml
from mutransformer.config.schema import Config
from mutransformer.data.tokenizers.registry import convert_hf
from mutransformer.data.tokenizers.tokenizer import HF_FILES, ByteTokenizer, HFTokenizer, SentencePieceTokenizer, Tokenizer
from mutransformer.errors import ConfigError, check, first_line, translate_errors
from mutransformer.exchange.classes import HFClass, overrides_from
from mutransformer.exchange.folds import ROUNDING, NotInvertible, Tensors, fold, same, unfold
from mutransformer.exchange.parity import TOLERANCE, Parity, compare, libraries, load_model, on_cpu, random_rows
from mutransformer.exchange.remainders import Kept, complete
from mutransformer.exchange.to_hf import REMAINDERS, SETTINGS
from mutransformer.model.weights import Transformer
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.program import Program
from mutransformer.training.run_folder import RunFolder

# What the settings of a training that is yet to come may change: the state at step 0 does not depend on them.
FREE = ["fingerprint.tokens", "steps", "seed", "data.packing", "data.intra_document_mask", "data.seq_len", "data.batch_size"]
FREE += ["optim.lr", "optim.schedule", "optim.warmup_steps", "optim.warmup_fraction", "optim.weight_decay", "optim.clip_norm"]
FREE += ["precision.compute"]  # resolved by the devices that train it


@dataclass(frozen=True)
class Imported:
    folder: Path
    class_name: str
    as_it_was: bool  # with the weights and settings of the run that was exported
    parity: Parity


def import_folder(folder: Path, out: Path, settings: Sequence[str], note: Callable[[str], None] = lambda text: None) -> Imported:
    """Writes a run whose checkpoint of step 0 has the weights of a folder of one of the classes in IMPORTED.

    A folder that was exported from a run gets this run's settings, and its weights bit for bit. Others get a parametrization
    whose base is the model itself, so that learning rates are those of this width.

    Args:
        out: the run's folder, which must not exist, or be empty. It gets its name when it is complete.
        settings: YAML files and overrides for what the folder does not say, such as the data and optim.lr.
        note: called with each line of progress.

    Raises:
        ConfigError: the folder cannot be read, no model here computes what it computes, `out` is not empty, or the logits differ.
    """
    with libraries() as (_, transformers), ExitStack() as stack:
        check((folder / "config.json").is_file(), f"{folder}: holds no config.json")
        check(not out.exists() or (out.is_dir() and not any(out.iterdir())), f"{out}: exists, and is not an empty folder")
        where = folder / "config.json"
        with translate_errors(f"{folder}: cannot be read", (OSError, ValueError)):
            hf_config = json.loads(where.read_text(encoding="utf-8"))
            check(isinstance(hf_config, dict) and "model_type" in hf_config, f"{where}: names no model_type")
            hf_config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False).to_dict()
            hf, model_settings = overrides_from(hf_config, str(where))
            model = load_model(transformers, folder)
        tensors = {name: t.detach().numpy() for name, t in model.state_dict().items()}
        known = {row.theirs.format(i) for row in hf.rows for i in range(hf_config["num_hidden_layers"])}
        unknown = sorted(tensors.keys() - known)
        check(not unknown, f"{folder}: {hf.name} has no {', '.join(unknown[:3])} here")
        note(f"{folder}: {hf.name}, {sum(t.size for t in tensors.values()):,} parameters")

        with translate_errors(f"{out}: cannot be written", OSError):
            out.absolute().parent.mkdir(parents=True, exist_ok=True)
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent)))
        place = [f"workdir={out.absolute().parent}", f"name={out.name}", f"checkpoint.allow=[{', '.join(FREE)}]"]
        converted = None
        if (folder / SETTINGS).is_file():
            kept = _kept(folder)
            try:
                converted = _convert([*_recorded(folder), *place, *settings], tensors, hf, work / "recorded", kept)
            except (NotInvertible, ConfigError) as error:
                note(f"{SETTINGS} in the folder is not used: {first_line(error)}")
            else:
                if kept and not converted.is_exact:
                    note(f"{REMAINDERS} in the folder is not used: the weights are not those that it was written with")
        as_it_was = converted is not None
        if converted is None:
            plain = [*model_settings, *_tokenizer_settings(folder, settings), *place, *settings]
            try:
                converted = _convert(plain, tensors, hf, work / "plain")
            except NotInvertible as error:
                raise ConfigError(f"{folder}: the settings of the model are not the folder's: {error}") from None
        rows = random_rows(converted.program)
        parity = compare(converted.program, converted.params, model, rows, f"random rows, {len(rows)} of {rows.shape[1]} ids")
        check(parity.holds, f"{out}: not written, since the logits differ from the folder's by more than {TOLERANCE:g}: {parity}")
        _write_run(converted, work, out)
    return Imported(out, hf.name, as_it_was, parity)


class _Converted(NamedTuple):
    config: Config
    program: Program
    params: Transformer[Any]
    tokenizer: Tokenizer
    is_exact: bool = False  # by what was kept of the weights


def _convert(settings: Sequence[str], tensors: Tensors, hf: HFClass, work: Path, kept: Kept | None = None) -> _Converted:
    """The config of these settings, and its weights. Raises NotInvertible if its model is not the folder's.

    kept: what an export kept of the weights. It is used if with it every bit of the folder's tensors follows from the weights.
    """
    config = load(settings)
    tokenizer = _open_tokenizer(config.data, work)
    program = on_cpu(config, tokenizer)
    params = unfold(program, tensors, hf)
    if kept:
        whole = complete(program, params, kept)
        # Sums of squares in a norm may be rounded otherwise on another machine.
        if same(fold(program, whole, hf), tensors, ROUNDING if config.model.embed_norm else 0.0):
            return _Converted(config, program, whole, tokenizer, is_exact=True)
    if not same(fold(program, params, hf), tensors):
        raise NotInvertible("they give other tensors")
    return _Converted(config, program, params, tokenizer)


def _kept(folder: Path) -> Kept:
    """What an export kept of the weights beside them. Raises ConfigError if the file is damaged."""
    path = folder / REMAINDERS
    if not path.is_file():
        return {}
    with translate_errors(f"{path}: cannot be read", (OSError, ValueError, EOFError, BadZipFile, zlib.error)):
        with np.load(path, allow_pickle=False) as held:
            return dict(held)


def _open_tokenizer(data: DataConfig, work: Path) -> Tokenizer:
    """The tokenizer that a config names, whose files may be put in a new folder. Reads no training data.

    Raises ConfigError if none is named, or it cannot be read.
    """
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    check(data.tokenizer_file is not None, "data.tokenizer_file is not set: name the tokenizer that the model was trained with")
    if data.tokenizer == "sentencepiece":
        return SentencePieceTokenizer(Path(str(data.tokenizer_file)).expanduser())
    work.mkdir()
    convert_hf(str(data.tokenizer_file), data.eos_token, work)
    return HFTokenizer(*(work / name for name in HF_FILES))


def _recorded(folder: Path) -> list[str]:
    """The settings of the run that a folder was exported from, with the tokenizer that lies in the folder."""
    kind = load([str(folder / SETTINGS)]).data.tokenizer
    file = {"hf": folder, "sentencepiece": folder / "tokenizer.model"}.get(kind)
    own = [f"data.tokenizer_file={file.absolute()}"] if file is not None and (folder / "tokenizer.json").is_file() else []
    return [str(folder / SETTINGS), *own]


def _tokenizer_settings(folder: Path, settings: Sequence[str]) -> list[str]:
    """The folder's tokenizer, unless the settings name another."""
    if any(one.startswith(("data.tokenizer=", "data.tokenizer_file=")) for one in settings):
        return []
    has_one = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))
    check(has_one, f"{folder}: holds no tokenizer; name one, such as data.tokenizer=bytes")
    return ["data.tokenizer=hf", f"data.tokenizer_file={folder.absolute()}"]


def _write_run(converted: _Converted, work: Path, out: Path) -> None:
    """The files of a run of which nothing is trained yet. work: a folder beside `out`, in which it is made."""
    config, program, params, tokenizer, _ = converted
    data = config.data
    if data.tokenizer == "sentencepiece":  # the run has a copy
        config = dataclasses.replace(
            config, data=dataclasses.replace(data, tokenizer_file=str(out.absolute() / "tokenizer.model"))
        )
    at_work = dataclasses.replace(config, workdir=str(work)).with_vocab(tokenizer.n_vocab)
    placed = jax.tree.map(jax.device_put, params, program.state_shardings.params)
    state = dataclasses.replace(program.init_state(), params=placed)
    keys = ("packing", "intra_document_mask", "truncated_eos", "seq_len", "batch_size")
    fingerprint = {"tokens": None, "tokenizer": tokenizer.fingerprint, "seed": config.seed}
    run = RunFolder(at_work.rundir)
    with closing(Checkpoints(at_work, run)) as checkpoints:
        checkpoints.save(state, {"next_index": 0}, fingerprint | {key: getattr(data, key) for key in keys})
        checkpoints.wait()
    with translate_errors(f"{out}: cannot be written", OSError):
        run.write(RUN_CONFIG, to_yaml(config.with_vocab(tokenizer.n_vocab)).encode())
        for name, path in tokenizer.files().items():
            run.write(name, Path(path).read_bytes())
        if out.exists():
            out.rmdir()
        run.path.rename(out)
