"""Measures a recipe one change at a time: whole schedules, both arms tuned, over seeds, with bits per byte and time.

    python -m trialgpt_jax.preprocess --config=configs/quickstart.py
    python scripts/bench/ladder.py                          # every rung; adds to scripts/bench/results/ladder.json
    python scripts/bench/ladder.py --only muon rope         # some of them
    python scripts/bench/ladder.py --store=data/rfc --layers=6 --width=384 --steps=150 --only gpt2 muon
    python scripts/bench/ladder.py --time                   # ms of a step of every rung, in turns
    python scripts/bench/ladder.py --h200=PYTHON            # FLOPs and bytes of a step of every rung at 124M, compiled
                                                            # for an H200 by an interpreter with the extra `cuda`

A rung changes some fields of the rung below it and is run with three seeds. Each arm's main learning rate is tuned over
at least four values with the first seed; a rung without a grid takes the best rate of the last grid below it. Each run
is a process of its own, with the trainer's compiled steps, data order and evaluation on the whole validation split.
Runs that are in the file are not repeated, so the script may be stopped at any time. `ladder_table.py` makes the tables
and plots of docs/learning.md from the file.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import threading
import time

import report

# Four layers of width 256 with the quickstart's data and tokenizer; otherwise GPT-2 and nanoGPT's AdamW.
BASE = {
    "data.dir": "data/quickstart",
    "model.vocab_size": 4096,
    "model.block_size": 256,
    "model.n_layer": 4,
    "model.n_head": 4,
    "model.n_embd": 256,
    "optim.warmup_steps": 0,
    "optim.warmup_fraction": 0.05,
    "train.batch_size": 8,
}
SEEDS = (1337, 1, 2)
STEPS = 150  # of a rung: 0.31M tokens
LONG = 6 * STEPS  # of the AdamW that the last rung is compared with
EMA = (0.9, 0.95, 0.98)  # decays of averaged weights
GPT2_124M = {"model.n_layer": 12, "model.n_embd": 768, "model.block_size": 1024, "model.vocab_size": 50304}
GPT2_124M |= {"train.batch_size": 32, "train.accumulate_steps": 1}


@dataclasses.dataclass(frozen=True)
class Rung:
    """A change of the recipe.

    Attributes:
      fields: what differs from the newest rung above it in `RUNGS` that is taken.
      rate, grid: the field that is tuned, and its values; without a grid, those of the newest rung above that has one.
      steps: length of the schedule.
      taken: whether the next rungs build on it: its gain is at least one standard deviation.
      averages: whether moving averages of the weights are evaluated too.
      why: it is taken, if not for its gain.
      removed: the last commit that has the option, if it was removed because its rung did not earn it.
    """

    name: str
    fields: dict
    rate: str = ""
    grid: tuple = ()
    steps: int = STEPS
    taken: bool = True
    averages: bool = False
    why: str = ""
    removed: str = ""


ADAMW = {"rate": "optim.learning_rate", "grid": (1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3)}
MUON = {"rate": "optim.muon_learning_rate", "grid": (0.007, 0.01, 0.014, 0.02, 0.028, 0.04)}
RUNGS = (
    Rung("gpt2 of 900 steps", {}, **ADAMW, steps=LONG, taken=False),
    Rung("gpt2", {}, **ADAMW),
    Rung("muon", {"optim.name": "muon", "optim.learning_rate": 3e-3}, **MUON),
    Rung("rope", {"model.position": "rope"}),
    Rung(
        "rmsnorm without scale, no biases",
        {"model.norm": "rmsnorm", "model.norm_scale": False, "model.bias": False},
        why="NanoChatForCausalLM has it",
    ),
    Rung("relu2", {"model.activation": "relu2"}),
    Rung("qk_norm", {"model.qk_norm": True}),
    Rung(
        "untied head, zero init, embed_norm",
        {"model.tie_embeddings": False, "model.zero_init_proj": True, "model.embed_norm": True},
    ),
    Rung("softcap 15", {"model.logit_softcap": 15.0}, why="NanoChatForCausalLM has it"),
    Rung("heads of 128", {"model.n_head": 2}, why="see the last rows"),
    Rung(
        "wsd to zero, no warmup",
        {
            "optim.schedule": "wsd",
            "optim.decay_fraction": 0.7,
            "optim.min_lr_ratio": 0.0,
            "optim.warmup_fraction": 0.0,
        },
    ),
    Rung(
        "rates by group, no clipping",
        {
            "optim.groups.head.learning_rate": 0.01,
            "optim.groups.embedding.learning_rate": 0.012,
            "optim.weight_decay": 0.01,
            "optim.clip_norm": 0.0,
        },
        **MUON | {"grid": (0.01, 0.014, 0.02, 0.028)},
    ),
    Rung(
        "momentum 0.9, betas 0.8 and 0.98, rope base 1024",
        {"optim.muon_momentum": 0.9, "optim.b1": 0.8, "optim.b2": 0.98, "model.rope_base": 1024.0},
        **MUON | {"grid": (0.014, 0.02, 0.028, 0.04)},
    ),
    # not taken
    Rung("normuon", {"optim.name": "normuon"}, taken=False, removed="f80de9b"),
    Rung(
        "decay 0.1, cautious, to zero",
        {
            "optim.groups.matrices.weight_decay": 0.1,
            "optim.cautious_weight_decay": True,
            "optim.weight_decay_schedule": "learning_rate",
        },
        taken=False,
        removed="f80de9b",
    ),
    Rung("averaged weights", {"optim.schedule": "constant"}, taken=False, averages=True),
    # the last taken rung without one of the changes below it
    Rung(
        "without: rmsnorm without scale, no biases",
        {"model.norm": "layernorm", "model.norm_scale": True, "model.bias": True},
        taken=False,
    ),
    Rung("without: softcap 15", {"model.logit_softcap": 0.0}, taken=False),
    Rung("without: heads of 128", {"model.n_head": 4}, taken=False),
    Rung("without: relu2", {"model.activation": "gelu"}, taken=False),
)


# ---- the fields of a rung


def find(figures: dict, fields: dict) -> dict | None:
    """The finished run of these fields."""
    return next((run for run in figures["runs"] if run["fields"] == fields), None)


def best_rate(figures: dict, rung: Rung, shape: dict | None = None) -> float | None:
    """The value of a rung's grid with the fewest bits per byte; None before its runs are finished."""
    fields = untuned(figures, rung, shape)
    runs = [find(figures, fields | {rung.rate: rate, "seed": SEEDS[0]}) for rate in rung.grid]
    if None in runs:
        return None
    return min(runs, key=lambda run: run["bits_per_byte"])["fields"][rung.rate]


