#!/usr/bin/env python3
"""Compiles the configs for slices and hosts that are not attached, and writes what that takes as a table.

    python scripts/scale_table.py            # compiles the rows that scale.json lacks, one at a time, then writes docs/scale.md
    python scripts/scale_table.py --rows=1   # compiles one of them and stops; --rows=0 makes the tables again

Results: scripts/bench/results/scale.json, a row as soon as it is compiled; the tables in docs/scale.md are made from it alone.
Needs what `aot_compile.py` needs: `libtpu` for TPUs; for H200 rows the extra `cuda`, in the environment of `--cuda_python`.
"""

import json
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "scripts", "bench", "results", "scale.json")
DOC = os.path.join(ROOT, "docs", "scale.md")

# Bytes per second that a chip receives from the others when all its links are busy. TPU: "interchip interconnect bandwidth per
# chip" of Google's Cloud TPU pages (v5e 1,600, v5p 4,800, v6e 3,584 Gbit/s); H200: NVIDIA's datasheet, NVLink 900 GB/s both ways.
LINKS = {"v5e": 1600e9 / 8, "v5p": 4800e9 / 8, "v6e": 3584e9 / 8, "h200": 450e9}
PEAK = {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "h200": 989e12}  # dense bf16 FLOP/s

# Rows of a kernel's shard, and columns of the embedding's: a TPU's tile has 128, and for less its compiler makes an all-reduce, of
# twice the bytes, out of each reduce-scatter. So fsdp is the largest power of two that leaves so many, and data takes the other chips.
_ROWS = 128
_WIDTH = {"gpt_7b": 4096, "gpt_13b": 5120, "gpt2_1558m": 1600, "gpt2_774m": 1280, "gpt2_350m": 1024, "gpt2_124m": 768}
_FITS = {  # config -> {target: sequences of a microbatch on a chip}
    "gpt_7b": {"v5e:4x4": 1, "v5p:4x4x4": 4, "h200:8": 4, "v6e:2x4": 2, "v5p:2x2x1": 4, "v5e:8x8": 2, "v5e:16x16": 2,
               "v6e:16x16": 4},
    "gpt_13b": {"v5p:4x4x4": 4, "h200:8": 4, "v5e:4x4": 1, "v6e:2x4": 1, "v5p:2x2x1": 2, "v5e:8x8": 1, "v5e:16x16": 1,
                "v6e:16x16": 2},
    "gpt2_1558m": {"v5e:4x4": 2, "h200:8": 4, "v6e:2x4": 4, "v5p:2x2x1": 4, "v5p:4x4x4": 4, "v5e:8x8": 2, "v5e:16x16": 2,
                   "v6e:16x16": 4},
    "gpt2_774m": {"v5e:4x4": 2, "h200:8": 4, "v6e:2x4": 4, "v5p:2x2x1": 4, "v5p:4x4x4": 4, "v5e:8x8": 2, "v5e:16x16": 2,
                  "v6e:16x16": 4},
    "gpt2_350m": {"v5e:4x4": 4, "h200:8": 4, "v6e:2x4": 4, "v5p:2x2x1": 4, "v5p:4x4x4": 4, "v5e:8x8": 4, "v5e:16x16": 4,
                  "v6e:16x16": 4},
}  # fmt: skip
_ALONE = (
    ("gpt_13b", "v5e:4x4"),
    ("gpt_13b", "v6e:2x4"),
)  # fit with one microbatch a step: two need a float32 sum of gradients
_GROWTH = {"v5e:1x1": 8, "v5e:2x2": 8, "v5e:4x4": 8, "v5e:8x8": 8, "v5e:16x16": 8}  # of gpt2_124m


def rows() -> list[dict]:
    """What is to be compiled: kind, config, target, sequences of a microbatch on a chip, microbatches of an optimizer step."""
    fits = [
        {"kind": "fits", "config": c, "target": t, "on_chip": n, "microbatches": 1 if (c, t) in _ALONE else 2}
        for c, targets in _FITS.items()
        for t, n in targets.items()
    ]
    growth = [
        {"kind": "growth", "config": "gpt2_124m", "target": t, "on_chip": n, "microbatches": 2}
        for t, n in _GROWTH.items()
    ]
    first = [row for row in fits if (row["config"], row["target"]) in (("gpt_7b", "v5e:4x4"), ("gpt_7b", "v5p:4x4x4"))]
    return first[:1] + growth + [row for row in fits if row not in first] + first[1:]


def fsdp(row: dict) -> int:
    size = 1
    while size < chips(row["target"]) and _WIDTH[row["config"]] // (2 * size) >= _ROWS:
        size *= 2
    return size


def chips(target: str) -> int:
    count = 1
    for size in re.findall(r"\d+", target.split(":")[1]):
        count *= int(size)
    return count


