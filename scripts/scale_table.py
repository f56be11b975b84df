#!/usr/bin/env python3
"""Compiles the configs for slices and hosts that are not attached, and tabulates memory and collectives.

    python scripts/scale_table.py            # compile the rows that scale.json lacks, then write docs/scale.md
    python scripts/scale_table.py --rows=1   # compile one of them; --rows=0 only writes the tables

Results go to scripts/bench/results/scale.json, each row as soon as it is compiled; the tables in docs/scale.md are
generated from that file alone. Requirements are those of `aot_compile.py`: `libtpu` for TPUs; for the H200 rows the
extra `cuda`, in the environment of `--cuda_python`.
"""

import json
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "scripts", "bench", "results", "scale.json")
DOC = os.path.join(ROOT, "docs", "scale.md")

# Bytes per second that a chip receives with all its links busy. TPU: "interchip interconnect bandwidth per chip" of
# Google's Cloud TPU pages (v5e 1,600, v5p 4,800, v6e 3,584 Gbit/s). H200: NVIDIA's datasheet, NVLink 900 GB/s, the sum
# of both directions.
LINKS = {"v5e": 1600e9 / 8, "v5p": 4800e9 / 8, "v6e": 3584e9 / 8, "h200": 450e9}
PEAK = {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "h200": 989e12}  # dense bf16 FLOP/s

# Minimum rows of a kernel's shard and columns of the embedding's. With less than a TPU tile of 128 the compiler turns
# reduce-scatters into all-reduces, which move twice the bytes. See `fsdp`.
_ROWS = 128

# A config is named as on the command line, without folder and extension: "gpt2:124m" = configs/gpt2.py:124m.
_WIDTH = {"gpt:7b": 4096, "gpt:13b": 5120, "gpt2:1558m": 1600, "gpt2:774m": 1280, "gpt2:350m": 1024, "gpt2:124m": 768}
_TARGETS = ("v5e:4x4", "h200:8", "v6e:2x4", "v5p:2x2x1", "v5p:4x4x4", "v5e:8x8", "v5e:16x16", "v6e:16x16")
_FITS = {  # config -> sequences per chip and microbatch, for each of _TARGETS
    "gpt:7b": (1, 4, 2, 4, 4, 2, 2, 4),
    "gpt:13b": (1, 4, 1, 2, 4, 1, 1, 2),
    "gpt2:1558m": (2, 4, 4, 4, 4, 2, 2, 4),
    "gpt2:774m": (2, 4, 4, 4, 4, 2, 2, 4),
    "gpt2:350m": (4, 4, 4, 4, 4, 4, 4, 4),
}
# These fit only with one microbatch a step: two need a float32 sum of gradients.
_ONE_MICROBATCH = (("gpt:13b", "v5e:4x4"), ("gpt:13b", "v6e:2x4"))
_GROWTH = {"v5e:1x1": 8, "v5e:2x2": 8, "v5e:4x4": 8, "v5e:8x8": 8, "v5e:16x16": 8}  # of gpt2:124m, sequences per chip


def rows() -> list[dict]:
    """What to compile: kind, config, target, sequences per chip and microbatch, microbatches per optimizer step."""
    fits = [
        {"kind": "fits", "config": c, "target": t, "on_chip": n, "microbatches": 1 if (c, t) in _ONE_MICROBATCH else 2}
        for c, counts in _FITS.items()
        for t, n in zip(_TARGETS, counts, strict=True)
    ]
    growth = [
        {"kind": "growth", "config": "gpt2:124m", "target": t, "on_chip": n, "microbatches": 2}
        for t, n in _GROWTH.items()
    ]
    return growth + fits


def fsdp(row: dict) -> int:
    """The largest power of two that leaves every chip `_ROWS` rows of a kernel; `data` takes the other chips."""
    size = 1
    while size < chips(row["target"]) and _WIDTH[row["config"]] // (2 * size) >= _ROWS:
        size *= 2
    return size


def chips(target: str) -> int:
    """Chips of a target such as "v5e:4x4" or "h200:8"."""
    count = 1
    for size in re.findall(r"\d+", target.split(":")[1]):
        count *= int(size)
    return count


def compile_row(row: dict, cuda_python: str) -> dict:
    """The row with the report of `aot_compile.py --json`.

    Its collectives are None where JAX cannot print the compiled program. Two microbatches are enough: the program then
    has the loop over microbatches, so the cost of any number of them is known.
    """
    n = chips(row["target"]) * row["on_chip"]
    python = cuda_python if row["target"].startswith("h200") else sys.executable
    file, _, size = row["config"].partition(":")
    argv = [
        python,
        os.path.join(ROOT, "scripts", "aot_compile.py"),
        f"--config={ROOT}/configs/{file}.py:{size}",
        f"--target={row['target']}",
        f"--config.train.batch_size={row['microbatches'] * n}",
        f"--config.train.accumulate_steps={row['microbatches']}",
        "--config.mesh.data=-1",
        f"--config.mesh.fsdp={fsdp(row)}",
        "--json",
    ]
    env = os.environ | {"PYTHONPATH": ROOT}
    result = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    if not lines or not lines[-1].startswith("{"):
        raise SystemExit(f"{row}: {result.stderr.strip().splitlines()[-1:]}")
    report = json.loads(lines[-1])
    report.pop("custom_calls", None)
    return row | report


# ---- tables


