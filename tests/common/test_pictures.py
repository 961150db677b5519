"""Pictures: every kind of bad one is refused with a reason, and fetching them neither trusts, hangs, leaks nor repeats."""
import hashlib
import http.server
import io
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from datetime import datetime, timedelta, timezone
from email.message import Message
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile

sys.path.insert(0, str(Path(__file__).parents[1]))
from sources import pictures as module
from sources.pictures import FORMATS, BadPicture, fetch, fetched, frames, open_picture

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def drawn(seed=0, side=24):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def animation(colours, format="GIF"):
    first, *rest = [Image.new("RGB", (6, 4), colour) for colour in colours]
    return encoded(first, format, save_all=True, append_images=rest, duration=50, lossless=True)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def huge(width, height):
    """A PNG of a few bytes that claims to be large."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)) + (
        chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


JPEG, PNG = encoded(drawn(), "JPEG"), encoded(drawn())
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
HTML = b"<!DOCTYPE html><html><body>sorry</body></html>"


# Opening

@pytest.mark.parametrize("format", FORMATS)
def test_the_five_formats_from_a_path_and_from_bytes(format, tmp_path):
    body = encoded(Image.new("RGB", (8, 5), RED), format)
    (tmp_path / "no-suffix").write_bytes(body)
    for source in (body, tmp_path / "no-suffix", str(tmp_path / "no-suffix")):
        picture = open_picture(source)
        assert (picture.mode, picture.size) == ("RGB", (8, 5))
        assert abs(np.asarray(picture, int) - RED).max() < 8


BAD = {"svg": (SVG, "not one of five picture formats"), "html": (HTML, "not one of five picture formats"),
       "text": (b"x", "not one of five picture formats"), "empty": (b"", "empty file"),
       "cut jpeg": (JPEG[:len(JPEG) // 2], "cut off"), "cut png": (PNG[:len(PNG) // 2], "cut off"),
       "cut webp": (encoded(drawn(), "WEBP")[:200], "cut off|damaged|not one"),
       "cut gif": (encoded(drawn(), "GIF")[:-300], "cut off"), "cut bmp": (encoded(drawn(), "BMP")[:-300], "cut off"),
       "header": (JPEG[:30], "not one of five|cut off"), "zeros": (PNG[:60] + bytes(500), "cut off|damaged"),
       "placeholder gif": (encoded(Image.new("P", (1, 1)), "GIF"), "one pixel: a placeholder"),
       "thread": (encoded(Image.new("RGB", (2, 400))), "too thin: 2 x 400"),
       "placeholder png": (encoded(Image.new("RGB", (1, 1))), "one pixel: a placeholder"),
       "large": (huge(9_460, 9_460), "too many pixels: 9460 x 9460"), "larger": (huge(20_000, 20_000), "too many pixels"),
       "no pixels": (huge(0, 0), "not one of five picture formats"),
       "gif": (b"GIF89a\xff\xff\xff\xff" + encoded(drawn(), "GIF")[10:], "too many pixels"),
       **{format: (encoded(drawn(), format), "not one of five picture formats")
          for format in ("TIFF", "ICO", "EPS", "TGA", "PPM", "PCX", "ICNS", "JPEG2000", "SGI", "PDF")},
       "psd": (b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(400), "not one of five.*")}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures(name, tmp_path):
    body, reason = BAD[name]
    (tmp_path / "x.jpg").write_bytes(body)
    for source in (body, tmp_path / "x.jpg"):
        with pytest.raises(BadPicture, match=f"^({reason})$"):
            open_picture(source)
    with pytest.raises(BadPicture, match=f"^({reason})$"):
        frames(tmp_path / "x.jpg")


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
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False and Image.MAX_IMAGE_PIXELS == module.PIXELS


@pytest.mark.filterwarnings("error")
def test_warnings_as_errors_stay_bad_pictures():
    with pytest.raises(BadPicture, match="^too many pixels$"):
        open_picture(huge(9_460, 9_460))


def transparent(mode):
    if mode == "P":
        picture = Image.new("P", (4, 4), 1)
        picture.putpalette([0, 255, 0, *RED])
        picture.putpixel((0, 0), 0)
        return encoded(picture, transparency=0)
    picture = Image.new("RGBA", (4, 4), (*RED, 255) if mode == "RGBA" else (90, 90, 90, 255))
    picture.putpixel((0, 0), (0, 255, 0, 0))
    return encoded(picture.convert(mode))


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA"])
def test_transparent_becomes_white(mode):
    picture = open_picture(transparent(mode))
    assert picture.getpixel((0, 0)) == WHITE
    assert picture.getpixel((2, 2)) == ((90, 90, 90) if mode == "LA" else RED)


def test_transparent_colour_of_an_rgb_png_becomes_white():
    picture = Image.new("RGB", (4, 4), RED)
    picture.putpixel((0, 0), (0, 255, 0))
    picture = open_picture(encoded(picture, transparency=(0, 255, 0)))
    assert picture.getpixel((0, 0)) == WHITE and picture.getpixel((2, 2)) == RED


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV",
                                  "I", "I;16", "I;16B", "I;16L", "F"])
def test_every_mode_becomes_rgb(mode):
    picture = module._rgb(Image.new(mode, (3, 2)))
    assert (picture.mode, picture.size) == ("RGB", (3, 2))


def test_cmyk_jpeg():
    picture = open_picture(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert abs(np.asarray(picture, int) - RED).max() < 30


def test_16_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 257, 30_000, 65_535]] * 2, np.uint16)
    picture = open_picture(encoded(Image.fromarray(grey)))
    assert np.asarray(picture)[0].tolist() == [[v] * 3 for v in (0, 1, 116, 255)]


def test_exif_turns_and_bad_exif_does_not_hurt():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_picture(encoded(Image.new("RGB", (8, 5), RED), "JPEG", exif=exif)).size == (5, 8)
    for format in ("JPEG", "PNG", "WEBP"):
        assert open_picture(encoded(Image.new("RGB", (8, 5), RED), format, exif=b"Exif\0\0XX*\0\x08\0\0\0")).size == (8, 5)


def test_of_an_animation_the_first_frame():
    for format in ("GIF", "WEBP", "PNG"):
        assert open_picture(animation(["red", "blue", "lime"], format)).getpixel((1, 1)) == RED


# Frames

COLOURS = [(i * 10, 0, 0) for i in range(25)]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_frames_of_an_animation(format, tmp_path):
    (tmp_path / "x").write_bytes(animation(COLOURS, format))
    images = frames(tmp_path / "x")
    assert [image.getpixel((1, 1))[0] for image in images] == [i * 10 for i in range(0, 20, 2)]    # stride 25 // 10
    assert {(image.mode, image.size) for image in images} == {("RGB", (6, 4))}
    assert len(frames(tmp_path / "x", most=40)) == 25


def test_each_frame_is_worked_on_before_the_next_and_large_ones_alone(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(animation(COLOURS, "PNG"))
    held = []
    for limit in (10 ** 6, 8):                                   # of pixels; the frames have 24
        monkeypatch.setattr(module, "PIXELS", limit * 8)
        assert frames(tmp_path / "x", make=lambda image: held.append(module.LARGE.locked()) or image.size) == [(6, 4)] * 10
    assert held == [False] * 10 + [True] * 10


def test_frames_of_a_still_picture(tmp_path):
    (tmp_path / "x.jpg").write_bytes(JPEG)
    (tmp_path / "two-views.jpg").write_bytes(encoded(drawn(), "MPO", save_all=True, append_images=[drawn(1)]))
    assert len(frames(tmp_path / "x.jpg")) == len(frames(str(tmp_path / "two-views.jpg"))) == 1


def test_frames_of_a_folder_in_natural_order(tmp_path):
    for n in range(1, 24):
        (tmp_path / f"frame{n}.png").write_bytes(encoded(Image.new("RGB", (4, 4), (n, 0, 0))))
    (tmp_path / ".hidden").write_bytes(b"x")
    (tmp_path / "more").mkdir()
    assert [image.getpixel((0, 0))[0] for image in frames(tmp_path)] == list(range(1, 20, 2))
    assert [image.getpixel((0, 0))[0] for image in frames(tmp_path, most=12)] == list(range(1, 13))
    (tmp_path / "frame3.png").write_bytes(b"")
    with pytest.raises(BadPicture, match="^frame3.png: empty file$"):
        frames(tmp_path)


def test_equal_numbers_are_taken_by_name(tmp_path, monkeypatch):
    for n, name in enumerate(["f01", "f1"]):
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", (4, 4), (n, 0, 0))))
    for order in (sorted, lambda files: sorted(files, reverse=True)):      # a folder lists its files in any order
        monkeypatch.setattr(Path, "iterdir", lambda path, order=order: order(tmp_path / name for name in os.listdir(path)))
        assert [image.getpixel((0, 0))[0] for image in frames(tmp_path)] == [0, 1]


@pytest.mark.parametrize("format", ["WEBP", "PNG"])
def test_animation_that_is_cut_off(format, tmp_path):
    body = animation(COLOURS, format)
    (tmp_path / "x").write_bytes(body[:len(body) // 2])
    with pytest.raises(BadPicture, match="^cut off$" if format == "PNG" else "^damaged$"):
        frames(tmp_path / "x")


def test_empty_folder(tmp_path):
    with pytest.raises(BadPicture, match="a folder without frames"):
        frames(tmp_path)


def test_animated_bomb(tmp_path):
    """Few bytes, a legal size, and so many frames that decoding them would take minutes."""
    blank = Image.new("1", (6000, 6000))
    (tmp_path / "x").write_bytes(encoded(blank, "GIF"))
    body = (tmp_path / "x").read_bytes()
    frame = body[body.index(b"\x2c", 13 + 6):-1]
    (tmp_path / "x").write_bytes(body[:-1] + frame * 30 + b";")
    start = time.monotonic()
    with pytest.raises(BadPicture, match="too many pixels in all frames"):
        frames(tmp_path / "x")
    assert time.monotonic() - start < 5


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_later_frame_larger_than_the_animation_says(tmp_path):
    body = animation(["red", "blue"])
    second = body.rindex(b"\x2c")
    (tmp_path / "x").write_bytes(body[:second] + b"\x2c" + struct.pack("<HHHH", 0, 0, 10_000, 10_000) + body[second + 9:])
    with pytest.raises(BadPicture, match="too many pixels"):
        frames(tmp_path / "x")


# Fetching

class Server:
    """Answers a path with its function; `asked` lists the paths."""

    def __init__(self):
        self.routes, self.asked, self.headers = {}, [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                outer.headers.append(self.headers)
                try:
                    outer.routes.get(self.path, send(404, HTML))(self)
                except OSError:          # the other side has hung up, as it should
                    pass

            def log_message(self, *args):
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, request, address):
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.port = self.http.server_port
        self.base = f"http://127.0.0.1:{self.port}"
        self.over = threading.Event()
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def slow(self, handler):
        self.over.wait(10)

    def drip(self, head):
        def answer(handler):
            handler.wfile.write(head)
            for _ in range(100):         # for longer than any test waits
                if not self.over.wait(0.05):
                    handler.wfile.write(b"x")
        return answer


def send(code=200, body=b"", length=None, **headers):
    def answer(handler):
        handler.send_response(code)
        if length != "none":
            handler.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
    return answer


def in_turn(*answers):
    left = list(answers)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.over.set()
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def get(server, tmp_path):
    """get(path or address, ...) fetches them for one item -> the counts. The server's /ok.jpg is a good picture."""
    server.routes["/ok.jpg"] = send(200, JPEG, Content_Type="text/html")

    def get(*urls, key="i", **options):
        urls = [server.base + url if url.startswith("/") else url for url in urls]
        return fetch([(key, urls)], tmp_path / "pictures", **{"private": True, "timeout": 2, "longest": 5} | options)
    return get