def untuned(figures: dict, rung: Rung, shape: dict | None = None) -> dict:
    """The fields of a rung that differ from the default, without the one that it tunes itself.

    Rates of the grids below it are the best ones of the small model, None where they are not known yet.

    Args:
      shape: replaces fields of `BASE`: a larger model on other data. Heads keep their width if n_embd changes.
    """
    fields = dict(BASE)
    for below in RUNGS[: RUNGS.index(rung)]:
        if below.taken:
            fields |= below.fields
            if below.grid:
                fields[below.rate] = best_rate(figures, below)
    fields |= rung.fields | {"train.steps": rung.steps}
    head_dim = fields["model.n_embd"] // fields["model.n_head"]
    fields |= shape or {}
    return fields | {"model.n_head": fields["model.n_embd"] // head_dim}


def tuned(figures: dict, rung: Rung, shape: dict | None = None) -> dict:
    """`untuned` with the best value of the rung's own grid."""
    fields = untuned(figures, rung, shape)
    return fields | {rung.rate: best_rate(figures, rung, shape)} if rung.grid else fields


# ---- one run, in a process of its own


def make_program(fields: dict):
    """The Program of a config with these fields, and its token store."""
    from trialgpt_jax.config import default_config, set_field, validate
    from trialgpt_jax.data.token_store import open_store
    from trialgpt_jax.parallel.sharding import single_device
    from trialgpt_jax.training.program import Program, resolve

    config = default_config()
    for name, value in fields.items():
        set_field(config, name, value)
    config.train.accumulate_steps = 1
    validate(config)
    store = open_store(config.data.dir)
    return Program(resolve(config, store), mesh=single_device()), store


def run(fields: dict, averaged: bool) -> dict:
    """Trains with `fields` and evaluates the last weights and, if `averaged`, their moving averages."""
    from trialgpt_jax.parallel.host_memory import MEMORY

    MEMORY.reuse()
    import jax

    from trialgpt_jax.parallel.sharding import batch_sharding, put_batch
    from trialgpt_jax.training.metrics import bits_per_byte, parameter_count

    program, store = make_program(fields)
    state, sharding = program.init_state(), batch_sharding(program.mesh)
    averages = {}
    if averaged:
        averages = dict.fromkeys(EMA, jax.tree.map(jax.numpy.zeros_like, state.params))
    average = jax.jit(lambda old, new, decay: jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new))
    unbiased = jax.jit(lambda total, weight: jax.tree.map(lambda a: a / weight, total))
    batches, losses = program.train_batches(store.split("train"), 0), []
    program.train_step  # noqa: B018 - compiles
    for _ in range(fields["train.steps"]):
        state, metrics = program.step(state, put_batch(next(batches), sharding))
        losses.append(float(metrics["loss"]))
        averages = {decay: average(old, state.params, decay) for decay, old in averages.items()}
    batches.close()
    val = store.split("val")

    def evaluate(params) -> float:
        loss, _ = program.evaluate(params, program.eval_batches(val, 0))
        return bits_per_byte(loss, val.n_tokens, val.n_bytes)

    every = max(1, len(losses) // 30)
    return {
        "bits_per_byte": evaluate(state.params),
        "averages": {str(d): evaluate(unbiased(total, 1 - d ** len(losses))) for d, total in averages.items()},
        "tokens": len(losses) * fields["train.batch_size"] * fields["model.block_size"],
        "parameters": parameter_count(program.params_layout),
        "loss": [statistics.fmean(losses[i : i + every]) for i in range(0, len(losses), every)],
    }


# ---- all runs


class Runs:
    """The file of runs: each is stored when it ends, and asked for by its fields."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.lock = options, threading.RLock()
        given = {"data.dir": options.store, "model.n_layer": options.layers, "model.n_embd": options.width}
        self.shape = {name: value for name, value in (given | {"train.steps": options.steps}).items() if value}
        self.cores = list(range(os.cpu_count()))
        try:
            with open(options.output, encoding="utf-8") as file:
                self.figures = json.load(file)
        except FileNotFoundError:
            self.figures = {"runs": []}

    def get(self, fields: dict, averaged: bool = False) -> dict:
        """The run of these fields; executed if the file does not have it."""
        if known := find(self.figures, fields):
            return known
        begin = time.perf_counter()
        argv = [sys.executable, os.path.abspath(__file__), f"--run={json.dumps([fields, averaged])}"]
        with self.lock:
            cores = [self.cores.pop() for _ in range(max(1, os.cpu_count() // self.options.workers))]
        try:
            output = subprocess.run(
                argv,
                stdout=subprocess.PIPE,
                check=True,
                text=True,
                preexec_fn=functools.partial(os.sched_setaffinity, 0, cores),
            ).stdout
        finally:
            with self.lock:
                self.cores += cores
        commit = subprocess.check_output(["git", "rev-parse", "--short=9", "HEAD"], text=True, cwd=report.RESULTS)
        done = {"fields": fields} | json.loads(output.splitlines()[-1]) | {"commit": commit.strip()}
        report.say(f"{done['bits_per_byte']:.4f} in {time.perf_counter() - begin:.0f} s: {fields}")
        with self.lock:
            self.figures["runs"].append(done)
            self.save()
        return done

    def save(self) -> None:
        self.figures |= {"versions": report.versions("jax", "jaxlib", "flax", "optax"), "machine": report.machine()}
        part = f"{self.options.output}.part"
        with open(part, "w", encoding="utf-8") as file:
            json.dump(self.figures, file, indent=1)
            file.write("\n")
        os.replace(part, self.options.output)

    def climb(self, rungs: list[Rung]) -> None:
        """Runs the grids one after another with the first seed, then the best rates of all rungs, seed by seed."""
        with concurrent.futures.ThreadPoolExecutor(self.options.workers) as pool:
            for rung in rungs:
                fields = untuned(self.figures, rung, self.shape)
                if None in fields.values():
                    raise SystemExit(f"{rung.name}: run the rungs with a grid below it first")
                list(pool.map(self.get, [fields | {rung.rate: rate, "seed": SEEDS[0]} for rate in rung.grid]))
            runs = [tuned(self.figures, rung, self.shape) | {"seed": seed} for seed in SEEDS for rung in rungs]
            list(pool.map(self.get, runs, [rung.averages for _ in SEEDS for rung in rungs]))


def measure_steps(figures: dict, rungs: list[Rung], rounds: int) -> dict[str, float]:
    """Median milliseconds of a step by rung; the rungs take turns, so that a noisy machine slows all alike."""
    import jax

    from trialgpt_jax.parallel.sharding import batch_sharding, put_batch

    programs, times = {}, {rung.name: [] for rung in rungs}
    for rung in rungs:
        program, store = make_program(tuned(figures, rung))
        batch = put_batch(next(program.train_batches(store.split("train"), 0)), batch_sharding(program.mesh))
        programs[rung.name] = [program, program.init_state(), batch]
    for n in range(rounds + 1):
        for name, entry in programs.items():
            program, state, batch = entry
            begin = time.perf_counter()
            for _ in range(3):
                state, metrics = program.train_step(state, batch)
            jax.block_until_ready(metrics)
            entry[1] = state
            if n:  # the first round warms up
                times[name].append((time.perf_counter() - begin) / 3)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def compile_steps(figures: dict, rungs: list[Rung], python: str) -> dict[str, dict[str, float]]:
    """Compiles the train step of each rung for one H200, at 124M with 32 x 1,024 tokens.

    Returns:
      Rung -> gflops of the model, and megabytes that the program reads and writes in device memory, both per token.
    """
    root = os.path.join(report.RESULTS, "..", "..", "..")
    argv = [python, os.path.join(root, "scripts", "aot_compile.py"), f"--config={root}/configs/gpt2.py:124m"]
    found = {}
    for rung in rungs:
        fields = untuned(figures, rung, GPT2_124M)  # the rates do not matter
        fields = {name: value for name, value in fields.items() if value is not None and not name.startswith("data.")}
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        output = subprocess.check_output([*argv, "--target=h200", "--json", *flags], text=True)
        step = json.loads(output.splitlines()[-1])
        found[rung.name] = {
            "gflops": step["flops_per_step"] / step["tokens_per_step"] / 1e9,
            "megabytes": step["bytes_moved"] / step["tokens_per_step"] / 1e6,
        }
        report.say(f"{rung.name} {found[rung.name]}")
    return found


def main() -> None:
    parser = report.parser(__doc__, "ladder", rounds=10)
    parser.add_argument(
        "--only", nargs="*", choices=[rung.name for rung in RUNGS if not rung.removed], help="rungs; default: all"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on its own cores")
    parser.add_argument("--store", default="", help="another token store")
    parser.add_argument("--layers", type=int, default=0, help="of the model, for another store")
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--time", action="store_true", help="measure the time of a step only")
    parser.add_argument("--h200", metavar="PYTHON", default="", help="compile the steps for an H200 only")
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(*json.loads(options.run))))
        return
    rungs = [rung for rung in RUNGS if not rung.removed and (not options.only or rung.name in options.only)]
    runs = Runs(options)
    if options.time:
        runs.figures["step_ms"] = measure_steps(runs.figures, rungs, options.rounds)
        runs.save()
        print(json.dumps(runs.figures["step_ms"], indent=1))
        return
    if options.h200:
        runs.figures["h200"] = compile_steps(runs.figures, rungs, options.h200)
        runs.save()
        return
    runs.climb(rungs)


if __name__ == "__main__":
    main()
