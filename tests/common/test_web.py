"""Fetching files and pictures, against a web server on this machine: neither trusts, hangs, leaks
nor repeats itself."""
import gzip
import hashlib
import json
import os
import re
import signal
import socket
import socketserver
import threading
import time
from datetime import datetime, timedelta, timezone
from email.message import Message
from email.utils import format_datetime
from types import SimpleNamespace

import pytest
from PIL import Image

from common import web
from common.files import UserError
from common.web import Rules, Trail, download, fetch_pictures, fetched_pictures
from helpers import HTML, drawn, encoded, huge, in_turn, send

JPEG, PNG = encoded(drawn(), "JPEG"), encoded(drawn())
FILE = gzip.compress(b"".join(b"line %d\n" % i for i in range(5000)), mtime=0)
HALF = len(FILE) // 2


@pytest.fixture
def names(monkeypatch):
    """What the name service knows: names.known["shop.example"] = addresses; names.asked counts."""
    names = SimpleNamespace(known={}, asked=[])

    def look_up(host, port):
        names.asked.append(host)
        if host not in names.known:
            raise socket.gaierror(-2, "Name or service not known")
        return names.known[host]

    monkeypatch.setattr(web, "look_up", look_up)
    return names


# ---------------- one file

@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "PAUSE", 0)
    return tmp_path / "raw" / "x.json.gz"


def begun(target, body):
    """An earlier run has left the beginning of the file."""
    target.parent.mkdir()
    target.with_name(target.name + ".part").write_bytes(body)


def files_beside(target):
    return sorted(path.name for path in target.parent.iterdir())


def ranges_asked(server):
    return [headers.get("Range") for headers in server.headers]


def ranges(body, cut=None):
    """Honours Range; cut: the number of bytes after which each answer breaks off."""
    def answer(handler):
        start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        if start >= len(body):
            send(416)(handler)
        else:
            code = 206 if start else 200
            span = f"bytes {start}-{len(body) - 1}/{len(body)}"
            rest = body[start:]
            send(code, rest[:cut], len(rest), Content_Range=span)(handler)
    return answer


def test_a_whole_file(server, target):
    server.routes["/x.json.gz"] = send(200, FILE)
    assert download([f"{server.base}/x.json.gz"], target) == target
    assert target.read_bytes() == FILE and files_beside(target) == ["x.json.gz"]


def test_a_part_is_continued(server, target):
    begun(target, FILE[:HALF])
    server.routes["/x.json.gz"] = ranges(FILE)
    download([f"{server.base}/x.json.gz"], target)
    assert target.read_bytes() == FILE
    assert ranges_asked(server) == [f"bytes={HALF}-"]


