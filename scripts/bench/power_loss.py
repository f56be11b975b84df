"""Takes copies of a real ext4 while a run trains in it, as a loss of power would leave it, and goes on from each copy.

    python scripts/bench/power_loss.py    # as root; writes scripts/bench/results/power_loss.json; some minutes

The file system is in an image file on a loop device. What the image holds is what ext4 has written to its disk; its
page cache is not in it. The run saves often and keeps one checkpoint. While a copy is taken the run is stopped, and a
copy counts if a second reading of the image equals it. Each copy is mounted, which replays its journal, and the same
run goes on in it, with one save at the end: it must start from a step that was saved when the copy was taken, or from
a later one, and end with the bits of the undisturbed run. For comparison all is repeated without the syncs of a save.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import report

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZE = 256 << 20  # bytes of the file system; a checkpoint has 19 MB
STEPS, EVERY = 300, 10
PACE = 0.1  # seconds that a step waits in the run that is copied, so that it lasts


def run(*command) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(map(str, command))} failed: {done.stderr.strip()}; this needs root and loop devices"
        )
    return done.stdout.strip()


@contextlib.contextmanager
def mounted(image: pathlib.Path, at: pathlib.Path):
    """The file system of an image file, mounted at a new folder."""
    at.mkdir()
    run("mount", "-o", "loop", image, at)
    try:
        yield
    finally:
        run("umount", at)
        at.rmdir()


def train(workdir: pathlib.Path, store: pathlib.Path, *flags: str) -> subprocess.Popen:
    """Starts this script with --train, see `child`."""
    argv = [sys.executable, __file__, f"--train={workdir}", f"--store={store}", *flags]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def child(workdir: str, store: str, without_syncs: bool, pace: float, every: int) -> None:
    """Trains and saves every `every` steps; each step waits `pace` seconds.

    Prints the log, then `arrays SHA256` of the last checkpoint or `refused: MESSAGE`.
    """
    import jax

    from trialgpt_jax import UserError
    from trialgpt_jax import train as train_module
    from trialgpt_jax.config import default_config
    from trialgpt_jax.storage import files
    from trialgpt_jax.training.checkpoint import Checkpoints
    from trialgpt_jax.training.program import Program

    if without_syncs:
        files.sync_tree = lambda folder: None
    put_batch = train_module.put_batch
    train_module.put_batch = lambda *arguments: time.sleep(pace) or put_batch(*arguments)
    config = default_config()
    config.data.dir = store
    config.model.update({"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50304})
    config.optim.warmup_steps = 10
    config.train.update({"steps": STEPS, "batch_size": 2, "max_seconds": 0.0})
    config.checkpoint.update({"every_steps": every, "keep_last": 1, "keep_best": 0, "every_minutes": 0.0})
    config.eval.every_steps, config.log.every_steps = 0, EVERY
    try:
        train_module.train(config, workdir)
    except UserError as error:
        print(f"refused: {error}")
        return
    checkpoints = Checkpoints(workdir)
    state = checkpoints.restore(checkpoints.newest_whole(), Program(config).layout)
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        whole.update(np.asarray(leaf).tobytes())
    print(f"arrays {whole.hexdigest()}")


def saved(workdir: pathlib.Path) -> int:
    """The newest step that is saved: its checksums are there, and the marker of its save is gone. 0 = none."""
    steps = [int(path.parent.name) for path in workdir.glob("checkpoints/*/checksums.json")]
    try:
        unfinished = int((workdir / "saving").read_text() or 0)
    except FileNotFoundError:
        unfinished = 0
    return max((step for step in steps if step != unfinished), default=0)


def copy(image: pathlib.Path, to: pathlib.Path, process: subprocess.Popen) -> None:
    """Copies the image in which a process writes, as it was at one moment: the kernel may be writing to it."""
    process.send_signal(signal.SIGSTOP)
    while True:
        run("cp", "--sparse=always", image, to)
        if subprocess.run(["cmp", "-s", image, to], check=False).returncode == 0:
            break
    process.send_signal(signal.SIGCONT)


def finished(process: subprocess.Popen) -> tuple[str, str | None]:
    """The output of a run and the sha256 of its last arrays, None if it was refused."""
    output = process.communicate()[0]
    arrays = re.search(r"^arrays (\w+)", output, re.MULTILINE)
    if not arrays and "refused: " not in output:
        raise SystemExit(f"a run failed:\n{output}")
    return output, arrays and arrays[1]


def measure(folder: pathlib.Path, store: pathlib.Path, n_copies: int, sync: bool, expected: str) -> dict:
    """Trains in a new file system, copies it `n_copies` times, and goes on from each copy.

    Args:
      expected: sha256 of the arrays of an undisturbed run.
    """
    image, disk, rng = folder / "image", folder / "disk", random.Random(0)
    with open(image, "wb") as file:
        file.truncate(SIZE)
    run("mkfs.ext4", "-q", image)
    copies = []
    with mounted(image, disk):
        workdir = disk / "run"
        process = train(workdir, store, f"--pace={PACE}", f"--every={EVERY}", *([] if sync else ["--without_syncs"]))
        while len(copies) < n_copies:
            before = saved(workdir)
            while (step := saved(workdir)) == before:
                if process.poll() is not None:
                    raise SystemExit(f"the run ended before there were {n_copies} copies:\n{process.stdout.read()}")
                time.sleep(0.001)
            time.sleep(rng.choice((0.0, rng.random())))  # at once, or in the second after
            step, path = saved(workdir), folder / f"copy_{len(copies)}"
            copy(image, path, process)
            copies.append((step, path))
            print(f"copy {len(copies)}: step {step} is saved", flush=True)
        process.kill()
        process.communicate()
    results = []
    for step, path in copies:
        with mounted(path, disk):
            output, arrays = finished(train(disk / "run", store))
        path.unlink()
        resumed = re.search(r"(?:resumed from|has the) checkpoint (?:of step )?(\d+)", output)
        refused = re.search("refused: .*", output)
        result = {
            "saved": step,
            "resumed": int(resumed[1]) if resumed else 0,
            "same_bits": arrays == expected,
        }
        result["recovered"] = result["resumed"] >= step and result["same_bits"]
        if refused:
            result["refused"] = re.sub(r"/\S*/run/", "", refused[0].removeprefix("refused: "))[:200]
        results.append(result)
        print(json.dumps(result), flush=True)
    return {"recovered": sum(result["recovered"] for result in results), "of": len(results), "copies": results}


def main() -> None:
    parser = report.parser(__doc__, "power_loss")
    parser.add_argument("--copies", type=int, default=12, help="of the file system, with syncs and without")
    parser.add_argument("--folder", default=None, help="where the images are; default: in memory, if there is /dev/shm")
    parser.add_argument("--train", help="only train, in this workdir")
    parser.add_argument("--store", help="token store for --train")
    parser.add_argument("--without_syncs", action="store_true", help="for --train: leave out the syncs of a save")
    parser.add_argument("--pace", type=float, default=0.0, help="for --train: seconds that each step waits")
    parser.add_argument("--every", type=int, default=STEPS, help="for --train: steps between saves")
    given = parser.parse_args()
    if given.train:
        child(given.train, given.store, given.without_syncs, given.pace, given.every)
        return
    parent = given.folder or ("/dev/shm" if os.path.isdir("/dev/shm") else None)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        folder = pathlib.Path(folder)
        store = folder / "store"
        store.mkdir()
        for split in ("train", "val"):
            np.random.default_rng(0).integers(0, 50257, 1_000_000, np.uint16).tofile(store / f"{split}.bin")
        figures = {
            "what": f"copies of an ext4 of {SIZE >> 20} MB while a run saves every {EVERY} steps, keep_last=1: "
            "how many go on from the newest checkpoint and end with the same bits",
            "machine": f"{report.machine()}, Linux {platform.release()}, "
            + ", ".join(f"{name} {v}" for name, v in report.versions("jax", "orbax-checkpoint").items()),
        }
        expected = finished(train(folder / "undisturbed", store))[1]
        for name, sync in (("with_syncs", True), ("without_syncs", False)):
            (folder / name).mkdir()
            figures[name] = measure(folder / name, store, given.copies, sync, expected)
            shutil.rmtree(folder / name)
        figures["note"] = given.note
    report.write(figures, given.output)


if __name__ == "__main__":
    main()
