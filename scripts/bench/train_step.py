"""Measures the train step, and nanoGPT's in turns with it in the same run: tokens/s, ms, MFU, memory, bytes moved.

    python scripts/bench/train_step.py --peer=path/to/nanoGPT    # writes scripts/bench/results/train_step.json

Without --shapes: on a CPU, GPT-2 124M at 2 x 1,024 and a 6-layer 384-wide model at 8 x 256, float32; on a GPU, GPT-2 124M
at 32 x 1,024 with heads of 64 and of 128, bfloat16. Both sides: random ids, AdamW, gradients clipped at norm 1, biases, no
dropout; nanoGPT's step is that of its train.py, its model.py eager and under torch.compile. Each way is a process of its
own, as its user would start it, for what one side does to the allocator would help the other, too. A round runs every way for
--steps steps after one that does not count; compilation is apart. Times are synchronised, and the ratio is that of medians.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import jax
import numpy as np

from trialgpt_jax.config import default_config, gpt_config
from trialgpt_jax.parallel import accelerators
from trialgpt_jax.parallel.sharding import batch_sharding, make_mesh, put_batch
from trialgpt_jax.training import train_step as steps
from trialgpt_jax.training.metrics import flops_per_token, parameter_count
from trialgpt_jax.training.optimizer import make_optimizer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import hlo

VOCABULARY = 50304  # a multiple of 64, as nanoGPT advises, so that both multiply the same matrices


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and its batch, written `layers,heads,width,batch,length`."""

    layers: int
    heads: int
    width: int
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.heads} heads, width {self.width}, {self.batch} x {self.length}"


SHAPES = {"cpu": ["12,12,768,2,1024", "6,6,384,8,256"], "gpu": ["12,12,768,32,1024", "12,6,768,32,1024"]}


def ours(shape: Shape, tokens_BxU: np.ndarray) -> tuple:
    """A function that runs n steps and returns the loss, and facts of the compiled step."""
    config = default_config()
    config.model.update({"vocab_size": VOCABULARY, "block_size": shape.length, "n_layer": shape.layers,
                         "n_head": shape.heads, "n_embd": shape.width})  # fmt: skip
    gpt = gpt_config(config, jax.devices()[0].platform)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    optimizer = make_optimizer(config.optim, 1000)
    compiled = steps.compile_train_step(gpt, optimizer, mesh, batch_size=shape.batch, accumulate_steps=1, seed=0)
    state = steps.create_state(gpt, optimizer, 0, mesh)
    batch = put_batch(tokens_BxU, batch_sharding(mesh))
    limit = accelerators.leave_room(compiled)

    def run(n: int) -> float:
        nonlocal state
        for _ in range(n):
            state, metrics = compiled(state, batch)
            accelerators.return_freed_memory(limit)
        return float(metrics["loss"])

    plan = compiled.memory_analysis()
    tokens = shape.batch * shape.length
    return run, {
        "attention": gpt.attention,
        "dtype": str(gpt.dtype),
        "parameters": parameter_count(state.params),
        "flops_per_token": flops_per_token(state.params, gpt),
        "planned_memory_gb": round((plan.argument_size_in_bytes + plan.temp_size_in_bytes) / 1e9, 2),
        "bytes_moved_per_token": round(sum(hlo.traffic(compiled.as_text()).values()) / tokens),
    }


