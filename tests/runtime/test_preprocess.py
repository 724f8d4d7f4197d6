"""Every kind of image file becomes the right pixels; pixels equal transformers' PIL image processors."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from runtime.errors import ImageError, InputError
from runtime.preprocess import PreprocessSettings, load_image, preprocess, preprocess_batch

TOLERANCE = 1e-6
"""Largest absolute difference of a normalised pixel from transformers' own."""

RESAMPLE_NUMBER = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL.Image.Resampling


def settings(height=24, width=20, resample="bicubic", mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28)):
    return PreprocessSettings(height=height, width=width, resample=resample, mean=mean, std=std)


def noise(height, width, channels=3, seed=0):
    shape = (height, width) if channels is None else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixel(source, x=0, y=0):
    return load_image(source).getpixel((x, y))


# --- parity with transformers


@pytest.mark.parametrize("processor_name", ["blip", "vit", "clip"])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("height_width", [(1, 1), (37, 91), (91, 37), (224, 3), (5, 1200)])
def test_pixels_equal_transformers(processor_name, resample, height_width):
    transformers = pytest.importorskip("transformers", reason="the judge is transformers' image processor")
    classes = {"blip": "BlipImageProcessorPil", "vit": "ViTImageProcessorPil", "clip": "CLIPImageProcessorPil"}
    chosen = settings(resample=resample)
    judge = getattr(transformers, classes[processor_name])(
        size={"height": chosen.height, "width": chosen.width},
        resample=RESAMPLE_NUMBER[resample],
        image_mean=chosen.mean,
        image_std=chosen.std,
        do_center_crop=False,
    )
    image = Image.fromarray(noise(*height_width))
    expected = np.asarray(judge(image, return_tensors="np")["pixel_values"][0])
    found = preprocess(image, chosen)
    assert found.dtype == np.float32 and found.shape == (3, chosen.height, chosen.width) == expected.shape
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_resample_filters_differ():
    image = noise(40, 31)
    results = [preprocess(image, settings(resample=name)) for name in RESAMPLE_NUMBER]
    for first in range(4):
        for second in range(first):
            assert np.abs(results[first] - results[second]).max() > 0.01


def test_batch_equals_singles_and_reads_a_path_once(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(noise(9, 9)).save(path)
    other = noise(4, 6, seed=1)
    opened = []
    real_open = Image.open
    monkeypatch.setattr(Image, "open", lambda source: opened.append(source) or real_open(source))
    batch = preprocess_batch([path, other, str(path)], settings())
    assert len(opened) == 1
    assert batch.shape == (3, 3, 24, 20)
    np.testing.assert_array_equal(batch[0], batch[2])
    np.testing.assert_array_equal(batch[1], preprocess(other, settings()))
    with pytest.raises(InputError, match="at least one image"):
        preprocess_batch([], settings())


# --- kinds of files


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation, form):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    undo = {  # the stored picture that each orientation turns upright
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    exif = Image.Exif()
    exif[274] = orientation
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    found = np.asarray(load_image(saved(stored, form, exif=exif, **lossless)))
    assert found.shape == upright.shape
    assert np.abs(found[4::8, 8::16].astype(int) - upright[4::8, 8::16]).max() <= 4  # JPEG rounds


def test_rgba_is_composited_on_white():
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 127)])
    for form in ("PNG", "WEBP", "TIFF"):
        data = saved(rgba, form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
        assert [pixel(data, x) for x in range(3)] == [(10, 20, 30), (255, 255, 255), (128, 128, 128)], form
    assert pixel(np.array([[[10, 20, 30, 0]]], np.uint8)) == (255, 255, 255)
    assert rgba.mode == "RGBA", "the caller's image is left as it was"


def test_grey_with_alpha_is_composited_on_white():
    image = Image.new("LA", (2, 1))
    image.putdata([(40, 255), (40, 0)])
    data = saved(image, "PNG")
    assert (pixel(data, 0), pixel(data, 1)) == ((40, 40, 40), (255, 255, 255))


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_palette_with_transparency(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putdata([0, 1])
    data = saved(image, "PNG", transparency=transparency)
    assert (pixel(data, 0), pixel(data, 1)) == ((200, 0, 0), (255, 255, 255))
    assert pixel(saved(image, "PNG"), 1) == (0, 0, 200), "without tRNS the palette colour stays"


def test_one_transparent_colour():
    image = Image.new("RGB", (2, 1))
    image.putdata([(1, 2, 3), (9, 9, 9)])
    data = saved(image, "PNG", transparency=(9, 9, 9))
    assert (pixel(data, 0), pixel(data, 1)) == ((1, 2, 3), (255, 255, 255))
    grey = Image.fromarray(np.array([[7, 50]], np.uint8))
    data = saved(grey, "PNG", transparency=7)
    assert (pixel(data, 0), pixel(data, 1)) == ((255, 255, 255), (50, 50, 50))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(form):
    values = np.array([[0, 257, 32896, 65535, 300]], np.uint16)
    data = saved(Image.fromarray(values), form)
    assert [pixel(data, x)[0] for x in range(5)] == [0, 1, 128, 255, 1]


def test_16_bit_grey_with_a_transparent_value():
    data = saved(Image.fromarray(np.array([[1000, 2570]], np.uint16)), "PNG", transparency=1000)
    assert (pixel(data, 0), pixel(data, 1)) == ((255, 255, 255), (10, 10, 10))


def test_16_bit_big_endian_tiff():
    values = np.array([[0, 32896, 65535]], ">u2")
    data = saved(Image.fromarray(values.astype("<u2")), "TIFF")
    big = Image.frombytes("I;16B", (3, 1), values.tobytes())
    for source in (data, big, saved(big, "TIFF")):
        assert [pixel(source, x)[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_float_images_say_their_range_by_their_values(top):
    values = (np.array([[0.0, 0.5, 1.0]], np.float32) * top).astype(np.float32)
    data = saved(Image.fromarray(values), "TIFF")
    assert [pixel(data, x)[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), 65536.0])
def test_grey_values_out_of_range_are_refused(bad):
    with pytest.raises(ImageError, match="expected grey values from 0 to 65535"):
        load_image(Image.fromarray(np.array([[0.0, bad]], np.float32)))


def test_integer_image_holds_16_bits():
    assert pixel(Image.fromarray(np.array([[32896]], np.int32))) == (128, 128, 128)
    with pytest.raises(ImageError, match="65536"):
        load_image(Image.fromarray(np.array([[65536]], np.int32)))


def test_cmyk_jpeg_as_adobe_writes_it():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # full magenta and yellow is red
    data = saved(cmyk, "JPEG", quality=100)
    assert b"Adobe" in data, "Pillow writes the Adobe marker with inverted values, as Photoshop does"
    red, green, blue = pixel(data)
    assert red > 245 and green < 10 and blue < 10
    assert pixel(saved(cmyk, "TIFF")) == (255, 0, 0)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)), ("HSV", (0, 255, 255), (255, 0, 0)), ("P", 0, (5, 6, 7))],
)
def test_other_modes(mode, colour, expected):
    image = Image.new(mode, (2, 2), colour)
    if mode == "P":
        image.putpalette([5, 6, 7])
    assert pixel(image) == expected


