"""A run becomes a folder for `transformers`. Nothing is left if its logits are not those of the run."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from mutransformer.config.load import to_yaml
from mutransformer.config.schema import Config
from mutransformer.data.batches import pipeline
from mutransformer.data.cache.prepare import prepare
from mutransformer.data.tokenizers.registry import saved_tokenizer
from mutransformer.data.tokenizers.tokenizer import Tokenizer
from mutransformer.errors import ConfigError, check, first_line, translate_errors
from mutransformer.exchange.card import card, logged_losses
from mutransformer.exchange.classes import HFClass, class_of, settings_for
from mutransformer.exchange.folds import fold, kept
from mutransformer.exchange.parity import (
    POSITIONS,
    ROWS,
    TOLERANCE,
    Parity,
    compare,
    libraries,
    load_model,
    on_cpu,
    random_rows,
)
from mutransformer.exchange.remainders import remainders
from mutransformer.exchange.servers import servers
from mutransformer.exchange.tokenizer import write_tokenizer
from mutransformer.generation.generate import restore_params
from mutransformer.training.program import Program
from mutransformer.training.url_folder import readable

# In an exported folder: the settings of the run, and what the folder's weights do not tell of its own, so that it can be imported
# unchanged. Not safetensors: servers read every such file of a folder as weights.
SETTINGS, REMAINDERS = "mutransformer.yaml", "mutransformer.npz"


@dataclass(frozen=True)
class Exported:
    folder: Path
    class_name: str
    step: int
    parity: Parity
    servers: list[str]  # lines


def export_run(
    config: Config,
    out: Path,
    *,
    keep_multipliers: bool = False,
    max_positions: int | None = None,
    with_tokenizer: bool = True,
    read_data: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Writes the checkpoint that eval.checkpoint names as a folder for transformers.

    Args:
        out: must not exist, or be empty. It gets its name when the folder is complete.
        keep_multipliers: Granite instead of Llama, with the factors as settings of its config.
        max_positions: the longest row that servers take; None: data.seq_len.
        with_tokenizer: write the tokenizer's files.
        read_data: compare on held-out rows if the run's data are there; else, or if they are not, on random ids.
        note: called with each line of progress.

    Raises:
        ConfigError: the run cannot be read, no class computes what it computes, the folder is not empty, or the logits differ.
    """
    with libraries() as (torch, transformers):
        check(not out.exists() or (out.is_dir() and not any(out.iterdir())), f"{out}: exists, and is not an empty folder")
        hf = class_of(config.model, keep_multipliers)
        seq_len = config.data.seq_len
        longest = seq_len if max_positions is None else max_positions
        check(longest >= seq_len, f"--max-positions {longest}: the run was trained on rows of data.seq_len = {seq_len}")
        with readable(config) as run:
            tokenizer = saved_tokenizer(config.data, run.path)
            program = on_cpu(config, tokenizer)
            step, params = restore_params(program, tokenizer, run)
            losses = logged_losses(run.path, step)
        note(f"{run.name}: step {step} as {hf.name}")
        tokens, rows = _rows(program, tokenizer, read_data)
        with translate_errors(f"{out}: cannot be written", OSError):
            out.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            folder = work / "folder"
            ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
            write_model(program, params, hf, ids, folder, torch, transformers, longest)
            if with_tokenizer:
                texts = [tokenizer.decode(row) for row in tokens] if rows.startswith("held-out") else []
                write_tokenizer(tokenizer, folder, config.data.add_bos, longest, texts)
            parity = compare(program, params, load_model(transformers, folder), tokens, rows)
            differ = f"{out}: not written, since the logits differ from the run's by more than {TOLERANCE:g}: {parity}"
            check(parity.holds, differ)
            lines = servers(hf, config.model)
            text = card(config.with_vocab(tokenizer.n_vocab), step, losses, hf, parity, lines, with_tokenizer)
            (folder / "README.md").write_text(text, encoding="utf-8")
            (folder / SETTINGS).write_text(to_yaml(config), encoding="utf-8")
            with translate_errors(f"{out}: cannot be written", OSError):
                for file in folder.iterdir():
                    file.chmod(0o644)  # safetensors' are private
                if out.exists():
                    out.rmdir()
                folder.rename(out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return Exported(out, hf.name, step, parity, lines)


def write_model(
    program: Program,
    params: Any,
    hf: HFClass,
    ids: dict[str, int],
    folder: Path,
    torch: Any,
    transformers: Any,
    max_positions: int,
) -> None:
    """Writes config.json, generation_config.json, the weights in safetensors, and what these do not tell of the run's weights.

    They are in float32; or in 16 bits if these hold every weight exactly, as those of a folder in 16 bits that was imported.

    Args:
        ids: bos_token_id and the like.
    """
    c, params = program.config.model, jax.device_get(params)
    tensors = fold(program, params, hf)
    rest = remainders(program, params, tensors, hf)
    # Of a tied folder that was imported and not trained.
    tied = np.array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    settings = settings_for(c, hf, max_positions) | kept(program, hf) | {"tie_word_embeddings": bool(tied)} | ids
    with translate_errors(f"{hf.name} cannot have the settings of this model", ValueError):
        hf_config = transformers.AutoConfig.for_model(hf.model_type, **settings)
    state = {name: torch.from_numpy(t.copy()) for name, t in tensors.items()}
    dtype = next((d for d in (torch.bfloat16, torch.float16) if _holds(d, state)), torch.float32)
    state = {name: t.to(dtype) for name, t in state.items()}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    # strict: the table of the class names every weight that the class has.
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(**ids)
    model.save_pretrained(folder)
    if rest:
        np.savez_compressed(folder / REMAINDERS, **rest)  # pyright: ignore[reportArgumentType]  # not allow_pickle


def _holds(dtype: Any, state: dict[str, Any]) -> bool:
    """Whether a dtype of torch holds all these numbers exactly."""
    return all(bool((t.to(dtype).to(t.dtype) == t).all()) for t in state.values())


def _rows(program: Program, tokenizer: Tokenizer, read_data: bool) -> tuple[Int32[np.ndarray, "B T"], str]:
    """Rows of the validation split if there are any, else random ids; and what they are."""
    data, n_vocab = program.config.data, program.vocabulary.n_vocab
    why = "its data were not read"
    if read_data:
        try:
            corpus = prepare(data)
            check(corpus.tokenizer.fingerprint == tokenizer.fingerprint, "the data are of another tokenizer")
            batches = pipeline.eval_batches(corpus.splits["validation"], data, 1, 1, (0,), n_vocab)
            tokens = np.asarray(next(iter(batches)).tokens)[:ROWS, :POSITIONS]
            return tokens, f"held-out rows, {len(tokens)} of {tokens.shape[1]} tokens"
        except ConfigError as error:
            why = first_line(error)
    tokens = random_rows(program)
    return tokens, f"random rows, {len(tokens)} of {tokens.shape[1]} ids ({why})"
