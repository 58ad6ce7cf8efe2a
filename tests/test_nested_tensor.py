"""Batches of images of different sizes."""
import pytest
import torch

from detr.nested_tensor import NestedTensor, as_nested_tensor, nested_tensor_from_tensor_list


def test_padding_at_the_right_and_the_bottom():
    a, b = torch.rand(3, 4, 7) + 1, torch.rand(3, 6, 5) + 1
    batch = nested_tensor_from_tensor_list([a, b])
    tensors, mask = batch.decompose()
    assert tensors.shape == (2, 3, 6, 7) and mask.shape == (2, 6, 7) and mask.dtype == torch.bool and len(batch) == 2
    assert torch.equal(tensors[0, :, :4], a) and torch.equal(tensors[1, :, :, :5], b)
    assert (tensors[0, :, 4:] == 0).all() and (tensors[1, :, :, 5:] == 0).all()
    assert torch.equal(mask, (tensors == 0).all(1))


def test_type_is_kept():
    batch = nested_tensor_from_tensor_list([torch.ones(3, 2, 2, dtype=torch.float64), torch.ones(3, 1, 4).double()])
    assert batch.tensors.dtype == torch.float64


def test_what_a_model_may_be_called_with():
    images = [torch.rand(3, 4, 7), torch.rand(3, 6, 5)]
    nested = nested_tensor_from_tensor_list(images)
    assert as_nested_tensor(nested) is nested
    for samples in (images, tuple(images)):
        assert torch.equal(as_nested_tensor(samples).tensors, nested.tensors)
        assert torch.equal(as_nested_tensor(samples).mask, nested.mask)
    tensor = torch.rand(2, 3, 4, 5)
    unpadded = as_nested_tensor(tensor)
    assert torch.equal(unpadded.tensors, tensor) and not unpadded.mask.any()


def test_to():
    batch = as_nested_tensor(torch.rand(2, 3, 4, 5)).to("meta")
    assert batch.tensors.device.type == batch.mask.device.type == "meta"
    same = as_nested_tensor(torch.rand(2, 3, 4, 5)).to(torch.device("cpu"), non_blocking=True)
    assert isinstance(same, NestedTensor) and same.mask.dtype == torch.bool


def test_repr_tells_the_share_of_padding():
    batch = nested_tensor_from_tensor_list([torch.rand(3, 4, 4), torch.rand(3, 4, 2)])
    assert repr(batch) == "NestedTensor(tensors=[2, 3, 4, 4], padded=25.0%)"


@pytest.mark.parametrize("images, message", [
    ([], "at least one image"),
    (torch.zeros(0, 3, 4, 4), "at least one image"),
    ([torch.zeros(3, 4, 4), torch.zeros(4, 4)], r"image 1 of the batch has shape \(4, 4\); images are \[C, H, W\]"),
    ([torch.zeros(3, 4, 4), torch.zeros(1, 4, 4)], r"image 1 of the batch has shape \(1, 4, 4\).*same C"),
    (torch.zeros(3, 4, 4), r"image 0 of the batch has shape \(4, 4\)")])
def test_what_is_no_batch(images, message):
    with pytest.raises(ValueError, match=message):
        as_nested_tensor(images)
