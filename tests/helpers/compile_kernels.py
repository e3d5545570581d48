"""Compiles the kernels with the largest products, as they are launched; prints the shared memory that each needs."""

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_adapm.step import kernels, triton_kernels

SCALARS = dict.fromkeys(("one", "beta1", "scale", "correction", "eps", "beta2", "lr", "decay", "clip"), "fp32")
COMMON = {"GRAD": tl.float32, "FACTOR": tl.bfloat16, "ALIGNED": True, "BLOCK_R": 128}
MOVED = dict.fromkeys(("PARAMETER", "DIRECTION", "AVERAGE"), tl.float32) | {
    "RIGHT": tl.bfloat16,
    "CHECKED": True,
    "AVERAGED": False,
    "CLAMP": True,
    "FACTORS": True,
    "BLOCK_K": 32,
}
READ = {"grads": "*i64", "bases": "*i64", "projected": "*fp32", "squares": "*fp32", "flaws": "*i32"}
COMBINE = {"grads": "*i64", "weights": "*bf16", "flaws": "*i32", "combined": "*fp32"}
MOVE = dict.fromkeys(("parameters", "directions", "averages", "rights"), "*i64") | {
    "flaws": "*i32",
    "left": "*bf16",
    "root_columns": "*fp32",
}


def shared(kernel, pointers, constants, tile, capability):
    """Bytes of shared memory, where everything is aligned."""
    rows, columns, warps, stages = tile
    constants = COMMON | MOVED | constants | {"BLOCK_M": rows, "BLOCK_N": columns}
    types = SCALARS | pointers
    signature = {p.name: "constexpr" if p.is_constexpr else types.get(p.name, "i32") for p in kernel.params}
    fixed = {(p.num,): constants[p.name] for p in kernel.params if p.is_constexpr}
    whole = [p for p in kernel.params if not p.is_constexpr and types.get(p.name) != "fp32"]
    aligned = {(p.num,): [["tt.divisibility", 16]] for p in whole}
    source = ASTSource(fn=kernel, constexprs=fixed, signature=signature, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


def main():
    capability = int(sys.argv[1])
    read = {"BASIS": tl.bfloat16, "FIRST": True, "PROJECT": True}
    elementwise, block = ({"FACTORED": False, "DENSE": not each, "ELEMENTWISE": each} for each in (True, False))
    found = {
        "read": shared(triton_kernels.read, READ, read, kernels.PROJECT, capability),
        "combine": shared(triton_kernels.combine, COMBINE, {}, kernels.COMBINE, capability),
        "move": shared(triton_kernels.move, MOVE | {"roots": "*fp32"}, block, kernels.MOVE_ALONG, capability),
        "move, elementwise": shared(
            triton_kernels.move, MOVE | {"roots": "*i64"}, elementwise, kernels.MOVE_ALONG_ELEMENTWISE, capability
        ),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
