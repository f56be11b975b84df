"""Reads the text of a compiled program: bytes moved through device memory, and bytes sent between chips.

Each instruction of the entry computation moves its operands and results once; instructions inside a fusion move
nothing. A loop body is multiplied by its trip count, and a slice of a stacked array counts as the slice only. Buffers
in a chip's fast memory (a TPU's VMEM) and library workspaces are not counted. The figure is what a program moves if no
cache keeps anything between two instructions. It depends on the text only, so it is the same on every machine.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
_FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "iota",
    "broadcast-in-dim",
}
# Access only a part of the first operand; the values are the operand that has the size of the part, else the result.
_PARTIAL = {"dynamic-slice": None, "slice": None, "gather": None, "dynamic-update-slice": 1, "scatter": 2}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = type operation(arguments), attributes`."""

    name: str
    type: str
    operation: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it reads."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def called(self) -> list[str]:
        """Names of the computations it calls."""
        kinds = "calls|to_apply|body|branch_computations|called_computations"
        lists = re.findall(rf"(?:{kinds})=\{{?([^}}\s,]+(?:, ?%[^}}\s,]+)*)", self.attributes)
        return [name.strip().lstrip("%") for names in lists for name in names.split(",")]


def type_bytes(hlo_type: str, fast_memory: bool = False) -> int:
    """Bytes of a type, or of all parts of a tuple type; buffers in fast memory count only with `fast_memory`."""
    total = 0
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", hlo_type):
        if not fast_memory and re.search(r"S\([1-9]", layout):  # a memory space other than HBM
            continue
        size = _BYTES.get(dtype, 0)
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        total += size
    return total


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computation name -> its instructions by name, and the name of the entry computation."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\)|\{?) ?(?:-> .*)?\{$", line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line)):
            rest = found[3]
            cut = _closing(rest) if rest.startswith("(") else re.match(r"\w+\[[\d,]*\](?:\{[^}]*\})?", rest).end()
            hlo_type, rest = rest[:cut], rest[cut:].strip()
            operation = rest.split("(")[0]
            end = _closing(rest[len(operation) :])
            arguments, attributes = rest[len(operation) + 1 :][: end - 2], rest[len(operation) + end :]
            current[found[2]] = Instruction(found[2], hlo_type, operation, arguments, attributes, bool(found[1]))
    return computations, entry


def traffic(text: str) -> dict[str, int]:
    """Operation, or kernel name of a custom call -> bytes moved through device memory in one run of the program."""
    computations, entry = parse(text)
    moved = collections.Counter()
    for times, instruction, name in _run(computations, entry):
        if instruction.operation in _FREE or instruction.operation.endswith("-done"):
            continue
        kernel = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
        what = kernel[1] if kernel else instruction.operation.removesuffix("-start")
        moved[what] += times * _moved(instruction, computations[name], computations)
    return dict(moved.most_common())


def collectives(text: str) -> dict[str, dict[str, float]]:
    """Kind -> {"count": runs per run of the program, "bytes": bytes that a chip receives}.

    Loop bodies are multiplied by their trip counts. TPU programs repeat a collective in the fusions that overlap it
    with computation, so it is counted where it starts; a reduce-scatter appears there as an all-reduce inside a fusion
    called all-reduce-scatter. In a group of n chips, each receives (n-1)/n of an all-gather's result and of a
    reduce-scatter's operand, and twice that for an all-reduce.
    """
    computations, entry = parse(text)
    found = {}

    def visit(name, times, channels, scattered, fused):
        inner = computations.get(name, {}).values()
        if name.startswith("async_collective_fusion") or any('"AsyncCollectiveDone"' in i.attributes for i in inner):
            return  # already counted where it starts
        for instruction in inner:
            if instruction.operation == "while":
                for body in instruction.called():
                    visit(body, times * _trips(instruction, computations), set(), False, False)
                continue
            kind = instruction.operation.removesuffix("-start")
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            # Collectives of shard_map share a channel, and those of equal shapes a type too. None is repeated outside
            # of fusions.
            which = channel and (channel[1], kind, instruction.type)
            if kind in COLLECTIVES and not (fused and which and which in channels):
                channels.add(which)
                kind = "reduce-scatter" if kind == "all-reduce" and scattered else kind
                total = found.setdefault(kind, {"count": 0, "bytes": 0})
                total["count"] += times
                total["bytes"] += times * _received(instruction, kind)
            for called in instruction.called():
                visit(called, times, channels, "all-reduce-scatter" in called, True)

    visit(entry, 1, set(), False, False)
    return found


def _received(collective: Instruction, kind: str) -> float:
    """Bytes that a chip receives in one run of a collective; `kind` may differ from the operation."""
    sizes = [type_bytes(array, True) for array in re.findall(r"\w+\[[\d,]*\]", collective.type)]
    n, size = _group(collective.attributes), sum(sizes)
    if collective.operation == "collective-permute-start":  # the type of a start holds operands and results
        return sizes[0]
    if collective.operation == "all-to-all-start":
        size /= 2  # its operands are as large as its results
    elif collective.operation.endswith("-start") and collective.operation != "all-reduce-start":
        size *= n / (n + 1)
    elif collective.operation == "reduce-scatter":
        size *= n
    return size if kind == "collective-permute" else size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group(attributes: str) -> int:
    """Chips of a collective's group."""
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 1


