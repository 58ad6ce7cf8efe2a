"""Position encodings against the published ones, by hand, and on maps of any size."""
import math

import pytest
import torch
import torch.nn.functional as F
from cases import check, load_case, unchecked

from detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from detr.position_encoding import (
    PositionEmbeddingLearned,
    PositionEmbeddingSine,
    build_position_encoding,
    sine_encoding,
)


def features(mask: torch.Tensor) -> NestedTensor:
    return NestedTensor(torch.zeros(len(mask), 1, *mask.shape[1:]), mask)


def unpadded(height: int, width: int) -> NestedTensor:
    return features(torch.zeros(1, height, width, dtype=torch.bool))


def test_published_encodings():
    case = load_case("detr_position_embedding")
    inputs, maps = case.spec["inputs"], features(case.expected["in.mask"])
    for feats in inputs["num_pos_feats"]:
        check(case, f"sine.{feats}.plain", PositionEmbeddingSine(feats)(maps))
        check(case, f"sine.{feats}.normalized", PositionEmbeddingSine(feats, normalize=True)(maps))
    feats = inputs["num_pos_feats"][0]
    check(case, f"sine.{feats}.scale", PositionEmbeddingSine(feats, inputs["temperature"], True, inputs["scale"])(maps))
    learned = PositionEmbeddingLearned(inputs["learned_feats"])
    learned.load_state_dict(case.state_dict())
    check(case, "learned", learned(maps))
    assert unchecked(case) == []


def test_sine_by_hand():
    feats, h, w = 8, 3, 5
    actual = PositionEmbeddingSine(feats, normalize=True).double()(unpadded(h, w))[0].double()
    expected = torch.empty(2 * feats, h, w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            for i in range(feats):
                wave = math.sin if i % 2 == 0 else math.cos
                length = 10000 ** ((i - i % 2) / feats)
                expected[i, y, x] = wave(2 * math.pi * (y + 1) / h / length)
                expected[feats + i, y, x] = wave(2 * math.pi * (x + 1) / w / length)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_sine_of_a_large_map():
    encoded = PositionEmbeddingSine(16, normalize=True)(unpadded(200, 150))
    assert encoded.shape == (1, 32, 200, 150) and encoded.dtype == torch.float32
    assert encoded.isfinite().all() and encoded.abs().max() <= 1
    rows, columns = encoded[0, :16, :, 0].T, encoded[0, 16:, 0].T
    assert torch.cdist(rows, rows).add(torch.eye(200)).min() > 1e-3         # no two places look alike
    assert torch.cdist(columns, columns).add(torch.eye(150)).min() > 1e-3


@pytest.mark.parametrize("normalize", [False, True])
def test_sine_of_an_image_does_not_depend_on_its_padding(normalize):
    encode = PositionEmbeddingSine(16, normalize=normalize)
    alone = encode(unpadded(7, 9))
    padded = encode(nested_tensor_from_tensor_list([torch.zeros(1, 7, 9), torch.zeros(1, 20, 30)]))
    assert torch.equal(padded[0, :, :7, :9], alone[0])
    if normalize:                                               # the far corner of every image is at (2 pi, 2 pi)
        torch.testing.assert_close(padded[0, :, 6, 8], padded[1, :, 19, 29], atol=1e-5, rtol=0)


def test_nothing_but_padding_is_finite():
    encoded = PositionEmbeddingSine(4, normalize=True)(features(torch.ones(1, 3, 3, dtype=torch.bool)))
    assert encoded.isfinite().all()


def test_sine_encoding_adds_a_dimension():
    assert sine_encoding(torch.rand(2, 3), 10).shape == (2, 3, 10)


def test_learned():
    encode = PositionEmbeddingLearned(4)
    assert {name: tuple(p.shape) for name, p in encode.named_parameters()} == {"row_embed.weight": (50, 4),
                                                                              "col_embed.weight": (50, 4)}
    assert 0 <= encode.row_embed.weight.min() and 0.9 < encode.row_embed.weight.max() < 1         # uniform in 0..1
    encoded = encode(unpadded(50, 50))
    assert encoded.shape == (1, 8, 50, 50)
    assert torch.equal(encoded[0, :4, 7, 12], encode.col_embed.weight[12])
    assert torch.equal(encoded[0, 4:, 7, 12], encode.row_embed.weight[7])
    encoded.sum().backward()
    assert (encode.row_embed.weight.grad == 50).all()


@pytest.mark.parametrize("size", [(51, 3), (3, 51)])
def test_learned_positions_end(size):
    with pytest.raises(ValueError, match=rf"end at 50 .* {size[0]}x{size[1]}: feed smaller images, or use "
                                         r"--position_embedding sine"):
        PositionEmbeddingLearned(4)(unpadded(*size))


def test_by_name():
    for name, kind in (("sine", PositionEmbeddingSine), ("learned", PositionEmbeddingLearned)):
        position = build_position_encoding(name, 32)
        assert isinstance(position, kind) and position(unpadded(2, 3)).shape == (1, 32, 2, 3)
    assert build_position_encoding("sine", 32).normalize
    with pytest.raises(ValueError, match="'v2' is not known; use 'sine' or 'learned'"):
        build_position_encoding("v2", 32)
    with pytest.raises(ValueError, match="normalize=True"):
        PositionEmbeddingSine(16, scale=1.0)


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"normalize": True, "offset": -0.5, "scale": 3.0}])
def test_without_padding(options):
    """Worked out by row and column, it is what it is pixel by pixel."""
    encoding = PositionEmbeddingSine(16, **options)
    features = NestedTensor(torch.zeros(2, 1, 13, 22), torch.zeros(2, 13, 22, dtype=torch.bool))
    found = encoding(features)
    below = F.pad(features.mask, (0, 0, 0, 1), value=True)          # one row of padding
    expected = encoding(NestedTensor(torch.zeros(2, 1, 14, 22), below))[:, :, :-1]
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
