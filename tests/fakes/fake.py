"""Fakes gcloud, kubectl, srun, scontrol, sudo, curl, python3 and the python of a virtual environment.

`fake.py NAME ARGUMENT...` appends [NAME, ARGUMENT...] to $FAKE/calls.jsonl and then follows $FAKE/scenario.json, which
maps a kind of call ("create", "train", "srun", ...) to the outcomes of its first, second, ... call. Calls without an
outcome succeed. There is one Cloud TPU node: $FAKE/node holds its state and type, $FAKE/vm is its home directory, and
$FAKE/bucket replaces gs://bucket. States, exit statuses and messages are the documented ones of gcloud, srun, scontrol
and kubectl.
"""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

FAKE = pathlib.Path(os.environ["FAKE"])
NODE, VM = FAKE / "node", FAKE / "vm"


def outcome(kind):
    """Removes and returns the scenario's next outcome for a kind of call; 0 if there is none."""
    with open(FAKE / "scenario.json", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        scenario = json.load(file)
        left = scenario.get(kind, [])
        value = left.pop(0) if left else 0
        file.seek(0)
        file.truncate()
        json.dump(scenario, file)
    return value


def local(path):
    return path.replace("gs://bucket", str(FAKE / "bucket"))


def fail(message, status=1):
    print(message, file=sys.stderr)
    sys.exit(status)


def gcloud(arguments):
    if arguments[:2] == ["storage", "rsync"]:
        source, target = arguments[2:4]
        return shutil.copytree(local(source), target, dirs_exist_ok=True)
    if arguments[0] in ("alpha", "beta"):
        del arguments[0]
    assert arguments[:2] == ["compute", "tpus"] and arguments[2] in ("tpu-vm", "queued-resources"), arguments
    verb, flags = arguments[3], dict(a[2:].split("=", 1) for a in arguments[4:] if a.startswith("--") and "=" in a)
    if arguments[2] == "queued-resources":
        queue(verb, flags)
    elif verb == "describe":
        if (change := outcome("describe")) != 0:
            NODE.write_text(change)
        print(NODE.read_text() if NODE.exists() else fail("NOT_FOUND"))
    elif verb == "create":
        if (what := outcome("create")) != 0:
            fail(what)
        NODE.write_text(f"READY,HEALTHY,{flags['accelerator-type']}")
        VM.mkdir(exist_ok=True)
    elif verb == "delete":
        if (what := outcome("delete")) != 0:
            fail(what)
        NODE.unlink()
        shutil.rmtree(VM)
    elif verb == "scp":
        shutil.copy(arguments[4], VM / arguments[5].split(":", 1)[1])
    elif verb == "ssh":
        ssh(flags["command"])
    else:
        fail(f"no such verb: {verb}", 2)


def queue(verb, flags):
    """A queued resource: $FAKE/queue has its states, one for each `describe`; with ACTIVE the node exists."""
    states = FAKE / "queue"
    if verb == "create":
        (FAKE / "queued type").write_text(flags["accelerator-type"])
        states.write_text("\n".join(outcome("queue") or ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]))
    elif verb == "describe":
        left = states.read_text().splitlines() if states.exists() else fail("NOT_FOUND")
        print(left[0])
        states.write_text("\n".join(left[1:] or left))
        if left[0] == "ACTIVE":
            NODE.write_text(f"READY,,{(FAKE / 'queued type').read_text()}")
            VM.mkdir(exist_ok=True)
    elif verb == "delete":
        states.unlink()
        NODE.unlink(missing_ok=True)
        shutil.rmtree(VM, ignore_errors=True)
    else:
        fail(f"no such verb: {verb}", 2)


