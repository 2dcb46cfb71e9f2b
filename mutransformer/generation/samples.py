"""What a run samples at its evaluations: continuations of the same prompts every time, by the same draws."""

from collections.abc import Iterator
from itertools import islice

from jax import Array

from mutransformer.data.cache.dataset import Corpus, TokenSplit
from mutransformer.generation.decoding import Decoder, Request
from mutransformer.generation.generate import complete, new_tokens
from mutransformer.generation.sampling import Sampling
from mutransformer.generation.text import Continuation, prompt_tokens
from mutransformer.model.weights import Transformer
from mutransformer.training.program import Program
from mutransformer.training.sinks import Sample

PROMPT = 16  # tokens of a held-out document that are a prompt; half of a shorter one
NEW = 64  # tokens of a text, if data.seq_len leaves as many


class Sampler:
    """Texts by the weights of a run in progress. Its programs are compiled when the first are wanted.

    The prompts are eval.prompts, or else the beginnings of the first eval.samples documents of the validation split.
    """

    def __init__(self, program: Program, corpus: Corpus) -> None:
        """Raises ConfigError if a text of eval.prompts leaves no room in a row."""
        config, self._program, self._tokenizer = program.config, program, corpus.tokenizer
        T, given = config.data.seq_len, config.eval.prompts
        tokens = [prompt_tokens(prompt, corpus.tokenizer, config) for prompt in given]
        for i, (prompt, ids) in enumerate(zip(given, tokens, strict=True), start=1):
            new_tokens(f"eval.prompts: prompt {i}, {prompt!r},", len(ids), None, T)
        if not given:  # tokens that were made elsewhere may have no ends of documents
            tokens = list(beginnings(corpus.splits["validation"], config.eval.samples, min(PROMPT, T // 2))) or [[]]
        self._prompts = tokens
        self._decoder: Decoder | None = None

    def __call__(self, params: Transformer[Array]) -> list[Sample]:
        ends = [min(self._program.config.data.seq_len, len(ids) + NEW) for ids in self._prompts]
        if self._decoder is None:
            requests = [Request(tuple(ids), 0, end) for ids, end in zip(self._prompts, ends, strict=True)]
            self._decoder = Decoder(self._program, Sampling(), requests)
        decode = self._tokenizer.decode
        texts = [
            Continuation(decode(ids), ids, end - len(ids), self._tokenizer) for ids, end in zip(self._prompts, ends, strict=True)
        ]
        complete(texts, self._decoder, params)
        return [Sample(text.prompt, text.text) for text in texts]


def make_sampler(program: Program, corpus: Corpus) -> Sampler | None:
    """What samples at the evaluations of a run; None if eval.samples = 0. Raises ConfigError as Sampler does."""
    return Sampler(program, corpus) if program.config.eval.samples else None


def beginnings(split: TokenSplit, n: int, length: int) -> Iterator[list[int]]:
    """The first tokens, `length` at most, of the first n documents of a split; of a short document half."""
    documents = ((source, index) for source in split.sources for index in range(source.n_documents))
    for source, index in islice(documents, n):
        start, stop = source.document(index)
        yield source.read(start, start + min(length, (stop - start) // 2)).tolist()