def _table(header: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [header, "|---" * (header.count("|") - 1) + "|"]


def _chips(row: dict) -> str:
    return f"{row['chips']} x {row['device_kind'].removeprefix('NVIDIA ')}"


def _received(row: dict) -> float:
    """GB that a chip receives in a microbatch."""
    return sum(kind["bytes"] for kind in (row["collectives"] or {}).values()) / row["microbatches"] / 1e9


def fits_table(results: list[dict]) -> str:
    """Markdown: memory and collectives of each config and target."""
    lines = _table(
        "| config | chips | data x fsdp | sequences a chip | GB a chip | of | state, GB | whole state / fsdp, GB "
        "| collectives of a microbatch: count, GB received by a chip | FLOPs of a microbatch |"
    )
    for row in results:
        if row["kind"] != "fits":
            continue
        begin = f"| {row['config']} | {_chips(row)} | {row['mesh']['data']} x {row['mesh']['fsdp']} | {row['on_chip']}"
        if "bytes_needed" not in row:
            lines.append(f"{begin} | does not fit | | | | | |")
            continue
        times, collectives = row["microbatches"], "not printable"
        if row["collectives"]:
            collectives = ", ".join(
                f"{kind} {v['count'] / times:g}: {v['bytes'] / times / 1e9:.2f}"
                for kind, v in sorted(row["collectives"].items())
            )
        lines.append(
            f"{begin}{' (one microbatch)' if times == 1 else ''} | {row['bytes_needed'] / 1e9:.2f}"
            f"{'' if row['fits'] else ' DOES NOT FIT'} | {row['bytes_of_chip'] / 1e9:.2f} "
            f"| {row['argument_bytes'] / 1e9:.3f} | {12 * row['parameters'] / row['mesh']['fsdp'] / 1e9:.3f} "
            f"| {collectives} | {row['flops_per_step'] / times:.3g} |"
        )
    return "\n".join(lines)


def theory_table(results: list[dict]) -> str:
    """Markdown: received bytes against those of fully sharded data parallelism."""
    lines = _table("| config | chips | 2 gathers + 1 scatter, GB | compiled, GB | ratio |")
    for row in results:
        if row["kind"] != "fits" or not row.get("collectives"):
            continue
        data, shards = row["mesh"]["data"], row["mesh"]["fsdp"]
        # bf16; the second term is the all-reduce over `data` of each chip's part of the gradients
        expected = 2 * row["parameters"] * (3 * (shards - 1) / shards + 2 * (data - 1) / data / shards) / 1e9
        received = _received(row)
        lines.append(
            f"| {row['config']} | {_chips(row)} | {expected:.2f} | {received:.2f} | {received / expected:.2f} |"
        )
    return "\n".join(lines)


def growth_table(results: list[dict]) -> str:
    """Markdown: compute and communication of GPT-2 124M on more and more chips."""
    lines = _table(
        "| chips | mesh | GB a chip | compute, ms | communication, ms | communication / compute | received, GB |"
    )
    for row in results:
        if row["kind"] != "growth":
            continue
        family, received = row["target"].split(":")[0], _received(row)
        compute = row["flops_per_step"] / row["microbatches"] / row["chips"] / PEAK[family]
        communication = received * 1e9 / LINKS[family]
        lines.append(
            f"| {row['chips']} | {row['mesh']['data']} x {row['mesh']['fsdp']} | {row['bytes_needed'] / 1e9:.2f} "
            f"| {compute * 1e3:.1f} | {communication * 1e3:.1f} | {communication / compute:.2f} | {received:.2f} |"
        )
    return "\n".join(lines)


def limits_table(results: list[dict]) -> str:
    """Markdown: tokens per chip, and chips for the config's batch, where communication takes as long as compute."""
    lines = _table(
        "| config | chips compiled for | tokens a chip at the limit | chips at the limit, of 2.1M tokens a step |"
    )
    for row in results:
        if row["kind"] != "fits" or not row["config"].startswith("gpt:") or not row.get("collectives"):
            continue
        family = row["target"].split(":")[0]
        seconds = _received(row) * 1e9 / LINKS[family]
        tokens = seconds * PEAK[family] / (row["flops_per_step"] / row["tokens_per_step"])
        lines.append(f"| {row['config']} | {_chips(row)} | {tokens:,.0f} | {1024 * 2048 / tokens:,.0f} |")
    return "\n".join(lines)


TABLES = {"fits": fits_table, "theory": theory_table, "growth": growth_table, "limits": limits_table}


def write_doc(results: list[dict]) -> None:
    """Replaces the tables between the markers in docs/scale.md."""
    with open(DOC) as file:
        text = file.read()
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text = text[: text.index(begin) + len(begin)] + "\n\n" + table(results) + "\n\n" + text[text.index(end) :]
    with open(DOC, "w") as file:
        file.write(text)


def main(argv: list[str]) -> None:
    cuda_python = next((a.split("=", 1)[1] for a in argv if a.startswith("--cuda_python=")), sys.executable)
    done = []
    n_rows = next((int(a.split("=", 1)[1]) for a in argv if a.startswith("--rows=")), len(rows()))
    if os.path.exists(RESULTS):
        with open(RESULTS) as file:
            done = json.load(file)
    have = {(row["kind"], row["config"], row["target"], row["on_chip"], row["microbatches"]) for row in done}
    missing = [row for row in rows() if tuple(row.values()) not in have]
    for row in missing[:n_rows]:
        print(*row.values(), file=sys.stderr, flush=True)
        done.append(compile_row(row, cuda_python))
        with open(RESULTS + ".part", "w") as file:
            json.dump(done, file, indent=1)
        os.replace(RESULTS + ".part", RESULTS)
    write_doc(sorted(done, key=lambda row: (row["kind"], list(_WIDTH).index(row["config"]), row["chips"])))


if __name__ == "__main__":
    main(sys.argv[1:])
