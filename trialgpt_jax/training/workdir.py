"""The files of a workdir: where each one is, the config snapshot, the identity of tokenizer and data. Imports no JAX.

The lock is `<workdir>/lock`, see `storage.lock`.
"""

import os

from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.token_store import TokenStore
from trialgpt_jax.data.tokenizer import TokenizerId
from trialgpt_jax.storage import files, json_files


def config_path(workdir: str) -> str:
    """The resolved config of the run, JSON."""
    return os.path.join(workdir, "config.json")


def metrics_path(workdir: str) -> str:
    """The log of the run, one JSON object per line."""
    return os.path.join(workdir, "metrics.jsonl")


def checkpoints_path(workdir: str) -> str:
    """The folder of the checkpoints, one folder per step."""
    return os.path.join(workdir, "checkpoints")


def saving_path(workdir: str) -> str:
    """The file that holds the step whose save is in progress."""
    return os.path.join(workdir, "saving")


def tokenizer_path(workdir: str) -> str:
    """Name and hash of the tokenizer, JSON; a trained BPE has its ranks in `tokenizer.tiktoken` next to it."""
    return os.path.join(workdir, "tokenizer.json")


def data_path(workdir: str) -> str:
    """The digests of the token stores that the run trains on, JSON: [[folder, sha256], ...]."""
    return os.path.join(workdir, "data.json")


def tensorboard_path(workdir: str) -> str:
    """The folder of TensorBoard's event files."""
    return os.path.join(workdir, "tensorboard")


def save_snapshot(config: ConfigDict, workdir: str) -> None:
    """Writes the resolved config to `<workdir>/config.json`, whole or not at all."""
    json_files.write(config_path(workdir), config.to_dict())


def load_snapshot(workdir: str) -> dict:
    """The nested fields in `<workdir>/config.json`; `config.load_snapshot` checks them and makes a ConfigDict of them.

    Raises:
      UserError: no such file, or not a JSON object.
    """
    path = config_path(workdir)
    try:
        saved = json_files.read(path)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; --workdir must be a folder that `train` or `convert` has written"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds {type(saved).__name__}, not an object of config fields")
    return saved


def keep_tokenizer(store: TokenStore, workdir: str) -> None:
    """Copies the store's tokenizer into the workdir, so that generation does not need the token store.

    Raises:
      UserError: the workdir's model was trained on ids of another tokenizer.
    """
    path = tokenizer_path(workdir)
    if files.exists(path):
        check_tokenizer(store, workdir)
        return
    if store.tokenizer_id.name != "gpt2":
        tokenizer_lib.from_store(store.folder).save(workdir)
    json_files.write(path, store.tokenizer_id._asdict())


def check_tokenizer(store: TokenStore, workdir: str) -> None:
    """Refuses a token store made with another tokenizer than the workdir's model was trained with.

    Raises:
      UserError: names both tokenizers, or the workdir's file if that is damaged.
    """
    path = tokenizer_path(workdir)
    try:
        saved = json_files.read(path)
        trained = TokenizerId(saved["name"], saved["hash"])
    except FileNotFoundError:
        return  # not trained yet
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the name of a tokenizer: {error!r}") from None
    found = store.tokenizer_id
    if not found.matches(trained):
        raise UserError(
            f"data.dir={store.folder} was made with tokenizer {found.name} ({found.hash}), but the model in "
            f"{workdir} was trained with {trained.name} ({trained.hash}); preprocess the text with that one"
        )


def keep_data(store: TokenStore, workdir: str) -> None:
    """Writes the digests of the run's token store, of a mixture those of all members."""
    json_files.write(data_path(workdir), [list(member) for member in store.members])


def check_data(store: TokenStore, workdir: str, allowed: bool) -> None:
    """Refuses a token store whose tokens are not those that the workdir's run was started with.

    Args:
      store: the run's.
      workdir: of the run; a run of an earlier version, without digests, is accepted.
      allowed: only say it.

    Raises:
      UserError: names the folder that differs, or the workdir's file if that is damaged.
    """
    path = data_path(workdir)
    try:
        kept = [(str(folder), str(digest)) for folder, digest in json_files.read(path)]
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the digests of the token stores: {error!r}") from None
    for i in range(max(len(kept), len(store.members))):
        then, now = (each[i] if i < len(each) else ("no store", "none") for each in (kept, store.members))
        if now[1] == then[1]:
            continue
        text = f"data.dir: {now[0]} (sha256 {now[1][:8]}) has other tokens than {then[0]} (sha256 {then[1][:8]})"
        if not allowed:
            raise UserError(
                f"{text}, with which the run in {workdir} was started; restore that one, use another --workdir, or "
                "--allow_config_change=data.dir"
            )
        say(f"{text}, with which this run was started; it goes on with them (--allow_config_change=data.dir)")
