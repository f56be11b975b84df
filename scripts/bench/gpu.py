"""Runs every measurement of one GPU within a time limit, and writes gpu.json and gpu.md. Started by gpu.sh.

The parts run one after another, each in processes of its own, because a program that compiles beside another one is
autotuned on a busy card. A part that fails or runs out of time is reported as such, and the next one starts.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import report

from trialgpt_jax.training.profile import operations
from trialgpt_jax.training.workdir import profile_path

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LOOP_SECONDS = 60  # of training before SIGTERM
PROFILED = (6, 3)  # first step and number of steps
GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"  # the decode loop as one CUDA graph
# Shapes of a CPU, to try the script without a GPU.
TINY = {
    "train_step": ["--shapes", "1,2,64,2,64", "--rounds=2", "--steps=2"],
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 64, "block_size": 64},
    "batch": 2,
    "seconds": 5,
}


@dataclasses.dataclass
class Part:
    """A measurement.

    Attributes:
      name: key of its figures, and of its log.
      seconds: what it takes on an H100; it is not started with less time left.
      run: (Machine, seconds left) -> its figures.
    """

    name: str
    seconds: int
    run: object


class Machine:
    """Where the parts run and write.

    Attributes:
      folder: of all output.
      tiny: small shapes instead of GPT-2's.
    """

    def __init__(self, given: argparse.Namespace):
        self.folder, self.peer, self.tiny = os.path.abspath(given.output), given.peer, given.tiny
        os.makedirs(self.folder, exist_ok=True)
        self.scratch = os.path.join(self.folder, "scratch")  # workdirs and tokens; removed at the end

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def command(
        self, name: str, *argv: str, seconds: float, stop_after: float | None = None, xla_flags: str = ""
    ) -> int:
        """Runs Python with `argv` and appends its output to NAME.log.

        Args:
          name: of the part.
          *argv: arguments of the interpreter.
          seconds: after which the program is killed.
          stop_after: seconds between the first step that the program prints and SIGTERM.
          xla_flags: added to XLA_FLAGS.

        Returns:
          The exit status.
        """
        environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}"}
        with open(self.path(f"{name}.log"), "a", encoding="utf-8") as log:
            log.write(f"$ python {' '.join(argv)}\n")
            log.flush()
            begin, printed = time.monotonic(), log.tell()
            process = subprocess.Popen(
                [sys.executable, *argv], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            first_step = None
            while process.poll() is None:
                time.sleep(0.2)
                if time.monotonic() - begin > seconds:
                    process.kill()
                if stop_after is None:
                    continue
                if first_step is None and b"\nstep" in self._since(name, printed):
                    first_step = time.monotonic()
                if first_step and time.monotonic() - first_step > stop_after:
                    process.send_signal(signal.SIGTERM)
                    stop_after = None
        return process.returncode

    def _since(self, name: str, offset: int) -> bytes:
        with open(self.path(f"{name}.log"), "rb") as log:
            log.seek(offset)
            return log.read()

    def tail(self, name: str) -> str:
        """The last line of a part's log."""
        with open(self.path(f"{name}.log"), encoding="utf-8", errors="replace") as log:
            return (log.read().strip().splitlines() or [""])[-1]

    def train(self, name: str, workdir: str, seconds: float, *flags: str, stop_after: float | None = None) -> int:
        """Trains GPT-2 124M with microbatches of 32 x 1,024 on the quickstart's tokens."""
        model = {"vocab_size": 50304, **(TINY["model"] if self.tiny else {})}
        batch = TINY["batch"] if self.tiny else 32
        return self.command(
            name,
            *("-m", "trialgpt_jax.train", "--config=configs/gpt2.py:124m", f"--workdir={self.scratch}/{workdir}"),
            *(f"--config.data.dir={self.tokens(name)}", "--config.log.tensorboard=False"),
            *(f"--config.model.{field}={value}" for field, value in model.items()),
            *(f"--config.train.batch_size={batch}", "--config.train.accumulate_steps=1", *flags),
            seconds=seconds,
            stop_after=stop_after,
        )

    def tokens(self, name: str) -> str:
        """The quickstart's token store, made at the first call."""
        folder = f"{self.scratch}/tokens"
        if not os.path.exists(f"{folder}/manifest.json"):
            argv = ("-m", "trialgpt_jax.preprocess", "--config=configs/quickstart.py", f"--config.data.dir={folder}")
            if self.command(name, *argv, seconds=120):
                raise RuntimeError(f"preprocess failed: {self.tail(name)}")
        return folder


