"""datasets/images.py: every kind of file becomes the same upright picture, and the rest is refused by name."""
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.coco import CocoDetection
from datasets.images import Deferred, height_width, read_deferred, read_image
from detr.preprocessing import as_planes


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


# Other numbers of channels.

def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.RandomState(seed).randint(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def in_8_bits(pixels):
    """0..65535 -> the nearest of 0..255."""
    return pixels if pixels.dtype.itemsize == 1 else np.round(pixels / 257).astype(np.uint8)


def planes(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def test_grey_for_one_channel(picture, tmp_path):
    grey = picture.convert("L")
    for name, image in (("grey.png", grey), ("rgb_of_grey.png", grey.convert("RGB"))):
        read = read_image(saved(image, tmp_path / name), channels=1)
        assert read.mode == "L" and read.tobytes() == grey.tobytes()
    read = read_image(saved(picture, tmp_path / "rgb.png"), channels=1)
    assert read.mode == "L" and height_width(read) == (12, 20)
    luma = np.asarray(picture) @ np.array([0.299, 0.587, 0.114])                                    # ITU-R BT.601
    assert abs(np.asarray(read) - luma).max() <= 0.51
    for mode in ("P", "LA", "CMYK", "1"):
        assert read_image(saved(picture.convert(mode), tmp_path / f"{mode}.tif"), channels=1).mode == "L"
    values = np.array([[0, 128, 129, 257, 256 * 100, 65535]], dtype=np.uint16)
    deep = read_image(saved(Image.fromarray(values), tmp_path / "deep.png"), channels=1)
    assert np.asarray(deep).tolist() == [[0, 0, 1, 1, 100, 255]]


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_arrays(tmp_path, channels, dtype):
    pixels = noise(7, 9, channels, dtype=np.dtype(dtype).newbyteorder("=")).astype(dtype)
    path = tmp_path / "a.npy"
    np.save(path, np.asfortranarray(pixels) if channels == 5 else pixels)
    for content in (None, path.read_bytes()):
        read = read_image(path, content, channels)
        assert height_width(read) == (7, 9)
        if channels in (1, 3):
            assert read.mode == {1: "L", 3: "RGB"}[channels]
            read = torch.from_numpy(np.array(read).reshape(7, 9, channels)).permute(2, 0, 1)
        assert read.dtype == torch.uint8 and read.shape == (channels, 7, 9)
        assert torch.equal(read, planes(in_8_bits(pixels)))


def test_an_array_without_a_third_axis_is_grey(tmp_path):
    np.save(tmp_path / "a.npy", noise(7, 9))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.npy", channels=1)), noise(7, 9))


def write_tiff(pixels, order="<", apart=False, deflated=False, predicted=False, tile=None, orientation=1):
    """``pixels [H, W, C]`` as a TIFF 6.0 file with C bands: strips of five rows, or tiles; ``apart``: planes one after
    the other."""
    height, width, channels = pixels.shape
    pieces = []
    for part in [pixels[..., c:c + 1] for c in range(channels)] if apart else [pixels]:
        tall, wide = tile or (5, width)
        for top in range(0, height, tall):
            for left in range(0, width, wide):
                piece = part[top:top + tall, left:left + wide]
                if tile:
                    piece = np.pad(piece, ((0, tall - len(piece)), (0, wide - piece.shape[1]), (0, 0)))
                if predicted:
                    piece = np.concatenate([piece[:, :1], piece[:, 1:] - piece[:, :-1]], axis=1)
                stored = piece.astype(piece.dtype.newbyteorder(order)).tobytes()
                pieces.append(zlib.compress(stored) if deflated else stored)
    starts = np.cumsum([8, *map(len, pieces)])
    lengths = [len(piece) for piece in pieces]
    tags = {256: [width], 257: [height], 258: [8 * pixels.itemsize] * channels, 259: [8 if deflated else 1], 262: [1],
            274: [orientation], 277: [channels], 284: [2 if apart else 1], 317: [2 if predicted else 1],
            338: [0] * (channels - 1)}
    tags |= {322: [tile[1]], 323: [tile[0]], 324: starts[:-1], 325: lengths} if tile else \
        {273: starts[:-1], 278: [5], 279: lengths}
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", starts[-1])
    entries, behind = struct.pack(order + "H", len(tags)), b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            place = starts[-1] + 2 + 12 * len(tags) + 4 + len(behind)
            packed, behind = struct.pack(order + "I", place), behind + packed
        entries += struct.pack(order + "HHI", tag, 4, len(values)) + packed
    return head + b"".join(pieces) + entries + bytes(4) + behind


LAYOUTS = [dict(), dict(order=">"), dict(apart=True), dict(deflated=True, predicted=True), dict(tile=(16, 32)),
           dict(order=">", deflated=True, predicted=True, tile=(16, 32)), dict(apart=True, deflated=True),
           dict(apart=True, deflated=True, predicted=True, tile=(16, 16))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " ".join(f"{k}={v}" for k, v in layout.items()) or "plain")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 5, 13])
