"""The Triton kernels of deformable attention against the published numbers and against the plain definition.

The checks run on CUDA where there is a GPU, and everywhere else through Triton's interpreter. The interpreter has to be
chosen before Triton is imported, so its checks run in a process of their own, this file as a program, and each reports
here as a test. What the interpreter cannot show is whether the kernels compile: they are compiled for a GPU too, which
needs none.
"""
from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cases import check, load_case, unchecked

from detr.deformable_attention import definition

HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="this PyTorch has no Triton")
SHAPES = [(5, 3), (1, 1)]
NAMES = ("output", "value", "locations", "weights")


def sample(*arguments) -> Tensor:
    from detr.deformable_triton import sample
    return sample(*arguments)


def inputs(batch=2, queries=5, heads=1, width=4, points=3, shapes=SHAPES, dtype=torch.float64, seed=0):
    """Value, locations (some off the image) and weights, leaves on the CPU."""
    torch.manual_seed(seed)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, width, dtype=dtype)
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2, dtype=dtype) * 1.6 - 0.3
    return value, locations, torch.randn(batch, queries, heads, len(shapes), points, dtype=dtype)


def run(function, device, value, locations, weights, shapes=SHAPES) -> list[Tensor]:
    """Output and gradients of value, locations and weights under a fixed incoming gradient, back on the CPU."""
    leaves = [x.detach().to(device).requires_grad_() for x in (value, locations, weights)]
    out = function(leaves[0], shapes, leaves[1], leaves[2])
    torch.manual_seed(7)
    direction = torch.randn(out.shape, dtype=torch.float64).to(out)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, direction))]


def agree(device, arguments, shapes=SHAPES, relative=1e-11):
    """Kernels and definition, which computes in float64 whatever it is given; errors relative to the largest value."""
    actual = run(sample, device, *arguments, shapes)
    expected = run(definition, "cpu", *(x.double() for x in arguments), shapes)
    for name, a, b, given in zip(NAMES, actual, expected, (arguments[0], *arguments)):
        assert a.dtype == given.dtype and a.shape == b.shape, name
        atol = relative * b.abs().max().item() if b.numel() else 0
        torch.testing.assert_close(a.double(), b, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def parity(bits, device):
    case = load_case("deformable_op")
    for configuration in case.spec["configurations"]:
        name, shapes = configuration["name"], [tuple(level) for level in configuration["levels"]]
        names = ("value", "sampling_locations", "attention_weights")
        given = [case.expected[f"{name}.in64.{x}"].to(device, getattr(torch, f"float{bits}")) for x in names]
        leaves = [x.requires_grad_() for x in given]
        out = sample(leaves[0], shapes, leaves[1], leaves[2])
        direction = case.expected[f"{name}.in64.grad_output"].to(out)
        grads = torch.autograd.grad(out, leaves, direction)
        for entry, actual in ((f"{name}.output{bits}", out),
                              *((f"{name}.grad{bits}.{x}", grad) for x, grad in zip(names, grads))):
            check(case, entry, actual, **case.spec["expected"][entry]["tolerance"])
    assert not [x for x in unchecked(case) if str(bits) in x and ".in64." not in x]


def sizes(change, device):
    agree(device, inputs(**change), change.get("shapes", SHAPES))


def nothing_to_do(change, device):
    arguments = inputs(**change)
    out, *grads = run(sample, device, *arguments)
    assert out.shape == (arguments[1].shape[0], arguments[1].shape[1], 4)
    assert all(a.shape == b.shape and (a == 0).all() for a, b in zip(grads, arguments))


def low_precision(dtype, device):
    value, locations, weights = inputs(width=16, dtype=torch.float32)
    agree(device, (value.to(dtype), locations, weights.to(dtype)), relative=1e-2)


def mixed_types(device):
    """A float32 value with float64 locations is summed in float64; float64 weights alone change none but their own."""
    value, locations, weights = inputs(dtype=torch.float32)
    agree(device, (value, locations.double(), weights), relative=1e-6)
    agree(device, (value, locations, weights.double()), relative=1e-5)


def many_small_terms(device):
    """A 16-bit sum of a thousand equal terms would stop growing long before the end."""
    value, locations, weights = torch.ones(1, 1, 1, 2), torch.full((1, 64, 1, 1, 16, 2), 0.5), torch.ones(1, 64, 1, 1, 16)
    leaf = value.to(device, torch.bfloat16).requires_grad_()
    sample(leaf, [(1, 1)], locations.to(device), weights.to(device)).sum().backward()
    assert leaf.grad.dtype == torch.bfloat16 and (leaf.grad == 1024).all()


def far_points(device):
    value, locations, weights = inputs(dtype=torch.float32)
    locations[0, ::2] = torch.tensor([1e9, 0.5])
    locations[0, 1::2] = torch.tensor([-1e30, 1e30])
    agree(device, (value, locations, weights), relative=1e-5)
    assert (run(sample, device, value, locations, weights)[0][0] == 0).all()


def not_numbers(device):
    """NaN and infinite points give NaN to their own rows, as in the definition, and touch no pixel's gradient."""
    value, locations, weights = inputs()
    locations[0, 1, 0, 0, 0, 0], locations[1, 2, 0, 1, 1, 1] = float("nan"), float("inf")
    out, grad_value, *_ = run(sample, device, value, locations, weights)
    expected, expected_grad_value, *_ = run(definition, "cpu", value, locations, weights)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().sum() == 2 * value.shape[-1]
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(grad_value, expected_grad_value)


def not_contiguous(device):
    value, locations, weights = inputs(heads=2)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (value, locations, weights)]
    strided[1] = locations.flip(-1).contiguous().flip(-1).transpose(3, 4).contiguous().transpose(3, 4)
    assert not any(x.is_contiguous() for x in strided)
    leaves = [x.to(device).requires_grad_() for x in strided]
    assert not any(x.is_contiguous() for x in leaves)
    out = sample(leaves[0], SHAPES, leaves[1], leaves[2])
    grads = torch.autograd.grad(out.sum(), leaves)                              # a gradient without strides of its own
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    expected = definition(leaves[0], SHAPES, leaves[1], leaves[2])
    for a, b in zip((out, *grads), (expected, *torch.autograd.grad(expected.sum(), leaves))):
        torch.testing.assert_close(a.cpu(), b, atol=1e-11, rtol=0)


