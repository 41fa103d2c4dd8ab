"""Reads what a compiler left: registers, spills, shared memory, and what the loops over the vocabulary are made of."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Loop",
    "Resources",
    "cuda_loops",
    "elf_text",
    "hip_loops",
    "parse_loops",
    "read_resources",
    "resource_usage",
]


@dataclass(frozen=True)
class Resources:
    """Of one kernel compiled by Triton."""

    registers: int
    """Of a thread: 32-bit registers, on AMD the vector registers of both kinds."""
    spilled_bytes: int
    """Memory of a thread; the kernels have no arrays, so all of it is spilled registers."""
    shared_bytes: int
    """Of a block, static and dynamic."""
    scalar_registers: int
    """Of a wave on AMD; 0 elsewhere."""
    scalars_in_lanes: int
    """Scalar registers that AMD's compiler keeps in lanes of a vector register: on the chip, so they are no spill here."""
    vector_loads: int
    """Load instructions of 128 bits, in the text of the program."""
    vector_stores: int
    shuffles_in_loops: int | None
    """Exchanges between threads inside the loops over the vocabulary; None: not looked for on this target."""


@dataclass(frozen=True)
class Loop:
    """An innermost loop of machine code that loads from global memory."""

    instructions: int
    """On AMD those on vectors: scalar ones have units of their own."""
    arithmetic: int
    """Of these, additions, multiplications and both at once in single precision."""
    special: int
    """Of these, those of the special-function units."""
    loaded_bytes: int
    """Of one thread and one turn."""
    masked: bool
    """Whether its loads depend on a condition; not looked for on AMD, where addresses out of bounds serve for one."""


def read_resources(compiled: Any) -> Resources:
    """Of what ``triton.compile`` returned."""
    backend = compiled.metadata.target.backend
    read = read_cuda if backend == "cuda" else read_hip
    return read(compiled.asm, compiled.metadata.shared)


def resource_usage(path: str) -> str:
    """What cuobjdump says of the kernels in a file: cubin, shared library or fat binary."""
    return _run("cuobjdump", "--dump-resource-usage", path)


def elf_text(path: str) -> str:
    """The sections of the programs for GPUs in such a file, as cuobjdump prints them."""
    return _run("cuobjdump", "--dump-elf", path)


def _run(program: str, *arguments: str) -> str:
    """The output of one of NVIDIA's tools that Triton brings along."""
    from triton import knobs

    command = [getattr(knobs.nvidia, program).path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_cuda(asm: Mapping[str, Any], shared_bytes: int = 0) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = resource_usage(cubin.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = asm["ptx"]
    return Resources(
        registers=numbers["REG"],
        spilled_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=shared_bytes,
        scalar_registers=0,
        scalars_in_lanes=0,
        vector_loads=len(re.findall(r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64)", ptx)),
        vector_stores=len(re.findall(r"st\.global[\w.:]*\.(?:v4\.b32|v2\.b64)", ptx)),
        shuffles_in_loops=_in_loops(ptx, "shfl"),
    )


def _in_loops(ptx: str, instruction: str) -> int:
    """How often an instruction occurs between a label and a later jump back to it."""
    lines = ptx.splitlines()
    labels = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r"(\$L\w+):", line.strip()))}
    inside: set[int] = set()
    for number, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line)
        if jump and labels[jump[1]] < number:
            inside.update(range(labels[jump[1]], number))
    return sum(instruction in lines[number] for number in inside)


def read_hip(asm: Mapping[str, Any], shared_bytes: int = 0) -> Resources:
    text = asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", text)[0])

    return Resources(
        registers=number("vgpr_count"),
        spilled_bytes=max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count")),
        shared_bytes=max(shared_bytes, number("group_segment_fixed_size")),
        scalar_registers=number("sgpr_count"),
        scalars_in_lanes=number("sgpr_spill_count"),
        vector_loads=len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        vector_stores=len(re.findall(r"(?:global|buffer)_store_dwordx4", text)),
        shuffles_in_loops=None,
    )


def cuda_loops(cubin: bytes) -> list[Loop]:
    """The innermost loops of a kernel that load from global memory, in the order of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return parse_loops(_run("nvdisasm", "-c", file.name))


def hip_loops(text: str) -> list[Loop]:
    """The same of AMD's assembly, in vector instructions."""
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []  # (opcode, operands)
    for line in text.splitlines():
        if match := re.match(r"(\.LBB\w+):", line):
            labels[match[1]] = len(code)
        elif match := re.match(r"\s+([a-z]\w+)\s*(.*)", line):
            code.append((match[1], match[2]))
    jumps = [
        (labels[label], end + 1)
        for end, (opcode, operands) in enumerate(code)
        if opcode.startswith(("s_cbranch", "s_branch")) and labels.get(label := operands.split()[0], end + 1) <= end
    ]
    loops = []
    for first, last in _innermost(jumps):
        body = [opcode for opcode, _ in code[first:last]]
        loads = [opcode for opcode in body if opcode.startswith(("global_load", "buffer_load"))]
        if loads:
            loops.append(
                Loop(
                    instructions=sum(opcode.startswith("v_") for opcode in body),
                    arithmetic=sum(opcode.startswith(AMD_ARITHMETIC) for opcode in body),
                    special=sum(opcode.startswith(AMD_SPECIAL) for opcode in body),
                    loaded_bytes=sum(_amd_load_bytes(opcode) for opcode in loads),
                    masked=False,
                )
            )
    return loops


AMD_ARITHMETIC = tuple(
    f"v_{form}{name}" for form in ("", "pk_") for name in ("add_f", "sub_f", "mul_f", "fma", "mac_f")
)
AMD_SPECIAL = ("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_")


def _amd_load_bytes(opcode: str) -> int:
    if match := re.search(r"dwordx(\d)", opcode):
        return 4 * int(match[1])
    return 4 if "dword" in opcode else 2 if "short" in opcode or "16" in opcode else 1


def _innermost(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [
        span
        for span in sorted(set(spans))
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
LABEL = re.compile(r"(\.L\w+):")


def parse_loops(text: str) -> list[Loop]:
    """The same from the text of ``nvdisasm -c``."""
    labels: dict[str, int] = {}
    code: list[tuple[bool, str, str]] = []  # (under a condition, opcode, operands)
    for line in text.splitlines():
        if match := LABEL.match(line.strip()):
            labels[match[1]] = len(code)
        elif match := INSTRUCTION.search(line):
            code.append((bool(match[1]), match[2], match[3]))
    spans = []
    for end, (_, opcode, operands) in enumerate(code):
        target = re.search(r"`\((\.L\w+)\)", operands)
        if opcode.startswith("BRA") and target and labels.get(target[1], end + 1) <= end:
            spans.append((labels[target[1]], end + 1))
    loops = []
    for first, last in _innermost(spans):
        body = code[first:last]
        loads = [(masked, opcode) for masked, opcode, _ in body if opcode.startswith("LDG")]
        if loads:
            loops.append(
                Loop(
                    instructions=sum(opcode != "NOP" for _, opcode, _ in body),
                    arithmetic=sum(opcode.startswith(("FADD", "FMUL", "FFMA")) for _, opcode, _ in body),
                    special=sum(opcode.startswith("MUFU") for _, opcode, _ in body),
                    loaded_bytes=sum(_load_bytes(opcode) for _, opcode in loads),
                    masked=all(masked for masked, _ in loads),
                )
            )
    return loops


def _load_bytes(opcode: str) -> int:
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((sizes[part] for part in opcode.split(".")[1:] if part in sizes), 4)
