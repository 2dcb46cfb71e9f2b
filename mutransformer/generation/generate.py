"""Continues prompts with the model of a run."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from jax import Array

from mutransformer.config.schema import Config
from mutransformer.data.tokenizers.registry import saved_tokenizer
from mutransformer.data.tokenizers.tokenizer import Tokenizer
from mutransformer.errors import check
from mutransformer.generation.decoding import NONE, Decoder, Request
from mutransformer.generation.sampling import N_TOKENS, Sampling
from mutransformer.generation.text import Continuation, prompt_tokens
from mutransformer.model.weights import Transformer
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.program import Program, build
from mutransformer.training.run_folder import RunFolder
from mutransformer.training.url_folder import readable


def generate(
    config: Config,
    prompts: Sequence[str],
    sampling: Sampling,
    show: Callable[[Sequence[Continuation]], None] = lambda texts: None,
) -> dict[str, Any]:
    """Continues prompts, which may be empty, with a run's model at the checkpoint that eval.checkpoint names.

    Reads the run's folder only. The texts are decoded together, up to sampling.batch of them. A text depends on its own prompt,
    the seed and its number among the prompt's samples, not on the others. `show` is called with all texts, prompt by prompt,
    before the first token and whenever there are new ones; for the first token of a text as soon as it is known.

    Returns run, step, and prompts: for each its prompt, and samples: of each the text and tokens without prompt and eos, and why
    it ended, eos, stop or length. A text ends before a stop string, whose tokens are listed.

    Raises:
        ConfigError: the run or its checkpoint is missing or does not fit the config; a text does not fit data.seq_len.
    """
    check(bool(prompts), "no prompt is given")
    with readable(config) as folder:
        tokenizer = saved_tokenizer(config.data, folder.path)
        program = build(config, vocabulary=tokenizer)
        requests, texts = list[Request](), list[Continuation]()
        for i, prompt in enumerate(prompts, start=1):
            name = "the prompt" if len(prompts) == 1 else f"prompt {i} of {len(prompts)}"
            prefix = prompt_tokens(prompt, tokenizer, config)
            most = new_tokens(name, len(prefix), sampling.tokens, config.data.seq_len)
            for number in range(sampling.samples):
                requests.append(Request(tuple(prefix), number, len(prefix) + most))
                texts.append(Continuation(prompt, prefix, most, tokenizer, sampling.stop))
        decoder = Decoder(program, sampling, requests)
        step, params = restore_params(program, tokenizer, folder)
    show(texts)
    complete(texts, decoder, params, lambda: show(texts))
    n = sampling.samples
    found = [
        {"prompt": prompt, "samples": [text.result() for text in texts[i * n : (i + 1) * n]]} for i, prompt in enumerate(prompts)
    ]
    return {"run": folder.name, "step": step, "prompts": found}


def complete(
    texts: Sequence[Continuation], decoder: Decoder, params: Transformer[Array], added: Callable[[], None] = lambda: None
) -> None:
    """Decodes texts, in the order of the decoder's requests, to their ends. Calls `added` after each chunk of new tokens."""
    for first, new in decoder.decode(params, ended=lambda i: texts[i].end is not None):
        for text, row in zip(texts[first:], new.tolist(), strict=False):
            text.add([token for token in row if token != NONE])
        added()


def new_tokens(name: str, n: int, wanted: int | None, T: int) -> int:
    """The new tokens, at most, after a prompt of n tokens in a row of T. Raises ConfigError if there is no room for them."""
    room = T - n
    check(room >= 1, f"{name} has {n} tokens: data.seq_len = {T} leaves none to add")
    check(wanted is None or wanted <= room, f"tokens = {wanted}: data.seq_len = {T} leaves {room} after {name}")
    return wanted or min(N_TOKENS, room)


def restore_params(program: Program, tokenizer: Tokenizer, folder: RunFolder) -> tuple[int, Transformer[Array]]:
    """The step and the weights of the checkpoint that eval.checkpoint names.

    Raises ConfigError if there is none, or if it belongs to another model or tokenizer.
    """
    # The training tokens do not matter here, and their fingerprint would require reading them all.
    config = program.config
    allow = replace(config.checkpoint, allow=[*config.checkpoint.allow, "fingerprint.tokens"])
    with closing(Checkpoints(replace(config, checkpoint=allow), folder, read_only=True)) as checkpoints:
        step = checkpoints.chosen(program.state)
        checkpoints.check_same(step, {"tokens": None, "tokenizer": tokenizer.fingerprint})
        state, _ = checkpoints.restore(step, program.state)
    return step, state.params