def nanogpt(folder: str, shape: Shape, tokens_BxU: np.ndarray, compiled: bool) -> tuple:
    """As `ours`, for nanoGPT."""
    import torch

    if folder not in sys.path:
        sys.path.insert(0, folder)
    from model import GPT, GPTConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    sizes = {"n_layer": shape.layers, "n_head": shape.heads, "n_embd": shape.width, "block_size": shape.length}
    raw = GPT(GPTConfig(vocab_size=VOCABULARY, dropout=0.0, bias=True, **sizes)).to(device)
    optimizer = raw.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
    model = torch.compile(raw) if compiled else raw
    x = torch.from_numpy(tokens_BxU[:, :-1].astype(np.int64)).to(device)
    y = torch.from_numpy(tokens_BxU[:, 1:].astype(np.int64)).contiguous().to(device)
    wide = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def run(n: int) -> float:
        for _ in range(n):
            with wide:
                _, loss = model(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run, {}


def serve(way: str, shape: Shape, folder: str) -> None:
    """The process of one way: prints its facts, then for every number of steps on stdin the seconds they took."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # nanoGPT prints
    tokens_BxU = np.random.default_rng(0).integers(0, VOCABULARY, (shape.batch, shape.length + 1), np.int32)
    if way == "ours":
        accelerators.keep_freed_memory()
        run, facts = ours(shape, tokens_BxU)
    else:
        run, facts = nanogpt(folder, shape, tokens_BxU, way == "nanogpt compiled")
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        run(int(line))
        seconds = time.perf_counter() - started
        stats = jax.devices()[0].memory_stats() if way == "ours" else None
        print(json.dumps([seconds, stats and stats["peak_bytes_in_use"]]), file=answers, flush=True)


class Way:
    """A process that runs `serve`."""

    def __init__(self, way: str, shape: Shape, folder: str):
        argv = [sys.executable, __file__, "--serve", way, "--shapes", ",".join(map(str, dataclasses.astuple(shape)))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([*argv, "--peer", folder], **pipes)
        self.facts = json.loads(self._process.stdout.readline())

    def run(self, n: int) -> float:
        """Seconds of n steps."""
        print(n, file=self._process.stdin, flush=True)
        seconds, self.peak_bytes = json.loads(self._process.stdout.readline())
        return seconds

    def stop(self) -> None:
        self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "train_step.json")
    parser.add_argument("--peer", metavar="FOLDER", help="nanoGPT's repository, to measure it too")
    parser.add_argument("--shapes", nargs="*", help="layers,heads,width,batch,length")
    parser.add_argument("--rounds", type=int, default=5, help="each runs every way once")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a round")
    parser.add_argument("--output", default=results, help="file for the figures")
    parser.add_argument("--note", default="", help="what the reader of the figures should know")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # the way that this process runs, for the one that measures
    given = parser.parse_args()
    if given.serve:
        return serve(given.serve, Shape(*map(int, given.shapes[0].split(","))), given.peer)

    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process and the ways share the card
    device = jax.devices()[0]
    chip = accelerators.chip(device.device_kind)
    packages = ("jax", "jaxlib", "flax", "optax", *(("torch",) if given.peer else ()))
    figures = {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
        "device": device.device_kind,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "shapes": {},
        "note": given.note,
    }
    for text in given.shapes or SHAPES[device.platform]:
        shape = Shape(*map(int, text.split(",")))
        names = ("ours", "nanogpt eager", "nanogpt compiled") if given.peer else ("ours",)
        ways = {name: Way(name, shape, given.peer or "") for name in names}
        first, seconds = {name: way.run(2) for name, way in ways.items()}, {name: [] for name in ways}
        for _ in range(given.rounds):
            for name, way in ways.items():
                way.run(1)
                seconds[name].append(way.run(given.steps) / given.steps)
        tokens = shape.batch * shape.length
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        facts = ways["ours"].facts
        row = facts | {
            "tokens_per_second": {way: round(tokens / s, 1) for way, s in medians.items()},
            "ms": {way: [round(1000 * s, 1) for s in times] for way, times in seconds.items()},
            "first_two_steps_seconds": {way: round(s, 1) for way, s in first.items()},
            "times_as_fast": {way: round(s / medians["ours"], 3) for way, s in medians.items() if way != "ours"},
        }
        if chip:
            row["mfu"] = round(tokens / medians["ours"] * facts["flops_per_token"] / chip.peak_flops, 4)
        if ways["ours"].peak_bytes:
            row["peak_memory_gb"] = round(ways["ours"].peak_bytes / 1e9, 2)
        for way in ways.values():
            way.stop()
        figures["shapes"][str(shape)] = row
        print(shape, json.dumps(row, indent=1))
    with open(given.output, "w", encoding="utf-8") as file:
        file.write(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