@pytest.fixture
def names(monkeypatch, server):
    """names["shop.example"] = addresses: what the name service knows; `asked` counts."""
    known = {}
    known["asked"] = []

    def lookup(host, port):
        known["asked"].append(host)
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return known[host]
    monkeypatch.setattr(module, "_lookup", lookup)
    return known


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "pictures" / "manifest.jsonl").read_text().splitlines()]


def statuses(tmp_path):
    return {row["url"]: row["status"] for row in rows(tmp_path)}


def test_good_picture(server, get, tmp_path):
    server.routes["/b"] = send(200, PNG)
    assert get("/ok.jpg", "/b") == {"ok": 2, "left": 0}
    assert sorted(rows(tmp_path), key=str) == sorted([
        {"url": f"{server.base}/ok.jpg", "item": "i", "status": "ok", "file": "i-1.jpg", "bytes": len(JPEG),
         "sha256": hashlib.sha256(JPEG).hexdigest()},
        {"url": f"{server.base}/b", "item": "i", "status": "ok", "file": "i-2.png", "bytes": len(PNG),
         "sha256": hashlib.sha256(PNG).hexdigest()}], key=str)
    found = fetched(tmp_path / "pictures")
    assert found[f"{server.base}/ok.jpg"].read_bytes() == JPEG and found[f"{server.base}/b"].name == "i-2.png"
    assert server.headers[0]["User-Agent"] == "mmseqrec"
    assert sorted(os.listdir(tmp_path / "pictures")) == ["i-1.jpg", "i-2.png", "manifest.jsonl"]