def test_premultiplied_alpha():
    assert pixel(Image.new("RGBA", (1, 1), (0, 0, 0, 127)).convert("RGBa")) == (128, 128, 128)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(form):
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(first, form, save_all=True, append_images=[second], duration=50, **options)
    assert pixel(data) == (255, 0, 0)


def test_transparent_gif_is_composited_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putdata([0, 1])
    data = saved(image, "GIF", transparency=1)
    assert (pixel(data, 0), pixel(data, 1)) == ((200, 0, 0), (255, 255, 255))


def test_sources_agree(tmp_path):
    array = noise(6, 9)
    path = tmp_path / "picture with spaces ü.png"
    Image.fromarray(array).save(path)
    for source in (array, Image.fromarray(array), path, str(path), path.read_bytes()):
        np.testing.assert_array_equal(np.asarray(load_image(source)), array)
    grey = noise(6, 9, None)
    np.testing.assert_array_equal(np.asarray(load_image(grey))[:, :, 1], grey)
    np.testing.assert_array_equal(np.asarray(load_image(grey[:, :, None]))[:, :, 1], grey)


def test_largest_and_smallest():
    assert load_image(noise(1, 1)).size == (1, 1)
    assert preprocess(noise(1, 1), settings()).shape == (3, 24, 20)
    data = saved(Image.new("RGB", (8000, 6000), (0, 128, 255)), "JPEG")
    pixels = preprocess(data, settings(mean=(0, 0, 0), std=(1, 1, 1)))
    np.testing.assert_allclose(pixels.mean(axis=(1, 2)), [0, 128 / 255, 1], atol=0.01)


def test_loading_leaves_no_file_open(tmp_path, monkeypatch):
    path = tmp_path / "a.gif"
    Image.new("RGB", (4, 4)).save(path, save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])
    opened = []
    real_open = Image.open
    monkeypatch.setattr(Image, "open", lambda source: opened.append(real_open(source)) or opened[-1])
    load_image(path)
    with pytest.raises(ValueError, match="closed"):
        opened[0].seek(1)
    mine = real_open(path)
    load_image(mine)
    mine.seek(1)  # the caller's image stays open
    mine.close()


# --- refusals


def test_missing_folder_and_foreign_files(tmp_path):
    text = tmp_path / "notes.jpg"
    text.write_text("not an image")
    empty = tmp_path / "empty.png"
    empty.touch()
    for source, found in (
        (tmp_path / "none.png", "found nothing under that name"),
        (tmp_path, "found a folder"),
        (text, "found other data"),
        (empty, "found other data"),
        (b"", "found other data"),
    ):
        with pytest.raises(ImageError, match=found) as caught:
            load_image(source)
        if not isinstance(source, bytes):
            assert str(source) in str(caught.value)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_refused(form, tmp_path):
    data = saved(Image.fromarray(noise(64, 64)), form)
    path = tmp_path / f"cut.{form.lower()}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=str(path)) as caught:
        load_image(path)
    assert "0x" not in str(caught.value), "no object addresses of the decoder in the message"


def test_a_bomb_is_refused_before_decoding():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="expected at most 178,956,970 pixels"):
        load_image(bomb)
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (13_500, 13_500), (0, 0))
    with pytest.raises(ImageError, match="expected at most 178,956,970 pixels"):
        load_image(huge)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_arrays_of_another_kind_are_refused(array):
    with pytest.raises(ImageError, match="expected uint8"):
        load_image(array)


def test_settings_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="std"):
        settings(std=(0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="resample"):
        settings(resample="box")


def test_tiff_tag_orientation_is_not_applied_twice():
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[274] = 6
    assert load_image(saved(Image.new("RGB", (4, 2)), "TIFF", tiffinfo=info)).size == (2, 4)
