"""Every kernel compiled ahead of time for sm_80, sm_90 and sm_100: no spills, shared memory within the machine's.

The compiler must not see TRITON_INTERPRET, so this file runs itself in another process and reads its JSON.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.slow  # compiling the kernels is its set-up

CAPABILITIES = (80, 90, 100)
# Bytes of shared memory a block may ask for (CUDA programming guide, technical specifications).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}


def cases() -> list[dict[str, Any]]:
    """Specialisations that the launchers ask for: kernel, dtype, constants, strides that are one.

    bf16 in full; fp16 compiles to the same code with another instruction, fp32 has its own tile sizes.
    """
    import torch

    from coachhook_fast.kernels import decode, delta_norm, gate, listed

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    entries: list[dict[str, Any]] = []

    def add(kernel: str, dtype: str, ones: str, **constants: Any) -> None:
        entries.append({"kernel": kernel, "dtype": dtype, "ones": ones.split(), "constants": constants})

    for dtype, tokens, r, length in (
        *(("bf16", tokens, r, False) for tokens in (64, 512, 2048) for r in (10, 100, 1000)),
        *(("bf16", tokens, 100, True) for tokens in (512, 2048)),
        ("fp16", 2048, 100, False),
        ("fp32", 2048, 100, True),
    ):
        for capability in CAPABILITIES:
            config = delta_norm.blocks(dtypes[dtype], tokens, r, capability)
            add("delta_norm.project_kernel", dtype, "p_col", HAS_LENGTH=length, SPLIT=8, GROUP=8, **config)
            entries[-1]["capabilities"] = [capability]
    for dtype, split in (("bf16", 4), ("bf16", 16), ("fp16", 4), ("fp32", 4)):
        for older in (True, False):
            config = listed.blocks(dtypes[dtype], 80 if older else 90)
            capabilities = [cc for cc in CAPABILITIES if older == (cc < 90)]
            add("listed.listed_kernel", dtype, "p_col", SPLIT=split, **config)
            entries[-1]["capabilities"] = capabilities
    for dtype, tokens, n, mapped in (
        ("bf16", 512, 10, True),
        ("bf16", 512, 100, False),
        ("bf16", 2048, 128, True),
        ("bf16", 2048, 1000, True),
        ("fp16", 2048, 100, False),
        ("fp32", 512, 20, False),
        ("fp32", 2048, 100, True),
    ):
        config = gate.correct_blocks(dtypes[dtype], tokens, n)
        flags = {"MAPPED": mapped, "CAST_X": dtype != "fp32", "ONE_BLOCK": n <= config["BLOCK_D"]}
        add("gate.correct_kernel", dtype, "a_col", **flags, **config)
    off = dict.fromkeys(("FIRST_STAGE", "STORE_NORM", "KEEP", "ADD", "HAS_MASK", "LISTED"), False)
    off = {**off, "DECIDE": True, "LENGTHS": 0, "LISTED_BLOCK": 256}
    for c_row, flags in (
        (16, {"KEEP": True}),
        (112, {"KEEP": True}),
        (112, {"KEEP": True, "HAS_MASK": True, "LENGTHS": 16}),
        (112, {"DECIDE": False, "STORE_NORM": True}),
        (128, {"FIRST_STAGE": True}),
        (128, {"FIRST_STAGE": True, "HAS_MASK": True, "LENGTHS": 16}),
        (1008, {"LISTED": True, "KEEP": True, "LENGTHS": 1}),
        (1008, {"LISTED": True, "KEEP": True, "DECIDE": False}),
        (1600, {"LISTED": True, "ADD": True}),
        (4096, {"LISTED": True, "ADD": True}),
        (4096, {"ADD": True, "HAS_MASK": True}),
    ):
        ones = "tokens split" if flags.get("STORE_NORM") else "split" if flags.get("HAS_MASK") else ""
        config = gate.decide_blocks(c_row)
        one = {"ONE_BLOCK": c_row <= config["BLOCK_N"]}
        add("gate.decide_kernel", "bf16", ones, **{**off, **flags}, **one, **config)
    two_stage = {"FACTORED": True, "TWO_STAGE": True, "SEQUENCE": False, "HAS_MASK": False, "HAS_STATE": False}
    sequence = {"FACTORED": True, "TWO_STAGE": False, "SEQUENCE": True, "HAS_MASK": True, "HAS_STATE": True}
    dense = {"FACTORED": False, "TWO_STAGE": False, "SEQUENCE": False, "HAS_MASK": False, "HAS_STATE": False}
    each = {**two_stage, "TWO_STAGE": False, "PER_TOKEN": True}
    for dtype, tokens, flags in (
        *(("bf16", tokens, flags) for tokens in (16, 32, 64) for flags in (two_stage, each, sequence)),
        ("bf16", 16, {**each, "TWO_STAGE": True}),  # up to cuda.TWO_STAGE_DECODE_TOKENS only
        ("bf16", 16, dense),
        ("fp16", 64, two_stage),
        ("fp32", 32, each),
    ):
        config = decode.blocks(dtypes[dtype], tokens, lean=flags["TWO_STAGE"] and flags.get("PER_TOKEN", False))
        flags = {"HAS_BIAS": True, "SPLIT": 4, "CAST_C": dtype != "fp32", "PER_TOKEN": False, **flags}
        add("decode.decode_kernel", dtype, "w_col u_col", **flags, **config)
    for packed in (True, False):
        flags = {"HAS_MASK": True, "PACKED": packed, "HAS_STATE": True}
        add("sequence.sequence_kernel", "fp32", "", BLOCK=1024, num_warps=4, **flags)
    add("gate.list_kernel", "fp32", "", BLOCK=1024, num_warps=4)
    return entries


# Types of the pointers; every other argument is a constant or an int32.
VALUES = ("x", "w", "bias", "p", "out", "u", "b", "sketch", "a")
FLOATS = (
    "c",
    "sums",
    "partial",
    "threshold",
    "tau",
    "norm",
    "alpha",
    "before",
    "after",
    "z",
    "src",
    "values",
    "lengths",
)
INTEGERS = ("rows", "count", "counts", "places", "listed", "bounds", "counters")
BYTES = ("mask", "fire")


def compile_case(case: dict[str, Any], capability: int) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of one kernel on one machine."""
    import importlib
    import tempfile

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    module, name = case["kernel"].split(".")
    kernel = getattr(importlib.import_module(f"coachhook_fast.kernels.{module}"), name)
    constants = {key: value for key, value in case["constants"].items() if key not in ("num_warps", "num_stages")}
    constants.update(dict.fromkeys(case["ones"], 1))
    # gated_linear_cuda._delta lets kernels of the calibrated gate start early, where a factored delta has no sketch
    early = capability >= 90 and "EARLY" in kernel.arg_names
    early &= not any(constants.get(flag) for flag in ("FIRST_STAGE", "STORE_NORM", "LISTED", "ADD", "MAPPED"))
    if "EARLY" in kernel.arg_names:
        constants["EARLY"] = early
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        if argument in VALUES:
            kind = f"*{case['dtype']}"
        elif argument in FLOATS:
            kind = "*fp32"
        elif argument in INTEGERS:
            kind = "*i32"
        elif argument in BYTES:
            kind = "*i8"
        else:
            kind = "i32"
        signature[argument] = kind
        if kind[0] == "*" or argument in ("d", "m", "x_row", "w_row", "p_row", "u_row", "a_row", "src_row", "c_row"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {key: case["constants"][key] for key in ("num_warps", "num_stages") if key in case["constants"]}
    options["launch_pdl"] = early
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    version = [capability] if inspect.signature(get_ptxas).parameters else []  # Triton 3.5 has one for all
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        report = subprocess.run(
            [get_ptxas(*version).path, "-v", f"--gpu-name={arch}", str(ptx), "-o", f"{folder}/kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill", report))
    registers = max(int(number) for number in re.findall(r"Used (\d+) registers", report))
    waits = compiled.asm["ptx"].find("griddepcontrol.wait")
    first = {  # places in the PTX
        access: min(
            (found.start() for found in re.finditer(pattern, compiled.asm["ptx"])), default=len(compiled.asm["ptx"])
        )
        for access, pattern in (
            ("reads", r"\bld\.(\w+\.)*global|cp\.async"),
            ("writes", r"\b(st|atom|red)\.(\w+\.)*global"),
        )
    }
    shared = compiled.metadata.shared
    return {"spilled": spills, "registers": registers, "shared": shared, "waits": waits, **first}


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    # From another folder, without PYTHONPATH: the root's `kernels` would shadow transformers' package of that name.
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root.parent,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(
    not importlib.metadata.version("triton").startswith("3.6."), reason="tile sizes are chosen for Triton 3.6"
)
def test_nothing_spills(reports: list[dict[str, Any]]) -> None:
    assert len(reports) > 50
    assert [report for report in reports if report["spilled"]] == []


def test_shared_memory_fits(reports: list[dict[str, Any]]) -> None:
    assert [report for report in reports if report["shared"] > SHARED_LIMIT[report["capability"]]] == []


def test_what_starts_early_waits_before_it_touches_memory(reports: list[dict[str, Any]]) -> None:
    early = [report for report in reports if report["waits"] >= 0]
    assert {(report["kernel"], report["capability"]) for report in early} == {
        (f"{kernel}_kernel", capability)
        for kernel in ("delta_norm.project", "gate.decide", "gate.correct")
        for capability in (90, 100)
    }
    assert [report for report in early if report["writes"] < report["waits"]] == []
    # but U, which nothing under way writes
    assert {report["kernel"] for report in early if report["reads"] < report["waits"]} == {"gate.correct_kernel"}


if __name__ == "__main__":
    results = []
    for item in cases():
        for cc in item.get("capabilities", CAPABILITIES):
            results.append({**item, "capability": cc, **compile_case(item, cc)})
    print(json.dumps(results))
