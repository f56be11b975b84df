"""lm-eval's task objects: built from the hub's data or from local files, checked, and with their requests ready."""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable

from trialgpt_jax import UserError
from trialgpt_jax.data import hub
from trialgpt_jax.evaluation import harness_index
from trialgpt_jax.evaluation.harness_model import check_generation
from trialgpt_jax.evaluation.harness_rows import Local, NotCached, check_supported, explained, with_files

_FEWSHOT_SEED = 1234  # of the choice of examples; lm-eval's default
_PLACES = ("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "metadata", "task_alias", "tag")


# ---- building


def build(name: str, index: harness_index.Index, files: dict[str, str]) -> dict:
    """What `TaskManager.load` returns for a task, group or tag.

    Args:
      name: of it.
      index: where it is defined.
      files: `harness.load`'s task_data.

    Raises:
      UserError: as `harness.load`.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    entries = harness_index.entries(index, [name])
    for task in entries.keys() & files.keys():
        entries[task] = with_files(entries[task], Local(task, files))
    manager.task_index.update(entries)

    def make() -> dict:
        with explained(f"task {name}"):
            return manager.load([name])

    return _from_hub(name, make, entries)


def _from_hub(name: str, make: Callable[[], dict], entries: dict) -> dict:
    """`make()` with the datasets in the cache, or if they are not there, from the hub.

    The cache comes first because a request takes a second for every task, and minutes without a network.
    """
    try:
        with hub.offline():
            return make()
    except (ConnectionError, FileNotFoundError, NotCached) as error:
        missing = str(error)
    repo, task, call = _dataset_of(missing, entries)
    if not repo:
        raise UserError(f"task {name}: {' '.join(missing.split())[:300]}")
    if why := hub.why_unreachable(repo):
        raise UserError(_not_cached(task, repo, call, why))
    try:
        return make()
    except (OSError, NotCached) as error:
        raise UserError(f"task {task}: {repo} cannot be loaded: {' '.join(str(error).split())[:300]}") from None


_BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # a `dataset_path` for files that the task names itself


def _dataset_of(missing: str, entries: dict) -> tuple[str, str, str]:
    """Repository, task and the call that downloads it, of the dataset in an error's text; "" if there is none."""
    for task, entry in sorted(entries.items()):
        config = entry.cfg or {}
        repo, part = config.get("dataset_path"), config.get("dataset_name")
        if (
            isinstance(repo, str)
            and repo not in _BUILDERS
            and repo in missing
            and (not part or f"'{part}'" in missing or "config" not in missing)
        ):
            return repo, task, ", ".join(repr(item) for item in (repo, part) if item)
    return "", "", ""


def _not_cached(task: str, repo: str, call: str, reason: str) -> str:
    import datasets

    cache = datasets.config.HF_DATASETS_CACHE
    return (
        f"task {task}: {repo} is not in {cache}, and {reason}; on a machine with access, run "
        f'python -c "import datasets; datasets.load_dataset({call})" and copy that folder here, or give '
        f"--task_data={task}=FILE (eval.task_data when training) with a JSON object per line"
    )


# ---- requests


def prepare(task, num_fewshot: int | None, limit: int | None) -> None:
    """Sets the number of examples and builds the requests of the first `limit` items, once for all runs.

    Raises:
      UserError: the task needs what is not supported, has too few examples, or an item that its code cannot read.
    """
    name, config = task.task_name, task.config
    check_supported(name, config)
    if task.OUTPUT_TYPE == "generate_until":
        check_generation(name, config.generation_kwargs or {})
    if num_fewshot is not None and config.num_fewshot != 0:  # as in lm-eval: a task that fixes 0 keeps it
        task.set_config("num_fewshot", num_fewshot)
    elif config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(_FEWSHOT_SEED)
    shots, sampler = config.num_fewshot, getattr(task, "sampler", None)
    if shots and sampler is not None:
        # As lm-eval: one more if they are of the split that is scored, because an item is no example of itself. Both
        # are None in a task without test split whose examples come from the training split.
        others, n = int(task.fewshot_cfg.split == config.test_split), len(sampler.df)
        if shots + others > n:
            what = "need more than" if others else "are more than"
            raise UserError(f"task {name}: {shots} examples (num_fewshot) {what} the {n} that it has")
    with explained(f"task {name}"):
        task.build_all_requests(limit=limit)
    task.build_all_requests = lambda **_: None  # `evaluate` would build them again


def forget_answers(task) -> None:
    """Makes the requests of a task ready for another model."""
    for request in task.instances:
        request.resps, request.filtered_resps = [], {}


def digest(task) -> str:
    """sha256 (hex) of a task's definition and of the items and examples that it reads."""
    config = {key: _plain(value) for key, value in vars(task.config).items() if key not in _PLACES}
    for key in list(config):
        if key.endswith("_split"):
            del config[key]
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    examples = task.sampler.df if task.config.num_fewshot and hasattr(task, "sampler") else ()
    for items in (task.eval_docs, examples):
        for item in items:
            found.update(json.dumps(item, sort_keys=True, default=str).encode() + b"\n")
        found.update(b"\n")
    return found.hexdigest()


def _plain(value: object) -> object:
    """A value without addresses: a function by its source."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, functools.partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if callable(value):
        try:
            return inspect.getsource(value)
        except (TypeError, OSError):
            return getattr(value, "__qualname__", type(value).__qualname__)
    if hasattr(value, "__dataclass_fields__"):
        return _plain({key: item for key, item in vars(value).items() if key != "split"})
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(type(value))
