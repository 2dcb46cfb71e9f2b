"""Speed of the data path, as JSON: python scripts/benchmark_data.py [FILE.yaml] [key=value ...]

Tokenising: a text of --megabytes, Python's own library over and over as JSON lines, is made a cache as prepare_data.py makes one;
by turns with that, as many processes read the same lines, give them to the tokenizer's library and drop what it says. Loading:
batches of that cache are drawn as training draws them, with documents joined and kept apart. Of the config, what concerns the
tokenizer, rows and processes counts. Medians of --repeats; seconds run from the first process's start to the last one's end.
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
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from mutransformer.config import load as settings
from mutransformer.config.schema import DataConfig, SourceConfig
from mutransformer.sharding.processes import command, guarded

CHUNK = 256 << 10  # characters given to a library at once: its fastest of 4 Ki to 4 Mi


def main() -> int:
    parser = command(__doc__ or "")
    parser.add_argument("--megabytes", type=float, default=200, help="of text; default: 200")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; default: 3")
    parser.add_argument("--batches", type=int, default=2000, help="drawn in each measurement of loading; default: 2000")
    given = parser.parse_intermixed_args()
    return guarded(lambda: run(given))


def run(given: Namespace) -> int:
    config = settings.load(given.args).data
    processes = config.tokenize_workers or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), given.megabytes, 4 * processes)
        alone = SourceConfig(source="jsonl", files=files)  # none of the config's own source, nor its splits, is left
        config = replace(config, **vars(alone), sources={}, cache_dir=f"{folder}/cache")
        config = replace(config, tokenize_workers=processes, local_dir=f"{folder}/local")
        report = tokenise(config, given.repeats) | {"loading": load(config, given.repeats, given.batches)}
    print(json.dumps(report, indent=2))
    return 0


def write(folder: Path, megabytes: float, n_files: int) -> list[str]:
    """Documents of some two thousand characters, as a page of the web has, in files of like size."""
    from mutransformer.data.sources.registry import SOURCES
    from mutransformer.data.sources.splits import Shares

    parts = SOURCES["stdlib"](SourceConfig(), "data", Shares(0.05, 0.05))
    texts = [record.text.decode() for part in parts for record in part.records() if record.text]
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


def tokenise(config: DataConfig, repeats: int) -> dict[str, object]:
    from mutransformer.data.cache.prepare import prepare

    prepared = prepare(config)  # the tokenizer too, so that its training does not count
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
            encoding.append(max(pool.map(library, [config.tokenizer] * processes, [model] * processes, shares)))
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


def library(tokenizer: str, model: str, files: list[str]) -> float:
    """Reads files and tokenises them, on one thread. Seconds spent in the tokenizer's library."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    if tokenizer == "hf":
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(model)
        # With the ids fetched, as the other libraries give them unasked.
        encode = lambda texts: [found.ids for found in fast.encode_batch_fast(texts, add_special_tokens=False)]  # noqa: E731
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


def load(config: DataConfig, repeats: int, batches: int) -> dict[str, object]:
    from mutransformer.data.batches.pipeline import train_batches
    from mutransformer.data.cache.prepare import prepare

    corpus = prepare(config)
    report: dict[str, object] = {"seq_len": config.seq_len, "batch_size": config.batch_size, "threads": config.threads}
    before = resident()
    rates: dict[str, list[float]] = {"join": [], "apart": []}
    for _ in range(repeats):
        for documents, found in rates.items():
            settings = replace(config, packing="concat", documents=documents)
            drawing = train_batches(corpus.splits["train"], settings, 0, 1, (0,), corpus.tokenizer.n_vocab)
            for _ in range(config.prefetch + 2):
                next(drawing)
            start = time.perf_counter()
            for _ in range(batches):
                next(drawing)
            found.append(batches * config.batch_size * config.seq_len / (time.perf_counter() - start) / 1e6)
            drawing.close()
    for documents, found in rates.items():
        report[f"{documents}_million_tokens_per_second"] = round(statistics.median(found), 1)
    return report | {"resident_megabytes_before": before, "resident_megabytes_most": resident()}


def resident() -> int:
    """The most memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