def test_the_bands_of_a_tiff(layout, dtype, channels):
    pixels = noise(37, 51, channels, dtype=dtype)
    read = read_image("a.tif", write_tiff(pixels, **layout), channels)
    assert read.dtype == torch.uint8 and torch.equal(read, planes(in_8_bits(pixels)))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_bands_that_pillow_writes(tmp_path, compression):
    pixels = noise(37, 51, 4)
    path = saved(Image.fromarray(pixels), tmp_path / "a.tif", compression=compression)
    assert torch.equal(read_image(path, channels=4), planes(pixels))


UPRIGHT = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
           5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
           8: lambda a: np.rot90(a)}                                                # TIFF 6.0, tag 274


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_and_pages_are_turned_upright(tmp_path, orientation):
    pixels = noise(6, 9, 5)
    want = planes(UPRIGHT[orientation](pixels))
    assert torch.equal(read_image("a.tif", write_tiff(pixels, orientation=orientation), 5), want)
    exif = Image.Exif()
    exif[0x0112] = orientation
    first, *rest = (Image.fromarray(pixels[..., c]) for c in range(5))
    assert torch.equal(read_image(saved(first, tmp_path / "a.tif", save_all=True, append_images=rest, exif=exif),
                                  channels=5), want)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_pages_of_a_tiff(tmp_path, dtype):
    """One channel each; a smaller page is a preview."""
    pixels = noise(12, 20, 5, dtype=dtype)
    first, *rest = (Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(5))
    path = saved(first, tmp_path / "a.tif", save_all=True, append_images=[*rest, Image.new("L", (10, 6))])
    assert torch.equal(read_image(path, channels=5), planes(in_8_bits(pixels)))
    assert read_image(path).mode == "RGB" and read_image(path).size == (20, 12)             # the first, as before


@pytest.mark.parametrize("name, mode, channels", [
    ("a.png", "RGBA", 4), ("a.tif", "RGBA", 4), ("a.webp", "RGBA", 4), ("a.png", "LA", 2), ("a.tif", "CMYK", 4)])
def test_alpha_and_ink_are_channels_where_they_are_asked_for(tmp_path, name, mode, channels):
    pixels = noise(12, 20, channels)
    image = Image.frombytes(mode, (20, 12), pixels.tobytes())
    options = {"lossless": True, "exact": True} if name == "a.webp" else {}
    assert torch.equal(read_image(saved(image, tmp_path / name, **options), channels=channels), planes(pixels))


def test_a_palette_with_transparency_has_four(picture, tmp_path):
    path = saved(picture.quantize(8), tmp_path / "a.png", transparency=0)
    read = read_image(path, channels=4)
    assert torch.equal(read[:3], planes(np.asarray(picture))) and set(read[3].unique().tolist()) == {0, 255}


@pytest.mark.parametrize("name, wanted, found", [
    ("a.jpg", 5, "3 channels"), ("rgb.png", 4, "3 channels"), ("grey.png", 2, "1 channel"), ("five.npy", 3, "5 channels"),
    ("five.npy", 1, "5 channels"), ("five.tif", 4, "5 channels"), ("rgb.tif", 6, "3 channels")])
def test_another_number_of_channels_is_named_with_the_flag(picture, tmp_path, name, wanted, found):
    for file in ("a.jpg", "rgb.png", "rgb.tif"):
        saved(picture, tmp_path / file)
    saved(picture.convert("L"), tmp_path / "grey.png")
    np.save(tmp_path / "five.npy", noise(12, 20, 5))
    (tmp_path / "five.tif").write_bytes(write_tiff(noise(12, 20, 5)))
    with pytest.raises(OSError, match=rf"{name} has {found}, not the {wanted} of --in_channels; give --in_channels "
                                      rf"{found[0]}, or a file that has {wanted}: a .npy array \[height, width"):
        read_image(tmp_path / name, channels=wanted)