def test_nothing_to_fetch(tmp_path):
    assert fetch([], tmp_path / "pictures") == {"ok": 0, "left": 0} and fetched(tmp_path / "nowhere") == {}


ANSWERS = [
    (send(404, HTML), "http 404"), (send(204), "http 204"), (send(206, JPEG), "http 206"), (send(302), "http 302"),
    (send(200, HTML, Content_Type="image/jpeg"), "not a picture: not one of five picture formats"),
    (send(200, SVG), "not a picture: not one of five picture formats"),
    (send(200, huge(20_000, 20_000)), "not a picture: too many pixels"),
    (send(200, b""), "not a picture: empty file"),
    (send(200, encoded(Image.new("P", (1, 1)), "GIF")), "not a picture: one pixel: a placeholder"),
    (send(200, JPEG[:200]), "not a picture: cut off"), (send(200, JPEG[:200], "none"), "not a picture: cut off"),
    (send(200, JPEG, len(JPEG) - 100), "not a picture: cut off"), (send(200, JPEG, len(JPEG) + 1), "no connection"),
    (send(200, JPEG, "-5"), "ok"), (send(200, JPEG, "many"), "ok"), (send(200, JPEG, "none"), "ok"),
    (send(200, bytes(60_000)), "too large"), (send(200, bytes(60_000), "none"), "too large"),
    (send(200, bytes(60_000), 10 ** 12), "too large"),
    (lambda handler: handler.wfile.write(b"hello\r\n\r\n"), "no connection"),
    (send(200, JPEG, X_Robots_Tag="noindex, NoAI"), "refused: noai"),
    (send(200, JPEG, X_Robots_Tag="noimageai"), "refused: noai"), (send(200, JPEG, X_Robots_Tag="noarchive"), "ok"),
]