def test_short_bodies_are_continued_as_long_as_bytes_come(server, target):
    server.routes["/x.json.gz"] = ranges(FILE, cut=len(FILE) // 5)
    download([f"{server.base}/x.json.gz"], target, tries=1)
    assert target.read_bytes() == FILE and len(server.asked) >= 5


def test_a_server_without_ranges_starts_from_zero(server, target):
    begun(target, b"\x1f\x8b something older")
    server.routes["/x.json.gz"] = send(200, FILE)
    download([f"{server.base}/x.json.gz"], target)
    assert target.read_bytes() == FILE


def test_a_part_longer_than_the_file_is_started_again(server, target):
    begun(target, FILE + b"more")
    server.routes["/x.json.gz"] = ranges(FILE)
    download([f"{server.base}/x.json.gz"], target)
    assert target.read_bytes() == FILE
    assert ranges_asked(server) == [f"bytes={len(FILE) + 4}-", None]


def test_another_range_than_asked_for_is_started_again(server, target):
    begun(target, FILE[:HALF])
    last = len(FILE) - HALF + 4    # as many bytes as are missing, but from byte 5 on
    span = f"bytes 5-{last}/{len(FILE)}"
    wrong = send(206, FILE[5:last + 1], Content_Range=span)
    server.routes["/x.json.gz"] = in_turn(wrong, send(200, FILE))
    download([f"{server.base}/x.json.gz"], target)
    assert target.read_bytes() == FILE


@pytest.mark.parametrize("rest", [send(200, FILE[:HALF], len(FILE)), send(416)], ids=["200", "416"])
def test_a_false_length_is_an_error_and_ends(rest, server, target):
    """The server promises more than it ever sends; asked for the rest, it starts again or knows of
    none."""
    first = send(200, FILE[:HALF], len(FILE))
    server.routes["/x.json.gz"] = (
        lambda handler: (rest if handler.headers.get("Range") else first)(handler)
    )
    with pytest.raises(UserError, match=f"{HALF} of {len(FILE)} bytes arrived|416"):
        download([f"{server.base}/x.json.gz"], target)
    assert not target.exists() and len(server.asked) < 8


def test_mirrors_are_asked_in_order(server, target):
    server.routes |= {
        "/b/x.json.gz": send(503), "/c/x.json.gz": send(200, FILE), "/d/x.json.gz": send(200, FILE)
    }
    download([f"{server.base}/{mirror}/x.json.gz" for mirror in "abcd"], target)
    assert [path[1] for path in server.asked] == list("abbc")    # 404 is final, 503 may pass
    assert target.read_bytes() == FILE


def test_a_redirect_is_followed(server, target):
    server.routes |= {"/x.json.gz": send(302, Location="/there.gz"), "/there.gz": send(200, FILE)}
    download([f"{server.base}/x.json.gz"], target)
    assert target.read_bytes() == FILE


def test_a_local_file_is_no_address(server, target, tmp_path):
    (tmp_path / "secret.gz").write_bytes(FILE)
    secret = f"file://{tmp_path}/secret.gz"
    server.routes["/x.json.gz"] = send(302, Location=secret)
    with pytest.raises(UserError, match="not http or https"):
        download([f"{server.base}/x.json.gz", secret], target)
    assert files_beside(target) == []


def test_a_web_page_in_place_of_the_file(server, target):
    server.routes |= {
        "/a.gz": send(200, HTML),
        "/b.gz": send(200, b""),
        "/c.gz": send(200, b'{"error": "too many requests"}'),
        "/d.gz": send(200, FILE),
        "/page.jsonl": send(200, b"\n <html>who are you?</html>"),
    }
    download([f"{server.base}/{name}.gz" for name in "abcd"], target)
    assert target.read_bytes() == FILE
    assert server.asked == ["/a.gz", "/b.gz", "/c.gz", "/d.gz"]
    with pytest.raises(UserError, match="a web page instead of the file"):
        download([f"{server.base}/page.jsonl"], target.with_name("x.jsonl"))


def test_an_uncompressed_mirror_keeps_its_own_name(server, target):
    server.routes["/hub/x.jsonl"] = send(200, b'{"a": 1}\n')
    urls = [f"{server.base}/x.jsonl.gz", f"{server.base}/hub/x.jsonl"]
    for _ in range(2):
        found = download(urls, target.with_name("x.jsonl.gz"))
        assert found.name == "x.jsonl" and found.read_bytes() == b'{"a": 1}\n'
    assert len(server.asked) == 2    # the second time it was there


def test_a_good_file_is_kept_without_a_request(server, target):
    target.parent.mkdir()
    target.write_bytes(b"\x1f\x8b put here by hand")
    download([f"{server.base}/x.json.gz"], target)
    assert target.read_bytes() == b"\x1f\x8b put here by hand" and server.asked == []


def test_an_unusable_file_is_set_aside(server, target):
    target.parent.mkdir()
    target.write_bytes(HTML)
    server.routes["/x.json.gz"] = send(200, FILE)
    download([f"{server.base}/x.json.gz"], target)
    assert files_beside(target) == ["x.json.gz", "x.json.gz~1"] and target.read_bytes() == FILE


def test_sha256(server, target, capsys):
    url = f"{server.base}/x.json.gz"
    server.routes["/x.json.gz"] = send(200, FILE)
    with pytest.raises(UserError, match="the SHA-256 differs"):
        download([url], target, expected="0" * 64, strict=True)
    assert files_beside(target) == []
    download([url], target, expected="0" * 64)
    assert "warning: x.json.gz has another SHA-256" in capsys.readouterr().err
    assert target.read_bytes() == FILE
    target.unlink()
    download([url], target, expected=hashlib.sha256(FILE).hexdigest())
    assert "warning" not in capsys.readouterr().err


def test_a_failure_says_where_to_put_the_file(server, target, names):
    names.known["127.0.0.1"] = ["127.0.0.1"]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}/x.json.gz"
        urls = [f"{server.base}/x.json.gz", nobody, "http://host.invalid/x.json.gz"]
        with pytest.raises(UserError) as error:
            download(urls, target)
    message = str(error.value)
    for url, reason in zip(urls, ("HTTP status 404", "[Errno", "[Errno")):
        assert f"{url}: {reason}" in message
    assert "\n" not in message and message.startswith("x.json.gz could not be downloaded")
    assert str(target.parent) in message and message.endswith("run the same command again")


def test_silence_is_bounded(server, target):
    """Neither a server that never answers nor a long list of addresses keeps the user waiting."""
    server.routes["/x.json.gz"] = server.slow
    urls = [f"{server.base}/x.json.gz"] + [f"{server.base}/x.json.gz?{i}" for i in range(9)]
    start = time.monotonic()
    with pytest.raises(UserError, match="no answer within 0.2 s.*not asked, the time was up"):
        download(urls, target, timeout=0.2, deadline=0.3)
    assert time.monotonic() - start < 2