def npy(array, allow_pickle=False):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


@pytest.mark.parametrize("name, content, message", [
    ("a.npy", npy(noise(12, 20, 5))[:-7], "cut short, copy it again"),
    ("a.npy", npy(noise(12, 20, 5))[:20], "cut short"),
    ("a.npy", b"", "cut short"),
    ("a.npy", npy(np.zeros((12, 20, 5), np.float32)), "its numbers are float32; convert them to uint8, or to uint16"),
    ("a.npy", npy(np.zeros((12, 20, 5), np.int16)), "its numbers are int16"),
    ("a.npy", npy(np.array([None]), allow_pickle=True), "allow_pickle=False"),
    ("a.npy", npy(noise(1, 12, 20, 5)), r"its array is \[1, 12, 20, 5\]; \[height, width, channels\] is needed"),
    ("a.npy", npy(noise(0, 20, 5)), r"its array is \[0, 20, 5\]"),
    ("a.tif", write_tiff(noise(12, 20, 5, dtype=np.uint32)), "its bands are not whole numbers of 8 or 16 bits"),
])
def test_what_cannot_be_read_as_channels(name, content, message):
    with pytest.raises(OSError, match=rf"image {name} \({len(content)} bytes\) cannot be read: .*{message}"):
        read_image(name, content, 5)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")                     # said by Pillow, too
@pytest.mark.parametrize("name, content", [("a.jpg", b"no image"), ("a.tif", write_tiff(noise(12, 20, 5))[:900])])
def test_what_is_no_image_of_several_channels(name, content):
    with pytest.raises(OSError, match=rf"image {name} .*is not in a format that Pillow reads; copy it again, convert it "
                                      rf"to .npy, an array \[height, width, channels\], or take it out"):
        read_image(name, content, 5)


# Read later.

def textured(height=120, width=88):
    """Smooth, as photographs are, and nowhere symmetric."""
    small = Image.fromarray(noise(height // 8, width // 8, 3))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name, mode, options", [
    ("a.jpg", "RGB", {}), ("a.jpg", "RGB", {"progressive": True, "subsampling": 0}), ("a.jpg", "L", {}),
    ("a.jpg", "CMYK", {}), ("a.png", "RGB", {}), ("a.png", "RGBA", {}), ("a.png", "P", {}), ("a.tif", "L", {}),
    ("a.webp", "RGB", {})])
def test_what_is_read_later_is_what_is_read_now(tmp_path, name, mode, options, channels):
    path = saved(textured().convert(mode), tmp_path / name, **options)
    for content in (None, path.read_bytes()):
        later, now = read_deferred(path, content, channels), read_image(path, content, channels)
        assert isinstance(later, Deferred) and height_width(later) == height_width(now)
        assert torch.equal(later.planes(), as_planes(now)) and len(later.planes()) == channels


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_later(tmp_path, orientation, reduced):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(textured(), tmp_path / "turned.jpg", exif=exif)
    later, now = read_deferred(path, reduced=reduced), read_image(path)
    assert height_width(later) == height_width(now) and torch.equal(later.planes(), as_planes(now))
    height, width = now.height // 5, now.width // 5
    small = as_planes(now.resize((width, height), Image.Resampling.BILINEAR)).int()
    found = later.resize((width, height), Image.Resampling.BILINEAR).planes().int()
    assert (found - small).abs().float().mean() < (3 if reduced else 0.02)                  # turned wrongly: 30