def ssh(command):
    kind = command.split("tpu_worker.sh ")[-1].split()[0]
    what = outcome(kind)
    if isinstance(what, int) and what:
        sys.exit(what)
    if kind == "stop":
        return (FAKE / "stopped").touch()
    if what == "until stopped":
        while not (FAKE / "stopped").exists():
            time.sleep(0.02)
        sys.exit(75)
    if what == "preempted":
        NODE.write_text(NODE.read_text().replace("READY", "PREEMPTED"))
        sys.exit(255)
    if kind == "train" and what != "run" and not isinstance(what, dict):
        return None
    worker = subprocess.Popen(
        ["bash", "-c", command], cwd=VM, env=os.environ | {"HOME": str(VM)}, start_new_session=True
    )
    if isinstance(what, dict):  # {"preempted at": step, "log": file}: the machine is killed at that step
        log = pathlib.Path(local(what["log"]))
        while worker.poll() is None:
            lines = log.read_text().splitlines() if log.exists() else []
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= what["preempted at"]:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
                NODE.write_text(NODE.read_text().replace("READY", "PREEMPTED"))
                sys.exit(255)
            time.sleep(0.002)
    return sys.exit(worker.wait())


def kubectl(arguments):
    """$FAKE/objects.json maps KIND/NAME to [manifest, its conditions that are true]. Messages as of kubectl 1.32."""
    objects_file = FAKE / "objects.json"
    objects = json.loads(objects_file.read_text()) if objects_file.exists() else {}
    verb, (what, *_) = arguments[0], [a for a in arguments[1:] if not a.startswith("-")] or [""]
    if (wrong := outcome(f"kubectl {verb}")) != 0:
        fail(wrong)
    if verb == "get":
        if what in objects:
            kind = {"job": "Job", "jobset": "JobSet"}[what.split("/")[0]]
            print(f"{kind} {objects[what][1]}", end="")
        elif "--ignore-not-found" not in arguments:
            fail(f"Error from server (NotFound): {what} not found")
    elif verb == "delete":
        if what not in objects:
            fail(f"Error from server (NotFound): {what} not found")
        del objects[what]
        print(f'"{what}" deleted')
    elif verb == "apply":
        text = sys.stdin.read()
        (FAKE / "stdin").write_text(text)
        kind = "jobset" if "kind: JobSet" in text else "job"
        what = f"{kind}/{text.split('metadata:')[1].split('name: ')[1].split()[0]}"
        full = what.replace("/", ".jobset.x-k8s.io/" if kind == "jobset" else ".batch/")
        if what in objects and objects[what][0] != text:
            fail('The Job "node" is invalid: spec.template: Invalid value: core.PodTemplateSpec{}: field is immutable')
        print(full, "unchanged" if what in objects else "created")
        objects[what] = [text, ""]
    objects_file.write_text(json.dumps(objects))


def main():
    name, *arguments = sys.argv[1:]
    with open(FAKE / "calls.jsonl", "a") as file:
        file.write(json.dumps([name, *arguments]) + "\n")
    if name == "gcloud":
        gcloud(arguments)
    elif name == "curl":
        attribute = arguments[-1].rsplit("/", 1)[1]
        workers = os.environ.get("FAKE_WORKERS", "host-0")
        print({"worker-network-endpoints": workers, "agent-worker-number": "1"}[attribute])
    elif name == "python3" and "venv" in arguments:  # `uv venv .venv` on the worker
        python = pathlib.Path(arguments[-1]) / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" venv-python "$@"\n')
        python.chmod(0o755)
    elif name == "venv-python" and arguments[0] == "scripts/check_venv.py":
        sys.exit(1)  # a new environment has nothing
    elif name == "venv-python" and arguments[:2] == ["-m", "trialgpt_jax.train"]:
        os.execv(sys.executable, [sys.executable, *map(local, arguments)])
    elif name == "python":  # started by multi_gpu.sh; outcomes by process id
        mine = next((a.split("=")[1] for a in arguments if a.startswith("--process_id=")), "")
        (FAKE / f"gpus{mine}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
        what = outcome(f"process {mine}")
        if what == "ignore sigterm":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif what == "until stopped":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        if isinstance(what, str):
            (FAKE / f"started{mine}").touch()
            while True:
                time.sleep(0.02)
        while not all((FAKE / f"started{other}").exists() for other in os.environ.get("FAKE_WAIT_FOR", "").split()):
            time.sleep(0.02)
        sys.exit(what)
    elif name == "kubectl":
        kubectl(arguments)
    elif name in ("srun", "scontrol", "sudo"):
        what = outcome(name)
        fail(what) if isinstance(what, str) else sys.exit(what)


main()
