"""The model card of an exported folder: README.md with the front matter of the Hub."""

import json
import math
from pathlib import Path

from mutransformer import __version__
from mutransformer.config.schema import Config, flatten
from mutransformer.errors import redact
from mutransformer.exchange.classes import HFClass
from mutransformer.exchange.parity import Parity
from mutransformer.training.sinks import read_metrics


def card(
    config: Config, step: int, losses: list[str], hf: HFClass, parity: Parity, servers: list[str], with_tokenizer: bool
) -> str:
    """The settings that differ from the defaults, the losses up to the step, and how to load the folder."""
    m, defaults = config.model, flatten(Config())
    of_place = ("workdir", "data.cache_dir", "data.local_dir", "distributed", "log.", "mesh.", "xla")
    rows = [
        f"| `{key}` | `{json.dumps(value)}` |"
        for key, value in flatten(config).items()
        if value != defaults.get(key) and not key.startswith(of_place)
    ]
    sentence = f"{m.n_layer} layers of width {m.d_model}, {m.n_head} heads of {m.d_head}, vocabulary {m.n_vocab}"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [mutransformer]",
        "---",
        "",
        f"# {redact(config.name)}",
        "",
        f"A decoder-only Transformer of mutransformer {__version__}: {sentence}, rows of {config.data.seq_len} tokens.",
        f"This is step {step} of {config.steps}, as `{hf.name}`.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        *(['tokenizer = AutoTokenizer.from_pretrained("FOLDER")'] if with_tokenizer else []),
        "```",
        "",
        "Every row that it was trained on begins with bos, so every prompt must. The tokenizer adds it.",
        "",
        f"Compared with the run in float32: {parity}.",
        "",
        "## Servers",
        "",
        *(f"- {line}" for line in servers),
        "",
        "## Losses",
        "",
        *([f"- {line}" for line in losses] or ["The run's folder holds none."]),
        "",
        "## Settings that differ from the defaults",
        "",
        "| setting | value |",
        "|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)


def logged_losses(run: Path, step: int) -> list[str]:
    """The latest of each loss, in nats per token, that the run in a folder logged up to a step."""
    found: dict[str, tuple[int, float]] = {}
    for row in read_metrics(run, step):
        for tag, value in row.items():
            if tag.endswith(("/loss", "/bits_per_byte")) and isinstance(value, float) and math.isfinite(value):
                found[tag] = (row["step"], value)
    return [f"{tag} {value:.4f} at step {at}" for tag, (at, value) in sorted(found.items())]
