"""Encoder and decoder layers against PyTorch's own (which know no positions) and against the paper's formulas."""
import pytest
import torch
from torch import Tensor, nn

from detr.architectures.detr import Transformer
from detr.decoder import TransformerDecoderLayer
from detr.encoder import TransformerEncoder, TransformerEncoderLayer
from detr.mlp import MLP
from detr.residual import post_norm, pre_norm

B, Q, S, D, M, FF = 2, 5, 6, 16, 4, 24
H, W = 2, 3
PADDING = torch.arange(S) >= torch.tensor([[6], [4]])                                           # [B, S]


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in every parameter, biases and normalisations too; float64, evaluation mode."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return module.double().eval()


def pair(ours: nn.Module, reference: nn.Module) -> tuple[nn.Module, nn.Module]:
    ours.load_state_dict(randomize(reference).state_dict(), strict=True)
    return ours.double().eval(), reference


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def encoder_layer(layer: nn.TransformerEncoderLayer, x: Tensor, mask: Tensor, position: Tensor, pre: bool) -> Tensor:
    """Figure 10, left, from the parts of PyTorch's layer."""
    def attend(y):
        return layer.self_attn(y + position, y + position, y, key_padding_mask=mask, need_weights=False)[0]

    def feed_forward(y):
        return layer.linear2(layer.linear1(y).relu())

    if pre:
        x = x + attend(layer.norm1(x))
        return x + feed_forward(layer.norm2(x))
    x = layer.norm1(x + attend(x))
    return layer.norm2(x + feed_forward(x))


def decoder_layer(layer: nn.TransformerDecoderLayer, x: Tensor, query_position: Tensor, memory: Tensor,
                  position: Tensor, mask: Tensor, pre: bool) -> Tensor:
    """Figure 10, right."""
    def self_attend(y):
        return layer.self_attn(y + query_position, y + query_position, y)[0]

    def cross_attend(y):
        return layer.multihead_attn(y + query_position, memory + position, memory, key_padding_mask=mask)[0]

    def feed_forward(y):
        return layer.linear2(layer.linear1(y).relu())

    for block, norm in ((self_attend, layer.norm1), (cross_attend, layer.norm2), (feed_forward, layer.norm3)):
        x = x + block(norm(x)) if pre else norm(x + block(x))
    return x


@pytest.mark.parametrize("pre", [False, True])
def test_encoder_layer(pre):
    ours, reference = pair(TransformerEncoderLayer(D, M, FF, normalize_before=pre),
                           nn.TransformerEncoderLayer(D, M, FF, batch_first=True, norm_first=pre))
    x, position = randn(B, S, D), randn(B, S, D)
    without = ours(x, PADDING, torch.zeros_like(x))
    torch.testing.assert_close(without[~PADDING], reference(x, src_key_padding_mask=PADDING)[~PADDING])
    actual = ours(x, PADDING, position)
    torch.testing.assert_close(actual, encoder_layer(reference, x, PADDING, position, pre))
    assert (actual - without).abs().max() > 1e-3


@pytest.mark.parametrize("pre", [False, True])
def test_decoder_layer(pre):
    ours, reference = pair(TransformerDecoderLayer(D, M, FF, normalize_before=pre),
                           nn.TransformerDecoderLayer(D, M, FF, batch_first=True, norm_first=pre))
    x, query_position, memory, position = randn(B, Q, D), randn(B, Q, D), randn(B, S, D), randn(B, S, D)
    without = ours(x, torch.zeros_like(x), memory, memory, PADDING)
    torch.testing.assert_close(without, reference(x, memory, memory_key_padding_mask=PADDING))
    actual = ours(x, query_position, memory, memory + position, PADDING)
    torch.testing.assert_close(actual, decoder_layer(reference, x, query_position, memory, position, PADDING, pre))


def test_decoder_query_mask():
    ours, reference = pair(TransformerDecoderLayer(D, M, FF), nn.TransformerDecoderLayer(D, M, FF, batch_first=True))
    x, memory = randn(B, Q, D), randn(B, S, D)
    none = torch.zeros(B, Q, dtype=torch.bool)
    none[:, -1] = True
    actual = ours(x, torch.zeros_like(x), memory, memory, PADDING, query_mask=none)
    torch.testing.assert_close(actual, reference(x, memory, tgt_key_padding_mask=none, memory_key_padding_mask=PADDING))
    x[:, -1] += 1                                               # the last query is hidden from all others
    assert torch.equal(ours(x, torch.zeros_like(x), memory, memory, PADDING, query_mask=none)[:, :-1], actual[:, :-1])