def test_several_channels_are_read_now(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(npy(noise(12, 20, 5)))
    assert torch.equal(read_deferred(path, channels=5), read_image(path, channels=5))
    path.write_bytes(npy(noise(12, 20, 3)))
    assert read_deferred(path).tobytes() == read_image(path).tobytes()


def test_damage_is_told_as_ever_when_it_is_seen(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jpg is not there; correct the path"):
        read_deferred(tmp_path / "nowhere.jpg")
    (tmp_path / "letter.jpg").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"letter.jpg \(8 bytes\) is not in a format that Pillow reads"):
        read_deferred(tmp_path / "letter.jpg")
    path = saved(textured(), tmp_path / "cut.jpg")
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(OSError) as now:
        read_image(path)
    for reduced in (False, True):
        later = read_deferred(path, reduced=reduced).resize((8, 8), Image.Resampling.BILINEAR)
        with pytest.raises(OSError) as then:
            later.planes()
        assert str(then.value) == str(now.value) and "cannot be read" in str(now.value)


def test_damage_is_told_with_the_image_id(tmp_path):
    whole = saved(textured(), tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "a.json").write_text('{"images": [{"id": 7, "file_name": "cut.jpg", "height": 120, "width": 88}], '
                                     '"annotations": [], "categories": [{"id": 1, "name": "a"}]}')
    for transforms in (None, lambda image, target: (image.planes(), target)):
        data = CocoDetection(tmp_path, tmp_path / "a.json", transforms, fast_images="on")
        with pytest.raises(OSError, match=r"cut.jpg .*cannot be read.*\(image id 7 of .*a.json\)$"):
            data[0]


OPERATIONS = {
    "flip": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "crop": lambda image: image.crop((11, 7, 60, 91)),
    "crop beyond": lambda image: image.crop((-3, 5, 95, 130)),
    "larger": lambda image: image.resize((133, 160), Image.Resampling.BILINEAR),
    "smaller": lambda image: image.resize((31, 77), Image.Resampling.BILINEAR),
    "same size": lambda image: image.resize(image.size, Image.Resampling.BILINEAR),
}


@pytest.mark.parametrize("second", OPERATIONS)
@pytest.mark.parametrize("first", OPERATIONS)
def test_what_is_noted_is_what_pillow_does(first, second):
    picture = textured()
    given = as_planes(picture)
    now, later = picture, Deferred(120, 88, lambda times: given)
    for operation in (OPERATIONS[first], OPERATIONS[second]):
        now, later = operation(now), operation(later)
    found, want = later.planes(), as_planes(now)
    assert later.size == now.size and found.dtype == torch.uint8 and found.shape == want.shape
    difference = (found.int() - want.int()).abs()
    resizes = {first, second} & {"larger", "smaller"}
    assert difference.max() <= 2 * bool(resizes) and (difference > 0).float().mean() < 0.02
    assert torch.equal(given, as_planes(picture))                                       # not changed in place


def test_how_much_smaller_a_file_may_be_read():
    asked = []

    def read(times):
        asked.append(times)
        return torch.zeros(3, 120, 88, dtype=torch.uint8)

    def small(image, height=12, width=11):
        return image.resize((width, height), Image.Resampling.BILINEAR)

    whole = Deferred(120, 88, read)
    for image in (whole, small(whole), OPERATIONS["flip"](small(whole)), small(OPERATIONS["flip"](whole)),
                  OPERATIONS["crop"](small(whole, 60, 44)), small(OPERATIONS["crop"](whole)),
                  small(OPERATIONS["larger"](whole))):
        image.planes()
    assert asked == pytest.approx([1, 8, 8, 8, 2, 1, 88 / 133])


def test_what_is_decoded_smaller(tmp_path):
    """At half of its size where a third of it or less is wanted, and so on; PNGs never."""
    picture = textured(1600, 1200)
    for name in ("a.jpg", "a.png"):
        path = saved(picture, tmp_path / name)
        for divisor, factor in ((2.9, 1), (3, 2), (6, 4), (11.5, 4), (12, 8), (30, 8)):
            later = read_deferred(path, reduced=True).resize((int(1200 / divisor), int(1600 / divisor)),
                                                             Image.Resampling.BILINEAR)
            expected = (1600, 1200) if name == "a.png" else (1600 // factor, 1200 // factor)
            assert later._read(later._times).shape[1:] == expected, (name, divisor)
    assert height_width(read_image(tmp_path / "a.jpg", reduced=8)) == (200, 150)


@pytest.mark.parametrize("operation", [
    lambda image: image.resize((5, 5)), lambda image: image.resize((5, 5), Image.Resampling.BICUBIC),
    lambda image: image.resize((5, 5), Image.Resampling.BILINEAR, (0, 0, 2, 2)),
    lambda image: image.transpose(Image.Transpose.ROTATE_90), lambda image: image.convert("L"), np.asarray,
    lambda image: image.tobytes()])
def test_what_needs_pixels_is_refused(operation):
    with pytest.raises(TypeError, match="before ToTensor.*put it behind ToTensor, or leave --fast_images out"):
        operation(Deferred(20, 30, lambda times: torch.zeros(3, 20, 30, dtype=torch.uint8)))
