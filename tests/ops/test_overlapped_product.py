"""The delta's product beside a base: how it is cut, its definition, what other kernels make of it, and csrc/cuda's."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, assert_as_good, between, problem
from torch import Tensor

from coachhook_fast.ops import build_info, overlapped_product
from coachhook_fast.ops import gated_linear_cuda as cuda
from coachhook_fast.ops.overlapped_base import Base
from coachhook_fast.ops.overlapped_product import Cut, cut
from coachhook_fast.ops.reference import gated_linear as reference
from coachhook_fast.ops.reference.delta_product import delta_product
from coachhook_fast.ops.sketch import make_sketch

library = torch.ops.coachhook
ROOT = Path(__file__).resolve().parents[2]
GPT_J, GPT2_XL, SMOL = (4096, 16384), (1600, 6400), (576, 1536)
# tokens, r, d, slices: odd sizes, slices without a tile, more rows than a block takes
SIZES = (
    (17, 5, 64, 2),
    (129, 33, 72, 1),
    (300, 100, 6400, 4),
    (1025, 128, 1000, 8),
    (700, 250, 640, 2),
    (513, 112, 520, 4),
)


@pytest.mark.parametrize(
    ("tokens", "shape", "rows", "options", "expected"),
    [
        (64, GPT_J, 100, {}, None),
        (65, GPT_J, 100, {}, Cut(128, 8)),
        (256, GPT_J, 100, {}, Cut(256, 8)),
        (257, GPT_J, 100, {}, None),
        (2048, GPT_J, 100, {}, Cut(256, 4)),
        (2048, GPT_J, 112, {}, Cut(256, 4)),
        (2048, GPT_J, 113, {}, Cut(128, 8)),
        (2048, GPT_J, 129, {}, None),
        (2048, GPT_J, 100, {"lengths": True}, Cut(128, 8)),
        (128, GPT_J, 100, {"lengths": True}, Cut(128, 8)),
        (256, GPT_J, 100, {"lengths": True}, None),
        (2048, GPT_J, 128, {"sketched": True}, Cut(128, 8)),
        (128, GPT_J, 64, {"sketched": True}, None),
        (2048, GPT2_XL, 100, {}, Cut(256, 4)),
        (1024, GPT2_XL, 100, {}, None),  # over before the product is
        (8192, GPT2_XL, 100, {}, None),  # more than a round of tiles
        (2048, SMOL, 100, {}, None),
    ],
)
def test_where_it_pays(
    tokens: int, shape: tuple[int, int], rows: int, options: dict[str, bool], expected: Cut | None
) -> None:
    assert cut(tokens, *shape, rows, **({"lengths": False, "sketched": False} | options)) == expected


def test_nothing_is_cut_where_the_kernel_is_not() -> None:
    x, p = torch.randn(2048, 16384).bfloat16(), torch.randn(100, 16384).bfloat16()
    assert overlapped_product.cut_of(x, p, 4096, lengths=False, sketched=False) is None


def test_which_rows_the_copy_engine_brings() -> None:
    wide = torch.zeros(40, 72 + 8).bfloat16()
    assert overlapped_product._has_rows(wide[:, :72])
    for t in (wide[:, 1:65], wide[:, :71], wide.T, wide[:1, :72].expand(40, 72), wide.flatten()[:-4].view(-1, 4)):
        assert not overlapped_product._has_rows(t), t.stride()


@pytest.mark.parametrize(("tokens", "r", "d", "slices"), SIZES)
def test_the_slices_of_the_definition_are_the_whole(tokens: int, r: int, d: int, slices: int) -> None:
    x, p = torch.randn(tokens, d), torch.randn(r, d)
    values, lengths, counts = library.delta_product(x, p, 128, slices, True)
    assert values.shape == (slices * tokens, -(-r // 16) * 16)
    whole = values.view(slices, tokens, -1).double().sum(dim=0)
    torch.testing.assert_close(whole[:, :r], x.double() @ p.double().T, rtol=1e-4, atol=1e-3)
    assert not whole[:, r:].any()
    torch.testing.assert_close(lengths.double().sum(dim=0), x.double().square().sum(dim=1), rtol=1e-5, atol=1e-5)
    assert counts.tolist() == [0, 0]
    assert library.delta_product(x, p, 128, slices, False)[1].numel() == 0


@pytest.mark.parametrize("want", [False, True])
def test_opcheck(want: bool) -> None:
    x, p = torch.randn(40, 72), torch.randn(9, 72)
    torch.library.opcheck(library.delta_product.default, (x, p, 128, 2, want))


@contextmanager
def plain_base(x: Tensor, weight: Tensor, bias: Tensor | None, always: bool = False) -> Iterator[Base]:
    assert always
    yield Base(torch.nn.functional.linear(x, weight, bias))


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's: csrc/cuda's own tests are below")
@pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")
@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("kind", ["factored", "masked", "relative", "sketched", "sketched dense", "relative sketched"])
def test_decisions_and_corrections_follow_from_it(kind: str, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    asked: list[dict[str, Any]] = []

    def always_cut(x: Tensor, p: Tensor, m: int, **options: Any) -> Cut:
        asked.append({"rows": p.shape[0], **options})
        return Cut(128, slices)

    monkeypatch.setattr(overlapped_product, "cut_of", always_cut)
    monkeypatch.setattr(cuda, "overlapped_base", plain_base)
    monkeypatch.setattr(cuda, "decodes", lambda *arguments: False)
    monkeypatch.setattr(cuda, "EXACT", 0)
    x, weight, bias, U, B = problem(150, 72, 264, 40, torch.bfloat16, dense="dense" in kind)
    norm = reference.delta_norm(x, B)
    relative = "relative" in kind
    threshold = between(norm / reference.key_length(x) if relative else norm)
    sketch = make_sketch(B, 1e-9, rows=24) if "sketched" in kind else None
    options = {"gate": "relative" if relative else "calibrated"}
    if kind == "masked":
        options["mask"] = torch.arange(150) % 7 != 0
    exact = reference.gated_linear(
        *(None if part is None else part.double() for part in (x, weight, bias, U, B)), threshold, **options
    )
    plain = reference.gated_linear(x, weight, bias, U, B, threshold, **options)
    out, fire, _ = cuda.gated_linear(x, weight, bias, U, B, threshold, sketch, **options)
    rows = 40 if sketch is None else 24
    assert asked == [{"rows": rows, "lengths": relative, "sketched": sketch is not None}]
    assert torch.equal(fire, exact[1])
    assert 0 < int(fire.sum()) < 150
    assert_as_good(out, plain[0], exact[0])


# ------------------------------------------------------------------------------- csrc/cuda's


def runs_here() -> bool:
    return (
        torch.cuda.is_available()
        and bool(build_info().get("cuda"))
        and overlapped_product.EXTENSION.has_delta_product()
    )


needs_hopper = pytest.mark.skipif(not runs_here(), reason="needs compute capability 9.0 and csrc/cuda")


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize(("tokens", "r", "d", "slices"), [*SIZES, (2048, 100, 16384, 4), (5000, 16, 1536, 1)])
def test_the_kernel_is_the_definition(tokens: int, r: int, d: int, slices: int, block: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, d + 8, device="cuda").to(dtype)[:, :d]
    p = (torch.randn(r, d, device="cuda") / d**0.5).to(dtype)
    found = library.delta_product(x, p, block, slices, True)
    expected = delta_product(x.double().float(), p.double().float(), block, slices, True)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-3)
    assert found[2].tolist() == [0, 0]
    again = library.delta_product(x, p, block, slices, True)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert torch.equal(library.delta_product(x, p, block, slices, False)[0], found[0])


@pytest.mark.gpu
@needs_hopper
def test_wrong_arguments_are_named() -> None:
    x, p = torch.randn(40, 72, device="cuda").bfloat16(), torch.randn(9, 72, device="cuda").bfloat16()
    for arguments, error, says in (
        ((x.float(), p, 128, 1, False), TypeError, "x must be bf16 or fp16"),
        ((x, p.half(), 128, 1, False), TypeError, "p must be"),
        ((x[:, 1:65], p[:, :64], 128, 1, False), ValueError, "x must be"),
        ((x, p[:, :64], 128, 1, False), ValueError, "p must be"),
        ((x[:1].expand(40, 72), p, 128, 1, False), ValueError, "x must be"),
        ((x, p, 64, 1, False), ValueError, "block must be"),
        ((x, p, 128, 0, False), ValueError, "slices must be"),
    ):
        with pytest.raises(error, match=says):
            library.delta_product(*arguments)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("tokens", "shape"), [(128, (8192, 4096)), (2048, (8192, 4096)), (2048, GPT2_XL)])
def test_a_graph_takes_it(tokens: int, shape: tuple[int, int], relative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Cut] = []
    project = overlapped_product.project

    def counted(x: Tensor, p: Tensor, where: Cut, **options: Any) -> Any:
        used.append(where)
        return project(x, p, where, **options)

    monkeypatch.setattr(overlapped_product, "project", counted)
    x, weight, bias, U, B = problem(tokens, *shape, 100, torch.bfloat16)
    norm = reference.delta_norm(x, B)
    threshold = between(norm / reference.key_length(x) if relative else norm)
    arguments = (x, weight, bias, U, B, threshold, None, "relative" if relative else "calibrated")
    eager = library.gated_linear(*arguments)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        library.gated_linear(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, fire, _ = library.gated_linear(*arguments)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert len(used) == 1
    assert torch.equal(fire, eager[1])
    torch.testing.assert_close(out, eager[0], rtol=0.02, atol=0.02 * float(eager[0].abs().max()))


# ptxas says so where the compiler has made the tensor cores wait for themselves
SERIAL = re.compile(r"wgmma.*serialized|[1-9]\d* bytes spill")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs CUDA's compiler")
def test_it_compiles_without_spills(tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++20", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin"]
    command += ["-I", str(ROOT / "csrc")]
    source = ROOT / "csrc" / "cuda" / "delta_product.cu"
    done = subprocess.run([*command, "-o", str(tmp_path / "out"), str(source)], capture_output=True, text=True)
    if "Unsupported gpu architecture" in done.stderr or "is not defined for option" in done.stderr:
        pytest.skip("this nvcc does not know sm_90a")
    assert done.returncode == 0, done.stderr
    assert "Compiling entry function" in done.stderr
    assert not SERIAL.findall(done.stderr)
