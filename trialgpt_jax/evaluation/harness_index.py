"""Finds lm-eval's tasks by name: which YAML file defines a task or group, and which tasks have a tag.

lm-eval's own `TaskManager()` parses its 14,000 files, which takes 13 s. Here a regular expression reads the few
top-level keys that decide about names, in 1 s, and lm-eval parses only the files that are needed.
"""

import functools
import importlib.util
import os
import re
from typing import NamedTuple

from trialgpt_jax import UserError

_KEY = re.compile(  # key, value on its line, and the lines of a list below it
    r"""^["']?(task|group|tag|include|class)["']?[ \t]*:[ \t]*([^\n]*)"""
    r"""((?:\n[ \t]*-[ \t]+[^\n]*|\n[ \t]*(?:\#[^\n]*)?(?=\n))*)""",
    re.MULTILINE,
)
_IGNORED = {"__pycache__", ".ipynb_checkpoints"}


class Index(NamedTuple):
    """Names and where they are defined.

    Attributes:
      files: task or group -> its YAML file.
      tags: tag -> tasks.
    """

    files: dict[str, str]
    tags: dict[str, set[str]]

    def names(self) -> list[str]:
        """Of tasks, groups and tags."""
        return sorted(self.files.keys() | self.tags.keys())


def own_folder() -> str:
    """The folder of lm-eval's own tasks; nothing is imported. "" if lm-eval is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    return os.path.join(os.path.dirname(spec.origin), "tasks") if spec else ""


def index(include_path: str = "") -> Index:
    """The tasks of lm-eval and those of a folder, which replace tasks of the same name.

    Raises:
      UserError: include_path is no folder, has no YAML file, or one of its files cannot be parsed.
    """
    folder = own_folder()
    found = _index(folder) if folder else Index({}, {})
    if not include_path:
        return found
    _check_folder(include_path)
    added = _of_folder(include_path)
    tags = {name: set(tasks) for name, tasks in found.tags.items()} | added.tags  # as lm-eval: later folders replace
    return Index(found.files | added.files, tags)


@functools.cache
def _index(folder: str) -> Index:
    return _of_folder(folder)


def _of_folder(folder: str) -> Index:
    found, seen = Index({}, {}), {}
    for path in _yaml_files(folder):
        keys = _keys(path, seen)
        name = next(iter(keys.get("task" if "class" in keys or "group" not in keys else "group", ())), "")
        if not name or name in found.files:  # as lm-eval: the first file in the order of paths counts
            continue
        found.files[name] = path
        for tag in keys.get("tag", ()) if "group" not in keys or "class" in keys else ():
            found.tags.setdefault(tag, set()).add(name)
    return found


def _yaml_files(folder: str) -> list[str]:
    paths = []
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _IGNORED]
        paths += [os.path.join(base, name) for name in names if name.endswith(".yaml")]
    return sorted(paths)


def _keys(path: str, seen: dict[str, dict[str, list[str]]]) -> dict[str, list[str]]:
    """Top-level key -> its values, with those of included files. `seen`: path -> result."""
    if path in seen:
        return seen[path]
    seen[path] = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return {}
    own = {key: _values(value, lines) for key, value, lines in _KEY.findall(text)}
    found = {}
    for name in own.get("include", ()):
        found |= _keys(os.path.normpath(os.path.join(os.path.dirname(path), name)), seen)
    seen[path] = found | own
    return seen[path]


def _values(value: str, lines: str) -> list[str]:
    value = value.strip()
    if value.startswith("["):
        return [_scalar(item) for item in value.strip("[]").split(",")]
    if value and not value.startswith("#"):
        return [_scalar(value)]
    return [_scalar(item) for item in re.findall(r"-[ \t]+([^\n]*)", lines)]


def _scalar(text: str) -> str:
    text = text.strip()
    if text[:1] and text[0] in "'\"":
        return text[1 : text.find(text[0], 1)]
    return re.split(r"\s+#", text)[0].strip()


def _check_folder(path: str) -> None:
    """Parses every YAML file of a user's folder, because lm-eval leaves out those that it cannot parse."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    if not os.path.isdir(path):
        raise UserError(f"include_path={path} is not a folder")
    files = _yaml_files(path)
    if not files:
        raise UserError(f"include_path={path} has no file that ends in .yaml")
    for file in files:
        try:
            load_yaml(file, resolve_func=False)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise UserError(f"{file}, line {mark.line + 1 if mark else 1}: {error.problem or error.context}") from None
        except FileNotFoundError as error:
            raise UserError(f"{file}: the included file {error.filename} does not exist") from None
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{file}: {' '.join(str(error).split())[:300]}") from None


def entries(found: Index, names: list[str]) -> dict:
    """lm-eval's own entries of these names and of all members of the groups and tags among them.

    Raises:
      UserError: a name that is not in the index.
    """
    from lm_eval.tasks._index import Entry, Kind, TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    result, waiting, everything = {}, list(names), found.files.keys() | found.tags.keys()
    while waiting:
        name = waiting.pop()
        if name in result:
            continue
        if name in found.files:
            read = {}
            TaskIndex.process_cfg(load_yaml(found.files[name], resolve_func=False), found.files[name], read)
            result[name] = read[name]
            if read[name].kind is Kind.GROUP:
                waiting += [member for member in _members(read[name].cfg) if member in everything]
        elif name in found.tags:
            result[name] = Entry(name, Kind.TAG, None, tags=found.tags[name])
            waiting += found.tags[name]
        else:
            raise UserError(f"`{name}` is not a task, group or tag of lm-eval")
    return result


def _members(config: dict) -> list[str]:
    """Names in a group's list, those of groups inside it as well."""
    names = []
    for item in config.get("task") or () if isinstance(config.get("task"), list) else ():
        if isinstance(item, str):
            names.append(item)
        elif isinstance(item, dict):
            names += [name for name in (item.get("group"), item.get("task")) if isinstance(name, str)]
            names += _members(item)
    return names
