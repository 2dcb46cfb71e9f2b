"""Make a run of a Hugging Face folder: it evaluates, generates and goes on training.

Example: mutransformer import exported/small --out runs/again data.source=text 'data.files=[notes/*.txt]' optim.lr=0.001

Takes Llama, Granite, Qwen3, Arcee and Apertus models in safetensors. The folder says what the model is; the settings say how it
goes on: data, steps, learning rate, with a new optimizer state. A folder that `mutransformer export` wrote also has the settings
of its run. The logits are compared with those of transformers in float32; if they differ nothing is written. Needs the extra
hf-export.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from mutransformer.errors import FINISHED

KEYS = ("steps", "data.source", "data.files", "data.tokenizer", "data.seq_len", "data.batch_size", "optim.lr", "model.d_base")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="as transformers' save_pretrained writes it")
    parser.add_argument("--out", required=True, metavar="RUN", help="the run's folder, which does not exist or is empty")


def run(args: Namespace) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # an accelerator would round float32 products
    from mutransformer.exchange.from_hf import import_folder
    from mutransformer.training import metrics

    metrics.setup_logging()
    done = import_folder(Path(args.folder).expanduser(), Path(args.out).expanduser(), args.settings, note=print)
    was = "with the settings of the run that it was exported from" if done.as_it_was else "whose own width is the base"
    print(f"same logits: {done.parity}\nwritten: {done.folder}, a run at step 0 {was}")
    print(f"next: mutransformer train {done.folder}")
    return FINISHED
