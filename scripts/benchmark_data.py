"""Measure the speed of the data path, as JSON: python scripts/benchmark_data.py [CONFIG] [key=value ...]

Tokenizing: a text of --megabytes, Python's own library repeated as JSON lines, is made into a cache as prepare-data does;
alternating with that, as many processes read the same lines, pass them to the tokenizer's library and discard the ids. Loading:
batches of that cache are drawn as in training, without data.intra_document_mask (join) and with it (apart). Of the config, only
the settings of tokenizer, rows and processes count. Figures are medians of --repeats; seconds run from the first process's start
to the last one's end.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from mutransformer.cli import run_cli
from mutransformer.config.data import DataConfig, SourceConfig
from mutransformer.config.load import load
from mutransformer.errors import FINISHED

CHUNK = 256 << 10  # characters passed to a library at once: the fastest of 4 Ki to 4 Mi


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="CONFIG | KEY=VALUE", help="as for mutransformer prepare-data")
    parser.add_argument("--megabytes", type=float, default=200, help="size of the text (default: 200)")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--batches", type=int, default=2000, help="batches drawn in each measurement of loading (default: 2000)")
    args = parser.parse_intermixed_args()
    return run_cli(lambda: run(args))


def run(args: Namespace) -> int:
    config = load(args.settings).data
    processes = config.tokenize_workers or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        files = write_text(Path(folder), args.megabytes, 4 * processes)
        own_text = SourceConfig(source="jsonl", files=files)  # replaces every setting of the config's own source
        config = replace(config, **vars(own_text), sources={}, cache_dir=f"{folder}/cache")
        config = replace(config, tokenize_workers=processes, local_dir=f"{folder}/local")
        report = tokenize_text(config, args.repeats) | {"loading": load_batches(config, args.repeats, args.batches)}
    print(json.dumps(report, indent=2))
    return FINISHED


def write_text(folder: Path, megabytes: float, n_files: int) -> list[str]:
    """Writes documents of about two thousand characters, like a web page, to files of equal size."""
    from mutransformer.data.sources.registry import SOURCES
    from mutransformer.data.sources.source import Fractions

    shards = SOURCES["stdlib"](SourceConfig(), "data", Fractions(0.05, 0.05))
    texts = [record.text.decode() for shard in shards for record in shard.records() if record.text]
    rng, files = random.Random(0), [folder / f"{k}.jsonl" for k in range(n_files)]
    for path in files:
        left = megabytes * 1e6 / n_files
        with path.open("w", encoding="utf-8") as file:
            while left > 0:
                text = rng.choice(texts)
                while text and left > 0:
                    n = int(rng.lognormvariate(7.3, 0.9)) + 1
                    file.write(json.dumps({"text": text[:n]}) + "\n")
                    left -= len(text[:n].encode())
                    text = text[n:]
    return [str(path) for path in files]


def tokenize_text(config: DataConfig, repeats: int) -> dict[str, object]:
    from mutransformer.data.cache.prepare import prepare

    prepared = prepare(config)  # trains the tokenizer too, so that its training does not count
    n_bytes = sum(text.n_bytes for text in prepared.splits.values())
    model = next(map(str, prepared.tokenizer.files().values()), "")
    processes, files = config.tokenize_workers or 1, config.files
    ours, reading, encoding = [], [], []
    for _ in range(repeats):
        for folder in Path(config.cache_dir).glob("tokens-*"):
            shutil.rmtree(folder)
        start = time.perf_counter()
        prepare(config)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            shares = [files[k::processes] for k in range(processes)]
            encoding.append(max(pool.map(encode_files, [config.tokenizer] * processes, [model] * processes, shares)))
        reading.append(time.perf_counter() - start)

    def rate(seconds: list[float]) -> float:
        return round(n_bytes / statistics.median(seconds) / 1e6, 2)

    return {
        "tokenizer": config.tokenizer,
        "processes": processes,
        "text_megabytes": round(n_bytes / 1e6, 1),
        "tokens": sum(text.n_tokens for text in prepared.splits.values()),
        "megabytes_per_second": rate(ours),
        "library_that_reads_megabytes_per_second": rate(reading),
        "library_megabytes_per_second": rate(encoding),  # what it would reach on texts in memory
        "seconds": [round(s, 2) for s in ours],
        "library_that_reads_seconds": [round(s, 2) for s in reading],
        "library_seconds": [round(s, 2) for s in encoding],
    }


def encode_files(tokenizer: str, model: str, files: list[str]) -> float:
    """Reads files and tokenizes them on one thread; returns the seconds spent in the tokenizer's library."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    if tokenizer == "hf":
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(model)
        # Fetching the ids counts, as the other libraries always return them.
        encode = lambda texts: [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)]  # noqa: E731
    elif tokenizer == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=model)
        encode = lambda texts: processor.encode(texts, num_threads=1)  # noqa: E731
    else:
        encode = lambda texts: [text.encode() for text in texts]  # noqa: E731
    seconds, texts, size = 0.0, [], 0
    for name in files:
        with open(name, "rb") as file:
            for line in [*file, b""]:
                if line:
                    texts.append(json.loads(line)["text"])
                    size += len(texts[-1])
                if size >= CHUNK or not line:
                    start = time.perf_counter()
                    encode(texts)
                    seconds += time.perf_counter() - start
                    texts, size = [], 0
    return seconds


def load_batches(config: DataConfig, repeats: int, batches: int) -> dict[str, object]:
    from mutransformer.data.batches.pipeline import train_batches
    from mutransformer.data.cache.prepare import prepare

    corpus = prepare(config)
    report: dict[str, object] = {"seq_len": config.seq_len, "batch_size": config.batch_size, "threads": config.threads}
    before = resident()
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats):
        for mask, million_per_second in rates.items():
            rows = replace(config, packing="concat", truncated_eos=False, intra_document_mask=mask)
            drawing = train_batches(corpus.splits["train"], rows, 0, 1, (0,), corpus.tokenizer.n_vocab)
            for _ in range(config.prefetch + 2):
                next(drawing)
            start = time.perf_counter()
            for _ in range(batches):
                next(drawing)
            million_per_second.append(batches * config.batch_size * config.seq_len / (time.perf_counter() - start) / 1e6)
            drawing.close()
    for mask, name in ((False, "join"), (True, "apart")):
        report[f"{name}_million_tokens_per_second"] = round(statistics.median(rates[mask]), 1)
    return report | {"resident_megabytes_before": before, "resident_megabytes_most": resident()}


def resident() -> int:
    """The process's largest resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
