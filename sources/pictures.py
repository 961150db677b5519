"""Pictures of strangers: opened without trust in what they say about themselves, and fetched by their addresses.

A fetched picture is stored as the bytes that came. Beside the pictures lies `manifest.jsonl`, one line per answer:
{"url", "item", "status", "file", "bytes", "sha256"}; the last three are null unless the status is "ok".
"""
import hashlib
import http.client
import io
import ipaddress
import json
import random
import re
import socket
import ssl
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from .common import atomic
from .download import _within

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")     # the only formats that are opened
SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
PIXELS = 89_478_485                     # in one picture; above it Pillow warns of decompression bombs
MOTION = 10 * PIXELS                    # in all frames of an animation, which are decoded one after the other
THIN = 100                              # sides' ratio above which encoders that scale the shorter side ask for gigabytes
LARGE = threading.Lock()                # one large picture at a time takes a gigabyte while it is opened
NAT64 = ipaddress.ip_network("64:ff9b::/96")
SILENT = ("timeout", "no connection")   # no answer: the fault may be on this side
PASSING = re.compile(r"timeout|no connection|http (408|429|5\d\d)")
UNLISTED = "host not on the list"
HOPS, TRIES, RUNS = 5, 3, 3             # redirects of one picture; requests while a host is busy; runs that try again
REST = 60                               # seconds: the longest rest a busy host is given
OFFLINE = 16                            # pictures without an answer from anyone, after which a run stops asking


class BadPicture(ValueError):
    """A picture that cannot be used. The message is the reason in a few plain words."""


def open_picture(source) -> Image.Image:
    """The picture in a file (path) or in bytes, as RGB; of an animation the first frame. Raises BadPicture only."""
    with _opened(source) as picture:
        return _made(picture)


