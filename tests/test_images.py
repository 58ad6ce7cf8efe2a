"""datasets/images.py: every kind of file becomes the same upright RGB picture, and the rest is refused by name."""
import numpy as np
import pytest
from PIL import Image

from datasets.images import read_image


@pytest.fixture
def picture():
    """20 x 12, with a different colour in each corner."""
    pixels = np.full((12, 20, 3), 128, dtype=np.uint8)
    pixels[:6, :10] = 255, 0, 0
    pixels[:6, 10:] = 0, 255, 0
    pixels[6:, :10] = 0, 0, 255
    return Image.fromarray(pixels)


def saved(image, path, **options):
    image.save(path, **options)
    return path


def same(image, pixels, within=0):
    assert image.mode == "RGB"
    a, b = np.asarray(image).astype(int), np.asarray(pixels).astype(int)
    return a.shape == b.shape and abs(a - b).max() <= within


def test_rgb_and_palette_are_exact(picture, tmp_path):
    assert same(read_image(saved(picture, tmp_path / "rgb.png")), picture)
    palette = picture.quantize(8)
    assert palette.mode == "P"
    assert same(read_image(saved(palette, tmp_path / "palette.png")), picture)
    assert same(read_image(saved(palette, tmp_path / "seen_through.png", transparency=0)), picture)
    assert same(read_image(saved(palette, tmp_path / "palette.gif")), picture)


def test_grey_is_the_same_in_all_channels(picture, tmp_path):
    grey = picture.convert("L")
    want = np.repeat(np.asarray(grey)[..., None], 3, 2)
    assert same(read_image(saved(grey, tmp_path / "grey.png")), want)
    assert same(read_image(saved(grey, tmp_path / "grey.jpg", quality=100)), want, within=8)
    bits = picture.convert("1", dither=Image.Dither.NONE)
    assert same(read_image(saved(bits, tmp_path / "bits.png")), np.asarray(bits.convert("RGB")))


def test_transparency_is_ignored_and_the_stored_colour_kept(picture, tmp_path):
    rgba, la = picture.convert("RGBA"), picture.convert("LA")
    for image in (rgba, la):
        image.putalpha(Image.fromarray(np.arange(240, dtype=np.uint8).reshape(12, 20)))
    assert same(read_image(saved(rgba, tmp_path / "rgba.png")), picture)
    assert same(read_image(saved(la, tmp_path / "la.png")), picture.convert("L").convert("RGB"))


def test_cmyk(picture, tmp_path):
    assert same(read_image(saved(picture.convert("CMYK"), tmp_path / "cmyk.tif")), picture)
    assert same(read_image(saved(picture.convert("CMYK"), tmp_path / "cmyk.jpg", quality=100)), picture, within=40)


@pytest.mark.parametrize("name", ["grey16.png", "grey16.tif"])
def test_grey_of_16_bits_is_scaled_not_clipped(name, tmp_path):
    values = np.array([[0, 128, 129, 257, 256 * 100, 65535]], dtype=np.uint16)
    read = read_image(saved(Image.fromarray(values), tmp_path / name))
    assert same(read, np.array([0, 0, 1, 1, 100, 255])[None, :, None].repeat(3, 2))


def test_grey_of_unknown_range_is_refused(tmp_path):
    wide = saved(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), tmp_path / "wide.tif")
    with pytest.raises(OSError, match="wide.tif.*0 to 70000.*convert"):
        read_image(wide)
    fractions = saved(Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)), tmp_path / "fractions.tif")
    with pytest.raises(OSError, match="fractions.tif.*floating-point.*convert"):
        read_image(fractions)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(picture, tmp_path, orientation, format):
    as_stored = {                                           # what the camera stored for each tag to look like `picture`
        1: picture, 2: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: picture.transpose(Image.Transpose.ROTATE_180), 4: picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: picture.transpose(Image.Transpose.TRANSPOSE), 6: picture.transpose(Image.Transpose.ROTATE_90),
        7: picture.transpose(Image.Transpose.TRANSVERSE), 8: picture.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if format == "jpg" else {}
    path = saved(as_stored, tmp_path / f"turned.{format}", exif=exif, **options)
    assert same(read_image(path), picture, within=30 if format == "jpg" else 0)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.gif", "a.bmp", "a.webp"])
def test_content_at_hand_is_read_as_the_file(picture, tmp_path, name):
    path = saved(picture, tmp_path / name)
    want = read_image(path)
    content = path.read_bytes()
    path.unlink()                                                               # it is not opened
    assert read_image(path, content).tobytes() == want.tobytes()
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_image(path)


def test_content_that_is_damaged(picture, tmp_path):
    with pytest.raises(OSError, match=r"gone.jpg \(8 bytes\) is not in a format.*copy it again"):
        read_image(tmp_path / "gone.jpg", b"no image")
    with pytest.raises(OSError, match=r"gone.jpg \(0 bytes\) is not in a format"):
        read_image(tmp_path / "gone.jpg", b"")
    whole = saved(Image.effect_noise((200, 200), 90), tmp_path / "a.png").read_bytes()
    with pytest.raises(OSError, match=rf"gone.png \({len(whole) // 2} bytes\) cannot be read.*copy it again"):
        read_image(tmp_path / "gone.png", whole[:len(whole) // 2])


def test_what_cannot_be_read_is_named_with_a_remedy(picture, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jpg is not there; correct the path"):
        read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_image(tmp_path)                                                                        # a folder
    noise = Image.effect_noise((200, 200), 90).convert("RGB")
    for name in ("cut.jpg", "cut.png"):
        whole = saved(noise, tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:len(whole) // 2])
        with pytest.raises(OSError, match=rf"{name} \({len(whole) // 2} bytes\) cannot be read.*copy it again"):
            read_image(tmp_path / name)
    for name, content in (("empty.jpg", b""), ("letter.jpg", b"no image"), ("head.png", whole[:5])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError, match=rf"{name} \({len(content)} bytes\) is not in a format.*copy it again"):
            read_image(tmp_path / name)
