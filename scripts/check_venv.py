"""Whether an environment already has what `pip install --editable TARGET` would give it; needs no network.

    .venv/bin/python scripts/check_venv.py '.[test]'

Exits with 0, or prints what is missing and exits with 1. Looks at every package that pyproject.toml names and at those
that they need, with their versions.
"""

import importlib.metadata
import json
import os
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAME = "trialgpt_jax"


def wanted(target: str) -> list[str]:
    """The requirements of this folder with the extras of `target`, such as `.[test]`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = [line.partition("#")[0].strip() for line in lines]
    for extra in filter(None, re.sub(r"^\.|[\[\]\s]", "", target).split(",")):
        found += project["optional-dependencies"][extra]
    return list(filter(None, found))


def lacking(requirements: list[str]) -> str | None:
    """The first requirement that is not installed, of these and of those that they have; None = all are."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return "packaging is not installed"
    rest, seen = [(Requirement(text), "") for text in requirements], set()
    while rest:
        requirement, extra = rest.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            found = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            return f"{requirement.name} is not installed"
        if not requirement.specifier.contains(found.version, prereleases=True):
            return f"{requirement.name} {found.version} is not {requirement.specifier}"
        for each in {"", *requirement.extras}:
            if (found.name, each) not in seen:
                seen.add((found.name, each))
                rest += [(Requirement(text), each) for text in found.requires or []]
    return None


def not_of_this_folder() -> str | None:
    """Why `trialgpt` of this environment does not run this folder's code; None if it does."""
    try:
        source = json.loads(importlib.metadata.distribution(NAME).read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        return f"{NAME} is not installed"
    if source.get("url") != ROOT.as_uri() or not source.get("dir_info", {}).get("editable"):
        return f"{NAME} is not that of {ROOT}"
    program = os.path.join(os.path.dirname(sys.executable), "trialgpt")
    return None if os.path.exists(program) else f"{program} does not exist"


if __name__ == "__main__":
    if problem := not_of_this_folder() or lacking(wanted(sys.argv[1])):
        print(problem)
        sys.exit(1)
