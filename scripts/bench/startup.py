"""Measures start-up: seconds from the command to the first optimizer step and to the first generated text.

    python scripts/bench/startup.py --peer=path/to/nanoGPT    # writes scripts/bench/results/startup.json

Each round runs `train` on the quickstart's config twice: cold, with an empty compilation cache, and warm, with the
cache of the cold run. The clock starts before Python does and stops when the line of step 1 is printed. The evaluation
before it (16 batches) is included, preprocessing is not. Then `infer` runs on a checkpoint of that model, warm, until
the prompt and its first token are on stdout. --peer runs nanoGPT's train.py eager on CPU, in turns with ours, with 4
layers of the same width, the same batch size and number of evaluation batches, until it prints its first iteration.
"""

import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import report

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MARKS = {
    "imported": r"\d[\d,]* parameters",
    "compiled": "compiled in",
    "evaluated": "step 0: validation loss",
    "stepped": r"step +1/",
}
CONFIG = "--config=configs/quickstart.py"


def seconds_until(marks: dict[str, str], command: list[str], cwd: str, env: dict[str, str]) -> dict[str, float]:
    """Seconds from the command to the first line that matches each mark; then the process is killed."""
    started, seen, lines = time.perf_counter(), {}, []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=cwd, env=env, **pipes) as process:
        for line in process.stdout:
            lines.append(line)
            for name, mark in marks.items():
                if name not in seen and re.match(mark, line):
                    seen[name] = time.perf_counter() - started
            if len(seen) == len(marks):
                break
        process.kill()
    if len(seen) < len(marks):
        missing = set(marks) - set(seen)
        raise SystemExit(f"{' '.join(command)} ended without a line of {missing}:\n{''.join(lines[-20:])}")
    return seen


def seconds_until_text(command: list[str], cwd: str, env: dict[str, str]) -> float:
    """Seconds from the command to the first byte on stdout; the command must end well."""
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        first, seconds = process.stdout.read(1), time.perf_counter() - started
        process.stdout.read()
    if not first or process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds


def nanogpt_folder(source: str, folder: str) -> str:
    """A copy of nanoGPT whose data are random ids."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".git", "assets", "data"))
    data = os.path.join(folder, "data", "random")
    os.makedirs(data)
    for name, size in (("train", 1_000_000), ("val", 100_000)):
        np.random.default_rng(0).integers(0, 4096, size, np.uint16).tofile(os.path.join(data, f"{name}.bin"))
    with open(os.path.join(data, "meta.pkl"), "wb") as file:
        pickle.dump({"vocab_size": 4096}, file)
    return folder


def main() -> None:
    parser = report.parser(__doc__, "startup", rounds=5)
    parser.add_argument("--peer", metavar="FOLDER", help="nanoGPT's repository, to measure it too")
    given = parser.parse_args()

    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        env |= {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"), "PYTHONUNBUFFERED": "1"}
        store = f"--config.data.dir={folder}/store"
        preprocess = [sys.executable, "-m", "trialgpt_jax.preprocess", CONFIG, store]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(preprocess, cwd=ROOT, env=env, check=True, **quiet)
        if given.peer:
            peer = nanogpt_folder(given.peer, f"{folder}/nanogpt")
            sizes = (
                "--block_size=256 --n_layer=4 --n_head=4 --n_embd=256 --batch_size=8 --gradient_accumulation_steps=1"
            )
            # it evaluates both splits: 2 x 8 batches
            other = "--dataset=random --device=cpu --dtype=float32 --compile=False --log_interval=1 --eval_iters=8"
            theirs = [sys.executable, "train.py", *sizes.split(), *other.split(), f"--out_dir={folder}/out"]
        env_of_infer = env | {"XDG_CACHE_HOME": f"{folder}/cache_of_infer"}
        short = ["--config.train.steps=1", "--config.eval.batches=1", f"--workdir={folder}/model"]
        train = [sys.executable, "-m", "trialgpt_jax.train", CONFIG, store, *short]
        subprocess.run(train, cwd=ROOT, env=env_of_infer, check=True, **quiet)
        infer = [sys.executable, "-m", "trialgpt_jax.infer", f"--workdir={folder}/model", "--prompt=The people"]
        infer += ["--max_new_tokens=20", "--temperature=0"]
        seconds_until_text(infer, ROOT, env_of_infer)  # fills the cache
        for number in range(given.rounds):
            runs.setdefault("infer", []).append({"first text": seconds_until_text(infer, ROOT, env_of_infer)})
            for name in ("cold", "warm"):
                train = [sys.executable, "-m", "trialgpt_jax.train", CONFIG, store, "--config.log.every_steps=1"]
                train.append(f"--workdir={folder}/{name}{number}")
                cache = {"XDG_CACHE_HOME": f"{folder}/cache{number}"}
                runs.setdefault(name, []).append(seconds_until(MARKS, train, ROOT, env | cache))
            if given.peer:
                runs.setdefault("nanogpt", []).append(seconds_until({"stepped": "iter 0:"}, theirs, peer, env))

    packages = ("jax", "jaxlib", "flax", "orbax-checkpoint", *(("torch",) if given.peer else ()))
    figures = {
        "what": "seconds from the command to the first finished step, quickstart (5.2M parameters, 8 x 256 tokens); "
        "infer: to the first token of its model, warm",
        "machine": report.machine(),
        "versions": report.versions(*packages),
    }
    medians = {}
    for name, rounds in runs.items():
        last = list(rounds[0])[-1]
        medians[name] = statistics.median(run[last] for run in rounds)
        until = {mark: round(statistics.median(run[mark] for run in rounds), 2) for mark in rounds[0]}
        figures[name] = {
            "median": round(medians[name], 2),
            "rounds": [round(run[last], 2) for run in rounds],
            "seconds_until": until,
        }
    if given.peer:
        figures["ratio"] = {name: round(medians["nanogpt"] / medians[name], 2) for name in ("cold", "warm")}
    figures["note"] = given.note
    report.write(figures, given.output)


if __name__ == "__main__":
    main()
