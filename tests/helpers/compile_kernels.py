"""Compiles kernels with their largest tiles, as they are launched; prints what each needs.

That is bytes of shared memory, and bytes of registers that do not fit and are kept in memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_adapm.moments.quantized import BLOCK
from lightning_adapm.step import averages, moves, newton_schulz, orthogonal, reading, triton_kernels

SCALARS = dict.fromkeys(
    (
        "one beta1 scale correction eps beta2 lr decay clip step count largest flush share alpha beta gamma diagonal"
    ).split(),
    "fp32",
)
COMMON = {
    "GRAD": tl.float32,
    "FACTOR": tl.bfloat16,
    "ALIGNED": True,
    "COLUMNS": True,
    "SPLIT": False,
    "ABSOLUTE": False,
    "RESULT": tl.bfloat16,
    "SCALED": False,
}
MOVED = dict.fromkeys(("PARAMETER", "DIRECTION", "AVERAGE"), tl.float32) | {
    "RIGHT": tl.bfloat16,
    "GROUPED": False,
    "EVEN": True,
    "CHECKED": True,
    "AVERAGED": False,
    "SPAN": 0,
    "CLAMP": True,
    "FACTORS": True,
    "FITTED": False,
    "STOCHASTIC": False,
    "RATED": False,
    "CLOCKED": True,
    "BLOCK_K": 32,
    "HELD": 0,
    "STAGES": 1,
}
READ = {"grads": "*i64", "bases": "*i64", "projected": "*fp32", "squares": "*fp32", "flaws": "*i32"} | {"sums": "*fp32"}
SUM_SQUARES = {"grads": "*i64", "squares": "*fp32", "sums": "*fp32", "flaws": "*i32"}
COMBINE = {"grads": "*i64", "weights": "*bf16", "flaws": "*i32", "combined": "*fp32"}
MOVE = dict.fromkeys(("parameters", "directions", "averages", "rights", "streams", "scales"), "*i64") | {
    "flaws": "*i32",
    "left": "*bf16",
    "root_columns": "*fp32",
    "root_left": "*fp32",
    "root_rights": "*i64",
    "rates": "*fp32",
    "clock": "*fp32",
}


ADVANCE = {"projected": "*fp32", "squares": "*fp32", "flaws": "*i32", "lefts": "*i64", "averages": "*i64"} | {
    "moved": "*fp32",
    "factors": "*bf16",
    "lengths": "*fp32",
    "roots": "*fp32",
    "clock": "*fp32",
}
DIRECT = dict.fromkeys(("grads", "averages", "rights"), "*i64") | {
    "left": "*bf16",
    "flaws": "*i32",
    "found": "*bf16",
    "factors": "*fp32",
    "sizes": "*fp32",
}
TILES = "left_tiles", "right_tiles", "added_tiles", "found_tiles", "lost_tiles"
SYMMETRIC = dict.fromkeys(("left", "right", "added", "other", "found", "lost", *TILES), "*bf16") | {"factors": "*fp32"}
ROUNDED = {"PARAMETER": tl.float16, "DIRECTION": tl.float16, "STOCHASTIC": True}
ADVANCED = {"LEFT": tl.float16, "REFRESHED": True, "MEASURED": True, "BLOCKS": True, "SHARED": True}


def needed(kernel, pointers, constants, tile, capability):
    """Bytes of shared memory and of spilled registers, where everything is aligned."""
    rows, columns, warps, stages = tile
    constants = COMMON | MOVED | {"BLOCK_M": rows, "BLOCK_N": columns} | constants
    types = SCALARS | pointers
    signature = {p.name: "constexpr" if p.is_constexpr else types.get(p.name, "i32") for p in kernel.params}
    fixed = {(p.num,): constants[p.name] for p in kernel.params if p.is_constexpr}
    whole = [p for p in kernel.params if not p.is_constexpr and types.get(p.name) != "fp32"]
    aligned = {(p.num,): [["tt.divisibility", 16]] for p in whole}
    source = ASTSource(fn=kernel, constexprs=fixed, signature=signature, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"shared": compiled.metadata.shared, "spilled": spilled(compiled.asm["cubin"])}


def spilled(binary):
    """Bytes of each thread's stack, as the tool that comes with Triton finds them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        found = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return max(map(int, re.findall(r"STACK:(\d+)", found.stdout)))


