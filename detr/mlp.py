"""Multi-layer perceptrons: the box head (Carion et al., 2020, section 3.2: "a 3-layer perceptron with ReLU") and the
feed-forward block of transformer layers (Vaswani et al., 2017, section 3.3)."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from .dropout import relu_dropout

AT_ONCE = 2 ** 23           # bytes between the two layers of a feed-forward block on CPUs, without gradients


class MLP(nn.Module):
    """``num_layers`` linear layers with ReLU between them: ``[..., input_dim]`` -> ``[..., output_dim]``."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


def feed_forward(x: Tensor, linear1: nn.Module, linear2: nn.Module, dropout: nn.Dropout,
                 activation: nn.Module | None = None) -> Tensor:
    """Two linear layers with ReLU, or another ``activation``, between them, dropout after each; a function, since
    published files know the two by the layer they belong to.

    On CPUs without gradients some tokens are computed after the others: what is between the layers stays in the
    processor's cache, and no memory is fetched for all of it."""
    if isinstance(linear1, nn.Linear) and in_parts(x, linear1, linear2, dropout, activation):
        tokens = max(1, AT_ONCE // (linear1.out_features * x.element_size()))
        parts = [block(part, linear1, linear2, dropout, activation) for part in x.reshape(-1, x.shape[-1]).split(tokens)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.view(*x.shape[:-1], out.shape[-1])
    return block(x, linear1, linear2, dropout, activation)


def in_parts(x: Tensor, *modules: nn.Module | None) -> bool:
    """Whether nobody could tell the difference, were a block of these ``modules`` called more than once."""
    followed = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    seen = _global_forward_hooks or _global_forward_pre_hooks or any(
        m is not None and (m.training or m._forward_hooks or m._forward_pre_hooks) for m in modules)
    return x.device.type == "cpu" and not (followed or seen)


def block(x: Tensor, linear1: nn.Module, linear2: nn.Module, dropout: nn.Dropout,
          activation: nn.Module | None) -> Tensor:
    """The block for all of ``x``."""
    hidden = linear1(x)
    if activation is None or isinstance(activation, nn.ReLU):
        hidden = relu_dropout(hidden, dropout.p, dropout.training)
    else:
        hidden = dropout(activation(hidden))
    return dropout(linear2(hidden))
