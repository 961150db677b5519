"""Opening pictures: every kind of bad one is refused with a reason."""
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from common import pictures
from common.pictures import FORMATS, BadPicture, frames, open_picture
from helpers import HTML, drawn, encoded, huge

RED, WHITE = (255, 0, 0), (255, 255, 255)
GREEN, GREY = (0, 255, 0), (90, 90, 90)
JPEG, PNG = encoded(drawn(), "JPEG"), encoded(drawn())


def plain(colour, size=(4, 4), mode="RGB"):
    return Image.new(mode, size, colour)


def animation(colours, format="GIF"):
    first, *rest = [plain(colour, (6, 4)) for colour in colours]
    more = {"save_all": True, "append_images": rest, "duration": 50, "lossless": True}
    return encoded(first, format, **more)


def is_red(picture, tolerance=8):
    return abs(np.asarray(picture, int) - RED).max() < tolerance


# ---------------- one picture

@pytest.mark.parametrize("format", FORMATS)
def test_the_five_formats_from_a_path_and_from_bytes(format, tmp_path):
    body = encoded(plain(RED, (8, 5)), format)
    path = tmp_path / "no-suffix"
    path.write_bytes(body)
    for source in (body, path, str(path)):
        picture = open_picture(source)
        assert (picture.mode, picture.size) == ("RGB", (8, 5)) and is_red(picture)


UNKNOWN = "not one of five picture formats"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
PSD = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(400)
OTHERS = ("TIFF", "ICO", "EPS", "TGA", "PPM", "PCX", "ICNS", "JPEG2000", "SGI", "PDF")
BAD = {
    "svg": (SVG, UNKNOWN),
    "html": (HTML, UNKNOWN),
    "text": (b"x", UNKNOWN),
    "empty": (b"", "empty file"),
    "cut jpeg": (JPEG[:len(JPEG) // 2], "cut off"),
    "cut png": (PNG[:len(PNG) // 2], "cut off"),
    "cut webp": (encoded(drawn(), "WEBP")[:200], f"cut off|damaged|{UNKNOWN}"),
    "cut gif": (encoded(drawn(), "GIF")[:-300], "cut off"),
    "cut bmp": (encoded(drawn(), "BMP")[:-300], "cut off"),
    "header": (JPEG[:30], f"{UNKNOWN}|cut off"),
    "zeros": (PNG[:60] + bytes(500), "cut off|damaged"),
    "placeholder gif": (encoded(Image.new("P", (1, 1)), "GIF"), "one pixel: a placeholder"),
    "placeholder png": (encoded(plain(RED, (1, 1))), "one pixel: a placeholder"),
    "thread": (encoded(plain(RED, (2, 400))), "too thin: 2 x 400"),
    "large": (huge(9_460, 9_460), "too many pixels: 9460 x 9460"),
    "larger": (huge(20_000, 20_000), "too many pixels"),
    "no pixels": (huge(0, 0), UNKNOWN),
    "large gif": (b"GIF89a" + b"\xff" * 4 + encoded(drawn(), "GIF")[10:], "too many pixels"),
    "psd": (PSD, f"{UNKNOWN}.*"),
    **{format: (encoded(drawn(), format), UNKNOWN) for format in OTHERS},
}


@pytest.mark.parametrize("body, reason", BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures(body, reason, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(body)
    for call, source in ((open_picture, body), (open_picture, path), (frames, path)):
        with pytest.raises(BadPicture, match=f"^({reason})$"):
            call(source)


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_any_bytes_is_a_picture_or_bad():
    """Pillow raises errors of many kinds; none but BadPicture comes out."""
    rng = np.random.default_rng(0)
    bodies = [encoded(drawn(), format) for format in FORMATS] + [animation(["red", "blue"])]
    for n in range(400):
        body = np.frombuffer(bodies[n % len(bodies)], np.uint8).copy()
        where = rng.integers(0, min(len(body), 300), 8)
        body[where] = rng.integers(0, 256, 8)
        try:
            open_picture(body.tobytes())
        except BadPicture as error:
            assert str(error)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "missing.jpg", tmp_path, tmp_path / "pipe", "a\0b"):
        with pytest.raises(BadPicture, match="^no such file$"):
            open_picture(source)
    with pytest.raises(BadPicture, match="^no such file$"):
        frames(tmp_path / "pipe")


def test_global_settings_are_left_alone():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert Image.MAX_IMAGE_PIXELS == pictures.PIXELS


@pytest.mark.filterwarnings("error")
def test_warnings_as_errors_stay_bad_pictures():
    with pytest.raises(BadPicture, match="^too many pixels$"):
        open_picture(huge(9_460, 9_460))


# ---------------- what becomes of transparency, modes, orientation

def transparent(mode):
    """A red (or grey) picture whose first pixel is transparent green."""
    if mode == "P":
        picture = Image.new("P", (4, 4), 1)
        picture.putpalette([*GREEN, *RED])
        picture.putpixel((0, 0), 0)
        return encoded(picture, transparency=0)
    if mode == "RGB":
        picture = plain(RED)
        picture.putpixel((0, 0), GREEN)
        return encoded(picture, transparency=GREEN)
    picture = plain((*(GREY if mode == "LA" else RED), 255), mode="RGBA")
    picture.putpixel((0, 0), (*GREEN, 0))
    return encoded(picture.convert(mode))


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "RGB"])
def test_transparent_becomes_white(mode):
    picture = open_picture(transparent(mode))
    assert picture.getpixel((0, 0)) == WHITE
    assert picture.getpixel((2, 2)) == (GREY if mode == "LA" else RED)


@pytest.mark.parametrize("mode", [
    "1", "L", "P", "PA", "LA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16",
    "I;16B", "I;16L", "F",
])
def test_every_mode_becomes_rgb(mode):
    picture = pictures.to_rgb(Image.new(mode, (3, 2)))
    assert (picture.mode, picture.size) == ("RGB", (3, 2))


def test_cmyk_jpeg():
    body = encoded(plain((0, 255, 255, 0), (8, 8), "CMYK"), "JPEG")
    assert is_red(open_picture(body), tolerance=30)


def test_16_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 257, 30_000, 65_535]] * 2, np.uint16)
    picture = open_picture(encoded(Image.fromarray(grey)))
    assert np.asarray(picture)[0].tolist() == [[v] * 3 for v in (0, 1, 116, 255)]


