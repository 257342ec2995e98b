"""Kernels compiled for GPUs that are not here: tensor cores, spills, shared memory, atomics in their machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from align.kernels.triton.compile import SHARED_LIMIT, MachineCode, instructions, machine_code, matrix_loops
from featstore.errors import SpecError

SASS = """
        /*0000*/                   STL [R1], R2 ;                      /* 0x0 */
        /*0010*/                   LDL R2, [R1] ;                      /* 0x0 */
        /*0020*/                   FADD R1, R2, R3 ;                   /* 0x0 */
        /*0030*/              @P0  BRA 0x20 ;                          /* 0x0 */
        /*0040*/                   HMMA.16816.F32.BF16 R4, R5, R6, R7 ; /* 0x0 */
        /*0050*/                   STL [R1+0x4], R9 ;                  /* 0x0 */
        /*0060*/              @!P1 BRA `(.L_x_1) ;                     /* 0x0 */
        /*0070*/             @!P0  BRA.U !UP0, 0x40 ;                  /* 0x0 */
        /*0080*/                   RED.E.ADD.F32 [R2], R3 ;            /* 0x0 */
        /*0090*/                   BRA 0x40 ;                          /* 0x0 */
"""

#: What the process without TRITON_INTERPRET does: every kernel with the constants of `launch`, counts as JSON.
GATE = """
import json
from dataclasses import asdict
from align.kernels.triton.compile import compile_kernel
from align.kernels.triton.gram_panel import gram_panel, gram_panel_pointers
from align.kernels.triton.launch import BM, BN
from align.kernels.triton.xcov_fro import xcov_fro, xcov_fro_pointers

TYPE, STEP = "bf16", 64
NAMES = {"norms": "*fp32", "panel": "*fp32", "row_sums": "*fp32", "column_sums": "*fp32", "sums": "*fp32",
         "order": "*i32", "ends": "*i32", "factor": "fp32", "shift": "fp32"}

def code(kernel, capability, stages, **constants):
    constants |= {"BM": BM, "BN": BN, "BK": STEP}
    operands = {"a": BM, "b": BN} if "a" in kernel.arg_names else {"x": BM, "y": BN}
    pointers = kernel.__name__.endswith("_pointers")
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in operands:
            signature[name] = f"*{TYPE}" if pointers else f"tensordesc<{TYPE}[{operands[name]},{STEP}]>"
        else:
            signature[name] = NAMES.get(name, "i32")
    found = compile_kernel(kernel, signature, constants, capability=capability, num_warps=8, num_stages=stages,
                           multiples=("stride", "stride_x", "stride_y"))
    return asdict(found)

print(json.dumps({
    "gram_panel linear": code(gram_panel, 90, 3, RBF=False, TS=4096),
    "gram_panel rbf": code(gram_panel, 90, 4, RBF=True, TS=4096),
    "xcov_fro": code(xcov_fro, 90, 4, SELF=False),
    "xcov_fro self": code(xcov_fro, 90, 4, SELF=True),
    "gram_panel_pointers linear": code(gram_panel_pointers, 80, 3, RBF=False, TS=4096),
    "gram_panel_pointers rbf": code(gram_panel_pointers, 80, 3, RBF=True, TS=4096),
    "xcov_fro_pointers": code(xcov_fro_pointers, 80, 3, SELF=False),
}))
"""
FAST = ("gram_panel linear", "gram_panel rbf", "xcov_fro", "xcov_fro self")
PLAIN = ("gram_panel_pointers linear", "gram_panel_pointers rbf", "xcov_fro_pointers")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, MachineCode]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", GATE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {name: MachineCode(**found) for name, found in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("name", FAST)
@pytest.mark.thorough
def test_sm_90_multiplies_with_warp_groups(compiled, name):
    code = compiled[name]
    assert code.hgmma > 0
    assert code.hmma == 0
    assert code.shared <= SHARED_LIMIT[90]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.thorough
def test_sm_80_multiplies_on_tensor_cores(compiled, name):
    code = compiled[name]
    assert code.hmma > 0
    assert code.hgmma == 0
    # Also that of sm_86, sm_89 and sm_120, which take the same kernels.
    assert code.shared <= 99 * 1024 < SHARED_LIMIT[80]


@pytest.mark.parametrize("name", FAST + PLAIN)
@pytest.mark.thorough
def test_no_spills_in_the_loop_and_no_atomics(compiled, name):
    code = compiled[name]
    assert code.loop_local == 0
    assert code.atomics == 0
    assert 0 < code.registers <= 255


def test_reading_machine_code():
    """Spills outside the matrix loop do not count, nor the loop without products, nor the outer loop."""
    assert instructions(SASS)[3] == (0x30, "@P0  BRA 0x20")
    assert matrix_loops(instructions(SASS)) == [(0x40, 0x70)]
    found = machine_code(SASS, shared=1, registers=2)
    assert found == MachineCode(hgmma=0, hmma=1, loop_local=1, atomics=1, shared=1, registers=2)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(SpecError, match="no machine instructions"):
        instructions("nothing")
    with pytest.raises(SpecError, match="no loop of this kernel"):
        machine_code(SASS.replace("HMMA", "FFMA"), shared=0, registers=0)
