"""Runs the launchers against the fakes of `fakes/fake.py`, in a copy of the repository."""

import json
import os
import shutil
import subprocess
import sys
import time

from conftest import ROOT


class Fakes:
    """Runs launchers with the fakes first in PATH, in a git work tree with the code; records the calls."""

    def __init__(self, folder):
        self.folder, self.root = folder, folder / "work tree"
        (folder / "bin").mkdir()
        for name in ("gcloud", "kubectl", "srun", "scontrol", "curl", "python3", "python", "nvidia-smi", "sudo"):
            path = folder / "bin" / name
            path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/fakes/fake.py" {name} "$@"\n')
            path.chmod(0o755)
        removed = ("SLURM_", "CUDA_", "KUBERNETES_", "JOB_COMPLETION_", "OMPI_")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(removed)}
        for name in ("VENV", "VIRTUAL_ENV", "PYTHON"):  # PYTHON chooses what the suite itself runs with
            self.env.pop(name, None)
        self.env |= {"FAKE": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
        self.env |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CEILING_DIRECTORIES": str(folder)}
        self.env.setdefault("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))  # the compilation cache survives a worker
        self.script()
        (folder / "calls.jsonl").touch()
        skip = shutil.ignore_patterns("__pycache__", "bench")
        for name in ("trialgpt_jax", "scripts"):
            shutil.copytree(ROOT / name, self.root / name, ignore=skip)
        (self.root / "config.py").write_text("from trialgpt_jax.config import default_config as get_config\n")
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message=all")

    def git(self, *arguments):
        subprocess.run(["git", *arguments], cwd=self.root, env=self.env, check=True)

    def script(self, **scenario):
        (self.folder / "scenario.json").write_text(json.dumps({k.replace("_", " "): v for k, v in scenario.items()}))

    def start(self, script, *arguments, **env):
        command = ["bash", f"scripts/{script}", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.root, env=self.env | env, **pipes)

    def __call__(self, script, *arguments, **env):
        process = self.start(script, *arguments, **env)
        stdout, stderr = process.communicate(timeout=280)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def calls(self, name=None):
        calls = [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]
        return [call for call in calls if name in (None, call[0])]

    def verbs(self):
        """The verbs of the gcloud calls in order, without `describe`; an ssh counts as the command it ran."""
        verbs = []
        for call in self.calls("gcloud"):
            words = [word for word in call[1:] if word != "alpha"]
            if words[0] == "compute" and words[3] != "describe":
                verbs.append(words[-1].split("tpu_worker.sh ")[-1].split()[0] if words[3] == "ssh" else words[3])
        return verbs

    def until(self, condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)
