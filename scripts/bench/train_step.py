"""Measures the train step against nanoGPT's in the same run: tokens/s, ms, MFU, memory, bytes moved.

    python scripts/bench/train_step.py --peer=path/to/nanoGPT    # writes scripts/bench/results/train_step.json

Default shapes: on a CPU, GPT-2 124M at 2 x 1,024 and a model of 6 layers of width 384 at 8 x 256, float32; on a GPU,
GPT-2 124M at 32 x 1,024 with heads of 64 and of 128, bfloat16. Both sides use random ids, AdamW, clipping at norm 1,
biases and no dropout; nanoGPT's step is that of its train.py, its model.py under torch.compile, on a CPU also eager.
--modern adds the model and optimizer of configs/modern.py at the same shapes. Each program is a separate process,
started as its user would start it, because allocator settings of one would affect the others. A round runs every
program for --steps steps after one that does not count. Compilation is reported separately. Times are synchronised, and
the ratio is that of medians.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
import report

from trialgpt_jax import config_file
from trialgpt_jax.config import default_config
from trialgpt_jax.parallel import accelerators
from trialgpt_jax.parallel.host_memory import MEMORY
from trialgpt_jax.parallel.sharding import batch_sharding, put_batch, single_device
from trialgpt_jax.training.metrics import flops_per_token, parameter_count
from trialgpt_jax.training.program import Program

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "scripts"))
import hlo

VOCABULARY = 50304  # a multiple of 128: no padding, so both multiply the same matrices


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


OURS = ("ours", "modern")
SHAPES = {"cpu": ["12,12,768,2,1024", "6,6,384,8,256"], "gpu": ["12,12,768,32,1024", "12,6,768,32,1024"]}


def ours(shape: Shape, tokens_BxU: np.ndarray, modern: bool) -> tuple:
    """A function that runs n steps and returns the loss, and facts about the compiled step."""
    config = config_file.load(os.path.join(ROOT, "configs", "modern.py")) if modern else default_config()
    config.model.update({"vocab_size": VOCABULARY, "block_size": shape.length, "n_layer": shape.layers})
    config.model.update({"n_head": shape.heads, "n_embd": shape.width})
    config.train.update({"batch_size": shape.batch, "accumulate_steps": 1, "steps": 1000, "tokens_per_parameter": 0.0})
    program = Program(config, mesh=single_device())
    gpt, compiled, state = program.gpt, program.train_step, program.init_state()
    batch = put_batch(tokens_BxU, batch_sharding(program.mesh))

    def run(n: int) -> float:
        nonlocal state
        for _ in range(n):
            state, metrics = program.step(state, batch)
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
    """As `ours`, for nanoGPT; `compiled`: under torch.compile."""
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
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def run(n: int) -> float:
        for _ in range(n):
            with autocast:
                _, loss = model(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run, {}


def serve(program: str, shape: Shape, folder: str) -> None:
    """Runs in the process of one program: prints its facts, then for each number of steps on stdin their seconds."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # nanoGPT prints to stdout
    tokens_BxU = np.random.default_rng(0).integers(0, VOCABULARY, (shape.batch, shape.length + 1), np.int32)
    if program in OURS:
        if jax.config.jax_platforms == "cpu":  # as `cli.start` does
            jax.config.update("jax_cpu_enable_async_dispatch", False)
            MEMORY.reuse()
        run, facts = ours(shape, tokens_BxU, program == "modern")
    else:
        run, facts = nanogpt(folder, shape, tokens_BxU, program == "nanogpt compiled")
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        run(int(line))
        seconds = time.perf_counter() - started
        stats = jax.devices()[0].memory_stats() if program in OURS else None
        print(json.dumps([seconds, stats and stats["peak_bytes_in_use"]]), file=answers, flush=True)


class Server:
    """A process that runs `serve`.

    Attributes:
      facts: about the compiled step.
      peak_bytes: peak device memory so far; None where it is unknown.
    """

    def __init__(self, program: str, shape: Shape, folder: str):
        sizes = ",".join(map(str, dataclasses.astuple(shape)))
        argv = [sys.executable, __file__, "--serve", program, "--shapes", sizes]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([*argv, "--peer", folder], **pipes)
        self.facts = json.loads(self._process.stdout.readline())

    def run(self, n: int) -> float:
        """Seconds of n steps."""
        print(n, file=self._process.stdin, flush=True)
        seconds, self.peak_bytes = json.loads(self._process.stdout.readline())
        return seconds

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(shape: Shape, given: argparse.Namespace, device: jax.Device) -> dict:
    """Figures of all programs for one shape; they run in turns."""
    names = OURS if given.modern else OURS[:1]
    if given.peer:
        names += ("nanogpt eager", "nanogpt compiled") if device.platform == "cpu" else ("nanogpt compiled",)
    servers, first, seconds = {}, {}, {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        for name in names:
            report.say(f"{name}, {shape}: starting")
            servers[name] = server = stack.enter_context(contextlib.closing(Server(name, shape, given.peer or "")))
            first[name] = server.run(2)
        for n in range(given.rounds):
            for name, server in servers.items():
                server.run(1)
                seconds[name].append(server.run(given.steps) / given.steps)
            last = ", ".join(f"{name} {1000 * times[-1]:,.1f} ms" for name, times in seconds.items())
            report.say(f"round {n + 1} of {given.rounds}: {last}")
    tokens = shape.batch * shape.length
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    facts = servers["ours"].facts
    row = facts | {
        "tokens_per_second": {name: round(tokens / s, 1) for name, s in medians.items()},
        "ms": {name: [round(1000 * s, 1) for s in times] for name, times in seconds.items()},
        "first_two_steps_seconds": {name: round(s, 1) for name, s in first.items()},
        "times_as_fast": {name: round(s / medians["ours"], 3) for name, s in medians.items() if name != "ours"},
    }
    if given.modern:
        row["modern"] = servers["modern"].facts
    if chip := accelerators.chip(device.device_kind):
        row["mfu"] = round(tokens / medians["ours"] * facts["flops_per_token"] / chip.peak_flops, 4)
    if peak := servers["ours"].peak_bytes:
        row["peak_memory_gb"] = round(peak / 1e9, 2)
    return row


def main() -> None:
    parser = report.parser(__doc__, "train_step", rounds=5)
    parser.add_argument("--peer", metavar="FOLDER", help="nanoGPT's repository, to measure it too")
    parser.add_argument(
        "--modern", action="store_true", help="measure the model and optimizer of configs/modern.py too"
    )
    parser.add_argument("--shapes", nargs="*", help="layers,heads,width,batch,length")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a round")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # the program that this process runs for the measuring one
    given = parser.parse_args()
    if given.serve:
        return serve(given.serve, Shape(*map(int, given.shapes[0].split(","))), given.peer)

    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process and the servers share the card
    device = jax.devices()[0]
    report.say(f"{device.device_kind}, {report.machine()}")
    packages = ("jax", "jaxlib", "flax", "optax", *(("torch",) if given.peer else ()))
    figures = {
        "machine": report.machine(),
        "device": device.device_kind,
        "versions": report.versions(*packages),
        "shapes": {},
        "note": given.note,
    }
    for text in given.shapes or SHAPES[device.platform]:
        shape = Shape(*map(int, text.split(",")))
        figures["shapes"][str(shape)] = row = measure(shape, given, device)
        report.say(f"{shape} {json.dumps(row, indent=1)}")
    report.write(figures, given.output)


if __name__ == "__main__":
    main()
