"""What several tests use: a tiny shop, a run of a script, a web server on this machine."""
import contextlib
import http.server
import importlib
import io
import json
import os
import random
import struct
import sys
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.files import command

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"
HTML = b"<!DOCTYPE html><html><body>sorry</body></html>"


def write_shop(folder, users=60, items=30, seed=0):
    """Own-data files of a small shop: user u walks through the items in steps, with some noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    lines = ["user,item,time"]
    day = 1_500_000_000
    for u in range(users):
        item = rng.randrange(items)
        for t in range(rng.randint(3, 12)):
            lines.append(f"u{u},i{item},{day + u * 1000 + t * 86_401}")
            item = (item + 1) % items if rng.random() < .8 else rng.randrange(items)
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    words = "red blue green soft hard round old new small large".split()
    with open(folder / "items.jsonl", "w") as file:
        for i in range(items):
            title = " ".join(rng.choices(words, k=3))
            file.write(json.dumps({"item": f"i{i}", "title": title, "language": "en"}) + "\n")
    return folder


def run(script, *args, cwd, ok=True):
    """Run one of the project's scripts as from the command line, in this process.

    -> its exit code and what it printed.
    """
    out, err = io.StringIO(), io.StringIO()
    before = os.getcwd(), sys.argv
    os.chdir(cwd)
    sys.argv = [script, *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with pytest.raises(SystemExit) as end:
                command(importlib.import_module(Path(script).stem).main)
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
    done = SimpleNamespace(
        returncode=end.value.code, stdout=out.getvalue(), stderr=err.getvalue()
    )
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


@contextlib.contextmanager
def kept_for_backward():
    """The sizes, in numbers, of the tensors that autograd keeps for the backward pass: a list."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def refused(done, *words):
    """Assert that a run ended with exit code 2 and one sentence that has these words."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


# ---------------- pictures

def encoded(image, format="PNG", **options):
    """The bytes of a picture's file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def drawn(seed=0, side=24):
    """A picture of noise."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def huge(width, height):
    """A PNG of a few bytes that claims to be large."""
    def chunk(kind, body):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


# ---------------- a web server

class Server:
    """Answers each path with its function of the handler; counts what is asked."""

    def __init__(self):
        self.routes = {}     # path -> answer
        self.asked = []      # paths
        self.headers = []    # of each request
        self.over = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                outer.headers.append(self.headers)
                try:
                    outer.routes.get(self.path, send(404, HTML))(self)
                except OSError:    # the other side has hung up, as it may
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
        serve = {"poll_interval": 0.01}
        threading.Thread(target=self.http.serve_forever, kwargs=serve, daemon=True).start()

    def close(self):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()

    def slow(self, handler):
        """An answer that never comes."""
        self.over.wait(10)

    def drip(self, head):
        """An answer whose body comes byte by byte, for longer than any test waits."""
        def answer(handler):
            handler.wfile.write(head)
            for _ in range(100):
                if not self.over.wait(0.05):
                    handler.wfile.write(b"x")
        return answer


def send(code=200, body=b"", length=None, **headers):
    """An answer. length: what Content-Length says instead of the truth; "none": no such header."""
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
    """One answer after the other; the last one again and again."""
    left = list(answers)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)
