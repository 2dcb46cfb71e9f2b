"""Prompts as tokens, and continuations as text: where a text ends, and how much of it is settled."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mutransformer.config.schema import Config
from mutransformer.data.tokenizers.tokenizer import Tokenizer
from mutransformer.errors import check

End = Literal["eos", "stop", "length"]
_INCOMPLETE = "\ufffd"  # what a tokenizer shows for the first bytes of a character


def prompt_tokens(prompt: str, tokenizer: Tokenizer, config: Config) -> list[int]:
    """The ids of a prompt, tokenized as the beginning of a document of the run's data.

    Raises ConfigError if it is not valid Unicode, as an argument of a command may be.
    """
    check(not any("\ud800" <= c <= "\udfff" for c in prompt), "the prompt is not UTF-8")
    bos = [tokenizer.bos_id] if config.data.add_bos else []
    return [*bos, *tokenizer.encode([prompt])[0].tolist()]


@dataclass
class Continuation:
    """The continuation of a prompt, as far as it is known."""

    prompt: str
    prefix: Sequence[int]  # the prompt's tokens
    most: int  # new tokens
    tokenizer: Tokenizer
    stop: Sequence[str] = ()  # strings before the first of which the text ends
    tokens: list[int] = field(default_factory=list)  # without eos; with those of a stop string
    text: str = ""  # without the prompt, eos and stop string
    end: End | None = None  # why it ended; None: it has not

    def __post_init__(self) -> None:
        self._head = self.tokenizer.decode(self.prefix)

    def add(self, new: Sequence[int]) -> None:
        """Adds tokens, of which only those before the text's end count: an eos, the token that completes a stop string, or the
        last one that was asked for. How tokens are divided over several calls changes nothing."""
        if self.end is not None:
            return
        eos, before = self.tokenizer.eos_id, len(self.tokens)
        new = new[: self.most - before]
        if eos in new:
            new, self.end = new[: new.index(eos)], "eos"
        elif before + len(new) == self.most:
            self.end = "length"
        self.tokens += new
        self.text = self._decode(self.tokens)
        if any(one in self.text for one in self.stop):
            texts = (self._decode(self.tokens[:n]) for n in range(before + 1, len(self.tokens) + 1))
            n, text = next((n, text) for n, text in enumerate(texts, before + 1) if any(one in text for one in self.stop))
            self.tokens, self.end = self.tokens[:n], "stop"
            self.text = text[: min(text.index(one) for one in self.stop if one in text)]

    @property
    def settled(self) -> str:
        """The part of the text that further tokens do not change: without the first bytes of a character, and without what may be
        the beginning of a stop string."""
        if self.end is not None:
            return self.text
        text = self.text.rstrip(_INCOMPLETE)
        begun = (n for one in self.stop for n in range(min(len(one) - 1, len(text)), 0, -1) if text.endswith(one[:n]))
        return text[: len(text) - max(begun, default=0)]

    def result(self) -> dict[str, Any]:
        """As JSON values."""
        return {"text": self.text, "tokens": self.tokens, "end": self.end}

    def _decode(self, tokens: list[int]) -> str:
        # Some tokenizers drop a space in front of the first token that they decode: decode the prompt's tokens too.
        full = self.tokenizer.decode([*self.prefix, *tokens])
        return full[len(self._head) :] if full.startswith(self._head) else self.tokenizer.decode(tokens)
