"""What says the class and the box of a query where classes are scored one by one: the heads of all models but DETR."""
import math

from torch import nn

from .mlp import MLP


def focal_heads(d_model: int, num_classes: int) -> tuple[nn.Linear, MLP]:
    """Class head, ``d_model -> num_classes`` logits for a sigmoid, and box head, ``d_model -> 4`` changes of a box or
    point. At first every class is as good as absent, with probability 0.01 (Lin et al., 2017, section 4.1), and boxes
    stay where they are."""
    class_head, box_head = nn.Linear(d_model, num_classes), MLP(d_model, d_model, 4, 3)
    nn.init.constant_(class_head.bias, -math.log(99))
    nn.init.zeros_(box_head.layers[-1].weight)                                                  # type: ignore[arg-type]
    nn.init.zeros_(box_head.layers[-1].bias)                                                    # type: ignore[arg-type]
    return class_head, box_head