@pytest.mark.parametrize("pre", [False, True])
def test_the_whole_transformer(pre):
    """Positions enter at every layer, queries start from zeros, and the decoder's norm closes every layer's output."""
    transformer = randomize(Transformer(D, M, 2, 3, FF, normalize_before=pre))
    assert hasattr(transformer.encoder.norm, "weight") == pre   # only pre-norm leaves something to normalise at the end
    src, pos, queries = randn(B, D, H, W), randn(B, D, H, W), randn(Q, D)
    hs, memory = transformer(src, PADDING, queries, pos)
    assert hs.shape == (3, B, Q, D) and memory.shape == (B, D, H, W)

    def reference(layer):
        kind = nn.TransformerEncoderLayer if isinstance(layer, TransformerEncoderLayer) else nn.TransformerDecoderLayer
        other = kind(D, M, FF, batch_first=True, norm_first=pre).double().eval()
        other.load_state_dict(layer.state_dict(), strict=True)
        return other

    x, position = src.flatten(2).transpose(1, 2), pos.flatten(2).transpose(1, 2)
    for layer in transformer.encoder.layers:
        x = encoder_layer(reference(layer), x, PADDING, position, pre)
    x = transformer.encoder.norm(x)
    torch.testing.assert_close(memory, x.transpose(1, 2).view(B, D, H, W))
    y = torch.zeros(B, Q, D, dtype=torch.float64)
    for i, layer in enumerate(transformer.decoder.layers):
        y = decoder_layer(reference(layer), y, queries[None], x, position, PADDING, pre)
        torch.testing.assert_close(hs[i], transformer.decoder.norm(y))


@pytest.mark.parametrize("pre", [False, True])
def test_what_lies_in_the_padding_does_not_matter(pre):
    transformer = randomize(Transformer(D, M, 2, 2, FF, normalize_before=pre))
    src, pos, queries, mask = randn(B, D, H, W), randn(B, D, H, W), randn(Q, D), PADDING
    hs, memory = transformer(src, mask, queries, pos)
    padding = mask.view(B, 1, H, W).expand_as(src)
    changed_hs, changed = transformer(torch.where(padding, 7.0, src), mask, queries, torch.where(padding, -3.0, pos))
    assert torch.equal(changed_hs, hs)
    assert torch.equal(changed[~padding], memory[~padding]) and not torch.equal(changed, memory)


def test_images_of_a_batch_do_not_see_each_other():
    transformer = randomize(Transformer(D, M, 2, 2, FF))
    src, pos, queries, mask = randn(B, D, H, W), randn(B, D, H, W), randn(Q, D), PADDING
    hs, memory = transformer(src, mask, queries, pos)
    for i in range(B):
        alone_hs, alone = transformer(src[i:i + 1], mask[i:i + 1], queries, pos[i:i + 1])
        torch.testing.assert_close(alone_hs[:, 0], hs[:, i])
        torch.testing.assert_close(alone[0], memory[i])


def test_initialisation_is_xavier():
    torch.manual_seed(0)
    transformer = Transformer(64, 4, 1, 1, 128)
    for name, p in transformer.named_parameters():
        if p.dim() > 1:
            bound = (6 / sum(p.shape)) ** 0.5
            assert 0.97 * bound < p.abs().max() <= bound, name
            assert abs(p.std() - bound / 3 ** 0.5) < 0.03 * bound, name


def test_dropout_in_training_alone():
    transformer = Transformer(D, M, 1, 1, FF, dropout=0.5)
    given = torch.randn(B, D, H, W), PADDING, torch.randn(Q, D), torch.randn(B, D, H, W)
    assert not torch.equal(transformer(*given)[0], transformer(*given)[0])
    transformer.eval()
    assert torch.equal(transformer(*given)[0], transformer(*given)[0])


def test_an_encoder_without_layers_changes_nothing():
    tokens = torch.randn(B, S, D)
    assert torch.equal(TransformerEncoder(0, D, M)(tokens, PADDING, tokens), tokens)


def test_residuals():
    norm = nn.LayerNorm(3)
    x = torch.tensor([[1.0, 2.0, 6.0]])
    assert torch.equal(post_norm(x, torch.square, norm), norm(x + x.square()))
    assert torch.equal(pre_norm(x, torch.square, norm), x + norm(x).square())


def test_mlp():
    mlp = randomize(MLP(4, 8, 3, 3))
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(8, 4), (8, 8), (3, 8)]
    x = randn(2, 5, 4)
    a, b, c = mlp.layers
    expected = c(b(a(x).clamp(min=0)).clamp(min=0))
    torch.testing.assert_close(mlp(x), expected)
    assert expected.min() < 0                                   # no ReLU at the end
