"""The run of a workdir at Weights & Biases, with its library, which is optional."""

import os
import re
import secrets

from ml_collections import ConfigDict

from trialgpt_jax import UserError, live_line
from trialgpt_jax.storage import files
from trialgpt_jax.training.workdir import wandb_id_path

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SECONDS = 30  # in which the server must answer


def start(project: str, workdir: str, config: ConfigDict):
    """The W&B run of a workdir, which a resumed run continues; a workdir of the same name elsewhere has its own.

    Raises:
      UserError: it cannot be started; `plan.check_wandb` has looked for a key.
    """
    import wandb

    name = os.path.basename(os.path.normpath(os.path.abspath(workdir)))
    options = {"project": project, "name": name, "id": run_id(workdir), "resume": "allow"}
    try:
        with live_line.task("starting Weights & Biases"):
            return wandb.init(**options, config=config.to_dict(), dir=_folder(workdir))
    except Exception as error:  # noqa: BLE001 - it raises many types: no network, a refused key, no such project
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"log.wandb={project} cannot be started: {type(error).__name__}: {why}; set WANDB_MODE=offline, or give "
            "--config.log.wandb= for none"
        ) from None


def _folder(workdir: str) -> str | None:
    """Where the library keeps its files: in the workdir, if that is on a disk."""
    return None if files.is_remote(workdir) else os.path.abspath(workdir)


def run_id(workdir: str) -> str:
    """The id of the workdir's run, from its file `wandb_id`, which is written with a random id if it does not exist.

    Raises:
      UserError: the file has something else.
    """
    path = wandb_id_path(workdir)
    if not files.exists(path):
        files.write(path, secrets.token_hex(8))
    with files.named(path), files.open_file(path) as file:
        text = file.read(100).decode("utf-8", "replace").strip()
    if not _ID.fullmatch(text):
        raise UserError(f"{path} should hold the id of a Weights & Biases run, but has {text!r:.50}; remove it")
    return text


def check_key() -> None:
    """Asks the server whether the key is valid.

    Raises:
      UserError: it is not, or the server does not answer.
    """
    import wandb

    try:
        with live_line.task("asking Weights & Biases"):
            valid = wandb.login(anonymous="never", timeout=_SECONDS, verify=True)
    except Exception as error:  # noqa: BLE001 - it raises many types
        valid, why = False, f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    else:
        why = ""
    if not valid:
        raise UserError(
            f"log.wandb is set, but Weights & Biases does not take the key{why}; run `wandb login`, set WANDB_API_KEY, "
            "or set WANDB_MODE=offline"
        )
