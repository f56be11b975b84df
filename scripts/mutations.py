"""Changes one line of the package at a time and runs the tests that should notice: a test suite without gaps fails for
every change.

    python scripts/mutations.py [--jobs=2] [--only=NUMBER,...] [--out=FILE.json]

Each change is made in a copy of the repository, with the interpreter and packages that run this script. A change is
killed when a test fails, and survives when all of the named test files pass. Not part of the suite: each change takes
about a minute.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
_PARTS = ("trialgpt_jax", "tests", "scripts", "configs", "docs", "pyproject.toml", "requirements.txt", "README.md")
_PARTS += ("CONTRIBUTING.md",)  # of the repository; not data, runs or virtual environments


class Mutation(NamedTuple):
    """`before`, which occurs once in `trialgpt_jax/<file>`, becomes `after`; `tests` are names of test files."""

    file: str
    before: str
    after: str
    tests: str


MUTATIONS = [
    # storage
    Mutation("storage/files.py", "        sync_file(part)\n", "", "files power_loss"),
    Mutation(
        "storage/files.py",
        "        raise\n    sync_folder(os.path.dirname(path))",
        "        raise",
        "files power_loss",
    ),
    Mutation(
        "storage/files.py",
        "            sync_folder(os.path.dirname(os.path.abspath(folder)))\n",
        "",
        "files power_loss",
    ),
    Mutation("storage/lock.py", "            if locked and _is_at(handle, path):", "            if locked:", "lock"),
    Mutation(
        "storage/lease.py", "                    exit_taken_over(folder, text)\n", "                    pass\n", "lock"
    ),
    Mutation(
        "storage/integrity.py",
        "if files.sha256(path, read) != digest:",
        "if size > 4000 and files.sha256(path, read) != digest:",
        "checkpoint",
    ),
    Mutation("storage/integrity.py", "if found[name] != size:", "if found[name] < size:", "checkpoint hostile_input"),
    Mutation("storage/lock.py", "fcntl.flock(file, kind | fcntl.LOCK_NB)", "pass", "checkpoint"),
    # data
    Mutation("data/shard_writer.py", "        os.fsync(self._file.fileno())\n", "", "power_loss preprocess"),
    Mutation("data/units.py", 'job.data["split_seed"].to_bytes', "int(0).to_bytes", "preprocess"),
    Mutation("data/units.py", "if unit.tokens >= shard_tokens:", "if unit.tokens > shard_tokens:", "preprocess"),
    Mutation("data/units.py", "whole = np.append(whole, np.uint32(tokenizer.eot_id))", "pass", "preprocess"),
    Mutation("data/foreign_store.py", "split.check_id(int(ids.max()), name)", "pass", "token_store"),
    Mutation("data/library_tokenizer.py", "library.encode_special_tokens = True", "pass", "tokenizer_source"),
    Mutation("data/char_tokenizer.py", 'raise _Refused(f"it has the opcode', 'str(f"it has the opcode', "char"),
    Mutation("data/walk.py", "                taken.add(identity)\n", "", "corpora"),
    Mutation("data/walk.py", "raise unreadable(path, error)", "pass", "corpora"),
    Mutation("data/input_record.py", "digest.update(file.read(_END_BYTES))", "pass", "preprocess"),
    Mutation("data/tokenizer_source.py", "return _of_folder(", "return None and _of_folder(", "tokenizer_source"),
    Mutation("data/archives.py", "context.depth + 1", "context.depth", "archives"),
    Mutation("data/batches.py", "(seed + number * 0x9E3779B97F4A7C15) % 2**64", "seed", "batches"),
    Mutation(
        "data/batches.py",
        "epochs, windows[mine] = np.divmod(places[mine], n_windows)",
        "epochs, windows[mine] = 0 * places[mine], places[mine] % n_windows",
        "batches",
    ),
    Mutation("data/batches.py", "valid = rows < windows", "valid = rows <= windows", "batches train_step"),
    Mutation(
        "data/batches.py",
        "read_into(window * block_size, out[row])",
        "read_into(window * (block_size - 1), out[row])",
        "batches",
    ),
    Mutation(
        "data/splits.py",
        "max(0, (self.n_tokens - 1) // block_size)",
        "max(0, self.n_tokens // block_size)",
        "token_store batches",
    ),
    Mutation(
        "data/token_store.py", "if largest >= vocab_size:", "if largest > vocab_size:", "token_store hostile_input"
    ),
    Mutation("data/token_store.py", 'record["tokens"], record["sha256"]]', 'record["tokens"]]', "workdir"),
    # model
    Mutation("model/config.py", "norm_eps: float = field(1e-5", "norm_eps: float = field(1e-6", "layers gpt"),
    Mutation(
        "model/layers.py", "0.02 / math.sqrt(2 * config.n_layer)", "0.02 / math.sqrt(config.n_layer)", "gpt layers"
    ),
    Mutation(
        "model/layers.py",
        "_A, _B = math.sqrt(2 / math.pi), 0.044715",
        "_A, _B = math.sqrt(2 / math.pi), 0.0447",
        "layers gpt",
    ),
    Mutation("model/norms.py", "        dx = dx - mean_of_g\n", "        pass\n", "layers gpt"),
    Mutation("model/layers.py", "frequency = base **", "frequency = (2 * base) **", "layers gpt"),
    Mutation("model/layers.py", "return jax.nn.silu(gate) * x", "return jax.nn.silu(x) * gate", "layers gpt"),
    Mutation(
        "model/attention.py",
        "query_positions = jnp.tile(positions, G if",
        "query_positions = jnp.repeat(positions, G if",
        "generate attention",
    ),
    Mutation("model/gpt.py", 'HeadNorm(c, name="k_norm")(k)', "k", "gpt"),
    Mutation(
        "model/gpt.py",
        "return config.logit_softcap * jnp.tanh(out / config.logit_softcap) if config.logit_softcap else out",
        "return out",
        "gpt generate infer",
    ),
    Mutation("model/loss.py", "return softcap * capped, 1 - capped**2", "return softcap * capped, 1.0", "loss"),
    Mutation("model/loss.py", "valid_N = labels_N >= 0", "valid_N = labels_N > 0", "loss train_step"),
    Mutation(
        "model/loss.py",
        "        logits_NxV = jnp.where(ids_V < vocab_size, logits_NxV, jnp.finfo(dtype).min)\n",
        "        pass\n",
        "loss",
    ),
    Mutation("model/sampling.py", "(before < top_p)", "(before + probabilities < top_p)", "generate"),
    Mutation("model/sampling.py", "limit(logits_BxV / draw.temperature, draw)", "limit(logits_BxV, draw)", "sampling"),
    Mutation("model/decode.py", "(0, None))(drawing.keys_B, state.n_new)", "(0, None))(drawing.keys_B, 0)", "generate"),
    Mutation("model/generate.py", "ahead = int(", "ahead = 0 * int(", "generate"),
    Mutation("model/hf.py", "        if shape != want:", "        if len(shape) > 9:", "hf convert"),
    # training
    Mutation("training/train_step.py", "jax.random.fold_in(step_key, rows[0])", "step_key", "train_step"),
    Mutation(
        "training/train_step.py",
        "jax.random.fold_in(jax.random.key(seed), state.step)",
        "jax.random.key(seed)",
        "train_step",
    ),
    Mutation(
        "training/train_step.py",
        "labels, config.vocab_size, config.logit_softcap)\n    return total, jnp.sum",
        "labels, config.vocab_size)\n    return total, jnp.sum",
        "train_step",
    ),
    Mutation(
        "training/train_step.py",
        "jnp.where(good, 0, state.skipped_in_a_row + 1)",
        "state.skipped_in_a_row + ~good",
        "train_step reporter",
    ),
    Mutation("training/spikes.py", "mean + sigmas * deviation", "mean + sigmas * deviation**2", "spikes"),
    Mutation(
        "training/groups.py",
        'return "head" if "lm_head" in outer else "embedding"',
        'return "embedding"',
        "optimizer",
    ),
    Mutation("training/optimizer.py", "peak / (warmup + 1), peak, warmup", "0.0, peak, warmup", "optimizer"),
    Mutation("training/meter.py", "return self._times.get()", "return time.monotonic()", "meter"),
    Mutation("config.py", 'train.matmul_precision if train.dtype == "float32" else None', "None", "train_step"),
    Mutation("training/reporter.py", "if skipped >= train.max_skipped:", "if skipped > train.max_skipped:", "reporter"),
    Mutation("training/reporter.py", 'self._log.last.get("seconds", 0.0)', "0.0", "faults"),
    Mutation("training/saver.py", "self._reporter.sync()", "pass", "power_loss faults"),
    Mutation(
        "training/checkpoint.py",
        "                files.sync_tree(self._path(step))  # orbax syncs the arrays, but none of its metadata files\n",
        "",
        "power_loss",
    ),
    Mutation("training/checkpoint.py", "                self._open(step, arrays)\n", "", "checkpoint"),
    Mutation(
        "training/checkpoint_folder.py", '            files.write(path + _REMOVED, b"")\n', "", "checkpoint power_loss"
    ),
    Mutation(
        "training/checkpoint_folder.py",
        "set(_by_loss(losses)[: self._keep_best])",
        "set(_by_loss(losses)[: self._keep_best + 1])",
        "checkpoint",
    ),
    Mutation("training/start.py", "checkpoints.set_aside_after(start.whole)", "pass", "finetune checkpoint"),
    # evaluation
    Mutation(
        "model/packing.py", "len(self.ids) - 1 - self.n_scored", "len(self.ids) - self.n_scored", "language_model"
    ),
    Mutation("model/scoring.py", "target_M - max_M - jnp.log(sum_M)", "target_M - jnp.log(sum_M)", "language_model"),
    Mutation("model/packing.py", "first = max(0, stop - block_size)", "first = start", "language_model"),
    Mutation(
        "evaluation/core.py", "solved = [task.items[i + (i >= index)]", "solved = [task.items[i + (i > index)]", "core"
    ),
    Mutation("evaluation/scoring.py", "if loss < losses[best]:", "if loss <= losses[best]:", "core hellaswag"),
    Mutation("evaluation/hellaswag.py", "model.block_size + 1)", "model.block_size)", "hellaswag"),
    Mutation(
        "evaluation/report.py",
        "metric: _finite(value) if metric in result.exact else rounded_to(value)",
        "metric: rounded_to(value)",
        "evaluate_tasks",
    ),
    Mutation(
        "evaluation/harness_tasks.py",
        "request.resps, request.filtered_resps = [], {}",
        "request.filtered_resps = {}",
        "harness",
    ),
    Mutation(
        "evaluation/in_loop.py",
        "if step != self._resumed or kind not in self._written]",
        "if step != self._resumed]",
        "in_loop",
    ),
]


def run(number: int) -> dict:
    """Applies a mutation in a copy of the repository and runs its tests; which test failed, or that none did."""
    file, before, after, tests = MUTATIONS[number]
    with tempfile.TemporaryDirectory(prefix="mutation_") as folder:
        copy = pathlib.Path(folder) / "repository"
        copy.mkdir()
        for name in _PARTS:
            source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, ignore=ignored) if source.is_dir() else shutil.copy(source, copy)
        path = copy / "trialgpt_jax" / file
        text = path.read_text()
        if text.count(before) != 1:
            raise SystemExit(f"mutation {number}: {before!r} occurs {text.count(before)} times in {file}")
        path.write_text(text.replace(before, after))
        names = [f"tests/test_{name}.py" for name in tests.split()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *names]
        env = os.environ | {"PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu", "TMPDIR": folder}
        began = time.monotonic()
        result = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
        failed = [line.split(" ")[1] for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if result.returncode not in (0, 1):
            failed = [f"pytest ended with status {result.returncode}: {result.stdout[-300:]}"]
        return {
            "number": number,
            "file": file,
            "before": before.strip(),
            "after": after.strip(),
            "tests": tests,
            "killed_by": failed[0] if failed else None,
            "seconds": round(time.monotonic() - began, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="test runs at the same time")
    parser.add_argument("--only", default="", help="comma-separated numbers")
    parser.add_argument("--out", help="JSON file for the results, rewritten after every mutation")
    options = parser.parse_args()
    numbers = [int(n) for n in options.only.split(",") if n] or range(len(MUTATIONS))
    results = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for future in concurrent.futures.as_completed([pool.submit(run, number) for number in numbers]):
            results.append(future.result())
            latest = results[-1]
            verdict = f"killed by {latest['killed_by']}" if latest["killed_by"] else "SURVIVED"
            print(f"{latest['number']:2} {latest['file']}: {latest['after'] or 'removed'}: {verdict}", flush=True)
            if options.out:
                ordered = sorted(results, key=lambda result: result["number"])
                pathlib.Path(options.out).write_text(json.dumps(ordered, indent=1) + "\n")
    killed = sum(1 for result in results if result["killed_by"])
    print(f"{killed} of {len(results)} killed")


if __name__ == "__main__":
    main()