def wanted_gradients(device):
    arguments = inputs(batch=1)
    _, *expected = run(definition, "cpu", *arguments)
    for wanted in range(1, 8):
        leaves = [x.detach().to(device).requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(arguments)]
        out = sample(leaves[0], SHAPES, leaves[1], leaves[2])
        torch.manual_seed(7)
        out.backward(torch.randn(out.shape, dtype=torch.float64).to(out))
        for i, (leaf, grad) in enumerate(zip(leaves, expected)):
            assert (leaf.grad is not None) == bool(wanted >> i & 1)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad.cpu(), grad, atol=1e-11, rtol=0)


def images_alone(device):
    value, locations, weights = (x.to(device) for x in inputs(batch=3, dtype=torch.float32))
    together = sample(value, SHAPES, locations, weights)
    for i in range(3):
        assert torch.equal(together[i:i + 1], sample(value[i:i + 1], SHAPES, locations[i:i + 1], weights[i:i + 1]))


def only_once(device):
    leaves = [x.to(device).requires_grad_() for x in inputs(batch=1)]
    out = sample(leaves[0], SHAPES, leaves[1], leaves[2])
    grad, = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def told_when_not_deterministic(device):
    value, locations, weights = (x.to(device) for x in inputs(batch=1))
    torch.use_deterministic_algorithms(True)
    try:
        sample(value, SHAPES, locations.requires_grad_(), weights).sum().backward()     # nothing atomic about this one
        out = sample(value.requires_grad_(), SHAPES, locations, weights).sum()
        with pytest.raises(RuntimeError, match="warn_only=True"):
            out.backward(retain_graph=True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="gradient of deformable attention's value"):
            out.backward()
    finally:
        torch.use_deterministic_algorithms(False)


def shapes_that_do_not_match(device):
    value, locations, weights = (x.to(device) for x in inputs(heads=2))
    for wrong in ((value[:, 1:], locations, weights), (value[:1], locations, weights), (value, locations[:, :3], weights),
                  (value[:, :, :1], locations, weights), (value, locations[..., :1], weights)):
        with pytest.raises(ValueError, match=r"they should be \[B, S, M, D / M\]"):
            sample(wrong[0], SHAPES, *wrong[1:])