def test_a_stalled_body_keeps_what_arrived(server, target):
    def stall(handler):
        send(200, FILE[:HALF], len(FILE))(handler)
        handler.wfile.flush()
        server.over.wait(5)

    server.routes["/x.json.gz"] = in_turn(stall, ranges(FILE))
    download([f"{server.base}/x.json.gz"], target, timeout=0.3)
    assert target.read_bytes() == FILE and ranges_asked(server)[-1] == f"bytes={HALF}-"


# ---------------- proxies

class Proxy(socketserver.ThreadingTCPServer):
    """Writes down the first line of each request, answers it with a file, or ends a tunnel."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), None)
        self.lines = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        serve = {"poll_interval": 0.01}
        threading.Thread(target=self.serve_forever, kwargs=serve, daemon=True).start()

    def finish_request(self, request, address):
        self.lines.append(request.recv(4096).split(b"\r\n")[0].decode())
        if self.lines[-1].startswith("CONNECT"):
            request.sendall(b"HTTP/1.1 502 no way there\r\n\r\n")
        else:
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(FILE)
            request.sendall(head + FILE)


@pytest.fixture
def proxy(monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    proxy = Proxy()
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def test_a_download_goes_through_the_proxy(proxy, target, monkeypatch):
    monkeypatch.setenv("http_proxy", proxy.address)
    download(["http://far.example/a/x.json.gz?b=1"], target)
    assert target.read_bytes() == FILE
    assert proxy.lines == ["GET http://far.example:80/a/x.json.gz?b=1 HTTP/1.1"]


def test_https_is_a_tunnel_through_the_proxy(proxy, target, monkeypatch):
    monkeypatch.setenv("https_proxy", proxy.address.removeprefix("http://"))
    with pytest.raises(UserError, match="502"):
        download(["https://far.example/x.json.gz"], target, tries=1)
    assert len(proxy.lines) == 1 and proxy.lines[0].startswith("CONNECT far.example:443 ")


def test_no_proxy_is_respected(proxy, server, target, monkeypatch):
    monkeypatch.setenv("http_proxy", proxy.address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.routes["/x.json.gz"] = send(200, FILE)
    download([f"{server.base}/x.json.gz"], target)
    assert server.asked == ["/x.json.gz"] and proxy.lines == []


def test_pictures_never_go_through_a_proxy(proxy, server, get, monkeypatch):
    """It would ask addresses that were never checked."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.address)
    monkeypatch.delenv("no_proxy")
    assert get("/ok.jpg")["ok"] == 1 and proxy.lines == []


# ---------------- whom to ask

@pytest.mark.parametrize("host, allowed", [
    ("images-amazon.com", True),
    ("ecx.images-amazon.com", True),
    ("ECX.Images-Amazon.com", True),
    ("images-amazon.com.", True),
    ("user:word@images-amazon.com", True),
    ("evil-images-amazon.com", False),
    ("images-amazon.com.evil.com", False),
    ("images-amazon.com@evil.com", False),
    ("images-amazon.com:80@evil.com", False),
    ("evil.com\\@images-amazon.co", False),
    ("evil.com#.images-amazon.com", False),
    ("evil.com?.images-amazon.com", False),
    ("amazon.com", False),
    ("images-amazon.com。evil.com", False),
])
def test_listed_hosts_and_their_subdomains(host, allowed):
    rules = Rules(hosts=("images-amazon.com",))
    if allowed:
        assert Trail(f"http://{host}/x.jpg", rules).host.endswith("images-amazon.com")
    else:
        with pytest.raises(ValueError):
            Trail(f"http://{host}/x.jpg", rules)


PRIVATE = """
    127.0.0.1 127.255.0.1 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1
    224.0.0.1 240.0.0.1 255.255.255.255 198.18.0.1 192.0.2.1 :: ::1 fe80::1 fe80::1%1 fc00::1
    fd00:ec2::254 fec0::1 ff02::1 ff0e::1 2001:db8::1 2001:0:1::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1
    ::ffff:169.254.169.254 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1
    2002:7f00:1:: 2002:a00:1::1 100::1
""".split()
PUBLIC = """
    8.8.8.8 1.1.1.1 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::
""".split()


def test_public_addresses():
    assert [address for address in PRIVATE + PUBLIC if web.is_public(address)] == PUBLIC


@pytest.mark.parametrize("old, new, followed", [
    ("https://a/x", "https://b/x", True),
    ("http://a/x", "https://b/x", True),
    ("http://a/x", "http://b/x", True),
    ("https://a/x", "http://b/x", False),
    ("http://a/x", "ftp://b/x", False),
    ("http://a/x", "file:///x", False),
])
def test_a_redirect_never_loses_encryption(old, new, followed):
    trail = Trail(old, Rules())
    if followed:
        trail.follow(new)
        assert f"{trail.scheme}://{trail.host}{trail.path}" == new
    else:
        with pytest.raises(web.Refused):
            trail.follow(new)


