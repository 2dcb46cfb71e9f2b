"""Which servers take an exported folder, by their source code as of 2026-11: none of them was run with one here."""

from mutransformer.config.schema import ModelConfig
from mutransformer.exchange.classes import APERTUS, ARCEE, HFClass

NATIVE = "reads it with its own code"


def servers(hf: HFClass, c: ModelConfig) -> list[str]:
    """One line for each server."""
    return [
        "transformers: loads it, with the logits of the run; compared here.",
        f"vLLM: {_vllm(hf, c)}",
        f"llama.cpp: {_llama_cpp(hf, c)}",
    ]


def _vllm(hf: HFClass, c: ModelConfig) -> str:
    only = {ARCEE.name: "relu2", APERTUS.name: "xielu"}.get(hf.name)
    act = hf.activations[c.activation]
    if only is not None and act != only:
        return f"not with its own {hf.name}, which computes {only} only; with --model-impl transformers."
    return f"{NATIVE}. It computes in bfloat16 unless told --dtype float32."


def _llama_cpp(hf: HFClass, c: ModelConfig) -> str:
    act = hf.activations[c.activation]
    if hf is ARCEE and act != "relu2":
        return f"DO NOT USE: it computes relu2 for every {hf.name}, and would be silently wrong with {act}."
    if hf is APERTUS:
        return f"no: it computes xielu for every {hf.name}, not {act}."
    if c.biases:
        return "no: it leaves out biases, and would be silently wrong."
    return f"{NATIVE}, once its convert_hf_to_gguf.py has converted the folder."
