#!/usr/bin/env python3
"""Compiles the configs for slices and hosts that are not attached, and writes what that takes as a table.

    python scripts/scale_table.py            # compiles the rows that scale.json lacks, one at a time, then writes docs/scale.md
    python scripts/scale_table.py --again    # compiles all of them

Results: scripts/bench/results/scale.json, a row as soon as it is compiled; the tables in docs/scale.md are made from it alone.
Needs what `aot_compile.py` needs: `libtpu` for TPUs; for H200 rows the extra `cuda`, in the environment of `--cuda_python`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "scripts", "bench", "results", "scale.json")
DOC = os.path.join(ROOT, "docs", "scale.md")

# Bytes per second that a chip receives from the others when all its links are busy. TPU: "interchip interconnect bandwidth per
# chip" of Google's Cloud TPU pages (v5e 1,600, v5p 4,800, v6e 3,584 Gbit/s); H200: NVIDIA's datasheet, NVLink 900 GB/s both ways.
LINKS = {"v5e": 1600e9 / 8, "v5p": 4800e9 / 8, "v6e": 3584e9 / 8, "h200": 450e9}
PEAK = {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "h200": 989e12}  # dense bf16 FLOP/s

_FITS = {  # config -> {target: (mesh fsdp, sequences of a microbatch on a chip)}; data takes the rest
    "gpt_7b": {"v5e:4x4": 1, "v5p:4x4x4": 4, "h200:8": 4, "v6e:2x4": 2, "v5p:2x2x1": 4, "v5e:8x8": 2, "v5e:16x16": 2,
               "v6e:16x16": 4},
    "gpt_13b": {"v5p:4x4x4": 4, "h200:8": 4, "v5e:4x4": 1, "v6e:2x4": 1, "v5p:2x2x1": 2, "v5e:8x8": 1, "v5e:16x16": 1,
                "v6e:16x16": 2},
    "gpt2_1558m": {"v5e:4x4": 2, "h200:8": 4, "v6e:2x4": 4, "v5p:2x2x1": 4},
    "gpt2_774m": {"v5e:4x4": 2, "h200:8": 4, "v6e:2x4": 4, "v5p:2x2x1": 4},
    "gpt2_350m": {"v5e:4x4": 4, "h200:8": 4, "v6e:2x4": 4, "v5p:2x2x1": 4},
}  # fmt: skip
_GROWTH = {"v5e:1x1": 8, "v5e:2x2": 8, "v5e:4x4": 8, "v5e:8x8": 8, "v5e:16x16": 8}  # of gpt2_124m, split by fsdp
_CHIPS = {"h200:8": 8}


def rows() -> list[dict]:
    """What is to be compiled: kind, config, target, chips, sequences of a microbatch on a chip."""
    fits = [
        {"kind": "fits", "config": c, "target": t, "on_chip": n}
        for c, targets in _FITS.items()
        for t, n in targets.items()
    ]
    growth = [{"kind": "growth", "config": "gpt2_124m", "target": t, "on_chip": n} for t, n in _GROWTH.items()]
    first = [row for row in fits if (row["config"], row["target"]) in (("gpt_7b", "v5e:4x4"), ("gpt_7b", "v5p:4x4x4"))]
    return first[:1] + growth + [row for row in fits if row not in first] + first[1:]


def chips(target: str) -> int:
    count = 1
    for size in re.findall(r"\d+", target.split(":")[1]):
        count *= int(size)
    return count


def compile_row(row: dict, cuda_python: str) -> dict | None:
    """The row with what `aot_compile.py --json` reports of it, and the collectives of one step by kind.

    None, with a word on stderr, where the compiler fails for another reason than memory. The optimizer step has two microbatches of the row's size: enough that the loop over them is there, and its cost is
    then known for any number.
    """
    n = chips(row["target"]) * row["on_chip"]
    python = cuda_python if row["target"].startswith("h200") else sys.executable
    with tempfile.NamedTemporaryFile(suffix=".txt") as hlo:
        argv = [python, os.path.join(ROOT, "scripts", "aot_compile.py"), f"--config={ROOT}/configs/{row['config']}.py",
                f"--target={row['target']}", f"--config.train.batch_size={2 * n}", "--config.train.accumulate_steps=2",
                "--config.mesh.data=1", "--config.mesh.fsdp=-1", "--json", f"--hlo={hlo.name}"]  # fmt: skip
        env = os.environ | {"PYTHONPATH": ROOT}
        result = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        lines = result.stdout.splitlines()
        if not lines or not lines[-1].startswith("{"):
            print(f"left out: {result.stderr.strip().splitlines()[-1:]}", file=sys.stderr, flush=True)
            return None
        report = json.loads(lines[-1])
        report.pop("custom_calls", None)
        report["collectives"] = collectives(hlo.read().decode()) if report["fits"] else {}
    return row | report


# ---- reading the compiled program

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_KINDS = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"


def collectives(text: str) -> dict[str, dict[str, float]]:
    """Kind -> times executed in a step, and bytes that a chip receives by them in a step.

    Loops count as often as they run: the bound that a loop's condition compares its counter with. TPU programs mention a
    collective again in the pieces that overlap it with computation, so it counts where it starts. A reduce-scatter is
    there an all-reduce inside a fusion `all-reduce-scatter`. Of n chips in a group, one receives (n-1)/n of an
    all-gather's result and of a reduce-scatter's operand, and twice that of an all-reduce.
    """
    computations, entry = _computations(text)
    found = {}

    def visit(name, times, channels, scattered):
        lines = computations.get(name, ())
        if name.startswith("async_collective_fusion") or any('"AsyncCollectiveDone"' in line for line in lines):
            return  # what was counted where it starts
        for line in lines:
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                visit(loop[2], times * _trips(computations[loop[1]], computations[loop[2]], line), set(), False)
                continue
            op = re.match(rf"(?:ROOT )?%?[\w.\-]+ = (\(?.*?\)?) ({_KINDS})(-start)?\(", line)
            channel = re.search(r"channel_id=(\d+)", line)
            if op and not (channel and channel[1] in channels):
                channels.add(channel and channel[1])
                sizes = [_size(*array) for array in re.findall(r"(\w+)\[([\d,]*)\]", op[1])]
                size = max(sizes) if op[3] else sum(sizes)  # a start holds operand and result
                n, kind = _group(line), op[2]
                if kind == "all-reduce" and scattered:
                    kind = "reduce-scatter"
                elif kind == "reduce-scatter":
                    size *= 1 if op[3] else n
                share = 1 if kind == "collective-permute" else (n - 1) / n * (2 if kind == "all-reduce" else 1)
                total = found.setdefault(kind, {"times": 0, "bytes": 0})
                total["times"] += times
                total["bytes"] += times * size * share
            for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                visit(called, times, channels, "all-reduce-scatter" in called)

    visit(entry, 1, set(), False)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found, name, entry = {}, None, ""
    for line in text.splitlines():
        if begin := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = begin[2]
            found[name] = []
            entry = name if begin[1] else entry
        elif line == "}":  # some attributes run over several lines, which may begin with a brace
            name = None
        elif name:
            found[name].append(line.strip())
    return found, entry


def _trips(condition: list[str], body: list[str], line: str) -> int:
    """How often a loop runs: what it says, or the bound of its counter over the counter's step (from 0)."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    bound = max((int(n) for text in condition for n in re.findall(r"constant\((\d+)\)", text)), default=1)
    place = next((int(n) for text in condition for n in re.findall(r" get-tuple-element\(.*index=(\d+)", text)), None)
    defined = {m[1]: m[2] for text in body if (m := re.match(r"(?:ROOT )?%?([\w.\-]+) = (.*)", text))}
    root = next((text for text in body if text.startswith("ROOT")), "")
    results = re.findall(r"%([\w.\-]+)", root.partition(" tuple(")[2])
    if place is None or place >= len(results):
        return bound

    def added(name, depth=0):
        """Sum of the constants on the way from a value back to the counter."""
        text = defined.get(name, "")
        if constant := re.search(r" constant\((\d+)\)", text):
            return int(constant[1])
        if depth > 8 or not (add := re.search(r" (?:add|copy)\((.*?)\)", text)):
            return 0
        return sum(added(operand, depth + 1) for operand in re.findall(r"%([\w.\-]+)", add[1]))

    return -(-bound // max(1, added(results[place])))


def _size(dtype: str, dims: str) -> int:
    count = _BYTES.get(dtype, 0)
    for dim in filter(None, dims.split(",")):
        count *= int(dim)
    return count


def _group(line: str) -> int:
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        count = 1
        for axis in re.findall(r"'(\w+)'", named[2]):
            count *= int(sizes[axis])
        return count
    return 1


# ---- the tables


def tables(results: list[dict]) -> tuple[str, str, str]:
    """Markdown: what fits where, the FSDP collectives against theory, growth."""
    fits = [
        "| config | chips | mesh fsdp | sequences a chip | GB a chip | of | state, GB | whole state / chips, GB "
        + "| collectives of a microbatch: times, GB received by a chip | FLOPs of a microbatch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    theory = ["| config | chips | 2 gathers + 1 scatter, GB | compiled, GB | ratio |", "|---|---|---|---|---|"]
    growth = ["| chips | GB a chip | compute, ms | communication, ms | communication / compute | received, GB |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for row in results:
        family = row["target"].split(":")[0]
        name = f"{row['chips']} x {row['device_kind'].removeprefix('NVIDIA ')}"
        if not row["fits"] and "bytes_needed" not in row:
            fits.append(
                f"| {row['config']} | {name} | {row['mesh']['fsdp']} | {row['on_chip']} | does not fit | | | | | |"
            )
            continue
        found = row["collectives"]
        received = sum(kind["bytes"] for kind in found.values()) / 2 / 1e9
        if row["kind"] == "fits":
            listed = ", ".join(
                f"{kind} {v['times'] / 2:g}: {v['bytes'] / 2e9:.2f}" for kind, v in sorted(found.items())
            )
            fits.append(
                f"| {row['config']} | {name} | {row['mesh']['fsdp']} | {row['on_chip']} | {row['bytes_needed'] / 1e9:.2f}"
                f"{'' if row['fits'] else ' DOES NOT FIT'} | {row['bytes_of_chip'] / 1e9:.2f} | {row['argument_bytes'] / 1e9:.3f} | "
                f"{12 * row['parameters'] / row['chips'] / 1e9:.3f} | {listed} | {row['flops_per_step'] / 2:.3g} |"
            )
            share = (row["chips"] - 1) / row["chips"]
            expected = 3 * 2 * row["parameters"] * share / 1e9
            theory.append(f"| {row['config']} | {name} | {expected:.2f} | {received:.2f} | {received / expected:.2f} |")
        else:
            compute = row["flops_per_step"] / 2 / row["chips"] / PEAK[family]
            communication = received * 1e9 / LINKS[family]
            growth.append(
                f"| {row['chips']} | {row['bytes_needed'] / 1e9:.2f} | {compute * 1e3:.1f} | {communication * 1e3:.1f} | "
                f"{communication / compute:.2f} | {received:.2f} |"
            )
    return "\n".join(fits), "\n".join(theory), "\n".join(growth)


def limits(results: list[dict]) -> str:
    """Markdown: tokens on a chip, and with it chips for the config's batch, at which communication takes as long as compute."""
    sizes = {"gpt_7b": 1024 * 2048, "gpt_13b": 1024 * 2048}
    lines = ["| config | chips compiled for | tokens a chip at the limit | chips at the limit, of 2.1M tokens a step |",
             "|---|---|---|---|"]  # fmt: skip
    for row in results:
        if row["kind"] != "fits" or not row["fits"] or row["config"] not in sizes or not row["collectives"]:
            continue
        family = row["target"].split(":")[0]
        seconds = sum(kind["bytes"] for kind in row["collectives"].values()) / 2 / LINKS[family]
        tokens = seconds * PEAK[family] / (row["flops_per_step"] / row["tokens_per_step"])
        name = f"{row['chips']} x {row['device_kind'].removeprefix('NVIDIA ')}"
        lines.append(f"| {row['config']} | {name} | {tokens:,.0f} | {sizes[row['config']] / tokens:,.0f} |")
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
    if os.path.exists(RESULTS) and "--again" not in argv:
        with open(RESULTS) as file:
            done = json.load(file)
    have = {(row["kind"], row["config"], row["target"], row["on_chip"]) for row in done}
    for row in rows() if "--tables" not in argv else ():
        if tuple(row.values()) not in have:
            print(*row.values(), file=sys.stderr, flush=True)
            if (compiled := compile_row(row, cuda_python)) is None:
                continue
            done.append(compiled)
            with open(RESULTS + ".part", "w") as file:
                json.dump(done, file, indent=1)
            os.replace(RESULTS + ".part", RESULTS)
    write_doc(sorted(done, key=lambda row: (row["kind"], [*_FITS, "gpt2_124m"].index(row["config"]), row["chips"])))


if __name__ == "__main__":
    main(sys.argv[1:])