def test_exif_turns_a_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_picture(encoded(plain(RED, (8, 5)), "JPEG", exif=exif)).size == (5, 8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_bad_exif_does_not_hurt(format):
    body = encoded(plain(RED, (8, 5)), format, exif=b"Exif\0\0XX*\0\x08\0\0\0")
    assert open_picture(body).size == (8, 5)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(format):
    body = animation(["red", "blue", "lime"], format)
    assert open_picture(body).getpixel((1, 1)) == RED


# ---------------- frames

COLOURS = [(i * 10, 0, 0) for i in range(25)]


def reds(images, at=(1, 1)):
    return [image.getpixel(at)[0] for image in images]


@pytest.fixture
def animated(tmp_path):
    """animated(body) -> the path of a file that holds it."""
    def write(body):
        path = tmp_path / "x"
        path.write_bytes(body)
        return path
    return write


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_frames_of_an_animation(format, animated):
    path = animated(animation(COLOURS, format))
    images = frames(path)
    assert reds(images) == [i * 10 for i in range(0, 20, 2)]    # stride 25 // 10
    assert {(image.mode, image.size) for image in images} == {("RGB", (6, 4))}
    assert len(frames(path, most=40)) == 25


@pytest.mark.parametrize("limit, alone", [(1_000_000, False), (8, True)])
def test_frames_are_worked_on_one_by_one_and_large_ones_alone(limit, alone, animated, monkeypatch):
    monkeypatch.setattr(pictures, "PIXELS", limit * 8)    # the frames have 24 pixels
    path = animated(animation(COLOURS, "PNG"))
    locked = frames(path, make=lambda image: pictures.LARGE.locked())
    assert locked == [alone] * 10


def test_frames_of_a_still_picture(animated):
    assert len(frames(animated(JPEG))) == 1
    views = encoded(drawn(), "MPO", save_all=True, append_images=[drawn(1)])    # of one moment
    assert len(frames(str(animated(views)))) == 1


def test_frames_of_a_folder_in_natural_order(tmp_path):
    for n in range(1, 24):
        (tmp_path / f"frame{n}.png").write_bytes(encoded(plain((n, 0, 0))))
    (tmp_path / ".hidden").write_bytes(b"x")
    (tmp_path / "more").mkdir()
    assert reds(frames(tmp_path)) == list(range(1, 20, 2))
    assert reds(frames(tmp_path, most=12)) == list(range(1, 13))
    (tmp_path / "frame3.png").write_bytes(b"")
    with pytest.raises(BadPicture, match="^frame3.png: empty file$"):
        frames(tmp_path)


@pytest.mark.parametrize("backwards", [False, True])
def test_equal_numbers_are_taken_by_name(backwards, tmp_path, monkeypatch):
    """A folder lists its files in any order."""
    for n, name in enumerate(["f01", "f1"]):
        (tmp_path / name).write_bytes(encoded(plain((n, 0, 0))))
    files = sorted(tmp_path.iterdir(), reverse=backwards)
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(files))
    assert reds(frames(tmp_path)) == [0, 1]


@pytest.mark.parametrize("format, reason", [("WEBP", "damaged"), ("PNG", "cut off")])
def test_an_animation_that_is_cut_off(format, reason, animated):
    body = animation(COLOURS, format)
    with pytest.raises(BadPicture, match=f"^{reason}$"):
        frames(animated(body[:len(body) // 2]))


def test_an_empty_folder(tmp_path):
    with pytest.raises(BadPicture, match="a folder without frames"):
        frames(tmp_path)


def test_an_animated_bomb(animated):
    """Few bytes, a legal size, and so many frames that decoding them would take minutes."""
    body = encoded(Image.new("1", (6000, 6000)), "GIF")
    frame = body[body.index(b"\x2c", 13 + 6):-1]
    path = animated(body[:-1] + frame * 30 + b";")
    start = time.monotonic()
    with pytest.raises(BadPicture, match="too many pixels in all frames"):
        frames(path)
    assert time.monotonic() - start < 5


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_later_frame_larger_than_the_animation_says(animated):
    body = animation(["red", "blue"])
    second = body.rindex(b"\x2c")
    size = struct.pack("<HHHH", 0, 0, 10_000, 10_000)
    with pytest.raises(BadPicture, match="too many pixels"):
        frames(animated(body[:second + 1] + size + body[second + 9:]))
