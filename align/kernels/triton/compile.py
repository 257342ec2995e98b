"""Kernels compiled for a GPU that need not be there, and what their machine code does.

``triton.compile`` needs a target, not a device; the wheel carries ``cuobjdump``. So whether a kernel reaches the tensor
cores of a target, spills registers inside its matrix loop, fits the shared memory or uses atomics is decided, and
tested, without a GPU. Not in a process where TRITON_INTERPRET is set: there kernels are Python functions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from featstore.errors import MissingPackageError, SpecError

#: Instructions that multiply matrices: warp groups (sm_90) and warps (sm_80).
_MATRIX = re.compile(r"\b(HGMMA|HMMA|QGMMA|IMMA)\b")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:[^;]*?\s)?`?\(?0x([0-9a-f]+)")
#: Shared memory of one program, bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class MachineCode:
    """What a compiled kernel consists of.

    Attributes:
        hgmma: Warp-group matrix products (sm_90).
        hmma: Warp matrix products (sm_80).
        loop_local: Loads and stores of local memory (spills) inside the loops that hold matrix products.
        atomics: Atomic operations and reductions on memory.
        shared: Shared memory, bytes.
        registers: Registers of a thread.
    """

    hgmma: int
    hmma: int
    loop_local: int
    atomics: int
    shared: int
    registers: int


def instructions(sass: str) -> list[tuple[int, str]]:
    """Address and text of every instruction in the output of ``cuobjdump -sass``.

    Args:
        sass: Its text.

    Raises:
        SpecError: There are none.
    """
    found = [(int(m[1], 16), m[2].strip()) for line in sass.splitlines() if (m := _INSTRUCTION.match(line))]
    if not found:
        raise SpecError("no machine instructions: give the output of `cuobjdump -sass` for one kernel")
    return found


def matrix_loops(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last address of every innermost loop that multiplies matrices.

    A loop is what lies between the target of a backward branch and the branch.

    Args:
        code: From :func:`instructions`.
    """
    loops = []
    for address, text in code:
        branch = _BRANCH.search(text)
        if branch and int(branch[1], 16) < address:
            first = int(branch[1], 16)
            if any(first <= at <= address and _MATRIX.search(line) for at, line in code):
                loops.append((first, address))
    return [
        (first, last)
        for first, last in loops
        if not any((f, e) != (first, last) and first <= f and e <= last for f, e in loops)
    ]


def machine_code(sass: str, *, shared: int, registers: int) -> MachineCode:
    """Count what matters in the disassembly of one kernel.

    Args:
        sass: Output of ``cuobjdump -sass``.
        shared: Shared memory, bytes.
        registers: Registers of a thread.

    Raises:
        SpecError: There are no instructions, or no loop multiplies matrices.
    """
    code = instructions(sass)
    loops = matrix_loops(code)
    if not loops:
        raise SpecError("no loop of this kernel multiplies matrices on the tensor cores; see its operand types")

    def count(pattern: str, only: list[tuple[int, int]] | None = None) -> int:
        inside = (text for at, text in code if only is None or any(a <= at <= b for a, b in only))
        return sum(bool(re.search(pattern, text)) for text in inside)

    return MachineCode(
        hgmma=count(r"\bHGMMA\b"),
        hmma=count(r"\bHMMA\b"),
        loop_local=count(r"\b(LDL|STL)\b", loops),
        atomics=count(r"\b(ATOM|ATOMG|ATOMS|RED|REDG)\b"),
        shared=shared,
        registers=registers,
    )


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    capability: int,
    num_warps: int,
    num_stages: int,
    multiples: Collection[str] = (),
) -> MachineCode:
    """Compile a kernel for a GPU and read its machine code.

    Pointers are taken to be aligned to 16 bytes, as PyTorch's allocations are.

    Args:
        kernel: A ``triton.jit`` function.
        signature: Argument to type, such as ``*fp32``, ``i32``, ``tensordesc<bf16[128,64]>``; constants too, as
            ``constexpr``.
        constants: Values of the constants.
        capability: 80 or 90.
        num_warps: Warps of a program.
        num_stages: Depth of the pipeline of loads.
        multiples: Numbers that are multiples of 16; of the others nothing is assumed.

    Raises:
        MissingPackageError: triton is missing, or runs as an interpreter.
        SpecError: No loop of the kernel multiplies matrices.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.tools.disasm import path_to_cuobjdump
    except ImportError as error:
        raise MissingPackageError("compiling kernels needs triton: pip install 'featstore[models]'") from error
    if not isinstance(kernel, triton.JITFunction):
        raise MissingPackageError("triton interprets its kernels here: unset TRITON_INTERPRET and start again")
    aligned = [k for k, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name in multiples]
    attributes = {(k,): [["tt.divisibility", 16]] for k in aligned}
    source = ASTSource(fn=kernel, signature=dict(signature), constexprs=dict(constants), attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    sass = _disassemble(path_to_cuobjdump(), compiled.asm["cubin"])
    registers = max((int(r) for r in re.findall(r"\bREG:(\d+)", sass)), default=0)
    return machine_code(sass, shared=int(compiled.metadata.shared), registers=registers)


def _disassemble(tool: str, cubin: bytes) -> str:
    import subprocess
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        return "".join(
            subprocess.run([tool, option, str(path)], check=True, capture_output=True, text=True).stdout
            for option in ("-sass", "-res-usage")
        )