@pytest.mark.parametrize("url, host", [
    ("https://h/x", "h"),
    ("http://h/x", "h"),
    ("http://h:443/x", "h:443"),
    ("https://h:80/x", "h:80"),
])
def test_the_host_header_leaves_out_the_usual_port(url, host, monkeypatch):
    sent = []
    monkeypatch.setattr(web.Line, "connect", lambda line: None)
    line = web.Line(Trail(url, Rules()))
    line.send = sent.append
    line.request("GET", "/")
    assert f"\r\nHost: {host}\r\n".encode() in sent[0]


def test_certificates_are_checked():
    context = web.tls()
    assert context.check_hostname and context.verify_mode == web.ssl.CERT_REQUIRED


def rest_of(text, tries=1):
    headers = Message()
    if text is not None:
        headers["Retry-After"] = text
    return web.rest_of(headers, tries)


def test_the_rest_of_a_busy_host():
    assert [rest_of(text) for text in ("0", "7", "100000", "9" * 400)] == [0, 7, 60, 60]
    now = datetime.now(timezone.utc)
    assert 20 < rest_of(format_datetime(now + timedelta(seconds=30), usegmt=True)) <= 30
    assert rest_of(format_datetime(now - timedelta(days=1), usegmt=True)) == 0
    assert [rest_of(None, 1), rest_of(None, 2)] == [2, 4]
    unreadable = ("soon", "-3", "²", "Wed, 21 Oct 2015 07:28:00 -0000")
    assert [rest_of(text) for text in unreadable] == [2] * 4


# ---------------- many pictures

@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pictures"


@pytest.fixture
def get(server, folder):
    """get(path or address, ...) fetches them for one item -> the counts.

    The server's /ok.jpg is a good picture.
    """
    server.routes["/ok.jpg"] = send(200, JPEG, Content_Type="text/html")

    def get(*urls, hosts=None, timeout=2, private=True, **options):
        urls = [server.base + url if url.startswith("/") else url for url in urls]
        rules = Rules(hosts=hosts, private=private, timeout=timeout)
        return fetch_pictures([("i", urls)], folder, rules, **{"longest": 5} | options)
    return get


