"""Measures `preprocess` against nanoGPT's preparation of OpenWebText on the same text: time and peak memory.

    python scripts/bench/preprocess.py FOLDER     # of .jsonl.gz files; writes scripts/bench/results/preprocess.json

nanoGPT's script loads the dataset with `datasets`, splits it, maps tiktoken over it in two processes, which writes each
id as a 64-bit integer to an Arrow file, and copies that in 1,024 pieces into a uint16 memory map. Ours is the command
line, Python's start-up included. Memory is the proportional set size of all processes of a run, sampled every 50 ms.
"""

import argparse
import glob
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import report

from trialgpt_jax.data import tokenizer as tokenizer_lib

PROCESSES = 2


def as_nanogpt(corpus: str, out: str) -> None:
    """The baseline, run in a separate process: writes `<out>/train.bin` and `<out>/val.bin`."""
    import datasets
    import tiktoken

    gpt2 = tokenizer_lib.load("gpt2")  # may need no download; with PATTERN the same as tiktoken.get_encoding("gpt2")
    ranks = {gpt2.token_bytes(i): i for i in range(gpt2.eot_id)}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=tokenizer_lib.PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": gpt2.eot_id}
    )
    files = sorted(glob.glob(os.path.join(corpus, "*.jsonl.gz")))
    loaded = datasets.load_dataset(
        "json", data_files=files, split="train", num_proc=PROCESSES, cache_dir=f"{out}/cache"
    )
    splits = loaded.train_test_split(test_size=0.0005, seed=2357, shuffle=True)

    def tokenize(row):
        ids = [*encoding.encode_ordinary(row["text"]), encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    for name, split in (("train", splits["train"]), ("val", splits["test"])):
        tokens = split.map(tokenize, remove_columns=split.column_names, num_proc=PROCESSES)
        target = np.memmap(f"{out}/{name}.bin", np.uint16, "w+", shape=(int(np.sum(tokens["len"])),))
        pieces, end = min(1024, len(tokens)), 0
        for piece in range(pieces):
            rows = tokens.shard(num_shards=pieces, index=piece, contiguous=True).with_format("numpy")
            ids = np.concatenate(rows["ids"])
            target[end : end + len(ids)] = ids
            end += len(ids)
        target.flush()


def measure(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, peak memory (MB) and CPU seconds of a command and its children."""
    started, before, peak = time.perf_counter(), os.times(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    errors: list[bytes] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    while process.poll() is None:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        peak = max(peak, sum(proportional_kb(pid) for pid in pids if session(pid) == process.pid))
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    reader.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors[0].decode()[-2000:]}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, peak / 1000, cpu


def session(pid: int) -> int:
    """Session of a process; -1 if it has ended."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def proportional_kb(pid: int) -> int:
    """Proportional set size of a process in kB; 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def documents_digest(paths: list[str], end_of_text: int = 50256) -> tuple[int, str]:
    """Number of tokens, and a digest of all documents that is independent of their order."""
    total, digests = 0, []
    for path in paths:
        ids = np.fromfile(path, np.uint16)
        total += len(ids)
        ends = np.flatnonzero(ids == end_of_text) + 1
        digests += [hashlib.sha256(document).digest() for document in np.split(ids, ends[:-1])]
    return total, hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def main() -> None:
    parser = report.parser(__doc__, "preprocess", rounds=3)
    parser.add_argument("corpus", help="folder of .jsonl.gz files with a `text` field")
    parser.add_argument("--as-nanogpt", metavar="OUT", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_nanogpt:
        as_nanogpt(given.corpus, given.as_nanogpt)
        return

    def ours(corpus: str, out: str, encoder: str) -> list[str]:
        source = ["--config.data.source=files", f"--config.data.source_options.path={corpus}/*.jsonl.gz"]
        flags = [*source, f"--config.data.dir={out}", f"--config.data.encoder={encoder}"]
        return [sys.executable, "-m", "trialgpt_jax.preprocess", *flags, f"--config.data.num_workers={PROCESSES}"]

    runs: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/twice")
        for path in glob.glob(os.path.join(given.corpus, "*.jsonl.gz")):
            for copy in "ab":
                os.symlink(os.path.abspath(path), f"{folder}/twice/{copy}_{os.path.basename(path)}")
        for number in range(given.rounds):
            for encoder in ("tiktoken", "gigatoken"):
                run = measure(ours(given.corpus, f"{folder}/{encoder}{number}", encoder))
                runs.setdefault(encoder, []).append(run)
            shutil.rmtree(f"{folder}/nanogpt", ignore_errors=True)
            os.makedirs(f"{folder}/nanogpt")
            baseline = [sys.executable, __file__, given.corpus, "--as-nanogpt", f"{folder}/nanogpt"]
            runs.setdefault("nanogpt", []).append(measure(baseline))
        for encoder in ("tiktoken", "gigatoken"):
            runs[f"{encoder}, input doubled"] = [measure(ours(f"{folder}/twice", f"{folder}/twice_{encoder}", encoder))]
        digests = {
            name: documents_digest(sorted(glob.glob(f"{folder}/{name}/*.bin")))
            for name in ("nanogpt", "tiktoken0", "gigatoken0")
        }
        with open(f"{folder}/tiktoken0/manifest.json", encoding="utf-8") as file:
            text = sum(shard["bytes"] for shard in json.load(file)["shards"])
    seconds = {name: statistics.median(s for s, _, _ in run) for name, run in runs.items()}
    figures = {
        "what": f"{text / 1e6:.1f} MB of text to GPT-2 ids, {PROCESSES} processes; times as fast: ratio of the medians",
        "machine": report.machine(),
        "versions": report.versions("datasets", "tiktoken", "gigatoken", "numpy"),
        "seconds": {name: [round(s, 2) for s, _, _ in run] for name, run in runs.items()},
        "cpu_seconds": {name: [round(cpu, 1) for _, _, cpu in run] for name, run in runs.items()},
        "peak_memory_mb": {name: round(max(mb for _, mb, _ in run)) for name, run in runs.items()},
        "times_as_fast_as_nanogpt": {
            name: round(seconds["nanogpt"] / seconds[name], 2) for name in ("tiktoken", "gigatoken")
        },
        "tokens": digests["nanogpt"][0],
        "same_documents_and_ids": len(set(digests.values())) == 1,
        "note": given.note,
    }
    report.write(figures, given.output)


if __name__ == "__main__":
    main()
