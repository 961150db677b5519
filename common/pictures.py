"""Pictures of strangers, opened without trust in what they say about themselves.

Only five formats are opened, whatever a file is called; pictures that would need gigabytes are
refused from their header; everything that goes wrong is a BadPicture with the reason in a few
plain words.
"""
import io
import re
import threading
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")     # the only formats that are opened
SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
PIXELS = 89_478_485        # in one picture; above it Pillow warns of decompression bombs
MOTION = 10 * PIXELS       # in all frames of an animation, which are decoded one after the other
THIN = 100                 # longer side / shorter side; above it, encoders that scale the shorter
                           # side to a fixed length would ask for gigabytes
LARGE = threading.Lock()   # one large picture at a time takes a gigabyte while it is opened


class BadPicture(ValueError):
    """A picture that cannot be used. The message is the reason in a few plain words."""


def unchanged(picture):
    return picture


def open_picture(source) -> Image.Image:
    """The picture in a file (path) or in bytes, as RGB; of an animation the first frame.

    Raises BadPicture, and nothing else.
    """
    with opened(source) as picture:
        return converted(picture)


def frames(path, most=10, make=unchanged) -> list:
    """At most `most` RGB pictures at a fixed stride, from an animation or a folder of frames.

    A still picture gives one. make: what becomes of each frame before the next one is opened; large
    ones are worked on one at a time. A folder's files are taken in natural order, frame2 before
    frame10. Raises BadPicture, which names the folder's file.
    """
    path = Path(path)
    return frames_of_folder(path, most, make) if path.is_dir() else frames_of_file(path, most, make)


def frames_of_file(path, most, make):
    with opened(path) as picture:
        # MPO: further pictures in the file are other views, not later ones
        total = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
        if total * picture.width * picture.height > MOTION:
            raise BadPicture("too many pixels in all frames")
        made = []
        for number in range(0, total, max(total // most, 1))[:most]:
            picture.seek(number)
            made.append(converted(picture, make))
        return made


def frames_of_folder(folder, most, make):
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    files = sorted(sorted(files), key=natural)
    if not files:
        raise BadPicture("a folder without frames")
    made = []
    for file in files[::max(len(files) // most, 1)][:most]:
        try:
            with opened(file) as picture:
                made.append(converted(picture, make))
        except BadPicture as error:
            raise BadPicture(f"{file.name}: {error}") from None
    return made


def natural(file) -> list:
    """What sorts frame2 before frame10."""
    parts = re.split(r"(\d+)", file.name)
    return [int(part) if part.isdecimal() else part for part in parts]


@contextmanager
def opened(source):
    """The picture in a file or in bytes, its pixels not read yet.

    Every error, here and in the block, becomes a BadPicture.
    """
    try:
        if isinstance(source, bytes):
            stream = io.BytesIO(source)
        elif Path(source).is_file():    # a pipe would wait for its other end
            stream = open(source, "rb")
        else:
            raise BadPicture("no such file")
        with stream:
            if not stream.read(1):
                raise BadPicture("empty file")
            with Image.open(stream, formats=FORMATS) as picture:
                yield picture
    except BadPicture:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPicture("too many pixels") from None
    except UnidentifiedImageError:
        raise BadPicture("not one of five picture formats") from None
    except Exception as error:    # a damaged file makes Pillow raise almost anything
        cut_off = "truncated" in str(error).lower()
        raise BadPicture("cut off" if cut_off else "damaged") from error


def converted(picture, make=unchanged):
    """make(the present frame as RGB)."""
    large = picture.width * picture.height > PIXELS // 8
    with LARGE if large else nullcontext():
        return make(to_rgb(picture))


def to_rgb(picture):
    """The present frame as RGB: upright, white where it is transparent, 16-bit grey as 8 bits."""
    width, height = picture.size
    if (width, height) == (1, 1):
        raise BadPicture("one pixel: a placeholder")
    if max(width, height) > THIN * min(width, height):
        raise BadPicture(f"too thin: {width} x {height}")
    if width * height > PIXELS:
        raise BadPicture(f"too many pixels: {width} x {height}")
    picture.load()
    with suppress(Exception):    # bad EXIF does not make a picture bad
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):    # convert() would clip at 255
        grey = np.asarray(picture) // 257
        picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
