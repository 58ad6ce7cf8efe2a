"""The lesson of ``docs/minimal_detr.md``: its code is run block by block, as a reader would."""
import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from detr import checkpoint

LESSON = Path(__file__).resolve().parent.parent / "docs" / "minimal_detr.md"


def blocks() -> list[str]:
    """The lesson's code, each block preceded by blank lines so that errors name the lesson's own line."""
    text = LESSON.read_text(encoding="utf-8")
    return ["\n" * text.count("\n", 0, found.start(1)) + found[1]
            for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


@pytest.fixture(scope="module")
def lesson() -> dict:
    """The names that the lesson's code defines, and what it prints under ``printed``."""
    names: dict = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks():
            exec(compile(block, str(LESSON), "exec"), names)
    return names | {"printed": printed.getvalue()}


def test_shapes(lesson):
    logits, boxes = lesson["outputs"]["pred_logits"], lesson["outputs"]["pred_boxes"]
    assert logits.shape == (1, 100, 92) and boxes.shape == (1, 100, 4)
    assert boxes.min() >= 0 and boxes.max() <= 1 and logits.isfinite().all()
    assert lesson["boxes_abs"].shape == (0, 4)                  # random weights are sure of nothing


def test_forty_lines():
    code = [line for line in blocks()[0].splitlines() if line.strip() and not line.strip().startswith('"""')]
    assert len(code) <= 40


def test_positions_are_column_then_row(lesson):
    model = lesson["model"]
    position = model.positions(3, 5).reshape(3, 5, -1)
    assert torch.equal(position[2, 4], torch.cat([model.col_embed[4], model.row_embed[2]]))


def test_a_batch_is_its_images(lesson):
    torch.manual_seed(1)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        together, second = lesson["model"](images), lesson["model"](images[1:])
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(together[name][1:], second[name], rtol=1e-4, atol=1e-5)


def test_names_of_the_published_demo(lesson, tmp_path):
    """Its file is a bare state_dict under these names; a file of that kind loads, strictly."""
    state = lesson["model"].state_dict()
    shapes = {name: list(value.shape) for name, value in state.items()}
    assert {name.split(".")[0] for name in shapes} == {"backbone", "conv", "transformer", "linear_class", "linear_bbox",
                                                       "query_pos", "row_embed", "col_embed"}
    assert shapes["query_pos"] == [100, 256] and shapes["row_embed"] == shapes["col_embed"] == [50, 128]
    assert shapes["conv.weight"] == [256, 2048, 1, 1] and shapes["linear_class.weight"] == [92, 256]
    assert shapes["linear_bbox.weight"] == [4, 256] and shapes["backbone.layer4.2.conv3.weight"] == [2048, 512, 1, 1]
    reference = nn.Transformer(256, 8, 6, 6, batch_first=True)  # what the demo is made of
    assert {name.removeprefix("transformer.") for name in shapes if name.startswith("transformer.")} \
        == set(reference.state_dict())
    assert not any(".fc." in name for name in shapes)

    torch.save(state, tmp_path / "detr_demo.pth")
    other = lesson["MinimalDETR"]()
    checkpoint.load_model(other, checkpoint.load(tmp_path / "detr_demo.pth")["model"], "detr_demo.pth")
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_training_on_one_batch(lesson):
    history = lesson["history"]
    assert torch.tensor(history).isfinite().all() and history[-1] < history[0] - 0.3
    assert {"loss_ce", "loss_bbox", "loss_giou"} <= lesson["losses"].keys()
    for name, parameter in lesson["model"].named_parameters():
        assert parameter.grad is not None, name


def test_what_it_prints(lesson):
    assert "{'pred_logits': [1, 100, 92], 'pred_boxes': [1, 100, 4]}" in lesson["printed"]
    assert "['boxes', 'labels', 'scores']" in lesson["printed"]


def test_padding_is_not_skipped(lesson):
    """What the lesson says of it; should this fail, the lesson's last section is wrong."""
    assert (lesson["scaled"] - lesson["alone"]).abs().max() > 0.01
