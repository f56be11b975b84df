"""Two minutes of kills, stops and damaged checkpoints: every run still ends with the bits of an undisturbed one."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from conftest import command, metrics, overrides, refused, small_config
from test_train import assert_same_bits, final_state

from trialgpt_jax.training.checkpoint import Checkpoints

SECONDS = float(os.environ.get("CHAOS_SECONDS", "120"))
STEPS = 300


@pytest.fixture(scope="module")
def chaos_config(store):
    c = small_config(store)
    c.model.dropout = 0.1
    c.train.update({"steps": STEPS, "batch_size": 16})
    c.checkpoint.update({"every_steps": 10, "keep_last": 3})
    c.eval.every_steps = 50
    return c


@pytest.fixture(scope="module")
def run_of(chaos_config, tmp_path_factory):
    """The command line and environment of a run in a workdir."""
    file = tmp_path_factory.mktemp("config") / "default.py"
    file.write_text("from trialgpt_jax.config import default_config as get_config\n")
    return lambda workdir: command("train", f"--config={file}", *overrides(chaos_config), f"--workdir={workdir}")


def finish(argv, env):
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)


def last_step(workdir):
    try:
        return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def damage(path, rng):
    """Damages a file the way disks and copies do; returns how."""
    size = path.stat().st_size
    what = rng.choice(["flip", "zero", "truncate", "delete"]) if size else "delete"
    if what == "delete":
        path.unlink()
    elif what == "truncate":
        os.truncate(path, rng.randrange(size))
    else:
        data = bytearray(path.read_bytes())
        begin = rng.randrange(size)
        if what == "flip":
            data[begin] ^= 1 << rng.randrange(8)
        else:
            block = slice(begin, begin + rng.randrange(1, 4096))
            data[block] = bytes(len(data[block]))
        if bytes(data) == path.read_bytes():  # the block was zero before
            data[begin] ^= 1
        path.write_bytes(data)
    return what


def damage_some(workdir, rng, leave):
    """Damages random files of random whole checkpoints, but leaves `leave` of them whole; returns what it did."""
    checkpoints = Checkpoints(str(workdir), say=print)
    whole = [step for step in checkpoints.steps() if checkpoints.problem(step) is None]
    n_victims = rng.randint(0, max(0, len(whole) - leave)) if leave else len(whole)
    done = []
    for step in rng.sample(whole, n_victims):
        files = sorted(path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())
        # empty files such as `commit_success.txt` cannot be damaged, only deleted
        path = rng.choice([path for path in files if path.stat().st_size])
        done.append(f"{damage(path, rng)} {path.relative_to(workdir)}")
    return done


def disturbed(workdir, argv, env, rng, until, events):
    """Starts, interrupts and damages the run repeatedly until it is done; after the time `until` only starts it."""
    while True:
        process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        how = rng.choice(["at a step", "in a save", "at a time"])
        begin, goal, moment = time.monotonic(), last_step(workdir) + rng.randint(5, 60), rng.uniform(0.5, 6)
        while process.poll() is None:
            if time.monotonic() > until:
                break
            if how == "at a time" and time.monotonic() - begin > moment:
                break
            if (
                how != "at a time"
                and last_step(workdir) >= goal
                and (how == "at a step" or (workdir / "saving").exists())
            ):
                break
            time.sleep(0.01)
        if time.monotonic() < until and process.poll() is None:
            number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            process.send_signal(number)
            events.append(f"{number.name} {how}, after step {last_step(workdir)}")
        output = process.communicate(timeout=300)[0]
        assert process.returncode in (0, 75, -signal.SIGKILL, -signal.SIGTERM), output
        if process.returncode == 0:
            return
        events.extend(damage_some(workdir, rng, leave=1))


@pytest.mark.slow
def test_two_minutes_of_chaos_change_nothing(run_of, tmp_path):
    begin = time.monotonic()
    result = finish(*run_of(tmp_path / "reference"))
    assert result.returncode == 0, result.stderr
    expected, expected_metrics = final_state(tmp_path / "reference"), metrics(tmp_path / "reference")
    seed, rounds, until = random.randrange(10**6), 0, begin + SECONDS
    while time.monotonic() < until:
        seed, rounds = seed + 1, rounds + 1
        workdir, events = tmp_path / str(seed), []
        print(f"seed {seed}")  # pytest shows it if the test fails
        disturbed(workdir, *run_of(workdir), random.Random(seed), until, events)
        print(f"{len(events)} events: {'; '.join(events)}")
        assert metrics(workdir) == expected_metrics, (seed, events)
        assert_same_bits(final_state(workdir), expected)
    print(f"{rounds} runs in {time.monotonic() - begin:.0f} s")


@pytest.mark.slow
def test_with_every_checkpoint_damaged_it_stops_and_says_so(run_of, tmp_path):
    workdir, rng = tmp_path / "run", random.Random(0)
    argv, env = run_of(workdir)
    process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and last_step(workdir) < 40:
        time.sleep(0.002)
    process.kill()
    process.wait()
    shutil.copytree(workdir, tmp_path / "before")
    events = damage_some(workdir, rng, leave=0)
    assert events
    refused(finish(argv, env), "none of the checkpoints", "is whole")
    assert last_step(workdir) >= 40
