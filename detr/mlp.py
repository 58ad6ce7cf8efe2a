"""Multi-layer perceptrons: the box head (Carion et al., 2020, section 3.2: "a 3-layer perceptron with ReLU") and the
feed-forward block of transformer layers (Vaswani et al., 2017, section 3.3)."""
import torch.nn.functional as F
from torch import Tensor, nn

from .dropout import relu_dropout


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
    published files know the two by the layer they belong to."""
    hidden = linear1(x)
    if activation is None or isinstance(activation, nn.ReLU):
        hidden = relu_dropout(hidden, dropout.p, dropout.training)
    else:
        hidden = dropout(activation(hidden))
    return dropout(linear2(hidden))
