"""Deformable attention, its definition and its path for CPUs: the published numbers, a loop over points, and what must
not matter. The path for CUDA has a file of its own."""
import itertools
import math
import warnings

import pytest
import torch
from cases import check, load_case, unchecked

from detr import deformable_attention, deformable_cpu
from detr.deformable_attention import MSDeformAttn, choose_path, deformable_sampling
from detr.structures import FeatureLevels

CPU_PATHS = ("definition", "cpu")
SHAPES = [(6, 5), (1, 1), (3, 4)]
SIZES = [                                       # levels, batch, queries, heads, channels a head, points
    pytest.param(SHAPES, 2, 3, 2, 4, 2, id="fewer points than pixels"),
    pytest.param(SHAPES, 2, 40, 2, 4, 2, id="more points than pixels"),
    pytest.param([(1, 1)], 1, 9, 1, 1, 1, id="one pixel, one head, one channel"),
    pytest.param([(1, 7), (5, 1), (2, 1)], 3, 11, 3, 5, 3, id="lines, odd width"),
    pytest.param([(9, 2)], 1, 2, 5, 3, 1, id="one level, one point"),
    pytest.param([(4, 5), (2, 3), (1, 2)], 2, 17, 4, 8, 4, id="pyramid"),
]
NOTHING = [
    pytest.param(0, 5, id="no images"),
    pytest.param(2, 0, id="no queries"),
]


