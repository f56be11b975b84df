"""Measures start-up: seconds from the command to the first finished optimizer step of the quickstart.

    python scripts/bench/startup.py --peer=path/to/nanoGPT    # writes scripts/bench/results/startup.json

Each round runs `train` on the quickstart's config twice: cold, with an empty compilation cache, and warm, with the cache
that the cold run left. The clock starts before Python does and stops when the line of step 1 is printed; the evaluation
before it (16 batches) counts, preprocessing does not. --peer runs nanoGPT's train.py eager on CPU, in turns with ours, on a model,
batch and number of evaluation batches of the same size, until it prints its first iteration.
"""

import argparse
import importlib.metadata
import json
import os
import pickle
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MARKS = {
    "imported": r"\d[\d,]* parameters",
    "compiled": "compiled in",
    "evaluated": "step 0: validation loss",
    "stepped": r"step +1/",
}
CONFIG = "--config=configs/quickstart.py"


def seconds_until(marks: dict[str, str], command: list[str], cwd: str, env: dict[str, str]) -> dict[str, float]:
    """Seconds from the command to the first line that begins with each mark, in turn; then the process is killed."""
    started, seen, lines = time.perf_counter(), {}, []
    with subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            lines.append(line)
            seen |= {
                name: time.perf_counter() - started
                for name, mark in marks.items()
                if re.match(mark, line) and name not in seen
            }
            if len(seen) == len(marks):
                break
        process.kill()
    if len(seen) < len(marks):
        raise SystemExit(
            f"{' '.join(command)} ended without a line of {set(marks) - set(seen)}:\n{''.join(lines[-20:])}"
        )
    return seen


def nanogpt_folder(source: str, folder: str) -> str:
    """A copy of nanoGPT with random ids as its data."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".git", "assets", "data"))
    data = os.path.join(folder, "data", "random")
    os.makedirs(data)
    for name, size in (("train", 1_000_000), ("val", 100_000)):
        np.random.default_rng(0).integers(0, 4096, size, np.uint16).tofile(os.path.join(data, f"{name}.bin"))
    with open(os.path.join(data, "meta.pkl"), "wb") as file:
        pickle.dump({"vocab_size": 4096}, file)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "startup.json")
    parser.add_argument("--peer", metavar="FOLDER", help="nanoGPT's repository, to measure it too")
    parser.add_argument("--output", default=results, help="file for the figures")
    parser.add_argument("--rounds", type=int, default=5, help="each runs every way once")
    parser.add_argument("--note", default="", help="what the reader of the figures should know")
    given = parser.parse_args()

    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        env |= {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"), "PYTHONUNBUFFERED": "1"}
        store = f"--config.data.dir={folder}/store"
        subprocess.run([sys.executable, "-m", "trialgpt_jax.preprocess", CONFIG, store], cwd=ROOT, env=env, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        if given.peer:
            peer = nanogpt_folder(given.peer, f"{folder}/nanogpt")
            # 2 x 8 evaluation batches, for it evaluates both splits
            sizes = [
                "--block_size=256",
                "--n_layer=4",
                "--n_head=4",
                "--n_embd=256",
                "--batch_size=8",
                "--eval_iters=8",
            ]
            other = ["--dataset=random", "--device=cpu", "--dtype=float32", "--compile=False", "--log_interval=1",
                     "--gradient_accumulation_steps=1", f"--out_dir={folder}/out"]  # fmt: skip
            theirs = [sys.executable, "train.py", *sizes, *other]
        for number in range(given.rounds):
            for way in ("cold", "warm"):
                command = [sys.executable, "-m", "trialgpt_jax.train", CONFIG, store, "--config.log.every_steps=1",
                           f"--workdir={folder}/{way}{number}"]  # fmt: skip
                cache = {"XDG_CACHE_HOME": f"{folder}/cache{number}"}
                runs.setdefault(way, []).append(seconds_until(MARKS, command, ROOT, env | cache))
            if given.peer:
                runs.setdefault("nanogpt", []).append(seconds_until({"stepped": "iter 0:"}, theirs, peer, env))

    packages = ("jax", "jaxlib", "flax", "orbax-checkpoint", *(("torch",) if given.peer else ()))
    figures = {
        "what": "seconds from the command to the first finished optimizer step, quickstart (4.3M parameters, 8 x 256 tokens)",
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    medians = {}
    for way, rounds in runs.items():
        medians[way] = statistics.median(run["stepped"] for run in rounds)
        until = {mark: round(statistics.median(run[mark] for run in rounds), 2) for mark in rounds[0]}
        figures[way] = {
            "median": round(medians[way], 2),
            "rounds": [round(run["stepped"], 2) for run in rounds],
            "seconds_until": until,
        }
    if given.peer:
        figures["ratio"] = {way: round(medians["nanogpt"] / medians[way], 2) for way in ("cold", "warm")}
    figures["note"] = given.note
    with open(given.output, "w", encoding="utf-8") as file:
        file.write(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