def test_one_answer_of_each_kind(server, get, tmp_path):
    paths = [f"/{n}.jpg" for n in range(len(ANSWERS))]
    server.routes |= {path: answer for path, (answer, _) in zip(paths, ANSWERS)}
    counts = get(*paths, most=50_000)
    assert [statuses(tmp_path)[server.base + path] for path in paths] == [status for _, status in ANSWERS]
    assert counts == {"ok": 4, "http 404": 1, "http 204": 1, "http 206": 1, "http 302": 1, "not a picture": 8,
                      "too large": 3, "no connection": 2, "refused": 2, "left": 0}
    assert len(os.listdir(tmp_path / "pictures")) == 4 + 1


def test_chunked_answer_without_end_is_too_large(server, get, tmp_path):
    def endless(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            handler.wfile.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")
    server.routes["/x.jpg"] = endless
    assert get("/x.jpg", most=50_000) == {"ok": 0, "too large": 1, "left": 0}


def test_slow_and_dripping_servers_are_left(server, get, tmp_path):
    head = b"HTTP/1.0 200 OK\r\n"
    server.routes |= {"/silent": server.slow, "/body": server.drip(head + b"\r\n"), "/head": server.drip(head + b"X: "),
                      "/chunk": server.drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0;")}
    before, start = threading.active_count(), time.monotonic()
    assert get("/ok.jpg", "/silent", timeout=0.3) == {"ok": 1, "timeout": 1, "left": 0}
    assert get("/ok.jpg", "/body", "/head", "/chunk", longest=0.5)["timeout"] == 3 and time.monotonic() - start < 4
    server.over.set()
    while threading.active_count() > before and time.monotonic() - start < 6:
        time.sleep(0.02)


def test_the_time_of_one_picture_covers_its_redirects(server, get):
    def late(answer):
        return lambda handler: (time.sleep(0.25), answer(handler))
    server.routes |= {f"/{n}": late(send(302, Location=f"/{n - 1}")) for n in range(1, 6)} | {"/0": late(send(200, JPEG))}
    assert get("/ok.jpg", "/5", longest=0.8) == {"ok": 1, "timeout": 1, "left": 0}


def test_a_thread_is_not_held_by_a_server_that_drips(server, tmp_path):
    """The server goes on for ever; the thread that listens to it does not."""
    server.routes["/head"] = server.drip(b"HTTP/1.0 200 OK\r\nX: ")
    mine = lambda: {t for t in threading.enumerate() if "work" in t.name}
    before, start = mine(), time.monotonic()
    fetch([("i", [f"{server.base}/head"])], tmp_path / "pictures", private=True, timeout=8, longest=0.3)
    while mine() - before and time.monotonic() - start < 5:
        time.sleep(0.02)
    assert not mine() - before


def test_only_http_and_https(get, tmp_path):
    urls = ["file:///etc/passwd", "ftp://127.0.0.1/x.jpg", "data:image/png;base64,AAAA", "img/1.jpg", "javascript:alert(1)",
            "127.0.0.1/x.jpg", "", "https", "FILE:///etc/passwd", " file:///etc/passwd"]
    assert get(*urls) == {"ok": 0, "refused": len(urls), "left": 0}
    assert set(statuses(tmp_path).values()) == {"refused: not http or https"}


def test_what_is_no_address(get, tmp_path):
    urls = ["http://", "http:///x.jpg", "http://[::1/x.jpg", "http://a:99999/x.jpg", "http://a:b/x.jpg", "http://a..b/x.jpg",
            "http://a b/x.jpg", "http://a\0b/x.jpg", f"http://{'a' * 70}/x.jpg", "http://a\\b/x.jpg", "http://h/\ud800.jpg"]
    assert get(*urls) == {"ok": 0, "refused": len(urls), "left": 0}
    assert set(statuses(tmp_path).values()) == {"refused: not a web address"}


def test_odd_letters_in_an_address_are_quoted(server, get, names):
    names["xn--bcher-kva.example"] = ["127.0.0.1"]
    server.routes["/gr%C3%BCn%20a.jpg?b=%C3%BC&c=%41"] = send(200, JPEG)
    assert get(f"http://Bücher.example.:{server.port}/grün a.jpg?b=ü&c=%41#top")["ok"] == 1
    assert server.headers[0]["Host"] == f"xn--bcher-kva.example:{server.port}"


@pytest.mark.parametrize("host, allowed", [
    ("images-amazon.com", True), ("ecx.images-amazon.com", True), ("ECX.Images-Amazon.com", True),
    ("images-amazon.com.", True), ("evil-images-amazon.com", False), ("images-amazon.com.evil.com", False),
    ("images-amazon.com@evil.com", False), ("images-amazon.com:80@evil.com", False), ("evil.com\\@images-amazon.co", False),
    ("evil.com#.images-amazon.com", False), ("evil.com?.images-amazon.com", False), ("amazon.com", False),
    ("images-amazon.com。evil.com", False), ("user:word@images-amazon.com", True)])
def test_listed_hosts_and_their_subdomains(host, allowed):
    web = module._Web(None, ("images-amazon.com",), 1, 1, 1, False)
    if allowed:
        assert web.target(f"http://{host}/x.jpg")[1].endswith("images-amazon.com")
    else:
        with pytest.raises(ValueError):
            web.target(f"http://{host}/x.jpg")


def test_host_that_is_not_listed_is_never_looked_up(server, get, names, tmp_path):
    names["evil.example"] = names["good.example"] = ["127.0.0.1"]
    evil = f"http://good.example@evil.example:{server.port}/ok.jpg"
    assert get(evil, hosts=("good.example",)) == {"ok": 0, "refused": 1, "left": 0}
    assert rows(tmp_path)[0]["status"] == "refused: host not on the list" and names["asked"] == [] == server.asked
    assert get(evil, hosts=("good.example",)) == {"ok": 0, "refused": 1, "left": 0} and len(rows(tmp_path)) == 1
    assert get(evil, hosts=("evil.example",)) == {"ok": 1, "left": 0}      # a longer list is a new question


PRIVATE = """127.0.0.1 127.255.0.1 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 224.0.0.1 240.0.0.1
255.255.255.255 198.18.0.1 192.0.2.1 :: ::1 fe80::1 fe80::1%1 fc00::1 fd00:ec2::254 fec0::1 ff02::1 ff0e::1 2001:db8::1
2001:0:1::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe
64:ff9b:1::1 2002:7f00:1:: 2002:a00:1::1 100::1""".split()
PUBLIC = "8.8.8.8 1.1.1.1 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::".split()


def test_public_addresses():
    assert [address for address in PRIVATE + PUBLIC if module._public(address)] == PUBLIC


@pytest.mark.parametrize("listed", [False, True])
def test_this_machine_is_not_asked(server, get, tmp_path, listed):
    hosts = ["127.0.0.1", "localhost", "2130706433", "0177.0.0.1", "0x7f.1", "127.1", "0", "[::1]", "[::ffff:127.0.0.1]",
             "[::ffff:7f00:1]", "[64:ff9b::127.0.0.1]", "0.0.0.0", "[::]", "①②⑦.0.0.1", "127。0。0。1"]
    counts = get(*[f"http://{host}:{server.port}/ok.jpg" for host in hosts], private=False,
                 hosts=[host.strip("[]") for host in hosts] if listed else None)
    assert counts == {"ok": 0, "refused": len(hosts), "left": 0} and server.asked == []
    assert set(statuses(tmp_path).values()) == {"refused: address not public"}


def test_one_private_address_among_others_is_enough(server, get, names):
    names["mixed.example"] = ["8.8.8.8", "127.0.0.1"]
    assert get(f"http://mixed.example:{server.port}/ok.jpg", private=False)["refused"] == 1 and server.asked == []


def test_the_checked_address_is_the_one_that_is_asked(server, get, names, monkeypatch):
    """The name service is asked once; what it would say a moment later does not matter."""
    names["shop.example"] = ["192.0.2.9", "127.0.0.1", "192.0.2.10"]
    called = []
    monkeypatch.setattr(module, "_public", lambda address: True)
    monkeypatch.setattr(module.socket, "create_connection",
                        lambda address, *rest, real=socket.create_connection:
                        called.append(address) or (real(address, *rest) if address[0] == "127.0.0.1" else refuse()))
    assert get(f"http://shop.example:{server.port}/ok.jpg", private=False)["ok"] == 1
    assert names["asked"] == ["shop.example"] and called == [("192.0.2.9", server.port), ("127.0.0.1", server.port)]
    assert server.headers[0]["Host"] == f"shop.example:{server.port}"


def test_host_header_leaves_out_the_usual_port(monkeypatch):
    monkeypatch.setattr(module._Line, "connect", lambda line: None)
    for scheme, port, host in (("https", 443, b"h"), ("http", 80, b"h"), ("http", 443, b"h:443"), ("https", 80, b"h:80")):
        line, sent = module._Line(scheme, "h", port, SimpleNamespace(timeout=1, private=False)), []
        line.send = sent.append
        line.request("GET", "/")
        assert b"\r\nHost: " + host + b"\r\n" in sent[0]


def refuse():
    raise ConnectionRefusedError


def test_no_proxy_from_the_environment(server, get, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert get("/ok.jpg")["ok"] == 1


def test_redirects(server, get, tmp_path):
    server.routes |= {"/a": send(302, Location="/b"), "/b": send(301, Location="ok.jpg"),
                      "/loop": send(308, Location="/loop"),
                      "/file": send(302, Location="file:///etc/passwd"), "/broken": send(302, Location="http://[::1"),
                      **{f"/{n}": send(307, Location=f"/{n - 1}") for n in range(1, 7)}, "/0": send(200, JPEG)}
    assert get("/a", "/loop", "/file", "/broken", "/5", "/6") == {"ok": 2, "refused": 4, "left": 0}
    found = statuses(tmp_path)
    assert found[f"{server.base}/loop"] == found[f"{server.base}/6"] == "refused: too many redirects"
    assert found[f"{server.base}/file"] == "refused: redirect, not http or https"
    assert found[f"{server.base}/broken"] == "refused: redirect, not a web address"
    assert server.asked.count("/loop") == 6


def test_every_redirect_is_checked_again(server, get, names, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_public", lambda address: address != "127.0.0.2")
    names["shop.example"], names["inside.example"] = ["127.0.0.1"], ["127.0.0.2"]
    server.routes |= {"/in": send(302, Location=f"http://inside.example:{server.port}/ok.jpg"),
                      "/ip": send(302, Location=f"http://127.0.0.1:{server.port}/ok.jpg")}
    urls = [f"http://shop.example:{server.port}/{path}" for path in ("in", "ip")]
    assert get(*urls, hosts=("shop.example", "inside.example"), private=False) == {"ok": 0, "refused": 2, "left": 0}
    assert statuses(tmp_path) == {urls[0]: "refused: redirect, address not public",
                                  urls[1]: "refused: redirect, host not on the list"}
    assert sorted(server.asked) == ["/in", "/ip"]


def test_tls_is_for_the_name_and_not_given_up_by_a_redirect(server, get, names, monkeypatch, tmp_path):
    class Plain(socket.socket):
        def do_handshake(self):
            self.settimeout(2)

    wrapped = []
    fake = lambda sock, server_hostname, do_handshake_on_connect: (
        wrapped.append(server_hostname) or Plain(fileno=sock.detach()))
    monkeypatch.setattr(module, "_tls", lambda: SimpleNamespace(wrap_socket=fake))
    names["shop.example"] = ["127.0.0.1"]
    base = f"shop.example:{server.port}"
    server.routes |= {"/down": send(302, Location=f"http://{base}/ok.jpg"), "/same": send(302, Location="/ok.jpg"),
                      "/up": send(302, Location=f"https://{base}/ok.jpg")}
    urls = [f"https://{base}/down", f"https://{base}/same", f"http://{base}/up"]
    assert get(*urls) == {"ok": 2, "refused": 1, "left": 0}
    assert statuses(tmp_path)[urls[0]] == "refused: redirect, from https to http"
    assert wrapped == ["shop.example"] * 4 and server.asked.count("/ok.jpg") == 2


def test_certificates_are_checked():
    context = module._tls()
    assert context.check_hostname and context.verify_mode == module.ssl.CERT_REQUIRED


@pytest.mark.parametrize("code", [429, 503])
def test_busy_host_is_asked_again(server, get, code):
    server.routes["/x"] = in_turn(send(code, Retry_After="0"), send(code, Retry_After="0"), send(200, JPEG))
    assert get("/x") == {"ok": 1, "left": 0} and server.asked == ["/x"] * 3


def test_busy_host_is_asked_three_times_and_in_three_runs(server, get, tmp_path):
    server.routes |= {"/x": send(429, Retry_After="0"), "/y": send(500)}
    for run in range(1, 6):
        assert get("/x", "/y") == {"ok": 0, "http 429": 1, "http 500": 1, "left": 0}
        assert server.asked.count("/x") == 3 * min(run, 3) and server.asked.count("/y") == min(run, 3)
    assert len(rows(tmp_path)) == 6


def test_all_threads_wait_for_a_busy_host(server, get, monkeypatch):
    monkeypatch.setattr(module, "_rest", lambda headers, tries: 0.5)
    times = []
    server.routes["/x"] = in_turn(send(429), lambda handler: (times.append(time.monotonic()), send(200, JPEG)(handler)))
    server.routes |= {f"/{n}": server.routes["/x"] for n in range(3)}
    start = time.monotonic()
    assert get("/x", "/0", "/1", "/2", threads=1)["ok"] == 4
    assert len(times) == 4 and min(times) - start > 0.4      # the first of four was told to wait, and all did


def test_rest_of_a_busy_host():
    def rest(text, tries=1):
        headers = Message()
        if text is not None:
            headers["Retry-After"] = text
        return module._rest(headers, tries)
    assert [rest("0"), rest("7"), rest("100000"), rest("9" * 400)] == [0, 7, 60, 60]
    now = datetime.now(timezone.utc)
    assert 20 < rest(format_datetime(now + timedelta(seconds=30), usegmt=True)) <= 30
    assert rest(format_datetime(now - timedelta(days=1), usegmt=True)) == 0
    assert [rest(None), rest(None, 2), rest("soon"), rest("-3"), rest("²"), rest("Wed, 21 Oct 2015 07:28:00 -0000")] == [
        2, 4, 2, 2, 2, 2]


def test_second_run_asks_for_nothing_but_what_is_missing(server, get, tmp_path):
    server.routes |= {"/page": send(200, HTML), "/large": send(200, bytes(60_000))}
    first = get("/ok.jpg", "/404", "/page", "/large", most=50_000)
    asked = len(server.asked)
    assert first == {"ok": 1, "http 404": 1, "not a picture": 1, "too large": 1, "left": 0} and asked == 4
    assert get("/ok.jpg", "/404", "/page", "/large", most=50_000) == first and len(server.asked) == 4
    (tmp_path / "pictures" / "i-1.jpg").unlink()
    assert fetched(tmp_path / "pictures") == {}
    assert get("/ok.jpg", "/404", "/page", "/large") == first and server.asked[4:] == ["/ok.jpg"]
    assert fetched(tmp_path / "pictures")[f"{server.base}/ok.jpg"].name == "i-1.jpg"


def test_new_address_of_an_item_does_not_take_an_old_name(server, get, tmp_path):
    server.routes["/new"] = send(200, PNG)
    get("/ok.jpg")
    get("/new", "/ok.jpg")
    found = fetched(tmp_path / "pictures")
    assert found[f"{server.base}/ok.jpg"].read_bytes() == JPEG and found[f"{server.base}/new"].name == "i-2.png"


def test_killed_run_goes_on(server, get, tmp_path):
    """The last line is half there, others are no lines of ours, one names a file outside."""
    server.routes["/b"] = send(200, PNG)
    get("/ok.jpg")
    manifest = tmp_path / "pictures" / "manifest.jsonl"
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    outside = {"url": "u", "item": "i", "status": "ok", "file": "../secret.jpg"}
    damage = [b"12", b"[]", b"{}", b"\xff\xfe", b'{"url": [], "status": "ok", "file": "i-1.jpg"}', b"[" * 100_000,
              b'{"url": "v", "status": 3, "file": 5}', json.dumps(outside).encode(), b'{"url": "http://127.0.0.1/', ]
    manifest.write_bytes(manifest.read_bytes() + b"\n".join(damage))
    assert list(fetched(tmp_path / "pictures")) == [f"{server.base}/ok.jpg"]
    assert get("/ok.jpg", "/b") == {"ok": 2, "left": 0} and server.asked == ["/ok.jpg", "/b"]
    assert len(fetched(tmp_path / "pictures")) == 2


@pytest.fixture
def ctrl_c():
    """Ctrl-C as a terminal gives it; a shell that starts a job in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_interrupted_run_leaves_no_thread_that_rests(server, get, monkeypatch, ctrl_c):
    """A thread that waits for a busy host when the run ends does not ask it afterwards."""
    monkeypatch.setattr(module, "_rest", lambda headers, tries: 0.6)

    def interrupt(handler):
        while "/busy" not in server.asked:
            time.sleep(0.01)
        time.sleep(0.1)
        ctrl_c()
    server.routes |= {"/busy": send(429), "/x": interrupt}
    with pytest.raises(KeyboardInterrupt):
        get("/x", "/busy")
    time.sleep(0.8)
    assert server.asked.count("/busy") == 1


def test_interrupted_run_goes_on(server, get, tmp_path, ctrl_c):
    def interrupt(handler):
        ctrl_c()
        server.over.wait(0.5)
    paths = [f"/{n}" for n in range(200)]
    server.routes |= {path: send(200, JPEG) for path in paths} | {"/x": in_turn(interrupt, send(200, JPEG))}
    with pytest.raises(KeyboardInterrupt):
        get("/x", *paths)
    done = len(fetched(tmp_path / "pictures"))
    time.sleep(0.1)
    asked = len(server.asked)
    time.sleep(0.2)
    assert len(server.asked) == asked        # nobody goes on in the background
    assert get("/x", *paths)["ok"] == 201 and len(server.asked) <= asked + 201 - done


def test_shared_address_is_fetched_once(server, tmp_path):
    server.routes["/ok.jpg"] = send(200, JPEG)
    url = f"{server.base}/ok.jpg"
    assert fetch([("a", [url, url]), ("b", [url])], tmp_path / "p", private=True) == {"ok": 1, "left": 0}
    assert server.asked == ["/ok.jpg"] and fetched(tmp_path / "p")[url].name == "a-1.jpg"


def test_hostile_keys_stay_in_the_folder_and_apart(server, tmp_path):
    keys = ["../../x", "../../y", "a/b", "a_b", "a\\b", "/etc/x", "CON", "con", "Con", "", ".", "..", "é", "è", "\ud800",
            "a\0b", "x" * 300, "x" * 301, "a b", "-rf", "~", "manifest.jsonl", "a", "a-1", "q\n"]
    server.routes |= {f"/{n}": send(200, encoded(drawn(n), "BMP")) for n in range(len(keys))}
    folder = tmp_path / "deep" / "er" / "pictures"
    items = [(key, [f"{server.base}/{n}"]) for n, key in enumerate(keys)]
    assert fetch(items, folder, private=True)["ok"] == len(keys)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.parent != folder] == []
    found = fetched(folder)
    assert len({path.name.casefold() for path in found.values()}) == len(keys)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{3,80}\.bmp", path.name) for path in found.values())
    assert all(found[f"{server.base}/{n}"].read_bytes() == encoded(drawn(n), "BMP") for n in range(len(keys)))
    assert {found[f"{server.base}/{keys.index(key)}"].name for key in ("a_b", "CON", "a", "a-1")} == {
        "a_b-1.bmp", "CON-1.bmp", "a-1.bmp", "a-1-1.bmp"}


def test_offline_run_stops_early_and_records_nothing(server, get, names, tmp_path):
    urls = [f"http://shop.example:{server.port}/{n}" for n in range(100)]
    for _ in range(4):
        names["asked"].clear()
        assert get(*urls) == {"ok": 0, "left": 100}
        assert 16 <= len(names["asked"]) <= 16 + 8
    assert rows(tmp_path) == []
    names["shop.example"] = ["127.0.0.1"]
    server.routes |= {f"/{n}": send(200, JPEG) for n in range(100)}
    assert get(*urls) == {"ok": 100, "left": 0}


def test_a_short_offline_run_records_nothing_either(get, names, tmp_path):
    assert get("http://shop.example/1", "http://shop.example/2") == {"ok": 0, "left": 2} and rows(tmp_path) == []


def test_with_an_answer_from_anyone_failures_are_recorded(server, get, names, tmp_path):
    names["127.0.0.1"] = ["127.0.0.1"]
    urls = [f"http://gone.example/{n}" for n in range(15)]
    assert get(*urls, "/ok.jpg") == {"ok": 1, "no connection": 15, "left": 0}
    assert len(rows(tmp_path)) == 16


def test_a_dead_host_among_others_does_not_stop_the_run(server, get, names, monkeypatch):
    names["127.0.0.1"] = ["127.0.0.1"]
    monkeypatch.setattr(module.random, "shuffle", lambda jobs: None)
    counts = get("/ok.jpg", *[f"http://gone.example/{n}" for n in range(40)], threads=1)
    assert counts == {"ok": 1, "no connection": 40, "left": 0}


def test_dead_hosts_first_do_not_stop_every_run(server, get, names):
    """The order is drawn anew: a catalog that begins with a dead shop is fetched sooner or later."""
    names["127.0.0.1"] = ["127.0.0.1"]
    server.routes |= {f"/{n}": send(200, JPEG) for n in range(40)}
    urls = [f"http://gone.example/{n}" for n in range(40)] + [f"/{n}" for n in range(40)]
    assert any(get(*urls, threads=2)["ok"] == 40 for _ in range(5))


def test_a_lookup_that_hangs_is_bounded(get, monkeypatch, server):
    monkeypatch.setattr(module, "_lookup", lambda host, port: server.over.wait(5))
    start = time.monotonic()
    assert get("http://shop.example/1", longest=0.2) == {"ok": 0, "left": 1} and time.monotonic() - start < 2


def test_a_full_disk_stops_the_run(get, monkeypatch, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(module, "atomic", full)
    with pytest.raises(OSError, match="No space left"):
        get("/ok.jpg")
    monkeypatch.undo()
    assert get("/ok.jpg") == {"ok": 1, "left": 0}
