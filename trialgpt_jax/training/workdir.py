"""The files of a workdir: where each one is, the config snapshot, the identity of tokenizer and data. Imports no JAX.

The lock is `<workdir>/lock`, see `storage.lock`.
"""

import os
from typing import Annotated, NamedTuple, TypedDict

import msgspec
from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.token_store import TokenStore
from trialgpt_jax.data.vocabulary import TokenizerId
from trialgpt_jax.storage import files, json_files


class _Data(TypedDict):
    tokenizer: str


class _Snapshot(TypedDict):
    data: _Data


_Member = Annotated[list[str], msgspec.Meta(min_length=2, max_length=3)]  # a `KeptStore`; older runs have no place


def config_path(workdir: str) -> str:
    """The resolved config of the run, JSON."""
    return os.path.join(workdir, "config.json")


def metrics_path(workdir: str) -> str:
    """The log of the run, one JSON object per line."""
    return os.path.join(workdir, "metrics.jsonl")


def samples_path(workdir: str) -> str:
    """The texts that the model has written during the run, one JSON object per line."""
    return os.path.join(workdir, "samples.jsonl")


def checkpoints_path(workdir: str) -> str:
    """The folder of the checkpoints, one folder per step."""
    return os.path.join(workdir, "checkpoints")


def saving_path(workdir: str) -> str:
    """The file that holds the step whose save is in progress."""
    return os.path.join(workdir, "saving")


def tokenizer_path(workdir: str) -> str:
    """Name and hash of the tokenizer, JSON; one other than `gpt2` has a file of its own next to it."""
    return os.path.join(workdir, tokenizer_lib.IDENTITY_FILE)


def data_path(workdir: str) -> str:
    """The digests of the token stores that the run trains on, JSON: [[folder, sha256], ...]."""
    return os.path.join(workdir, "data.json")


def tensorboard_path(workdir: str) -> str:
    """The folder of TensorBoard's event files."""
    return os.path.join(workdir, "tensorboard")


def log_path(workdir: str) -> str:
    """What the processes of the run have said, with times."""
    return os.path.join(workdir, "log.txt")


def times_path(workdir: str) -> str:
    """The times of the processes of the run, JSON."""
    return os.path.join(workdir, "processes.json")


def summary_path(workdir: str) -> str:
    """What the run was and what came out, Markdown."""
    return os.path.join(workdir, "summary.md")


def curves_path(workdir: str) -> str:
    """The curves of the run, a picture."""
    return os.path.join(workdir, "curves.png")


def profile_path(workdir: str) -> str:
    """The folder of the traces, one folder for each."""
    return os.path.join(workdir, "profile")


def wandb_id_path(workdir: str) -> str:
    """The id of the run at Weights & Biases."""
    return os.path.join(workdir, "wandb_id")


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
            f"{path} does not exist; --workdir must be a folder that `train` or `convert` has written, and a new run "
            "of `train` needs --config=FILE as well"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or ' '.join(str(error).split())}") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds {type(saved).__name__}, not an object of config fields")
    if "model" not in saved and saved.keys() & {"model_type", "architectures"}:
        raise UserError(
            f"{workdir} is a Hugging Face folder, not a workdir; make a workdir of it: trialgpt convert "
            f"--from_hf={workdir} --workdir=NEW_FOLDER"
        )
    return saved


def keep_tokenizer(store: TokenStore, workdir: str) -> None:
    """Copies the store's tokenizer into the workdir, so that generation does not need the token store.

    Raises:
      UserError: the workdir's model was trained on ids of another tokenizer.
    """
    if files.exists(tokenizer_path(workdir)):
        check_tokenizer(store, workdir)
        return
    if store.tokenizer_id.name != "gpt2":
        tokenizer_lib.from_store(store.folder).save(workdir)
    tokenizer_lib.write_identity(store.tokenizer_id, workdir)


def check_tokenizer(store: TokenStore, workdir: str) -> None:
    """Refuses a token store made with another tokenizer than the workdir's model was trained with.

    A workdir that has checkpoints and no `tokenizer.json` has the data.tokenizer of its snapshot.

    Raises:
      UserError: names both tokenizers, or the workdir's file if that is damaged.
    """
    trained = tokenizer_lib.read_identity(workdir)
    if trained is None:
        if not files.names(checkpoints_path(workdir)):
            return  # not trained yet
        try:
            snapshot = json_files.check(load_snapshot(workdir), _Snapshot)
        except ValueError as error:
            raise UserError(f"{config_path(workdir)} is not the config of a run: {error}") from None
        trained = TokenizerId(snapshot["data"]["tokenizer"], None)
    found = store.tokenizer_id
    if not found.matches(trained):
        raise UserError(
            f"data.dir={store.folder} was made with tokenizer {found}, but the model in {workdir} was trained with "
            f"{trained}; preprocess the text with --config.data.tokenizer=from:{workdir}"
        )