def tests(machine: Machine, seconds: float) -> dict:
    status = machine.command(
        "tests", "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "-p", "no:cacheprovider", seconds=seconds
    )
    return {"status": status, "summary": machine.tail("tests").strip("= ")}


def bench(script: str, *flags: str, part: str = "", xla_flags: str = ""):
    """The function of a part that runs another benchmark of this folder and takes its JSON.

    Args:
      script: name of the benchmark.
      *flags: for it.
      part: name, if another; such a part measures ours alone.
      xla_flags: added to XLA_FLAGS.
    """
    name = part or script

    def run(machine: Machine, seconds: float) -> dict:
        output = machine.path(f"{name}.json")
        with_peer = bool(machine.peer) if script == "train_step" else not part
        peer = [f"--peer={machine.peer}" if script == "train_step" else "--peer"] if with_peer else []
        sizes = TINY.get(script, ()) if machine.tiny else ()
        argv = (f"scripts/bench/{script}.py", f"--output={output}", *peer, *flags, *sizes)
        if machine.command(name, *argv, seconds=seconds, xla_flags=xla_flags):
            raise RuntimeError(machine.tail(name))
        with open(output, encoding="utf-8") as file:
            return json.load(file)

    return run


def loop(machine: Machine, seconds: float) -> dict:
    """`train` for a minute until SIGTERM, and again from its checkpoint."""
    flags = ("--config.train.steps=1000000", "--config.log.every_steps=20", "--config.eval.every_steps=400")
    limit = TINY["seconds"] if machine.tiny else LOOP_SECONDS
    status = machine.train("loop", "loop", seconds, *flags, stop_after=limit)
    stopped = _lines(machine, "loop")
    again = machine.train("loop", "loop", seconds, *flags, stop_after=limit / 6)
    lines = _lines(machine, "loop")
    rates = [line["tokens_per_second"] for line in stopped]
    last = stopped[-1]
    return {
        "exit_status_of_sigterm": [status, again],
        "steps": last["step"],
        "tokens_per_second": last["tokens"] / last["seconds"],
        "lowest_and_highest_line": [min(rates), max(rates)],
        "mfu": last.get("mfu"),
        "loss": last["loss"],
        "first_step_after_the_resume": next(line["step"] for line in lines if line["step"] > last["step"]),
    }


def _lines(machine: Machine, workdir: str) -> list[dict]:
    """The training lines of a run's metrics.jsonl."""
    with open(f"{machine.scratch}/{workdir}/metrics.jsonl", encoding="utf-8") as file:
        return [line for line in map(json.loads, file) if "tokens_per_second" in line]


def profile(machine: Machine, seconds: float) -> dict:
    """Device time of the kernels of a step, longest first."""
    first, steps = PROFILED
    flags = (f"--config.train.steps={first + steps}", "--config.optim.warmup_steps=0")
    flags += (f"--config.log.profile={first}-{first + steps - 1}",)
    if machine.train("profile", "profile", seconds, *flags):
        raise RuntimeError(machine.tail("profile"))
    rows = operations(os.path.join(profile_path(f"{machine.scratch}/profile"), str(first)))
    kernels = [{"name": r.name, "calls": r.calls / steps, "ms": round(r.milliseconds / steps, 3)} for r in rows]
    return {"ms_of_a_step": round(sum(kernel["ms"] for kernel in kernels), 2), "kernels": kernels[:40]}


PARTS = (
    Part("tests", 60, tests),
    Part("train_step", 120, bench("train_step", "--modern", "--steps=20")),
    Part("loop", 110, loop),
    Part("decode", 60, bench("decode")),
    Part("profile", 40, profile),
    Part("decode_graphs", 45, bench("decode", "--rounds=3", part="decode_graphs", xla_flags=GRAPHS)),
)


