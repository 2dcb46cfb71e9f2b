"""Hugging Face tokenizers of three families, made here: small, and with the special tokens and templates of the real ones."""

from pathlib import Path

import tokenizers as tk
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = ["the cat sat on the mat", "a naïve Ärger of 中文 and 😀", "def f(x):\n\treturn x + 12345\n", "</s> <s> <|endoftext|>"] * 4


def save(tokenizer: tk.Tokenizer, folder: Path, **special: str) -> Path:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    """Unigram pieces; pad 0, eos 1, unk 2, no bos; extra ids at the end; its template ends a text with eos."""
    tokenizer = tk.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in range(3)])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return save(tokenizer, folder, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def gpt2(folder: Path) -> Path:
    """Byte-level BPE; one special token, which is bos, eos and nothing else; no template."""
    tokenizer = tk.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return save(tokenizer, folder, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def llama(folder: Path) -> Path:
    """BPE with bytes for what it does not know; unk 0, bos 1, eos 2, no pad; its template begins a text with bos."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = tk.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False, limit_alphabet=40)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return save(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


FAMILIES = {"t5": t5, "gpt2": gpt2, "llama": llama}
