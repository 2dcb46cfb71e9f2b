"""Write a run's model as a folder that Hugging Face's transformers loads, with the same logits.

Example: mutransformer export runs/small --to hf exported/small eval.checkpoint=best

The class follows from the model: swiglu is Llama, with model.qk_norm Qwen3; relu, sqrelu, gelu and silu are Arcee, with
model.qk_norm Apertus. All factors that the class lacks are folded into the weights. The folder is loaded again, and its logits
are compared with the run's in float32; if they differ it is removed. Needs the extra hf-export.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from mutransformer.commands import RUN_KEYS
from mutransformer.config.load import load
from mutransformer.errors import FINISHED, check

KEYS = ("eval.checkpoint", *RUN_KEYS, "data.cache_dir")


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--to", nargs=2, required=True, metavar=("hf", "FOLDER"), help="the format, and a folder that does not exist or is empty")
    add("--keep-multipliers", action="store_true", help="Granite instead of Llama: factors as settings, not folded into weights")
    add("--max-positions", type=int, metavar="N", help="the longest row that servers take (default: data.seq_len)")
    add("--without-tokenizer", action="store_true", help="write the model alone")
    add("--random-rows", action="store_true", help="compare on random ids, and do not read the run's data")


def run(args: Namespace) -> int:
    to, out = args.to
    check(to == "hf", f"--to {to}: the format must be hf")
    config = load(args.settings)

    import jax

    jax.config.update("jax_platforms", "cpu")  # an accelerator would round float32 products
    from mutransformer.exchange.to_hf import export_run
    from mutransformer.training import metrics

    metrics.setup_logging()

    done = export_run(
        config,
        Path(out).expanduser(),
        keep_multipliers=args.keep_multipliers,
        max_positions=args.max_positions,
        with_tokenizer=not args.without_tokenizer,
        read_data=not args.random_rows,
        note=print,
    )
    print("\n".join([f"same logits: {done.parity}", *done.servers, f"written: {done.folder}"]))
    return FINISHED
