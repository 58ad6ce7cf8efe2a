"""Dropout: what it is by definition, over many draws; and that it is PyTorch's wherever it says so."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detr.attention import MultiheadAttention
from detr.dropout import BITS, Dropout, dropout, relu_dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_chances(p):
    """Elements are dropped independently with chance p, and the mean stays: both within five standard deviations."""
    torch.manual_seed(0)
    x = torch.ones(1001, 997)
    out = dropout(x, p, True)
    dropped = out == 0
    n = x.numel()
    assert abs(float(dropped.float().mean()) - p) < 5 * (p * (1 - p) / n) ** 0.5 + 1 / BITS
    kept = out[~dropped]
    assert bool((kept == kept[0]).all()) and float(kept[0]) == pytest.approx(1 / (1 - p), rel=1e-4 / (1 - p))
    for shift in (1, 2, 3, 4, 997):                                     # four elements share a random number
        both = (dropped.flatten()[shift:] & dropped.flatten()[:-shift]).float().mean()
        assert abs(float(both) - p * p) < 5 * (p * p * (1 - p * p) / n) ** 0.5 + 2 / BITS
    again = dropout(x, p, True)
    assert not torch.equal(again, out)
    torch.manual_seed(0)
    assert torch.equal(dropout(x, p, True), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 2), (0, 4)])
def test_gradient_is_dropped_where_the_value_was(shape, dtype):
    torch.manual_seed(1)
    x = (torch.rand(shape) + 1).to(dtype).requires_grad_()
    out = Dropout(0.5)(x)
    assert out.shape == x.shape and out.dtype == dtype
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(x.grad * x.detach(), out.detach(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_relu_and_dropout_in_place():
    """As one after the other, with the same random numbers; in place, but for leaves."""
    torch.manual_seed(2)
    leaf = torch.randn(41, 9, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (lambda x: relu_dropout(x, 0.4, True), lambda x: dropout(F.relu(x), 0.4, True),
                     lambda x: Dropout(0.4)(F.relu(x) + 0)):
        torch.manual_seed(3)
        fresh = leaf * 1
        out = function(fresh)
        (out ** 2).sum().backward()
        results.append((out.detach().clone(), leaf.grad.clone()))
        leaf.grad = None
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0]) and 0 < int((out == 0).sum()) < out.numel()
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-12, atol=0)
    assert relu_dropout(fresh := leaf * 1, 0.4, True) is fresh
    assert relu_dropout(leaf, 0.4, True) is not leaf and Dropout(0.4)(leaf) is not leaf
    assert torch.equal(relu_dropout(leaf, 0.4, False), F.relu(leaf)) and bool((leaf < 0).any())


def test_nothing_is_dropped():
    x = torch.randn(5, 5)
    assert Dropout(0.3).eval()(x) is x and Dropout(0.0)(x) is x
    assert bool((Dropout(1.0)(x) == 0).all())
    assert isinstance(Dropout(0.1), nn.Dropout)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(1.5)


def test_mean_of_attention():
    """With dropout, attention is on average what it is without, padding included."""
    torch.manual_seed(0)
    attention = MultiheadAttention(16, 4, dropout=0.3)
    q, k = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    padding = torch.arange(9) >= torch.tensor([[9], [6]])
    with torch.no_grad():
        expected = attention.eval()(q, k, k, key_padding_mask=padding)[0]
        attention.train()
        many = torch.stack([attention(q, k, k, key_padding_mask=padding)[0] for _ in range(3000)])
    error = many.std(0) / len(many) ** 0.5
    assert bool(((many.mean(0) - expected).abs() < 5 * error + 1e-3).all()) and bool((many.std(0) > 0).all())
    poisoned = k.clone()
    poisoned[1, 6:] = 1e3
    torch.manual_seed(3)
    one = attention(q, k, k, key_padding_mask=padding)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(attention(q, poisoned, poisoned, key_padding_mask=padding)[0], one)