def inputs(shapes=SHAPES, batch=2, queries=40, heads=2, width=4, points=2, dtype=torch.float64, seed=0):
    """value, locations (a fifth of them outside), weights: leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(batch, tokens, heads, width, generator=generator, dtype=torch.float64)
    locations = torch.rand(batch, queries, heads, levels, points, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.1
    weights = torch.randn(batch, queries, heads, levels, points, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (value, locations, weights)]


def direction_of(out, seed=1):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out)


def run(path, given, shapes=SHAPES, direction=None):
    """Output and the gradients of the three inputs."""
    out = deformable_sampling(given[0], shapes, given[1], given[2], path)
    return [out, *torch.autograd.grad(out, given, direction_of(out) if direction is None else direction)]


def levels_of(shapes, mask):
    """Levels as far as attention reads them: ``mask [B, S]``."""
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32)
    return FeatureLevels(torch.empty(0), mask, torch.empty(0), list(shapes), sizes, sizes.expand(len(mask), -1, -1))


def module_inputs(width, shapes, queries=3):
    """query, reference, tokens, levels of two images."""
    torch.manual_seed(0)
    mask = torch.zeros(2, sum(h * w for h, w in shapes), dtype=torch.bool)
    return (torch.randn(2, queries, width), torch.rand(2, queries, len(shapes), 2), torch.randn(*mask.shape, width),
            levels_of(shapes, mask))


def by_hand(value, shapes, locations, weights):
    """Equation 3, point by point; pixels are unit squares, and pixel i has its centre at i + 0.5."""
    batch, queries, heads, levels, points, _ = locations.shape
    out = [[[value.new_zeros(value.shape[3]) for _ in range(heads)] for _ in range(queries)] for _ in range(batch)]
    for b, q, m, level, p in itertools.product(*(range(n) for n in (batch, queries, heads, levels, points))):
        (h, w), first = shapes[level], sum(i * j for i, j in shapes[:level])
        x, y = (locations[b, q, m, level, p] * torch.tensor([w, h]) - 0.5).unbind()
        for v, u in itertools.product(range(h), range(w)):
            hat = (1 - (x - u).abs()).clamp(min=0) * (1 - (y - v).abs()).clamp(min=0)
            out[b][q][m] = out[b][q][m] + weights[b, q, m, level, p] * hat * value[b, first + v * w + u, m]
    return torch.stack([torch.stack([torch.cat(row) for row in image]) for image in out])


def close(actual, expected, atol, names=("output", "value", "locations", "weights")):
    for name, a, b in zip(names, actual, expected):
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), atol=atol * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(params=[None, 1, 50], ids=["blocks", "a head and a query at a time", "small blocks"])
def work_size(request, monkeypatch):
    """How much the path for CPUs takes on at once."""
    if request.param:
        monkeypatch.setattr(deformable_cpu, "BLOCK", request.param)
        monkeypatch.setattr(deformable_cpu, "CHUNK", request.param)


@pytest.mark.parametrize("path", CPU_PATHS)
def test_published_operator(path):
    case = load_case("deformable_op")
    names = ("value", "sampling_locations", "attention_weights")
    for setting, bits in itertools.product(case.spec["configurations"], (64, 32)):
        dtype, key = getattr(torch, f"float{bits}"), setting["name"]
        given = [case.expected[f"{key}.in64.{name}"].to(dtype).requires_grad_() for name in names]
        direction = case.expected[f"{key}.in64.grad_output"].to(dtype)
        out, *grads = run(path, given, [tuple(level) for level in setting["levels"]], direction)
        actual = {f"{key}.output{bits}": out} | {f"{key}.grad{bits}.{name}": g for name, g in zip(names, grads)}
        for name, tensor in actual.items():
            assert tensor.dtype == dtype
            check(case, name, tensor, **case.spec["expected"][name]["tolerance"])
    assert [name for name in unchecked(case) if ".in64." not in name] == []


@pytest.mark.parametrize("path", CPU_PATHS)
def test_published_module(path):
    case = load_case("deformable_attention")
    module = MSDeformAttn(**case.spec["args"], path=path)
    module.load_state_dict(case.state_dict(), strict=True)
    shapes = [tuple(level) for level in case.spec["levels"]]
    for size, masked in itertools.product((2, 4), (True, False)):
        leaves = {name: case.expected[f"in.{source}"].clone().requires_grad_() for name, source in
                  (("query", "query"), ("reference", f"reference{size}"), ("input_flatten", "input_flatten"))}
        out = module(*leaves.values(), levels_of(shapes, case.expected["in.padding_mask"] & masked))
        grads = torch.autograd.grad(out, list(leaves.values()), case.expected["in.grad_output"])
        kind = f"{size}.{'masked' if masked else 'unmasked'}"
        for name, tensor in {f"output.{kind}": out, **{f"grad.{kind}.{n}": g for n, g in zip(leaves, grads)}}.items():
            if name in case.expected:
                check(case, name, tensor, **case.spec["expected"][name]["tolerance"])
    assert unchecked(case) == []


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("queries", [2, 8])
def test_point_by_point(path, queries):
    """Few points are sampled from the value itself, many from a table."""
    given = inputs([(3, 4), (1, 1)], batch=2, queries=queries, width=3)
    expected = by_hand(given[0], [(3, 4), (1, 1)], *given[1:])
    expected = [expected, *torch.autograd.grad(expected, given, direction_of(expected))]
    close(run(path, given, [(3, 4), (1, 1)]), expected, atol=1e-12)


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("queries", [1, 5])
def test_gradient_numerically(path, queries):
    shapes = [(2, 3), (1, 1)]
    given = inputs(shapes, batch=2, queries=queries, width=2)
    assert torch.autograd.gradcheck(lambda *x: deformable_sampling(x[0], shapes, x[1], x[2], path), given)


@pytest.mark.parametrize("shapes, batch, queries, heads, width, points", SIZES)
def test_paths_agree(shapes, batch, queries, heads, width, points, work_size):
    given = inputs(shapes, batch, queries, heads, width, points)
    expected = run("definition", given, shapes)
    close(run("cpu", given, shapes), expected, atol=1e-12)
    close(run("cpu", [x.detach().float().requires_grad_() for x in given], shapes), expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_paths_agree_on_random_sizes(seed):
    pick = torch.Generator().manual_seed(seed)
    def number(low, high):
        return int(torch.randint(low, high, (), generator=pick))
    shapes = [(number(1, 9), number(1, 9)) for _ in range(number(1, 5))]
    given = inputs(shapes, number(1, 4), number(1, 60), number(1, 5), number(1, 9), number(1, 6), seed=seed)
    close(run("cpu", given, shapes), run("definition", given, shapes), atol=1e-12)


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("batch, queries", NOTHING)
def test_nothing_to_do(path, batch, queries):
    given = inputs(batch=batch, queries=queries)
    out, *grads = run(path, given)
    assert out.shape == (batch, queries, 8)
    for grad, x in zip(grads, given):
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("far", [1e9, -1e9, 3e38, math.inf, -math.inf, 2.0, -1.0])
def test_far_points_are_zero(queries, far):
    value, locations, weights = inputs(queries=queries, dtype=torch.float32)
    for axis in (0, 1):
        away = locations.detach().clone()
        away[:, ::2, ..., axis] = far
        out, *grads = run("cpu", [value, away.requires_grad_(), weights])
        assert not out[:, ::2].any() and out[:, 1::2].any()
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[1][:, ::2].any() and not grads[2][:, ::2].any()


@pytest.mark.parametrize("queries", [3, 40])
def test_the_border_falls_to_zero_over_a_pixel(queries):
    """Centres of border pixels, half a pixel farther out, and a whole one, where nothing is left."""
    value = torch.full((1, 12, 1, 1), 3.0)
    x = torch.tensor([0.5, 0.0, -0.5, 3.5, 4.0, 4.5]) / 4                       # of a level of 3 rows and 4 columns
    locations = torch.stack([x, torch.full_like(x, 0.5)], -1)[None, None, None, None].repeat(1, queries, 1, 1, 1, 1)
    for path in CPU_PATHS:
        each = torch.eye(6)[:, None, None, None, None].expand(6, 1, queries, 1, 1, 6)
        actual = [deformable_sampling(value, [(3, 4)], locations, weights, path)[0, 0, 0].item() for weights in each]
        assert actual == pytest.approx([3, 1.5, 0, 3, 1.5, 0], abs=1e-6)


@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_gives_nan(queries, which):
    """And stays with its query: the others, and the other image, are as they were."""
    given = inputs(queries=queries)
    before = run("cpu", given)[0]
    broken = [x.detach().clone() for x in given]
    broken[which][1, slice(None) if which == 0 else 1, 0] = math.nan
    out, *grads = run("cpu", [x.requires_grad_() for x in broken])
    out = out.detach()
    assert torch.equal(out[0], before[0]) and all(grad[0].isfinite().all() for grad in grads)
    if which:
        assert out[1, 1, :4].isnan().all()
        out[1, 1, :4] = before[1, 1, :4]
        assert torch.equal(out, before)
    else:
        expected = run("definition", broken)[0].isnan()
        assert expected.any() and out.isnan()[expected].all() and torch.equal(out[..., 4:], before[..., 4:])


@pytest.mark.parametrize("queries", [5, 60])
def test_a_batch_is_its_images(queries):
    given = inputs(batch=5, queries=queries)
    direction = torch.randn(5, queries, 8, dtype=torch.float64)
    together = run("cpu", given, direction=direction)
    for i in range(5):
        alone = run("cpu", [x.detach()[i:i + 1].requires_grad_() for x in given], direction=direction[i:i + 1])
        assert all(torch.equal(a[i:i + 1], b) for a, b in zip(together, alone))


def test_work_size_does_not_matter(work_size, monkeypatch):
    given = inputs(batch=3, dtype=torch.float32)
    actual = run("cpu", given)
    monkeypatch.setattr(deformable_cpu, "BLOCK", 2 ** 18)
    monkeypatch.setattr(deformable_cpu, "CHUNK", 2 ** 16)
    assert all(torch.equal(a, b) for a, b in zip(actual, run("cpu", given)))


@pytest.mark.parametrize("queries", [5, 60])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", CPU_PATHS)
def test_low_precision_values(dtype, path, queries):
    value, locations, weights = inputs(queries=queries, width=8)
    value, weights = (x.detach().to(dtype).double().requires_grad_() for x in (value, weights))
    locations = locations.detach().float().double().requires_grad_()
    expected = run("definition", [value, locations, weights], direction=torch.ones(2, queries, 16, dtype=torch.float64))
    low = [x.detach().to(t).requires_grad_() for x, t in ((value, dtype), (locations, torch.float32), (weights, dtype))]
    actual = run(path, low, direction=torch.ones(2, queries, 16, dtype=dtype))
    assert [x.dtype for x in actual] == [dtype, dtype, torch.float32, dtype]
    for a, b in zip(actual, expected):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()


@pytest.mark.parametrize("queries", [5, 60])
def test_strided_inputs_and_some_gradients(queries):
    """Inputs that are views of other layouts, and each of the inputs as the only one that wants a gradient."""
    given = inputs(queries=queries)
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1) for x in given]
    assert not any(x.is_contiguous() for x in strided)
    expected = run("definition", given)
    close(run("cpu", [x.requires_grad_() for x in strided]), expected, atol=1e-12)
    for i in range(3):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(given)]
        out = deformable_sampling(leaves[0], SHAPES, leaves[1], leaves[2], "cpu")
        out.backward(direction_of(out))
        close([leaves[i].grad], [expected[1 + i]], atol=1e-12)
        assert all(leaf.grad is None for j, leaf in enumerate(leaves) if j != i)


def test_inputs_stay_as_they_are_and_nothing_is_said():
    given = inputs()
    before = [x.detach().clone() for x in given]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deformable_cpu.hush.cache_clear()
        run("cpu", given)
    assert all(torch.equal(a, b) for a, b in zip(given, before))


def test_second_derivatives_belong_to_the_definition():
    given = inputs(queries=3)
    out = deformable_sampling(given[0], SHAPES, given[1], given[2], "cpu")
    direction = torch.ones_like(out).requires_grad_()
    grad, = torch.autograd.grad(out, given[:1], direction, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_choice_of_path(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv(deformable_attention.ENVIRONMENT, raising=False)
    assert choose_path(cpu) == "cpu"
    assert choose_path(torch.device("meta")) == "definition"
    monkeypatch.setenv(deformable_attention.ENVIRONMENT, "definition")
    assert choose_path(cpu) == "definition"
    assert choose_path(cpu, "cpu") == "cpu"                     # the argument before the environment
    monkeypatch.setenv(deformable_attention.ENVIRONMENT, "fastest")
    with pytest.raises(ValueError, match="DETR_DEFORMABLE_PATH 'fastest' is no path of deformable attention; use one of "
                                         "definition, cpu, triton"):
        choose_path(cpu)
    with pytest.raises(ValueError, match="^path 'gpu' is no path"):
        MSDeformAttn(8, 1, 2, 1, path="gpu")
    monkeypatch.setenv(deformable_attention.ENVIRONMENT, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(deformable_attention, "TRITON", True)
    with pytest.raises(ValueError, match="DETR_DEFORMABLE_PATH triton is for tensors on a GPU, .* use cpu or definition"):
        choose_path(cpu)
    with pytest.raises(ValueError, match="path cpu is for tensors on a CPU, and these are on meta; use triton or"):
        choose_path(torch.device("meta"), "cpu")
    monkeypatch.setattr(deformable_attention, "TRITON", False)
    with pytest.raises(ValueError, match="path triton: this PyTorch has no Triton; pip install triton, or use"):
        choose_path(torch.device("meta"), "triton")


def test_a_gpu_without_triton_falls_back_and_says_so(monkeypatch):
    monkeypatch.delenv(deformable_attention.ENVIRONMENT, raising=False)
    monkeypatch.setattr(deformable_attention, "TRITON", False)
    with pytest.warns(UserWarning, match="runs in plain PyTorch, slowly: this PyTorch has no Triton .pip install triton"):
        assert choose_path(torch.device("cuda")) == "definition"
    monkeypatch.setattr(deformable_attention, "TRITON", True)
    assert choose_path(torch.device("cuda")) == "triton"


@pytest.mark.parametrize("path", CPU_PATHS)
def test_served_counts_calls(path, monkeypatch):
    monkeypatch.setenv(deformable_attention.ENVIRONMENT, path)
    before = deformable_attention.served.copy()
    MSDeformAttn(8, 1, 2, 1)(*module_inputs(8, [(2, 2)]))
    assert deformable_attention.served - before == {path: 1}


def test_initial_ring():
    """Section A.4: eight heads look into the eight directions of the compass, the k-th point k pixels away."""
    module = MSDeformAttn(d_model=16, n_levels=2, n_heads=8, n_points=3)
    compass = torch.tensor([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]).float()
    ring = module.sampling_offsets.bias.view(8, 2, 3, 2)
    for level, point in itertools.product(range(2), range(3)):
        torch.testing.assert_close(ring[:, level, point], (point + 1) * compass, atol=1e-5, rtol=0)
    assert not module.sampling_offsets.weight.any()
    assert not module.attention_weights.weight.any() and not module.attention_weights.bias.any()
    assert not module.value_proj.bias.any() and module.value_proj.weight.any()
    assert not module.output_proj.bias.any() and module.output_proj.weight.any()


@pytest.mark.parametrize("path", CPU_PATHS)
def test_padding_is_zero(path):
    """Whatever stands in padded tokens, not even their bias is seen; all padded, and the output is its bias."""
    torch.manual_seed(0)
    module = MSDeformAttn(8, 2, 2, 2, path=path)
    torch.nn.init.normal_(module.value_proj.bias)
    torch.nn.init.normal_(module.output_proj.bias)
    query, reference, tokens, levels = module_inputs(8, [(4, 3), (2, 2)], queries=9)
    mask = torch.rand(2, 16) < 0.5
    mask[1] = True
    padded = levels._replace(mask=mask)
    out = module(query, reference, tokens, padded)
    assert torch.equal(out, module(query, reference, tokens.masked_fill(mask[..., None], 1e6), padded))
    assert not torch.equal(out[0], module(query, reference, tokens, levels)[0])
    assert torch.equal(out[1], module.output_proj.bias.expand(9, 8))


def test_wrong_shapes_are_named():
    value, locations, weights = (x.detach() for x in inputs())
    with pytest.raises(ValueError, match=r"value has 43 tokens, and levels of \[\(6, 5\), \(3, 4\)\] have 42"):
        deformable_sampling(value, [(6, 5), (3, 4)], locations, weights)
    for wrong in ((locations, weights[..., :1]), (locations[:, :, :1], weights[:, :, :1]),
                  (locations[:, :, :, :2], weights[:, :, :, :2])):
        with pytest.raises(ValueError, match=r"value \[2, 43, 2, 4\], locations .* and weights .* of 3 levels: they "
                                             r"should be \[B, S, M, D / M\], \[B, Q, M, L, P, 2\] and \[B, Q, M, L, P\]"):
            deformable_sampling(value, SHAPES, *wrong)
    with pytest.raises(ValueError, match="hidden_dim 12 does not divide into nheads 5; choose --nheads"):
        MSDeformAttn(12, 1, 5)


class Fixed(torch.nn.Module):
    """Levels of fixed sizes, for exporters, which take tensors alone."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.attention = shapes, MSDeformAttn(8, len(shapes), 2, 2)
        torch.nn.init.normal_(self.attention.sampling_offsets.weight)
        torch.nn.init.normal_(self.attention.attention_weights.weight)

    def forward(self, query, reference, tokens):
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        return self.attention(query, reference, tokens, levels_of(self.shapes, mask))


@pytest.mark.parametrize("how", ["export", "trace"])
def test_exported(how):
    """What compilers look into is the definition, with nothing said to choose it."""
    given = module_inputs(8, [(4, 3), (2, 2)])[:3]
    module = Fixed([(4, 3), (2, 2)]).eval()
    before = deformable_attention.served.copy()
    if how == "export":
        made = torch.export.export(module, given, strict=False).module()
    else:
        made = torch.jit.trace(module, given)
    if how == "export":                                             # the tracer runs the definition once, and counts it
        assert deformable_attention.served == before
    assert "grid_sampler" in str(made.graph if how == "export" else made.inlined_graph)
    other = (given[0].flip(1), given[1].flip(1), given[2].flip(1))
    for x in (given, other):
        torch.testing.assert_close(made(*x), module(*x), atol=1e-6, rtol=0)