class KeptStore(NamedTuple):
    """A token store of a run: the folder as it was given, its digest, and its absolute path ("" if not recorded)."""

    folder: str
    digest: str
    place: str


def keep_data(store: TokenStore, workdir: str) -> None:
    """Writes names, digests and absolute paths of the run's token store, of a mixture those of all members."""
    kept = [KeptStore(folder, digest, os.path.abspath(folder)) for folder, digest in store.members]
    for i, old in enumerate(kept_data(workdir)[: len(kept)]):
        if old.place == kept[i].folder:  # opened where the record says, see `find_data`
            kept[i] = kept[i]._replace(folder=old.folder)
    json_files.write(data_path(workdir), kept)


def kept_data(workdir: str) -> list[KeptStore]:
    """What `keep_data` has written; nothing for a workdir without a run, or of an earlier version.

    Raises:
      UserError: the file is damaged.
    """
    path = data_path(workdir)
    try:
        return [KeptStore(*member, *[""] * (3 - len(member))) for member in json_files.read(path, list[_Member])]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as the digests of the token stores: {error}") from None


def find_data(data_dir: str, workdir: str) -> str:
    """`data.dir` with the absolute paths of the run's record, so that a relative one is found from any current folder.

    A folder that is not in the record is returned unchanged.

    Raises:
      UserError: a store has moved since: neither the name nor the recorded place exists.
    """
    kept = {member.folder: member.place for member in kept_data(workdir)}
    mixture = not os.path.isdir(data_dir) and data_dir not in kept and ("," in data_dir or ":" in data_dir)
    found = []
    for item in data_dir.split(",") if mixture else [data_dir]:
        folder, colon, weight = item.strip().rpartition(":") if mixture else (item, "", "")
        place = kept.get(folder, "")
        if os.path.isdir(place):
            folder = place
        elif folder in kept and not os.path.isdir(folder):
            there = f", nor {place}, where it was" if place not in ("", folder) else ""
            raise UserError(
                f"data.dir={folder} of the run in {workdir} does not exist{there}; give the folder it has moved to: "
                "--config.data.dir=FOLDER"
            )
        found.append(f"{folder}{colon}{weight}")
    require_data(",".join(found), workdir)
    return ",".join(found)


def require_data(data_dir: str, workdir: str) -> None:
    """Refuses a token store that does not exist, for a workdir with a tokenizer, as `convert` writes it.

    Raises:
      UserError: says how a token store with that tokenizer is made.
    """
    absent = not os.path.exists(data_dir) and "," not in data_dir and ":" not in data_dir
    if absent and files.exists(tokenizer_path(workdir)):
        raise UserError(
            f"data.dir={data_dir} does not exist; make a token store with this model's tokenizer: trialgpt "
            f"preprocess --config.data.source=files --config.data.source_options.path=TEXTS "
            f"--config.data.tokenizer=from:{workdir} --config.data.val_fraction=0.1 "
            "--config.data.dir=STORE. Then add --config.data.dir=STORE to this command, and to evaluate a store of few "
            "documents, whose validation split may be empty, --split=train"
        )


def check_data(store: TokenStore, workdir: str, allowed: bool) -> bool:
    """Refuses a token store whose tokens are not those that the workdir's run was started with.

    Args:
      store: the run's.
      workdir: of the run; a run of an earlier version, without digests, is accepted.
      allowed: only say it.

    Returns:
      Whether they are known to be the same tokens, wherever the store is.

    Raises:
      UserError: names the folder that differs, or the workdir's file if that is damaged.
    """
    kept, same = [(member.folder, member.digest) for member in kept_data(workdir)], True
    if not kept:
        return False
    for i in range(max(len(kept), len(store.members))):
        then, now = (each[i] if i < len(each) else ("no store", "none") for each in (kept, store.members))
        if now[1] == then[1]:
            continue
        same = False
        text = f"data.dir: {now[0]} (sha256 {now[1][:8]}) has other tokens than {then[0]} (sha256 {then[1][:8]})"
        if not allowed:
            raise UserError(
                f"{text}, with which the run in {workdir} was started; restore that one, use another --workdir, or "
                "--allow_config_change=data.dir"
            )
        say(f"{text}, with which this run was started; it goes on with them (--allow_config_change=data.dir)")
    return same