def rows(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def statuses(folder):
    return {row["url"]: row["status"] for row in rows(folder)}


def test_a_good_picture_and_its_line(server, get, folder):
    server.routes["/b"] = send(200, PNG)
    assert get("/ok.jpg", "/b") == {"ok": 2, "left": 0}
    for path, name, body in (("/ok.jpg", "i-1.jpg", JPEG), ("/b", "i-2.png", PNG)):
        assert {
            "url": server.base + path, "item": "i", "status": "ok", "file": name,
            "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest(),
        } in rows(folder)
        found = fetched_pictures(folder)[server.base + path]
        assert found.name == name and found.read_bytes() == body
    assert sorted(os.listdir(folder)) == ["i-1.jpg", "i-2.png", "manifest.jsonl"]
    assert server.headers[0]["User-Agent"] == "mmseqrec"


def test_nothing_to_fetch(folder, tmp_path):
    assert fetch_pictures([], folder) == {"ok": 0, "left": 0}
    assert fetched_pictures(tmp_path / "nowhere") == {}


def nonsense(handler):
    handler.wfile.write(b"hello\r\n\r\n")


PIXEL = encoded(Image.new("P", (1, 1)), "GIF")
BAD = "not a picture: "
ANSWERS = [
    (send(404, HTML), "http 404"),
    (send(204), "http 204"),
    (send(206, JPEG), "http 206"),
    (send(302), "http 302"),
    (send(200, HTML, Content_Type="image/jpeg"), BAD + "not one of five picture formats"),
    (send(200, huge(20_000, 20_000)), BAD + "too many pixels"),
    (send(200, b""), BAD + "empty file"),
    (send(200, PIXEL), BAD + "one pixel: a placeholder"),
    (send(200, JPEG[:200]), BAD + "cut off"),
    (send(200, JPEG[:200], "none"), BAD + "cut off"),
    (send(200, JPEG, len(JPEG) - 100), BAD + "cut off"),
    (send(200, JPEG, len(JPEG) + 1), "no connection"),
    (send(200, JPEG, "-5"), "ok"),
    (send(200, JPEG, "many"), "ok"),
    (send(200, JPEG, "none"), "ok"),
    (send(200, bytes(60_000)), "too large"),
    (send(200, bytes(60_000), "none"), "too large"),
    (send(200, bytes(60_000), 10 ** 12), "too large"),
    (nonsense, "no connection"),
    (send(200, JPEG, X_Robots_Tag="noindex, NoAI"), "refused: noai"),
    (send(200, JPEG, X_Robots_Tag="noimageai"), "refused: noai"),
    (send(200, JPEG, X_Robots_Tag="noarchive"), "ok"),
]


def test_one_answer_of_each_kind(server, get, folder):
    paths = [f"/{n}.jpg" for n in range(len(ANSWERS))]
    for path, (answer, _) in zip(paths, ANSWERS):
        server.routes[path] = answer
    counts = get(*paths, most=50_000)
    found = statuses(folder)
    assert [found[server.base + path] for path in paths] == [status for _, status in ANSWERS]
    assert counts == {
        "ok": 4, "http 404": 1, "http 204": 1, "http 206": 1, "http 302": 1, "not a picture": 7,
        "too large": 3, "no connection": 2, "refused": 2, "left": 0,
    }
    assert len(os.listdir(folder)) == 4 + 1


def test_a_chunked_answer_without_end_is_too_large(server, get):
    def endless(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            handler.wfile.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")

    server.routes["/x.jpg"] = endless
    assert get("/x.jpg", most=50_000) == {"ok": 0, "too large": 1, "left": 0}


def test_slow_and_dripping_servers_are_left(server, get):
    head = b"HTTP/1.0 200 OK\r\n"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0;"
    server.routes |= {
        "/silent": server.slow,
        "/body": server.drip(head + b"\r\n"),
        "/head": server.drip(head + b"X: "),
        "/chunk": server.drip(chunked),
    }
    start = time.monotonic()
    assert get("/ok.jpg", "/silent", timeout=0.3) == {"ok": 1, "timeout": 1, "left": 0}
    assert get("/ok.jpg", "/body", "/head", "/chunk", longest=0.5)["timeout"] == 3
    assert time.monotonic() - start < 4


def test_the_time_of_one_picture_covers_its_redirects(server, get):
    def late(answer):
        return lambda handler: (time.sleep(0.25), answer(handler))

    server.routes["/0"] = late(send(200, JPEG))
    for n in range(1, 6):
        server.routes[f"/{n}"] = late(send(302, Location=f"/{n - 1}"))
    assert get("/ok.jpg", "/5", longest=0.8) == {"ok": 1, "timeout": 1, "left": 0}


def test_no_thread_is_held_by_a_server_that_drips(server, get):
    """The server goes on for ever; the thread that listens to it does not."""
    def listening():
        return {thread for thread in threading.enumerate() if "work" in thread.name}

    server.routes["/head"] = server.drip(b"HTTP/1.0 200 OK\r\nX: ")
    before = listening()
    start = time.monotonic()
    get("/head", timeout=8, longest=0.3)
    while listening() - before and time.monotonic() - start < 5:
        time.sleep(0.02)
    assert not listening() - before


# ---------------- addresses of pictures

def test_only_http_and_https(get, folder):
    urls = [
        "file:///etc/passwd", "ftp://127.0.0.1/x.jpg", "data:image/png;base64,AAAA", "img/1.jpg",
        "javascript:alert(1)", "127.0.0.1/x.jpg", "", "https", "FILE:///etc/passwd",
        " file:///etc/passwd",
    ]
    assert get(*urls) == {"ok": 0, "refused": len(urls), "left": 0}
    assert set(statuses(folder).values()) == {"refused: not http or https"}


def test_what_is_no_address(get, folder):
    urls = [
        "http://", "http:///x.jpg", "http://[::1/x.jpg", "http://a:99999/x.jpg", "http://a:b/x.jpg",
        "http://a..b/x.jpg", "http://a b/x.jpg", "http://a\0b/x.jpg", f"http://{'a' * 70}/x.jpg",
        "http://a\\b/x.jpg", "http://h/\ud800.jpg",
    ]
    assert get(*urls) == {"ok": 0, "refused": len(urls), "left": 0}
    assert set(statuses(folder).values()) == {"refused: not a web address"}


def test_odd_letters_in_an_address_are_quoted(server, get, names):
    names.known["xn--bcher-kva.example"] = ["127.0.0.1"]
    server.routes["/gr%C3%BCn%20a.jpg?b=%C3%BC&c=%41"] = send(200, JPEG)
    assert get(f"http://Bücher.example.:{server.port}/grün a.jpg?b=ü&c=%41#top")["ok"] == 1
    assert server.headers[0]["Host"] == f"xn--bcher-kva.example:{server.port}"


def test_a_host_that_is_not_listed_is_never_looked_up(server, get, names, folder):
    names.known |= {"evil.example": ["127.0.0.1"], "good.example": ["127.0.0.1"]}
    evil = f"http://good.example@evil.example:{server.port}/ok.jpg"
    for _ in range(2):
        assert get(evil, hosts=("good.example",)) == {"ok": 0, "refused": 1, "left": 0}
        assert [row["status"] for row in rows(folder)] == ["refused: host not on the list"]
    assert names.asked == [] and server.asked == []
    assert get(evil, hosts=("evil.example",)) == {"ok": 1, "left": 0}    # a longer list is new


THIS_MACHINE = [
    "127.0.0.1", "localhost", "2130706433", "0177.0.0.1", "0x7f.1", "127.1", "0", "[::1]",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::127.0.0.1]", "0.0.0.0", "[::]",
    "①②⑦.0.0.1", "127。0。0。1",
]


@pytest.mark.parametrize("listed", [False, True])
def test_this_machine_is_not_asked(listed, server, get, folder):
    urls = [f"http://{host}:{server.port}/ok.jpg" for host in THIS_MACHINE]
    hosts = [host.strip("[]") for host in THIS_MACHINE] if listed else None
    counts = get(*urls, private=False, hosts=hosts)
    assert counts == {"ok": 0, "refused": len(urls), "left": 0} and server.asked == []
    assert set(statuses(folder).values()) == {"refused: address not public"}


def test_one_private_address_among_others_is_enough(server, get, names):
    names.known["mixed.example"] = ["8.8.8.8", "127.0.0.1"]
    url = f"http://mixed.example:{server.port}/ok.jpg"
    assert get(url, private=False)["refused"] == 1 and server.asked == []


def test_the_checked_address_is_the_one_that_is_asked(server, get, names, monkeypatch):
    """The name service is asked once; what it would say a moment later does not matter."""
    connect = socket.create_connection
    called = []

    def watched(address, *rest):
        called.append(address)
        if address[0] != "127.0.0.1":
            raise ConnectionRefusedError
        return connect(address, *rest)

    names.known["shop.example"] = ["192.0.2.9", "127.0.0.1", "192.0.2.10"]
    monkeypatch.setattr(web, "is_public", lambda address: True)
    monkeypatch.setattr(web.socket, "create_connection", watched)
    assert get(f"http://shop.example:{server.port}/ok.jpg", private=False)["ok"] == 1
    assert names.asked == ["shop.example"]
    assert called == [("192.0.2.9", server.port), ("127.0.0.1", server.port)]
    assert server.headers[0]["Host"] == f"shop.example:{server.port}"


def test_redirects(server, get, folder):
    server.routes |= {
        "/a": send(302, Location="/b"),
        "/b": send(301, Location="ok.jpg"),
        "/loop": send(308, Location="/loop"),
        "/file": send(302, Location="file:///etc/passwd"),
        "/broken": send(302, Location="http://[::1"),
        "/0": send(200, JPEG),
    }
    for n in range(1, 7):
        server.routes[f"/{n}"] = send(307, Location=f"/{n - 1}")
    counts = get("/a", "/loop", "/file", "/broken", "/5", "/6")
    assert counts == {"ok": 2, "refused": 4, "left": 0}
    found = statuses(folder)
    for path, reason in (
        ("/loop", "too many in a row"), ("/6", "too many in a row"),
        ("/file", "not http or https"), ("/broken", "not a web address"),
    ):
        assert found[server.base + path] == f"refused: redirect, {reason}"
    assert server.asked.count("/loop") == 6


def test_every_redirect_is_checked_again(server, get, names, monkeypatch, folder):
    monkeypatch.setattr(web, "is_public", lambda address: address != "127.0.0.2")
    names.known |= {"shop.example": ["127.0.0.1"], "inside.example": ["127.0.0.2"]}
    inside = f"http://inside.example:{server.port}/ok.jpg"
    by_number = f"http://127.0.0.1:{server.port}/ok.jpg"
    server.routes |= {"/in": send(302, Location=inside), "/ip": send(302, Location=by_number)}
    urls = [f"http://shop.example:{server.port}/{path}" for path in ("in", "ip")]
    counts = get(*urls, hosts=("shop.example", "inside.example"), private=False)
    assert counts == {"ok": 0, "refused": 2, "left": 0}
    assert statuses(folder) == {
        urls[0]: "refused: redirect, address not public",
        urls[1]: "refused: redirect, host not on the list",
    }
    assert sorted(server.asked) == ["/in", "/ip"]


def test_tls_is_for_the_name_and_kept_by_redirects(server, get, names, monkeypatch, folder):
    class Plain(socket.socket):
        def do_handshake(self):
            self.settimeout(2)

    class Context:
        wrapped = []

        def wrap_socket(self, sock, server_hostname, do_handshake_on_connect):
            self.wrapped.append(server_hostname)
            return Plain(fileno=sock.detach())

    monkeypatch.setattr(web, "tls", Context)
    names.known["shop.example"] = ["127.0.0.1"]
    base = f"shop.example:{server.port}"
    server.routes |= {
        "/down": send(302, Location=f"http://{base}/ok.jpg"),
        "/same": send(302, Location="/ok.jpg"),
        "/up": send(302, Location=f"https://{base}/ok.jpg"),
    }
    urls = [f"https://{base}/down", f"https://{base}/same", f"http://{base}/up"]
    assert get(*urls) == {"ok": 2, "refused": 1, "left": 0}
    assert statuses(folder)[urls[0]] == "refused: redirect, from https to http"
    assert Context.wrapped == ["shop.example"] * 4 and server.asked.count("/ok.jpg") == 2


# ---------------- busy hosts, later runs

@pytest.mark.parametrize("code", [429, 503])
def test_a_busy_host_is_asked_again(code, server, get):
    busy = send(code, Retry_After="0")
    server.routes["/x"] = in_turn(busy, busy, send(200, JPEG))
    assert get("/x") == {"ok": 1, "left": 0} and server.asked == ["/x"] * 3


def test_a_busy_host_is_asked_three_times_and_in_three_runs(server, get, folder):
    server.routes |= {"/x": send(429, Retry_After="0"), "/y": send(500)}
    for run in range(1, 6):
        assert get("/x", "/y") == {"ok": 0, "http 429": 1, "http 500": 1, "left": 0}
        assert server.asked.count("/x") == 3 * min(run, 3)
        assert server.asked.count("/y") == min(run, 3)
    assert len(rows(folder)) == 6


def test_all_threads_wait_for_a_busy_host(server, get, monkeypatch):
    monkeypatch.setattr(web, "rest_of", lambda headers, tries: 0.5)
    times = []

    def later(handler):
        times.append(time.monotonic())
        send(200, JPEG)(handler)

    answer = in_turn(send(429), later)    # the first of four is told to wait, and all do
    paths = ["/x", "/0", "/1", "/2"]
    server.routes |= dict.fromkeys(paths, answer)
    start = time.monotonic()
    assert get(*paths, threads=1)["ok"] == 4
    assert len(times) == 4 and min(times) - start > 0.4


def test_a_second_run_asks_for_nothing_but_what_is_missing(server, get, folder):
    server.routes |= {"/page": send(200, HTML), "/large": send(200, bytes(60_000))}
    paths = ("/ok.jpg", "/404", "/page", "/large")
    first = get(*paths, most=50_000)
    assert first == {"ok": 1, "http 404": 1, "not a picture": 1, "too large": 1, "left": 0}
    assert get(*paths, most=50_000) == first and len(server.asked) == 4
    (folder / "i-1.jpg").unlink()
    assert fetched_pictures(folder) == {}
    assert get(*paths) == first and server.asked[4:] == ["/ok.jpg"]
    assert fetched_pictures(folder)[f"{server.base}/ok.jpg"].name == "i-1.jpg"


def test_a_new_address_of_an_item_does_not_take_an_old_name(server, get, folder):
    server.routes["/new"] = send(200, PNG)
    get("/ok.jpg")
    get("/new", "/ok.jpg")
    found = fetched_pictures(folder)
    assert found[f"{server.base}/ok.jpg"].read_bytes() == JPEG
    assert found[f"{server.base}/new"].name == "i-2.png"


def test_a_killed_run_goes_on(server, get, folder, tmp_path):
    """The last line is half there, others are no lines of ours, one names a file outside."""
    server.routes["/b"] = send(200, PNG)
    get("/ok.jpg")
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    outside = {"url": "u", "item": "i", "status": "ok", "file": "../secret.jpg"}
    damage = [
        b"12", b"[]", b"{}", b"\xff\xfe", b'{"url": [], "status": "ok", "file": "i-1.jpg"}',
        b"[" * 100_000, b'{"url": "v", "status": 3, "file": 5}', json.dumps(outside).encode(),
        b'{"url": "http://127.0.0.1/',
    ]
    manifest = folder / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes() + b"\n".join(damage))
    assert list(fetched_pictures(folder)) == [f"{server.base}/ok.jpg"]
    assert get("/ok.jpg", "/b") == {"ok": 2, "left": 0} and server.asked == ["/ok.jpg", "/b"]
    assert len(fetched_pictures(folder)) == 2


