"""download() against a web server in a thread: every way in which fetching a file goes wrong."""
import gzip
import hashlib
import http.server
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from sources import download as module
from sources.common import UserError
from sources.download import download

FILE = gzip.compress(b"".join(b"line %d\n" % i for i in range(5000)), mtime=0)
HALF = len(FILE) // 2


class Server:
    """Answers a path with its function; `asked` lists each (path, Range header)."""

    def __init__(self):
        self.routes, self.asked = {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append((self.path, self.headers.get("Range")))
                outer.routes.get(self.path, status(404))(self)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


def send(handler, code, body, length=None, **headers):
    handler.send_response(code)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def status(code, **headers):
    return lambda handler: send(handler, code, b"<html>sorry</html>", **headers)


def plain(body):
    """The whole body, whatever range was asked for."""
    return lambda handler: send(handler, 200, body)


def ranges(body, cut=None):
    """Honours Range; `cut` is the number of bytes after which each answer breaks off."""
    def answer(handler):
        start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        if start >= len(body):
            return send(handler, 416, b"")
        rest = body[start:]
        send(handler, 206 if start else 200, rest[:cut], len(rest),
             Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
    return answer


def in_turn(*answers):
    left = list(answers)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "PAUSE", 0)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "raw" / "x.json.gz"


def names(target):
    return sorted(path.name for path in target.parent.iterdir())


def test_whole_file(server, target):
    server.routes["/x.json.gz"] = plain(FILE)
    assert download([f"{server.base}/x.json.gz"], target) == target
    assert target.read_bytes() == FILE and names(target) == ["x.json.gz"]


def test_part_is_resumed(server, target):
    target.parent.mkdir()
    target.with_name("x.json.gz.part").write_bytes(FILE[:HALF])
    server.routes["/x.json.gz"] = ranges(FILE)
    download([f"{server.base}/x.json.gz"], target)
    assert target.read_bytes() == FILE
    assert server.asked == [("/x.json.gz", f"bytes={HALF}-")]


def test_short_bodies_are_continued_as_long_as_bytes_come(server, target):
    server.routes["/x.json.gz"] = ranges(FILE, cut=len(FILE) // 5)
    download([f"{server.base}/x.json.gz"], target, tries=1)
    assert target.read_bytes() == FILE and len(server.asked) >= 5


def test_server_without_ranges_starts_from_zero(server, target):
    target.parent.mkdir()
    target.with_name("x.json.gz.part").write_bytes(b"\x1f\x8b something older")
    server.routes["/x.json.gz"] = plain(FILE)
    download([f"{server.base}/x.json.gz"], target)
    assert target.read_bytes() == FILE


def test_part_longer_than_the_file_is_started_again(server, target):
    target.parent.mkdir()
    target.with_name("x.json.gz.part").write_bytes(FILE + b"more")
    server.routes["/x.json.gz"] = ranges(FILE)
    download([f"{server.base}/x.json.gz"], target)
    assert target.read_bytes() == FILE
    assert [asked for _, asked in server.asked] == [f"bytes={len(FILE) + 4}-", None]


def test_another_range_than_asked_for_is_started_again(server, target):
    target.parent.mkdir()
    target.with_name("x.json.gz.part").write_bytes(FILE[:HALF])
    last = len(FILE) - HALF + 4                    # as many bytes as are missing, but from byte 5 on
    wrong = lambda handler: send(handler, 206, FILE[5:last + 1], Content_Range=f"bytes 5-{last}/{len(FILE)}")
    server.routes["/x.json.gz"] = in_turn(wrong, plain(FILE))
    download([f"{server.base}/x.json.gz"], target)
    assert target.read_bytes() == FILE


def false_length(handler):
    send(handler, 200, FILE[:HALF], len(FILE))


@pytest.mark.parametrize("rest", [false_length, status(416)])
def test_false_length_is_an_error_and_ends(server, target, rest):
    """The server promises more than it ever sends; asked for the rest, it starts again or knows of none."""
    server.routes["/x.json.gz"] = lambda handler: (rest if handler.headers.get("Range") else false_length)(handler)
    with pytest.raises(UserError, match=f"{HALF} of {len(FILE)} bytes arrived|416"):
        download([f"{server.base}/x.json.gz"], target)
    assert not target.exists() and len(server.asked) < 8


def test_mirrors_in_order(server, target):
    server.routes |= {"/b/x.json.gz": status(503), "/c/x.json.gz": plain(FILE), "/d/x.json.gz": plain(FILE)}
    download([f"{server.base}/{m}/x.json.gz" for m in "abcd"], target)
    assert [path[1] for path, _ in server.asked] == ["a", "b", "b", "c"]     # 404 is final, 503 is asked again
    assert target.read_bytes() == FILE


def test_redirect_is_followed(server, target):
    server.routes |= {"/x.json.gz": status(302, Location="/there.gz"), "/there.gz": plain(FILE)}
    download([f"{server.base}/x.json.gz"], target)
    assert target.read_bytes() == FILE


@pytest.mark.parametrize("old, new, followed", [
    ("https://a/x", "https://b/x", True), ("http://a/x", "https://b/x", True), ("http://a/x", "http://b/x", True),
    ("https://a/x", "http://b/x", False), ("http://a/x", "ftp://b/x", False), ("http://a/x", "file:///x", False)])
def test_redirects_never_lose_encryption(old, new, followed):
    request = module.urllib.request.Request(old)
    call = lambda: module._Redirects().redirect_request(request, None, 302, "Found", {}, new)
    if followed:
        assert call().full_url == new
    else:
        with pytest.raises(module.urllib.error.HTTPError, match="refused"):
            call()


def test_redirect_to_a_local_file_is_refused(server, target, tmp_path):
    (tmp_path / "secret.gz").write_bytes(FILE)
    server.routes["/x.json.gz"] = status(302, Location=f"file://{tmp_path}/secret.gz")
    with pytest.raises(UserError):
        download([f"{server.base}/x.json.gz", f"file://{tmp_path}/secret.gz"], target)
    assert names(target) == []


def test_web_page_in_place_of_the_file(server, target):
    server.routes |= {"/a.gz": plain(b"<!DOCTYPE html>who are you?"), "/b.gz": plain(b""),
                      "/c.gz": plain(b'{"error": "too many requests"}'), "/d.gz": plain(FILE)}
    download([f"{server.base}/{name}.gz" for name in "abcd"], target)
    assert target.read_bytes() == FILE
    assert [path for path, _ in server.asked] == ["/a.gz", "/b.gz", "/c.gz", "/d.gz"]
    server.routes["/page.jsonl"] = plain(b"\n <html>who are you?</html>")
    with pytest.raises(UserError, match="a web page instead of the file"):
        download([f"{server.base}/page.jsonl"], target.with_name("x.jsonl"))


def test_uncompressed_mirror_keeps_its_own_name(server, tmp_path):
    server.routes["/hub/x.jsonl"] = plain(b'{"a": 1}\n')
    urls = [f"{server.base}/x.jsonl.gz", f"{server.base}/hub/x.jsonl"]
    assert download(urls, tmp_path / "x.jsonl.gz") == tmp_path / "x.jsonl"
    assert download(urls, tmp_path / "x.jsonl.gz").read_bytes() == b'{"a": 1}\n' and len(server.asked) == 2


def test_good_file_is_kept_without_a_request(server, target):
    target.parent.mkdir()
    target.write_bytes(b"\x1f\x8b put here by hand")
    download([f"{server.base}/x.json.gz"], target)
    assert target.read_bytes() == b"\x1f\x8b put here by hand" and server.asked == []


def test_unusable_file_is_set_aside(server, target):
    target.parent.mkdir()
    target.write_bytes(b"<html>please log in</html>")
    server.routes["/x.json.gz"] = plain(FILE)
    download([f"{server.base}/x.json.gz"], target)
    assert names(target) == ["x.json.gz", "x.json.gz~1"] and target.read_bytes() == FILE


def test_digest(server, target, capsys):
    server.routes["/x.json.gz"] = plain(FILE)
    with pytest.raises(UserError, match="the SHA-256 differs"):
        download([f"{server.base}/x.json.gz"], target, sha256="0" * 64, strict=True)
    assert names(target) == []
    download([f"{server.base}/x.json.gz"], target, sha256="0" * 64)
    assert "warning: x.json.gz has another SHA-256" in capsys.readouterr().err and target.read_bytes() == FILE
    target.unlink()
    download([f"{server.base}/x.json.gz"], target, sha256=hashlib.sha256(FILE).hexdigest())
    assert "warning" not in capsys.readouterr().err


def test_failure_says_where_to_put_the_file(server, target):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{unused.getsockname()[1]}/x.json.gz"
        with pytest.raises(UserError) as error:
            download([f"{server.base}/x.json.gz", refused, "http://host.invalid/x.json.gz"], target)
    message = str(error.value)
    assert f"{server.base}/x.json.gz: HTTP Error 404" in message and f"{refused}: [Errno" in message
    assert "http://host.invalid/x.json.gz: [Errno" in message
    assert str(target.parent) in message and message.count("x.json.gz could not") == 1 and "\n" not in message
    assert message.endswith("run the same command again")


def test_silence_is_bounded(server, target):
    """Neither a server that never answers nor a long list of addresses keeps the user waiting."""
    release = threading.Event()
    server.routes["/x.json.gz"] = lambda handler: release.wait(5)
    start = time.monotonic()
    with pytest.raises(UserError, match="no answer within 0.2 s.*not asked, the time was up"):
        download([f"{server.base}/x.json.gz"] + [f"{server.base}/x.json.gz?{i}" for i in range(9)], target,
                 timeout=0.2, deadline=0.3)
    release.set()
    assert time.monotonic() - start < 2


def test_stalled_body_keeps_what_arrived(server, target):
    release = threading.Event()
    def stall(handler):
        send(handler, 200, FILE[:HALF], len(FILE))
        handler.wfile.flush()
        release.wait(5)
    server.routes["/x.json.gz"] = in_turn(stall, ranges(FILE))
    download([f"{server.base}/x.json.gz"], target, timeout=0.3)
    release.set()
    assert target.read_bytes() == FILE and server.asked[-1][1] == f"bytes={HALF}-"
