"""What the benchmarks share: their flags, the description of the machine, and the JSON file beside them."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import sys

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")


def parser(doc: str, name: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with --output (default: results/NAME.json), --note and, with a default `rounds`, --rounds."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--output", default=os.path.join(RESULTS, f"{name}.json"), help="file for the figures")
    result.add_argument("--note", default="", help="remark to store with the figures")
    if rounds:
        result.add_argument("--rounds", type=int, default=rounds, help="each round runs every program once")
    return result


def machine() -> str:
    """Cores, CPU, its vector instructions, and the version of Python."""
    about = [platform.machine()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", file.read(), re.MULTILINE))
        about.append(fields.get("model name", "CPU of unknown name"))
        about += [name.upper() for name in ("avx512f", "avx2") if name in fields.get("flags", "").split()][:1]
    return f"{os.cpu_count()} CPU cores, {', '.join(about)}, Python {platform.python_version()}"


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def installed(*packages: str) -> dict[str, str]:
    """`versions` of those that are installed."""
    found = {name for distribution in importlib.metadata.distributions() if (name := distribution.name) in packages}
    return versions(*sorted(found))


def write(figures: dict, path: str) -> None:
    """Writes the figures as JSON and prints them."""
    text = json.dumps(figures, indent=1)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text)
