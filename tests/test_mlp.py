"""The feed-forward block of transformer layers: in parts or whole, the same."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detr import mlp
from detr.mlp import feed_forward


class Counted(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.fixture
def block(monkeypatch):
    monkeypatch.setattr(mlp, "AT_ONCE", 100 * 24 * 4)                           # 100 tokens
    return Counted(16, 24).eval(), Counted(24, 16).eval(), nn.Dropout(0.5).eval()


@pytest.mark.parametrize("shape, parts", [((3, 130, 16), 4), ((100, 16), 1), ((2, 7, 5, 16), 1), ((2, 0, 16), 1),
                                          ((16,), 1)])
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.GELU()])
def test_tokens_in_parts(block, shape, parts, activation):
    linear1, linear2, dropout = block
    x, act = torch.randn(shape), activation or F.relu
    if activation is not None:
        activation.eval()
    with torch.no_grad():
        found = feed_forward(x, linear1, linear2, dropout, activation)
        torch.testing.assert_close(found, linear2(act(linear1(x))))
    assert found.shape == x.shape and linear1.calls == parts + 1


def test_whole_where_somebody_could_tell(block):
    linear1, linear2, dropout = block
    x = torch.randn(3, 130, 16)

    def calls():
        before = linear1.calls
        found = feed_forward(x, linear1, linear2, dropout, nn.GELU().eval())
        assert found.shape == x.shape
        return linear1.calls - before

    assert calls() == 1                                                         # gradients, or a graph of them
    with torch.no_grad():
        assert calls() == 4
        dropout.train()
        torch.manual_seed(0)
        expected = dropout(linear2(dropout(F.gelu(linear1(x)))))
        torch.manual_seed(0)
        assert torch.equal(feed_forward(x, linear1, linear2, dropout, nn.GELU()), expected)
        dropout.eval()
        for seen in (linear1.register_forward_hook, linear2.register_forward_pre_hook):
            hook = seen(lambda *args: None)
            assert calls() == 1
            hook.remove()
        shapes = []
        for seen in (nn.modules.module.register_module_forward_hook,            # of all modules, as diagnosis asks for
                     nn.modules.module.register_module_forward_pre_hook):
            hook = seen(lambda module, given, *found: shapes.append(given[0].shape) if module is linear2 else None)
            try:
                assert calls() == 1
            finally:
                hook.remove()
        assert shapes == [(3, 130, 24)] * 2
        assert calls() == 4


def test_other_layers(block):
    """What stands in for a linear layer may have no width."""
    _, _, dropout = block
    x = torch.randn(3, 130, 16)
    with torch.no_grad():
        assert torch.equal(feed_forward(x, nn.Identity().eval(), nn.Identity().eval(), dropout), x.relu())