@pytest.fixture
def ctrl_c():
    """Ctrl-C as a terminal gives it; a shell that starts a job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_run_leaves_no_thread_that_rests(server, get, monkeypatch, ctrl_c):
    """A thread that waits for a busy host when the run ends does not ask it afterwards."""
    def interrupt(handler):
        while "/busy" not in server.asked:
            time.sleep(0.01)
        time.sleep(0.1)
        ctrl_c()

    monkeypatch.setattr(web, "rest_of", lambda headers, tries: 0.6)
    server.routes |= {"/busy": send(429), "/x": interrupt}
    with pytest.raises(KeyboardInterrupt):
        get("/x", "/busy")
    time.sleep(0.8)
    assert server.asked.count("/busy") == 1


def test_an_interrupted_run_goes_on(server, get, folder, ctrl_c):
    def interrupt(handler):
        ctrl_c()
        server.over.wait(0.5)

    paths = [f"/{n}" for n in range(200)]
    server.routes |= dict.fromkeys(paths, send(200, JPEG))
    server.routes["/x"] = in_turn(interrupt, send(200, JPEG))
    with pytest.raises(KeyboardInterrupt):
        get("/x", *paths)
    done = len(fetched_pictures(folder))
    time.sleep(0.1)
    asked = len(server.asked)
    time.sleep(0.2)
    assert len(server.asked) == asked    # nobody goes on in the background
    assert get("/x", *paths)["ok"] == 201 and len(server.asked) <= asked + 201 - done


def test_a_shared_address_is_fetched_once(server, folder):
    server.routes["/ok.jpg"] = send(200, JPEG)
    url = f"{server.base}/ok.jpg"
    counts = fetch_pictures([("a", [url, url]), ("b", [url])], folder, Rules(private=True))
    assert counts == {"ok": 1, "left": 0}
    assert server.asked == ["/ok.jpg"] and fetched_pictures(folder)[url].name == "a-1.jpg"


def test_hostile_keys_stay_in_the_folder_and_apart(server, tmp_path):
    keys = [
        "../../x", "../../y", "a/b", "a_b", "a\\b", "/etc/x", "CON", "con", "Con", "", ".", "..",
        "é", "è", "\ud800", "a\0b", "x" * 300, "x" * 301, "a b", "-rf", "~", "manifest.jsonl", "a",
        "a-1", "q\n",
    ]
    bodies = [encoded(drawn(n), "BMP") for n in range(len(keys))]
    urls = {key: f"{server.base}/{n}" for n, key in enumerate(keys)}
    for n, body in enumerate(bodies):
        server.routes[f"/{n}"] = send(200, body)
    folder = tmp_path / "deep" / "er" / "pictures"
    items = [(key, [url]) for key, url in urls.items()]
    assert fetch_pictures(items, folder, Rules(private=True))["ok"] == len(keys)
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != folder]
    assert outside == []
    found = fetched_pictures(folder)
    names = [path.name for path in found.values()]
    assert len({name.casefold() for name in names}) == len(keys)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{3,80}\.bmp", name) for name in names)
    assert [found[url].read_bytes() for url in urls.values()] == bodies
    for key in ("a_b", "CON", "a", "a-1"):    # harmless ones stay as they are
        assert found[urls[key]].name == f"{key}-1.bmp"


# ---------------- no network

def test_an_offline_run_stops_early_and_records_nothing(server, get, names, folder):
    urls = [f"http://shop.example:{server.port}/{n}" for n in range(100)]
    for _ in range(4):
        names.asked.clear()
        assert get(*urls) == {"ok": 0, "left": 100}
        assert 16 <= len(names.asked) <= 16 + 8
    assert rows(folder) == []
    names.known["shop.example"] = ["127.0.0.1"]
    server.routes |= {f"/{n}": send(200, JPEG) for n in range(100)}
    assert get(*urls) == {"ok": 100, "left": 0}


def test_a_short_offline_run_records_nothing_either(get, names, folder):
    assert get("http://shop.example/1", "http://shop.example/2") == {"ok": 0, "left": 2}
    assert rows(folder) == []


def test_with_an_answer_from_anyone_failures_are_recorded(get, names, folder):
    names.known["127.0.0.1"] = ["127.0.0.1"]
    urls = [f"http://gone.example/{n}" for n in range(15)]
    assert get(*urls, "/ok.jpg") == {"ok": 1, "no connection": 15, "left": 0}
    assert len(rows(folder)) == 16


def test_a_dead_host_among_others_does_not_stop_the_run(get, names, monkeypatch):
    names.known["127.0.0.1"] = ["127.0.0.1"]
    monkeypatch.setattr(web.random, "shuffle", lambda jobs: None)
    dead = [f"http://gone.example/{n}" for n in range(40)]
    assert get("/ok.jpg", *dead, threads=1) == {"ok": 1, "no connection": 40, "left": 0}


def test_dead_hosts_first_do_not_stop_every_run(server, get, names):
    """The order is drawn anew: a catalog that begins with a dead shop is fetched all the same."""
    names.known["127.0.0.1"] = ["127.0.0.1"]
    good = [f"/{n}" for n in range(40)]
    server.routes |= dict.fromkeys(good, send(200, JPEG))
    dead = [f"http://gone.example/{n}" for n in range(40)]
    assert any(get(*dead, *good, threads=2)["ok"] == 40 for _ in range(5))


def test_a_lookup_that_hangs_is_bounded(get, monkeypatch, server):
    monkeypatch.setattr(web, "look_up", lambda host, port: server.over.wait(5))
    start = time.monotonic()
    assert get("http://shop.example/1", longest=0.2) == {"ok": 0, "left": 1}
    assert time.monotonic() - start < 2


def test_a_full_disk_stops_the_run(get, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(web, "atomic", full)
        with pytest.raises(OSError, match="No space left"):
            get("/ok.jpg")
    assert get("/ok.jpg") == {"ok": 1, "left": 0}