def _run(computations: dict, name: str, times: int = 1) -> Iterator[tuple[int, Instruction, str]]:
    """Yields (times run, instruction, name of its computation) over a computation and all that it calls."""
    for instruction in computations[name].values():
        if instruction.operation in ("while", "call", "conditional", "async-start"):
            trips = _trips(instruction, computations) if instruction.operation == "while" else 1
            for called in instruction.called():
                if called in computations:
                    yield from _run(computations, called, times * trips)
        else:
            yield times, instruction, name


def _trips(loop: Instruction, computations: dict) -> int:
    """Trip count of a loop: the annotated one, or the bound of its counter divided by its step (from 0)."""
    if known := re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.attributes):
        return int(known[1])
    condition, body = (
        computations.get(found[1], {}) if (found := re.search(rf"{part}=%?([\w.\-]+)", loop.attributes)) else {}
        for part in ("condition", "body")
    )
    bounds = [int(i.arguments) for i in condition.values() if i.operation == "constant" and i.arguments.isdigit()]
    bound = max(bounds, default=1)
    read = next((i for i in condition.values() if i.operation == "get-tuple-element"), None)
    root = next((i for i in body.values() if i.is_root), None)
    place = int(re.search(r"index=(\d+)", read.attributes)[1]) if read else None
    if root is None or root.operation != "tuple" or place is None or place >= len(root.operands):
        return bound

    def added(name: str, depth: int = 0) -> int:
        """Sum of the constants on the path from a value back to the counter."""
        i = body.get(name)
        if i is None or depth > 8:
            return 0
        if i.operation == "constant" and i.arguments.isdigit():
            return int(i.arguments)
        return sum(added(operand, depth + 1) for operand in i.operands) if i.operation in ("add", "copy") else 0

    return -(-bound // max(1, added(root.operands[place])))


def _moved(instruction: Instruction, computation: dict, computations: dict) -> int:
    """Bytes that one instruction reads and writes."""
    # the last result of a cuBLAS or cuDNN call is its workspace; how much of it is used is unknown
    result = type_bytes(re.sub(r", [su]8\[\d+\]\{0\}\)$", ")", instruction.type))
    reads = [type_bytes(computation[name].type) if name in computation else 0 for name in instruction.operands]
    operation = instruction.operation.removesuffix("-start")
    if operation != instruction.operation:  # the type of a start is (operands, results, ...)
        result -= sum(reads)
    if operation in ("dynamic-slice", "slice", "gather"):
        # reads as much as it returns, also into fast memory, which `result` does not include
        arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", instruction.type)
        part = type_bytes(arrays[0] if operation == instruction.operation else arrays[len(reads)], fast_memory=True)
        return min(part, reads[0]) + result
    if instruction.operation == "dynamic-update-slice":
        return 2 * reads[1]
    if instruction.operation == "scatter":
        return 3 * reads[2] + reads[1]
    if (
        not instruction.operation.startswith("fusion")
        or not (called := instruction.called())
        or called[0] not in computations
    ):
        return result + sum(reads)
    inner = computations[called[0]]
    users = collections.defaultdict(list)
    for i in inner.values():
        for operand in i.operands:
            users[operand].append(i)
    for i in inner.values():
        # a parameter is read in part if it is only sliced, gathered from or added to, and not if it is only updated
        if i.operation == "parameter":
            names = [i.name, *(u.name for u in users[i.name] if u.operation == "bitcast")]
            ends = [u for name in names for u in users[name] if u.operation != "bitcast"]
            if ends and all(u.operation in _PARTIAL and u.operands[0] in names for u in ends):
                parts = [_part(u, inner) for u in ends if u.operation != "dynamic-update-slice"]
                reads[int(i.arguments)] = min(sum(parts), reads[int(i.arguments)])
    root = next(i for i in inner.values() if i.is_root)
    for i in [inner[name] for name in root.operands] if root.operation == "tuple" else [root]:
        while i.operation in ("bitcast", "copy", "convert") and i.operands[0] in inner:
            i = inner[i.operands[0]]
        if i.operation in ("dynamic-update-slice", "scatter"):  # in place: only the new part is written
            result += min(_part(i, inner) - type_bytes(i.type), 0)
    return max(result, 0) + sum(reads)


def _part(instruction: Instruction, computation: dict) -> int:
    """Bytes of what an operation of `_PARTIAL` reads or writes of its first operand."""
    operand = _PARTIAL[instruction.operation]
    return type_bytes(instruction.type if operand is None else computation[instruction.operands[operand]].type)


def _closing(text: str) -> int:
    """Length of `text` up to the parenthesis that closes the one it starts with."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place + 1
    return len(text)