def main():
    capability = int(sys.argv[1])
    read = {"BASIS": tl.bfloat16, "FIRST": True, "PROJECT": True, "BLOCK_R": reading.RANKS, "MORE_R": 0}
    elementwise, block = ({"FACTORED": False, "DENSE": not each, "ELEMENTWISE": each} for each in (True, False))
    rows = averages.MOST_ROWS_OF_A_HEAD
    advanced = ADVANCED | {"LOW_RANK": True, "BLOCK_R": averages.ADVANCED_NUMEL // rows}
    averaged = block | {"AVERAGED": True, "AVERAGE": tl.float16, "FACTORS": False}
    exactly = {"SPLIT": True, "ABSOLUTE": True, "BLOCK_R": reading.RANKS}
    fitted = elementwise | {"ELEMENTWISE": False, "FITTED": True, "CLAMP": False, "RIGHT": tl.float32}
    found = {
        "advance": needed(triton_kernels.advance, ADVANCE, advanced, (rows, 0, 4, 3), capability),
        "advance, many rows": needed(
            triton_kernels.advance, ADVANCE, ADVANCED | {"LOW_RANK": False, "BLOCK_R": 16}, (1024, 0, 4, 3), capability
        ),
        "read": needed(triton_kernels.read, READ, read, reading.PROJECT, capability),
        "sum_squares": needed(
            triton_kernels.sum_squares,
            SUM_SQUARES,
            {"FIRST": True, "STAGES": reading.SUM_SQUARES[3]},
            reading.SUM_SQUARES,
            capability,
        ),
        "combine": needed(triton_kernels.combine, COMBINE, {"BLOCK_R": reading.RANKS}, reading.COMBINE, capability),
        "read, exactly": needed(
            triton_kernels.read,
            READ,
            read | exactly | {"BASIS": tl.float32, "COLUMNS": False},
            reading.READ_EXACTLY,
            capability,
        ),
        "combine, exactly": needed(
            triton_kernels.combine, COMBINE | {"weights": "*fp32"}, exactly, reading.COMBINE_EXACTLY, capability
        ),
        "move, fitted": needed(
            triton_kernels.move, MOVE | {"left": "*fp32", "roots": "*i64"}, fitted, moves.MOVE_FITTED, capability
        ),
        "move": needed(triton_kernels.move, MOVE | {"roots": "*fp32"}, block, moves.MOVE_ALONG, capability),
        "move, full": needed(triton_kernels.move, MOVE | {"roots": "*fp32"}, averaged, moves.MOVE, capability),
        "move, rounded": needed(
            triton_kernels.move, MOVE | {"roots": "*fp32"}, averaged | ROUNDED, moves.MOVE, capability
        ),
        "move along, rounded": needed(
            triton_kernels.move,
            MOVE | {"roots": "*fp32"},
            block | ROUNDED | {"PARAMETER": tl.bfloat16},
            moves.MOVE_ALONG,
            capability,
        ),
        "move, full in eight bits": needed(
            triton_kernels.move,
            MOVE | {"roots": "*fp32"},
            averaged | ROUNDED | {"AVERAGE": tl.int8, "SPAN": BLOCK},
            moves.MOVE_CODES,
            capability,
        ),
        "direct": needed(triton_kernels.direct, DIRECT, {}, orthogonal.DIRECT_ALONG, capability),
        "direct, scaled": needed(
            triton_kernels.direct,
            DIRECT | {"found": "*fp16"},
            {"RESULT": tl.float16, "SCALED": True},
            orthogonal.DIRECT_ALONG,
            capability,
        ),
        "direct, full": needed(triton_kernels.direct, DIRECT, averaged, orthogonal.DIRECT, capability),
        "symmetric": needed(
            triton_kernels.symmetric,
            SYMMETRIC,
            {"ADDED": True, "OTHER": True, "LOST": True, "DESCRIBED": False, "TRANSPOSED": False}
            | {"PRODUCT_POWER": 1, "ADDED_POWER": 1, "OTHER_POWER": 1, "DIAGONAL_POWER": 1}
            | {"BLOCK_K": newton_schulz.SMALL_SYMMETRIC[2]},
            (*newton_schulz.SMALL_SYMMETRIC[:2], *newton_schulz.SMALL_SYMMETRIC[3:]),
            capability,
        ),
        "move, elementwise": needed(
            triton_kernels.move, MOVE | {"roots": "*i64"}, elementwise, moves.MOVE_ALONG_ELEMENTWISE, capability
        ),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
