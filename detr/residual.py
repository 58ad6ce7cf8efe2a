"""The two places of a transformer's layer normalisation around a residual block."""
from collections.abc import Callable

from torch import Tensor, nn

Block = Callable[[Tensor], Tensor]


def post_norm(x: Tensor, block: Block, norm: nn.Module) -> Tensor:
    """``norm(x + block(x))``: the original transformer (Vaswani et al., 2017, section 3.1), DETR's default."""
    return norm(x + block(x))


def pre_norm(x: Tensor, block: Block, norm: nn.Module) -> Tensor:
    """``x + block(norm(x))``: the residual path stays untouched (``--pre_norm``)."""
    return x + block(norm(x))