def compile_row(row: dict, cuda_python: str) -> dict:
    """The row with what `aot_compile.py --json` reports of it.

    Its collectives are None where JAX cannot print the compiled program. Two microbatches are enough for the loop over them
    to be there, and its cost is then known for any number.
    """
    n = chips(row["target"]) * row["on_chip"]
    python = cuda_python if row["target"].startswith("h200") else sys.executable
    argv = [python, os.path.join(ROOT, "scripts", "aot_compile.py"), f"--config={ROOT}/configs/{row['config']}.py",
            f"--target={row['target']}", f"--config.train.batch_size={row['microbatches'] * n}",
            f"--config.train.accumulate_steps={row['microbatches']}", "--config.mesh.data=-1", f"--config.mesh.fsdp={fsdp(row)}", "--json"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": ROOT}
    result = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    if not lines or not lines[-1].startswith("{"):
        raise SystemExit(f"{row}: {result.stderr.strip().splitlines()[-1:]}")
    report = json.loads(lines[-1])
    report.pop("custom_calls", None)
    return row | report


# ---- the tables


def tables(results: list[dict]) -> tuple[str, str, str]:
    """Markdown: what fits where, the FSDP collectives against theory, growth."""
    fits = [
        "| config | chips | data x fsdp | sequences a chip | GB a chip | of | state, GB | whole state / fsdp, GB "
        + "| collectives of a microbatch: times, GB received by a chip | FLOPs of a microbatch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    theory = ["| config | chips | 2 gathers + 1 scatter, GB | compiled, GB | ratio |", "|---|---|---|---|---|"]
    growth = ["| chips | mesh | GB a chip | compute, ms | communication, ms | communication / compute | received, GB |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in results:
        family, mesh = row["target"].split(":")[0], f"{row['mesh']['data']} x {row['mesh']['fsdp']}"
        name = f"{row['chips']} x {row['device_kind'].removeprefix('NVIDIA ')}"
        if "bytes_needed" not in row:
            fits.append(f"| {row['config']} | {name} | {mesh} | {row['on_chip']} | does not fit | | | | | |")
            continue
        found = row["collectives"]
        times = row["microbatches"]
        received = sum(kind["bytes"] for kind in (found or {}).values()) / times / 1e9
        if row["kind"] == "growth":
            compute = row["flops_per_step"] / times / row["chips"] / PEAK[family]
            communication = received * 1e9 / LINKS[family]
            growth.append(
                f"| {row['chips']} | {mesh} | {row['bytes_needed'] / 1e9:.2f} | {compute * 1e3:.1f} | {communication * 1e3:.1f} | "
                f"{communication / compute:.2f} | {received:.2f} |"
            )
            continue
        listed = "not printable"
        if found:
            listed = ", ".join(
                f"{kind} {v['count'] / times:g}: {v['bytes'] / times / 1e9:.2f}" for kind, v in sorted(found.items())
            )
            # the gradients are also summed over data: an all-reduce of each chip's part
            data, shards = row["mesh"]["data"], row["mesh"]["fsdp"]
            expected = 2 * row["parameters"] * (3 * (shards - 1) / shards + 2 * (data - 1) / data / shards) / 1e9
            theory.append(f"| {row['config']} | {name} | {expected:.2f} | {received:.2f} | {received / expected:.2f} |")
        fits.append(
            f"| {row['config']} | {name} | {mesh} | {row['on_chip']}{' (one microbatch)' if times == 1 else ''} | {row['bytes_needed'] / 1e9:.2f}"
            f"{'' if row['fits'] else ' DOES NOT FIT'} | {row['bytes_of_chip'] / 1e9:.2f} | {row['argument_bytes'] / 1e9:.3f} | "
            f"{12 * row['parameters'] / row['mesh']['fsdp'] / 1e9:.3f} | {listed} | {row['flops_per_step'] / times:.3g} |"
        )
    return "\n".join(fits), "\n".join(theory), "\n".join(growth)


def limits(results: list[dict]) -> str:
    """Markdown: tokens on a chip, and with it chips for the config's batch, at which communication takes as long as compute."""
    lines = ["| config | chips compiled for | tokens a chip at the limit | chips at the limit, of 2.1M tokens a step |",
             "|---|---|---|---|"]  # fmt: skip
    for row in results:
        if row["kind"] != "fits" or not row["config"].startswith("gpt_") or not row.get("collectives"):
            continue
        family = row["target"].split(":")[0]
        seconds = sum(kind["bytes"] for kind in row["collectives"].values()) / row["microbatches"] / LINKS[family]
        tokens = seconds * PEAK[family] / (row["flops_per_step"] / row["tokens_per_step"])
        name = f"{row['chips']} x {row['device_kind'].removeprefix('NVIDIA ')}"
        lines.append(f"| {row['config']} | {name} | {tokens:,.0f} | {1024 * 2048 / tokens:,.0f} |")
    return "\n".join(lines)


def write_doc(results: list[dict]) -> None:
    """Puts the tables between the markers in docs/scale.md."""
    with open(DOC) as file:
        text = file.read()
    for name, table in zip(("fits", "theory", "growth", "limits"), (*tables(results), limits(results)), strict=True):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text = text[: text.index(begin) + len(begin)] + "\n\n" + table + "\n\n" + text[text.index(end) :]
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
    write_doc(sorted(done, key=lambda row: (row["kind"], [*_FITS, "gpt2_124m"].index(row["config"]), row["chips"])))


if __name__ == "__main__":
    main(sys.argv[1:])