CHECKS: dict[str, Callable[[str], None]] = {
    "parity in float32": functools.partial(parity, 32),
    "parity in float64": functools.partial(parity, 64),
    **{f"sizes {change}": functools.partial(sizes, change) for change in (
        {"width": 5}, {"width": 16, "queries": 9, "batch": 1}, {"width": 32, "points": 4}, {"width": 48, "points": 1},
        {"heads": 3, "width": 1, "batch": 1}, {"shapes": [(1, 1)], "batch": 1, "queries": 1},
        {"shapes": [(1, 9), (6, 1), (3, 3), (2, 2), (4, 5)], "points": 5, "heads": 2})},
    **{f"nothing in {change}": functools.partial(nothing_to_do, change) for change in ({"batch": 0}, {"queries": 0})},
    "bfloat16": functools.partial(low_precision, torch.bfloat16),
    "float16": functools.partial(low_precision, torch.float16),
    **{check.__name__.replace("_", " "): check for check in (
        mixed_types, many_small_terms, far_points, not_numbers, not_contiguous, wanted_gradients, images_alone, only_once,
        told_when_not_deterministic, shapes_that_do_not_match)},
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """What became of each check in the interpreter: None, or its traceback."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name, interpreted):
    if interpreted[name] is not None:
        pytest.fail(interpreted[name], pytrace=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CHECKS)
def test_on_cuda(name):
    CHECKS[name]("cuda")


def compile_for(capability, kernel, kind, width, absent=()):
    """Compile a kernel for an NVIDIA GPU of this compute capability: types and constants as ``launch`` hands them over,
    value and outputs of type ``kind``, two levels, four points; gradients named in ``absent`` are None."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    exact = "fp64" if kind == "fp64" else "fp32"
    pointers = {"levels": "i32", "locations": exact, "weights": exact, "grad_locations": exact, "grad_weights": exact,
                "value": kind, "out": kind, "grad_out": kind, "grad_value": exact}
    constants = {"WIDTH": width, "LEVELS": 2, "POINTS": 4, "EXACT": tl.float64 if kind == "fp64" else tl.float32,
                 "BLOCK_P": 4, "BLOCK_D": triton.next_power_of_2(width), "BLOCK_Q": 8, **dict.fromkeys(absent)}
    names = kernel.arg_names
    types = {name: "*" + pointers[name] if name in pointers else "i32" for name in names if name not in constants}
    aligned = [i for i, name in enumerate(names) if name in pointers and name in types]
    if "constexprs" in inspect.signature(ASTSource.__init__).parameters:
        source = ASTSource(kernel, {name: types.get(name, "constexpr") for name in names},
                           {(i,): constants[name] for i, name in enumerate(names) if name in constants},
                           {(i,): [["tt.divisibility", 16]] for i in aligned})
    else:                                                                       # Triton 3.2, which comes with PyTorch 2.6
        from triton.backends.compiler import AttrsDescriptor
        source = ASTSource(kernel, types, constants, AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16)))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": 4, "enable_fp_fusion": True})


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """The module of the kernels, where Triton can compile them for NVIDIA GPUs; nothing is cached elsewhere."""
    pytest.importorskip("triton.backends.nvidia", reason="this Triton does not compile for NVIDIA GPUs")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from detr import deformable_triton
    if deformable_triton.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set, so nothing is compiled")
    return deformable_triton


@pytest.mark.parametrize("kind, width, load", [("fp32", 32, "v4.b32"), ("bf16", 32, "v4.b32"), ("fp32", 5, "b32"),
                                               ("fp64", 32, "v2.b64")])
def test_the_forward_kernel_compiles(kernels, kind, width, load):
    """The pixels of 32 channels come in loads of 16 bytes a thread."""
    assert f"ld.global.{load}" in compile_for(90, kernels.forward_kernel, kind, width).asm["ptx"]


@pytest.mark.parametrize("kind, width, absent", [("fp32", 32, ()), ("bf16", 32, ("grad_locations", "grad_weights")),
                                                 ("fp32", 5, ("grad_value",))])
def test_the_backward_kernel_compiles(kernels, kind, width, absent):
    """Its one atomic operation is there when the gradient of value is wanted, in float32, and not otherwise."""
    assembly = compile_for(90, kernels.backward_kernel, kind, width, absent).asm["ptx"]
    atomic = re.findall(r"(?:atom|red)\.\S*add\S*", assembly)
    assert bool(atomic) == ("grad_value" not in absent) and all("f32" in x for x in atomic)


def test_on_the_cpu(kernels):
    """Without the interpreter there is nothing that could run there."""
    with pytest.raises(ValueError, match="value is on cpu.* use path cpu or definition"):
        kernels.sample(inputs()[0], SHAPES, *inputs()[1:])


if __name__ == "__main__":
    results: dict[str, str | None] = {}
    for name, check_it in CHECKS.items():
        try:
            check_it("cpu")
            results[name] = None
        except (Exception, pytest.fail.Exception):
            results[name] = traceback.format_exc()
    print(json.dumps(results))