def card() -> dict:
    """The GPU, its driver and the libraries that run on it."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    try:
        smi = subprocess.check_output(query, text=True).strip()
    except OSError:
        smi = None
    code = "import jax; print(jax.devices()[0].device_kind)"
    device = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
    names += tuple(f"nvidia-{name}" for name in ("cudnn-cu13", "cublas", "cudnn-cu12", "cublas-cu12"))
    return {"device": device, "nvidia_smi": smi, "machine": report.machine(), "versions": report.installed(*names)}


def markdown(figures: dict) -> str:
    """The figures as tables."""
    found = {name: part["figures"] for name, part in figures["parts"].items() if "figures" in part}
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines = [f"{figures['device']}, commit {figures['commit']}, {figures['date']}; {versions}", ""]
    lines += ["| part | result | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {part['result']} | {part['seconds']:.0f} |" for name, part in figures["parts"].items()]
    if shapes := found.get("train_step", {}).get("shapes"):
        lines += ["", "| train step | program | tokens/s | MFU | ours / it | peak GB |", "|---|---|---|---|---|---|"]
        for shape, row in shapes.items():
            for program, rate in row["tokens_per_second"].items():
                mfu, memory = (row.get(key, "") if program == "ours" else "" for key in ("mfu", "peak_memory_gb"))
                ratio = row["times_as_fast"].get(program, "")
                lines.append(f"| {shape} | {program} | {rate:,.0f} | {mfu} | {ratio} | {memory} |")
    if row := found.get("loop"):
        low, high = row["lowest_and_highest_line"]
        rates = f"{row['tokens_per_second']:,.0f} tokens/s, lines say {low:,.0f} to {high:,.0f}"
        statuses = f"exit statuses {row['exit_status_of_sigterm']} after SIGTERM"
        lines += ["", f"`train`: {row['steps']} steps, {rates}, MFU {row['mfu']}, {statuses}"]
    for title in ("decode", "decode_graphs"):
        if not (row := found.get(title)):
            continue
        programs = [name for name in ("ours", "ours_sampled", "hugging_face") if name in row["batch 1"]]
        lines += ["", f"| {title}, tokens/s, batch | {' | '.join(programs)} |", "|---|" + "---|" * len(programs)]
        for name in (name for name in row if name.startswith("batch ")):
            rates = " | ".join(f"{row[name][program]['median']:,.0f}" for program in programs)
            lines.append(f"| {name.removeprefix('batch ')} | {rates} |")
    if row := found.get("profile"):
        lines += ["", f"{row['ms_of_a_step']} ms of kernels in a step:", "", "| kernel | calls | ms |", "|---|---|---|"]
        lines += [f"| {k['name']} | {k['calls']:.0f} | {k['ms']:.2f} |" for k in row["kernels"][:15]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="", metavar="FOLDER", help="nanoGPT's repository; without it ours alone")
    parser.add_argument("--minutes", type=float, default=8.0, help="limit for all parts together")
    parser.add_argument("--output", default=os.path.join(report.RESULTS, "gpu"), help="folder")
    parser.add_argument("--only", default="", help="names of parts, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script on a CPU")
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    if given.peer and not os.path.isfile(os.path.join(given.peer, "model.py")):
        parser.error(f"--peer={given.peer} has no model.py; it is the folder of nanoGPT's repository")
    if not given.tiny and shutil.which("nvidia-smi") is None:
        parser.error("no NVIDIA GPU: nvidia-smi is not installed; --tiny tries the script on a CPU")
    machine = Machine(given)
    commit = subprocess.check_output(["git", "rev-parse", "--short=9", "HEAD"], text=True, cwd=ROOT).strip()
    figures = card() | {"commit": commit, "date": time.strftime("%Y-%m-%d"), "parts": {}}
    unknown = set(filter(None, given.only.split(","))) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"--only: no part {', '.join(sorted(unknown))}")
    for part in PARTS:
        if given.only and part.name not in given.only.split(","):
            continue
        begin, left = time.monotonic(), end - time.monotonic()
        entry = figures["parts"][part.name] = {}
        if left < part.seconds and not machine.tiny:
            entry["result"] = f"left out: takes {part.seconds} s, {left:.0f} s are left"
        else:
            try:
                entry["figures"] = part.run(machine, left)
                entry["result"] = entry["figures"].pop("summary", "measured")
            except (RuntimeError, OSError, ValueError, LookupError, StopIteration) as error:
                entry["result"] = f"failed: {' '.join(str(error).split())}"
        entry["seconds"] = round(time.monotonic() - begin, 1)
        report.say(f"{part.name}: {entry['result']} ({entry['seconds']} s)")
        with open(machine.path("gpu.json"), "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
        with open(machine.path("gpu.md"), "w", encoding="utf-8") as file:
            file.write(markdown(figures))
    shutil.rmtree(machine.scratch, ignore_errors=True)
    print(markdown(figures))


if __name__ == "__main__":
    main()
