"""Attention against ``torch.nn.MultiheadAttention``: same names, same start, same output and weights."""
import copy

import pytest
import torch
from torch import nn

from detr.attention import MultiheadAttention

B, Q, S, D, M = 3, 5, 7, 12, 4


def pair(dtype: torch.dtype = torch.float64) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and PyTorch's, with the same random weights and biases, in evaluation mode."""
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(D, M, batch_first=True)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = MultiheadAttention(D, M)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours.to(dtype).eval(), reference.to(dtype).eval()


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, Q, D, dtype=dtype), torch.randn(B, S, D, dtype=dtype), torch.randn(B, S, D, dtype=dtype)


PADDING = torch.arange(S) >= torch.tensor([[7], [5], [1]])                                      # [B, S]
BLIND = (torch.arange(Q)[:, None] + torch.arange(S)) % 3 == 1                                   # [Q, S]


@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("blind", [None, BLIND])
def test_output_and_weights(padding, blind):
    ours, reference = pair()
    q, k, v = inputs()
    out, weights = ours(q, k, v, key_padding_mask=padding, attn_mask=blind, need_weights=True)
    expected, expected_weights = reference(q, k, v, key_padding_mask=padding, attn_mask=blind)
    seeing = torch.ones(B, Q, dtype=torch.bool)                 # PyTorch gives NaN where a query may look nowhere
    if padding is not None and blind is not None:
        seeing = (~padding[:, None] & ~blind).any(-1)
        assert not seeing.all()
    torch.testing.assert_close(out[seeing], expected[seeing], atol=1e-12, rtol=0)
    torch.testing.assert_close(weights[seeing], expected_weights[seeing], atol=1e-12, rtol=0)
    torch.testing.assert_close(weights.sum(-1), seeing.double(), atol=1e-12, rtol=0)
    if padding is not None:
        assert (weights.masked_select(padding[:, None]) == 0).all()


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_lower_precision(dtype, atol):
    exact, _ = pair()
    ours, _ = pair(dtype)
    q, k, v = inputs()
    expected, expected_weights = exact(q, k, v, key_padding_mask=PADDING, need_weights=True)
    out, weights = ours(q.to(dtype), k.to(dtype), v.to(dtype), key_padding_mask=PADDING, need_weights=True)
    assert out.dtype == weights.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=0)
    torch.testing.assert_close(weights.double(), expected_weights, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_padding_gives_zeros(dtype):
    ours, _ = pair(dtype)
    q, k, v = (x.requires_grad_() for x in inputs(dtype))
    padding = PADDING.clone()
    padding[1] = True
    out, weights = ours(q, k, v, key_padding_mask=padding, need_weights=True)
    assert torch.equal(out[1], ours.out_proj.bias.expand(Q, D))                 # zeros, then the output projection
    assert (weights[1] == 0).all()
    assert out.isfinite().all() and weights.isfinite().all()
    (out.sum() + weights.square().sum()).backward()
    for x in (q, k, v, *ours.parameters()):
        assert x.grad.isfinite().all()
    assert (q.grad[1] == 0).all() and (k.grad[1] == 0).all() and (v.grad[1] == 0).all()
    assert q.grad[0].abs().max() > 0


def test_gradient():
    ours, reference = pair()
    q, k, v = (x.requires_grad_() for x in inputs())
    direction = torch.randn(B, Q, D, dtype=torch.float64)
    actual, expected = (torch.autograd.grad(module(q, k, v, PADDING)[0], [q, k, v, *module.parameters()], direction)
                        for module in (ours, reference))
    names = ["query", "key", "value"] + [name for name, _ in reference.named_parameters()]
    assert names[3:] == [name for name, _ in ours.named_parameters()]
    for name, a, b in zip(names, actual, expected):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_gradient_of_output_and_weights_numerically():
    ours, _ = pair()
    q, k, v = (x[:2, :3].clone().requires_grad_() for x in inputs())
    padding = torch.tensor([[False, False, False], [False, True, True]])
    assert torch.autograd.gradcheck(lambda *x: ours(*x, key_padding_mask=padding, need_weights=True), (q, k, v))


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_prior_is_added_to_the_scores_of_all_heads(dtype, atol):
    """As PyTorch's attention takes a mask of numbers for each head; and what is padding stays out."""
    exact, reference = pair()
    ours, _ = pair(dtype)
    q, k, v = inputs()
    prior = torch.randn(B, Q, S, dtype=torch.float64) * 3
    mask = prior.masked_fill(PADDING[:, None], float("-inf")).repeat_interleave(M, 0)
    expected, expected_weights = reference(q, k, v, attn_mask=mask)
    for module, tensors in ((exact, (q, k, v)), (ours, (q.to(dtype), k.to(dtype), v.to(dtype)))):
        out, weights = module(*tensors, PADDING, need_weights=True, prior=prior.float() if module is ours else prior)
        assert out.dtype == tensors[0].dtype
        bound = atol if module is ours else 1e-12
        torch.testing.assert_close(out.double(), expected, atol=max(bound, 1e-5 * (module is ours)), rtol=0)
        torch.testing.assert_close(weights.double(), expected_weights, atol=max(bound, 1e-5 * (module is ours)), rtol=0)
    assert (exact(q, k, v, PADDING)[0] - expected).abs().max() > 0.1            # it does matter
    alone = exact(q, k, v, prior=prior)[0]                                      # without padding, too
    torch.testing.assert_close(alone, reference(q, k, v, attn_mask=prior.repeat_interleave(M, 0))[0], atol=1e-12, rtol=0)
    blind = PADDING | (torch.arange(B) == 1)[:, None]                           # of an image that is all padding: zeros
    out, weights = exact(q, k, v, blind, prior=prior, need_weights=True)
    assert torch.equal(out[1], exact.out_proj.bias.expand(Q, D)) and (weights[1] == 0).all()


def test_weights_only_where_somebody_asks():
    ours, _ = pair(torch.float32)
    q, k, v = inputs(torch.float32)
    out, weights = ours(q, k, v, PADDING)
    assert weights is None
    asked, weights = ours(q, k, v, PADDING, need_weights=True)
    assert torch.equal(asked, out) and weights.shape == (B, Q, S)
    seen = []
    hook = ours.register_forward_hook(lambda module, args, output: seen.append(output))
    watched, watched_weights = ours(q, k, v, PADDING)
    hook.remove()
    assert torch.equal(watched, out) and torch.equal(watched_weights, weights) and len(seen) == 1
    assert ours(q, k, v, PADDING)[1] is None


def test_dropout_in_training_alone():
    ours = MultiheadAttention(D, M, dropout=0.5)
    q, k, v = inputs(torch.float32)
    assert not torch.equal(ours(q, k, v)[0], ours(q, k, v)[0])
    weights = ours(q, k, v, need_weights=True)[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, Q))               # before dropout
    ours.eval()
    undropped = MultiheadAttention(D, M)
    undropped.load_state_dict(ours.state_dict())
    assert torch.equal(ours(q, k, v)[0], undropped(q, k, v)[0])


def test_initialisation():
    torch.manual_seed(3)
    reference = nn.MultiheadAttention(D, M).state_dict()
    torch.manual_seed(3)
    ours = MultiheadAttention(D, M).state_dict()
    assert list(ours) == list(reference)
    for name in reference:
        assert torch.equal(ours[name], reference[name]), name


def test_inputs_stay_as_they_are():
    ours, _ = pair()
    given = (*inputs(), PADDING.clone(), BLIND.clone())
    before = copy.deepcopy(given)
    ours(*given, need_weights=True)
    assert all(torch.equal(a, b) for a, b in zip(given, before))


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="hidden_dim 12 does not divide into nheads 5; choose --nheads"):
        MultiheadAttention(12, 5)