def frames(path, most=10, make=lambda rgb: rgb) -> list:
    """At most `most` RGB pictures at a fixed stride, from an animation or a folder of frames; a still picture gives one.

    make: what becomes of each picture before the next is opened; large ones are worked on one at a time. A folder's
    files are taken in natural order, frame2 before frame10. Raises BadPicture, which names a folder's file.
    """
    path = Path(path)
    if not path.is_dir():
        with _opened(path) as picture:
            total = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)    # MPO: other views, not later ones
            if total * picture.width * picture.height > MOTION:
                raise BadPicture("too many pixels in all frames")
            images = []
            for number in range(0, total, max(total // most, 1))[:most]:
                picture.seek(number)
                images.append(_made(picture, make))
            return images
    files = sorted((file for file in sorted(path.iterdir()) if not file.name.startswith(".") and file.is_file()),
                   key=lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)])
    if not files:
        raise BadPicture("a folder without frames")
    images = []
    for file in files[::max(len(files) // most, 1)][:most]:
        try:
            with _opened(file) as picture:
                images.append(_made(picture, make))
        except BadPicture as error:
            raise BadPicture(f"{file.name}: {error}") from None
    return images


@contextmanager
def _opened(source):
    """The picture in a file or in bytes, its pixels not read yet. Every error, here and in the block, is a BadPicture."""
    try:
        if not isinstance(source, bytes) and not Path(source).is_file():    # a pipe would wait for its other end
            raise BadPicture("no such file")
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            if not file.read(1):
                raise BadPicture("empty file")
            with Image.open(file, formats=FORMATS) as picture:
                yield picture
    except BadPicture:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPicture("too many pixels") from None
    except UnidentifiedImageError:
        raise BadPicture("not one of five picture formats") from None
    except Exception as error:           # a damaged file makes Pillow raise almost anything
        raise BadPicture("cut off" if "truncated" in str(error).lower() else "damaged") from error


def _made(picture, make=lambda rgb: rgb):
    with LARGE if picture.width * picture.height > PIXELS // 8 else nullcontext():
        return make(_rgb(picture))


def _rgb(picture):
    """The present frame as RGB: upright, white where it is transparent, 16-bit grey scaled to 8 bits."""
    if picture.size == (1, 1):
        raise BadPicture("one pixel: a placeholder")
    if max(picture.size) > THIN * min(picture.size):
        raise BadPicture(f"too thin: {picture.width} x {picture.height}")
    if picture.width * picture.height > PIXELS:
        raise BadPicture(f"too many pixels: {picture.width} x {picture.height}")
    picture.load()
    with suppress(Exception):            # bad EXIF does not make a picture bad
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):     # convert() would clip at 255
        picture = Image.fromarray((np.asarray(picture) // 257).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def fetch(items, folder, hosts=None, threads=8, timeout=10, longest=30, most=10_000_000, private=False) -> dict:
    """Fetch the pictures of items into `folder`, each address once; what earlier runs have settled is not asked again.

    items: (item key, [addresses]) pairs. hosts: names that may be asked, with their subdomains; None = any.
    timeout: seconds without a byte. longest: seconds for all requests of one picture. most: bytes of one picture.
    private: whether addresses inside this network or machine may be asked as well.

    Returns how many of the addresses have which status: "ok", "http 404", "not a picture", "too large", "refused",
    "timeout", "no connection", or "left" for the next run. Failures that may pass are tried in 3 runs. A run in which
    nobody answers ends early and records none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    web = _Web(folder, hosts, timeout, longest, most, private)
    rows, failures = _manifest(folder)
    names = {Path(row["file"]).stem.casefold() for row in rows.values() if row["status"] == "ok"}
    urls, jobs = set(), []
    for key, addresses in items:
        for n, url in enumerate(addresses, 1):
            status = rows[url]["status"] if url in rows else ""
            again = (PASSING.fullmatch(status) and failures[url] < RUNS or
                     status == f"refused: {UNLISTED}" and web.listed(urlsplit(url).hostname))
            if url not in urls and (again or not status):
                jobs.append((url, key, _name(key, n, names)))
            urls.add(url)
    random.shuffle(jobs)                 # so that the first ones speak for all hosts
    silent = []
    with open(folder / "manifest.jsonl", "a+b") as manifest, ThreadPool(threads) as pool:
        manifest.seek(max(manifest.tell() - 1, 0))
        if manifest.read(1) not in (b"", b"\n"):
            manifest.write(b"\n")        # after a line that a kill cut off
        try:
            for row in tqdm(pool.imap_unordered(web.picture, jobs), total=len(jobs), desc="fetching pictures",
                            leave=False, disable=None):
                silent += [row] if row["status"] in SILENT else []
                done = [row] if row["status"] not in ("left", *SILENT) else []
                if web.answered:
                    done, silent = done + silent, []
                for row in done:
                    manifest.write(json.dumps(row).encode() + b"\n")
                    rows[row["url"]] = row
                manifest.flush()
        finally:
            web.stop.set()               # the threads finish what they are at and ask for nothing more
    kinds = Counter(rows[url]["status"].split(":")[0] if url in rows else "left" for url in urls)
    return {"ok": 0, **kinds, "left": kinds["left"]}


def fetched(folder) -> dict:
    """url -> path of its picture, for every picture of the manifest that is still there."""
    return {url: Path(folder) / row["file"] for url, row in _manifest(Path(folder))[0].items() if row["status"] == "ok"}


def _manifest(folder):
    """url -> its last line, unless the picture is gone; url -> number of its lines with a failure that may pass."""
    rows, failures = {}, Counter()
    path = folder / "manifest.jsonl"
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError, RecursionError):     # not a line of ours, or half of one
            row = json.loads(line)
            url, name = row["url"], row["file"]
            if row["status"] == "ok" and not (Path(name).name == name and (folder / name).is_file()):
                rows.pop(url, None)
            else:
                failures[url] += bool(PASSING.fullmatch(row["status"]))
                rows[url] = row
    return rows, failures


def _name(key, n, names):
    """A new file name without its suffix: the key, made harmless, and a number that counts on where a name is taken.

    names: those taken, without case; the new one is added.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", key)[:60]
    if safe != key or not key:           # two keys may look the same by now
        safe += "-" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    while f"{safe}-{n}".casefold() in names:
        n += 1
    names.add(f"{safe}-{n}".casefold())
    return f"{safe}-{n}"


class _Refused(ValueError):
    """An address that is not asked. The message is the reason."""


class _Web:
    """What the threads share: whom they may ask, how long and how much; who wants a rest; whether anybody answers."""

    def __init__(self, folder, hosts, timeout, longest, most, private):
        self.folder, self.hosts, self.timeout, self.longest = folder, hosts, timeout, longest
        self.most, self.private, self.busy = most, private, {}      # busy: host -> when to ask it again
        self.stop, self.answered, self.silent = threading.Event(), False, 0
        self.counting = threading.Lock()

    def picture(self, job):
        """(address, item key, file name without suffix) -> the line for the manifest; the file is written if it is good."""
        url, key, name = job
        status, body = self.ask(url)
        row = {"url": url, "item": key, "status": status, "file": None, "bytes": None, "sha256": None}
        with self.counting:
            self.silent += status in SILENT
        if self.silent >= OFFLINE and not self.answered:
            self.stop.set()
        if status == "ok":
            try:
                with _opened(body) as picture:
                    _made(picture)
                    file = f"{name}.{SUFFIX[picture.format]}"
            except BadPicture as error:
                return row | {"status": f"not a picture: {error}"}
            with atomic(self.folder / file, "wb") as out:
                out.write(body)
            row |= {"file": file, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
        return row

    def ask(self, url):
        """(status, body) of an address, after redirects and rests; the body counts only if the status is "ok"."""
        link, scheme, hops, tries, left = "", "", 0, 1, self.longest
        while True:
            try:
                url, before = urljoin(url, link), scheme
                scheme, host, port, path = self.target(url)
                if (before, scheme) == ("https", "http"):
                    raise _Refused("from https to http")
                if self.stop.wait(max(0, self.busy.get(host, 0) - time.monotonic())):
                    return "left", b""
                line, start = _Line(scheme, host, port, self), time.monotonic()
                try:
                    code, headers, body = _within(left, line.get, path, self.most)
                finally:
                    left -= time.monotonic() - start
                    if line.answered:
                        self.answered = True
                    line.hang_up()
            except TimeoutError:
                return "timeout", b""
            except (OSError, http.client.HTTPException):
                return "no connection", b""
            except ValueError as error:  # the parsers' messages are many
                reason = error if isinstance(error, _Refused) else "not a web address"
                return f"refused: {'redirect, ' if hops else ''}{reason}", b""
            link = headers.get("Location", "") if code in (301, 302, 303, 307, 308) else ""
            if link and hops == HOPS:
                return "refused: too many redirects", b""
            elif link:
                hops += 1
            elif code in (429, 503) and tries < TRIES:
                self.busy[host] = time.monotonic() + _rest(headers, tries)
                tries += 1
            elif code != 200:
                return f"http {code}", b""
            elif re.search(r"\bno(image)?ai\b", ",".join(headers.get_all("X-Robots-Tag", [])).lower()):
                return "refused: noai", b""
            else:
                return ("too large", b"") if len(body) > self.most else ("ok", body)

    def target(self, url):
        """(scheme, host, port, path with query) of an address that may be asked. Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise _Refused("not http or https")
        host = (parts.hostname or "").encode("idna").decode().rstrip(".")
        if not re.fullmatch(r"[a-z0-9._:%-]+", host):
            raise ValueError(host)
        if not self.listed(host):
            raise _Refused(UNLISTED)
        path = (parts.path or "/") + ("?" + parts.query if parts.query else "")
        return (parts.scheme, host, parts.port or {"http": 80, "https": 443}[parts.scheme],
                quote(path, safe="%/:?@!$&'()*+,;=~[]"))

    def listed(self, host):
        return self.hosts is None or any(host == name or host.endswith(f".{name}") for name in self.hosts)


class _Line(http.client.HTTPConnection):
    """One request to a host. It goes to an address that was checked: the name is looked up once."""

    def __init__(self, scheme, host, port, web):
        self.default_port = 443 if scheme == "https" else 80    # which the Host header leaves out
        super().__init__(host, port, timeout=web.timeout)
        self.tls, self.private, self.plug, self.answered = scheme == "https", web.private, None, False

    def connect(self):
        addresses = _lookup(self.host, self.port)
        if not self.private and not all(map(_public, addresses)):
            raise _Refused("address not public")
        for address in addresses:
            try:
                self.plug = socket.create_connection((address, self.port), self.timeout)
                break
            except OSError:
                if address == addresses[-1]:
                    raise
        if self.tls:
            self.plug = _tls().wrap_socket(self.plug, server_hostname=self.host, do_handshake_on_connect=False)
            self.plug.do_handshake()     # only now, so that hang_up() ends a slow one as well
        self.sock = self.plug

    def get(self, path, most):
        """(status, headers, body); of a body longer than `most` bytes the beginning. Raises OSError, HTTPException."""
        self.request("GET", path, headers={"User-Agent": "mmseqrec", "Accept": "image/*"})
        answer = self.getresponse()
        self.answered, body = True, bytearray()
        while answer.status == 200 and len(body) <= most and (chunk := answer.read1(1 << 16)):
            body += chunk
        if answer.status == 200 and len(body) <= most and answer.length:
            raise http.client.IncompleteRead(bytes(body), answer.length)
        return answer.status, answer.headers, bytes(body)

    def hang_up(self):
        """Close the line, also under a thread that waits for its next byte."""
        if self.plug:
            with suppress(OSError):
                self.plug.shutdown(socket.SHUT_RDWR)
            self.plug.close()
        self.close()


@cache
def _tls():
    return ssl.create_default_context()


def _lookup(host, port):
    return [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _public(address) -> bool:
    """Whether an IP address, or the IPv4 address wrapped in it, is one of the open internet."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        last = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = ip.ipv4_mapped or ip.sixtofour or (last if ip in NAT64 else ip)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False))


def _rest(headers, tries) -> float:
    """Seconds for which a busy host wants to be left alone: what it says, in seconds or as a date, or 2, 4."""
    text = headers.get("Retry-After", "")
    try:
        seconds = float(text) if text.isdecimal() else (
            parsedate_to_datetime(text) - datetime.now(timezone.utc)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        seconds = 2 ** tries
    return min(max(seconds, 0), REST)
