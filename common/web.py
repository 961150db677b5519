"""Fetching files and pictures over HTTP, with one client.

The client (`Trail`, `Line`) decides whom to ask and asks. Two kinds of work use it: `download`
brings one large file from the first of several addresses that has it, resumed where it broke off;
`fetch_pictures` brings many small pictures from strangers' addresses, asks only public machines,
and keeps a manifest. Nothing that arrives is run or unpacked here.
"""
import hashlib
import http.client
import ipaddress
import json
import os
import random
import re
import socket
import ssl
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from .files import FULL, UserError, alone_in, atomic, naming, set_aside, sha256
from .pictures import SUFFIX, BadPicture, converted, opened
from .progress import Bar

PORTS = {"http": 80, "https": 443}
HOPS = 5                  # redirects that are followed from one address
REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")
UNLISTED = "host not on the list"


# ---------------- the client

class Refused(ValueError):
    """An address that is not asked. The message is the reason."""


@dataclass
class Rules:
    """Whom a request may ask, and how."""
    hosts: tuple = None      # names that may be asked, with their subdomains; None = any
    private: bool = False    # whether addresses inside this network or machine may be asked as well
    proxies: bool = False    # whether to go through the proxies that the environment names
    timeout: float = 10      # seconds without a byte

    def listed(self, host) -> bool:
        if self.hosts is None:
            return True
        return any(host == name or host.endswith(f".{name}") for name in self.hosts)


class Trail:
    """An address and where its redirects lead. Raises Refused or ValueError where that ends."""

    def __init__(self, url, rules):
        self.rules = rules
        self.hops = 0
        self._go(url)

    def follow(self, link):
        """Go on to where a redirect points: not more than HOPS times, never from https to http."""
        if self.hops == HOPS:
            raise Refused("too many in a row")
        self.hops += 1
        before = self.scheme
        self._go(urljoin(self.url, link))
        if (before, self.scheme) == ("https", "http"):
            raise Refused("from https to http")

    def _go(self, url):
        parts = urlsplit(url)
        if parts.scheme not in PORTS:
            raise Refused("not http or https")
        host = (parts.hostname or "").encode("idna").decode().rstrip(".")
        if not re.fullmatch(r"[a-z0-9._:%-]+", host):
            raise ValueError(f"{host} is no host")
        if not self.rules.listed(host):
            raise Refused(UNLISTED)
        path = (parts.path or "/") + ("?" + parts.query if parts.query else "")
        self.url = url
        self.scheme = parts.scheme
        self.host = host
        self.port = parts.port or PORTS[parts.scheme]
        self.path = quote(path, safe="%/:?@!$&'()*+,;=~[]")


class Line(http.client.HTTPConnection):
    """One GET request. The name is looked up once: the address that was checked is asked."""

    def __init__(self, trail):
        self.default_port = PORTS[trail.scheme]    # which the Host header leaves out
        super().__init__(trail.host, trail.port, timeout=trail.rules.timeout)
        self.trail = trail
        self.proxy = proxy_of(trail)
        self.plug = None         # the socket, which hang_up closes from another thread
        self.answered = False
        if self.proxy and trail.scheme == "https":
            self.set_tunnel(trail.host, trail.port)

    def connect(self):
        host, port = self.proxy or (self.host, self.port)
        addresses = look_up(host, port)
        if not self.trail.rules.private and not all(map(is_public, addresses)):
            raise Refused("address not public")
        for address in addresses:
            try:
                self.plug = socket.create_connection((address, port), self.timeout)
                break
            except OSError:
                if address == addresses[-1]:
                    raise
        self.sock = self.plug
        if self.trail.scheme == "https":
            if self.proxy:
                self._tunnel()
            self.plug = tls().wrap_socket(
                self.plug, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.plug.do_handshake()    # only now, so that hang_up() ends a slow one as well
        self.sock = self.plug

    def ask(self, headers=None):
        """Send the request -> the answer, its body not read yet. Raises OSError, HTTPException."""
        path = self.trail.path
        if self.proxy and self.trail.scheme == "http":
            path = f"http://{self.host}:{self.port}{path}"
        self.request("GET", path, headers={"User-Agent": "mmseqrec", **(headers or {})})
        answer = self.getresponse()
        self.answered = True
        return answer

    def get(self, most, headers=None):
        """(status, headers, body); of a body longer than `most` bytes the beginning."""
        answer = self.ask(headers)
        body = bytearray()
        if answer.status == 200:
            while len(body) <= most and (chunk := answer.read1(1 << 16)):
                body += chunk
            if len(body) <= most and answer.length:
                raise http.client.IncompleteRead(bytes(body), answer.length)
        return answer.status, answer.headers, bytes(body)

    def hang_up(self):
        """Close the line, also under a thread that waits for its next byte."""
        if self.plug:
            with suppress(OSError):
                self.plug.shutdown(socket.SHUT_RDWR)
            self.plug.close()
        self.close()


def redirect_of(status, headers) -> str:
    """Where an answer sends on to; "" where it is no redirect."""
    return headers.get("Location", "") if status in REDIRECTS else ""


def proxy_of(trail):
    """(host, port) of the proxy that the environment names for an address, or None."""
    if not trail.rules.proxies or urllib.request.proxy_bypass(trail.host):
        return None
    address = urllib.request.getproxies().get(trail.scheme)
    if not address:
        return None
    parts = urlsplit(address if "://" in address else f"http://{address}")
    return parts.hostname, parts.port or PORTS["http"]


@cache
def tls():
    return ssl.create_default_context()


def look_up(host, port) -> list:
    """The IP addresses of a name."""
    return [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address) -> bool:
    """Whether an IP address, or the IPv4 address wrapped in it, is one of the open internet."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        last = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = ip.ipv4_mapped or ip.sixtofour or (last if ip in NAT64 else ip)
    special = ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False)
    return ip.is_global and not special


def within(seconds, call, *args):
    """The result of a call, or TimeoutError.

    A socket's own timeout covers neither the lookup of a name nor all the addresses of a host.
    """
    future = Future()

    def work():
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(seconds)


# ---------------- one file

PASSING = {408, 416, 429, *range(500, 600)}    # after these, the same address may give the file
PAUSE = 1                                      # seconds before the same address is asked again


class Status(OSError):
    """An answer that is not the file."""

    def __init__(self, code):
        super().__init__(f"HTTP status {code}")
        self.code = code


def download(urls, target, expected=None, strict=False, tries=2, timeout=10, deadline=45) -> Path:
    """Fetch `target` from the first of `urls` that has it -> path of the file.

    A good file already there is kept. Until a file is whole it is called `<name>.part`. A mirror
    may keep `x.jsonl.gz` uncompressed: what comes from an address without `.gz` is stored without
    it. expected: SHA-256; another one gives a warning, with strict=True it is a failure of that
    address. tries: requests to one address that bring nothing new. timeout: seconds without an
    answer or a byte. deadline: seconds without a new byte after which no further request starts.

    Raises UserError naming every address with its reason, and where to put a file fetched by hand.
    """
    target = Path(target)
    places = {url: place_of(url, target) for url in urls}
    demanded = expected if strict else None
    for place in (target, *places.values()):
        if place.is_file() and not defect_of(place, place.suffix, demanded):
            return place
    target.parent.mkdir(parents=True, exist_ok=True)
    reasons = dict.fromkeys(urls, "not asked, the time was up")
    last_byte = time.monotonic()
    for url, place in places.items():
        part = place.with_name(place.name + ".part")
        most = size_of(part)
        left = tries
        while left and time.monotonic() - last_byte < deadline:
            try:
                receive(url, part, timeout)
                accept(part, place, expected, strict)
                return place
            except (OSError, http.client.HTTPException, ValueError) as error:
                refuse_if_of_the_disk(error, part)
                reasons[url] = reason_of(error, timeout)
                if getattr(error, "code", None) == 416:
                    part.unlink(missing_ok=True)    # it is longer than the file: not the same file
                final = isinstance(error, ValueError) or getattr(error, "code", 500) not in PASSING
                left = 0 if final else left - 1
            if size_of(part) > most:    # more than ever before, so that no server can keep us
                most = size_of(part)    # going for nothing
                left = tries
                last_byte = time.monotonic()
            if left:
                time.sleep(PAUSE)
    listed = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
    raise UserError(
        f"{target.name} could not be downloaded ({listed}): fetch it by hand, put it into "
        f"{target.parent.resolve()} under the name {target.name}, and run the same command again"
    )


def refuse_if_of_the_disk(error, part):
    """Raise an error again that no other address can help with: the disk is full, or locked."""
    if getattr(error, "errno", None) in FULL:
        error.filename = str(part)
    if getattr(error, "filename", None):    # errors of the network name no file
        raise error


def place_of(url, target) -> Path:
    """Where the file of an address is stored: without .gz if the address has none."""
    compressed_here = target.suffix == ".gz"
    compressed_there = Path(urlsplit(url).path).suffix == ".gz"
    return target.with_suffix("") if compressed_here and not compressed_there else target


def reason_of(error, timeout) -> str:
    return f"no answer within {timeout} s" if isinstance(error, TimeoutError) else str(error)


def receive(url, part, timeout):
    """One request that takes `part` from its present size to the whole file.

    Raises OSError, HTTPException or ValueError; what arrived before stays in `part` unless it
    cannot be continued.
    """
    start = size_of(part)
    headers = {"Range": f"bytes={start}-"} if start else {}
    shown = f"downloading {url}" + (f" from byte {start}" if start else "")
    trail = Trail(url, Rules(private=True, proxies=True, timeout=timeout))
    print(shown, file=sys.stderr, flush=True)
    while True:
        line = Line(trail)
        try:
            answer = within(timeout, line.ask, headers)
            link = redirect_of(answer.status, answer.headers)
            if not link:
                return store(answer, part, start)
        finally:
            line.hang_up()
        trail.follow(link)


def store(answer, part, start):
    """Write an answer's body to `part`, after its first `start` bytes if the server agrees."""
    if answer.status not in (200, 206):
        raise Status(answer.status)
    length = answer.headers.get("Content-Length")
    total = int(length) if length else None
    if answer.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if not span or int(span[1]) != start:
            part.unlink(missing_ok=True)
            raise OSError("the server sent another part of the file than was asked for")
        total = int(span[2])
    else:
        start = 0    # the server sends the file from its beginning
    bar = Bar(f"fetching {part.stem}", total, " bytes", start)
    with open(part, "ab" if start else "wb") as file, bar:
        while chunk := answer.read1(1 << 18):    # what has come, so that a stall loses nothing
            file.write(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and size_of(part) != total:
        raise OSError(f"{size_of(part)} of {total} bytes arrived")


def accept(part, place, expected, strict):
    """Give a whole `part` its name; what was there before is set aside. Raises ValueError."""
    defect = defect_of(part, place.suffix, expected if strict else None)
    if defect:
        part.unlink()
        raise ValueError(defect)
    if expected and not strict and sha256(part) != expected:
        warning = f"warning: {place.name} has another SHA-256 than expected, {expected}"
        print(warning, file=sys.stderr)
    if place.exists():
        print(f"{place} was not usable and is now {set_aside(place)}", file=sys.stderr)
    os.replace(part, place)


def defect_of(path, suffix, expected=None) -> str:
    """What shows that a file is not what its name promises; "" when nothing does."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip()
    if not head:
        return "the file is empty"
    if suffix == ".gz" and head[:2] != b"\x1f\x8b":
        return "not a gzip file, perhaps a web page"
    if head[:1] == b"<":
        return "a web page instead of the file"
    if expected and sha256(path) != expected:
        return "the SHA-256 differs"
    return ""


def size_of(path) -> int:
    return path.stat().st_size if path.exists() else 0


# ---------------- many pictures

SILENT = ("timeout", "no connection")    # no answer: the fault may be on this side
MAY_PASS = re.compile(r"timeout|no connection|http (408|429|5\d\d)")
TRIES = 3        # requests while a host is busy
RUNS = 3         # runs that try a failure again that may pass
REST = 60        # seconds: the longest rest that a busy host is given
OFFLINE = 16     # pictures without an answer from anyone, after which a run stops asking


def fetch_pictures(items, folder, rules=None, threads=8, longest=30, most=10_000_000) -> dict:
    """Fetch the pictures of items into `folder`, each address once, as the bytes that came.

    items: (item key, [addresses]) pairs. rules: whom to ask; None = any public machine.
    longest: seconds for all requests of one picture. most: bytes of one picture.

    Beside the pictures lies `manifest.jsonl`, one line per answer: {"url", "item", "status",
    "file", "bytes", "sha256"}; the last three are null unless the status is "ok". What earlier
    runs have settled is not asked again; failures that may pass are tried in 3 runs. A run in
    which nobody answers ends early and records none.

    Of two processes at once the second waits, and finds what the first has brought.

    Returns how many of the addresses have which status: "ok", "http 404", "not a picture",
    "too large", "refused", "timeout", "no connection", or "left" for the next run.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        return fetch_alone(items, folder, rules or Rules(), threads, longest, most)


def fetch_alone(items, folder, rules, threads, longest, most) -> dict:
    """fetch_pictures, while no other process works in the folder."""
    manifest = Manifest(folder)
    jobs = manifest.jobs(items, rules)
    random.shuffle(jobs)    # so that the first ones speak for all hosts
    crew = Crew(folder, rules, longest, most)
    silent = []             # answers that never came, kept back until somebody answers
    with ThreadPool(threads) as pool, naming(manifest.path), manifest.appending() as file:
        rows = pool.imap_unordered(crew.picture, jobs)
        try:
            for row in Bar("fetching pictures", len(jobs)).over(rows):
                if row["status"] in SILENT:
                    silent.append(row)
                elif row["status"] != "left":
                    manifest.add(row, file)
                if crew.answered:
                    while silent:
                        manifest.add(silent.pop(0), file)
                file.flush()
        finally:
            crew.stop.set()    # the threads finish what they are at and ask for nothing more
    return manifest.counts()


def fetched_pictures(folder) -> dict:
    """address -> path of its picture, for every picture of the manifest that is still there."""
    manifest = Manifest(Path(folder))
    return {
        url: manifest.folder / row["file"]
        for url, row in manifest.rows.items() if row["status"] == "ok"
    }


class Manifest:
    """What is known of each address: its last line, and how many passing failures it has had."""

    def __init__(self, folder):
        self.folder = folder
        self.path = folder / "manifest.jsonl"
        self.rows = {}
        self.failures = Counter()
        self.asked_for = {}    # the addresses of the present run, in order
        lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        for line in lines:
            with suppress(ValueError, KeyError, TypeError, RecursionError):    # not a line of ours
                self._know(json.loads(line))

    def _know(self, row):
        url, name, status = row["url"], row["file"], row["status"]
        if status == "ok" and not (Path(name).name == name and (self.folder / name).is_file()):
            self.rows.pop(url, None)    # the picture is gone
        else:
            self.failures[url] += bool(MAY_PASS.fullmatch(status))
            self.rows[url] = row

    def jobs(self, items, rules) -> list:
        """(address, item key, new file name without suffix) of what is to be asked in this run."""
        kept = [row["file"] for row in self.rows.values() if row["status"] == "ok"]
        names = {Path(name).stem.casefold() for name in kept}
        jobs = []
        for key, addresses in items:
            for n, url in enumerate(addresses, 1):
                if url not in self.asked_for and self.is_open(url, rules):
                    jobs.append((url, key, new_name(key, n, names)))
                self.asked_for[url] = True
        return jobs

    def is_open(self, url, rules) -> bool:
        """Whether an address is still to be asked."""
        if url not in self.rows:
            return True
        status = self.rows[url]["status"]
        if status == f"refused: {UNLISTED}":    # a longer list is a new question
            return rules.listed(urlsplit(url).hostname)
        return bool(MAY_PASS.fullmatch(status)) and self.failures[url] < RUNS

    def appending(self):
        """The manifest opened for further lines, after one that a kill may have cut off."""
        file = open(self.path, "a+b")
        file.seek(max(file.tell() - 1, 0))
        if file.read(1) not in (b"", b"\n"):
            file.write(b"\n")
        return file

    def add(self, row, file):
        file.write(json.dumps(row).encode() + b"\n")
        self.rows[row["url"]] = row

    def counts(self) -> dict:
        statuses = (
            self.rows[url]["status"].split(":")[0] if url in self.rows else "left"
            for url in self.asked_for
        )
        kinds = Counter(statuses)
        return {"ok": 0, **kinds, "left": kinds["left"]}


class Crew:
    """What the threads share: rules, limits, who wants a rest, and whether anybody answers."""

    def __init__(self, folder, rules, longest, most):
        self.folder = folder
        self.rules = rules
        self.longest = longest
        self.most = most
        self.busy = {}                   # host -> when to ask it again
        self.stop = threading.Event()
        self.answered = False
        self.silent = 0
        self.counting = threading.Lock()

    def picture(self, job):
        """(address, item key, file name) -> line for the manifest; a good picture is written."""
        url, key, name = job
        status, body = self.ask(url)
        row = {
            "url": url, "item": key, "status": status, "file": None, "bytes": None, "sha256": None,
        }
        with self.counting:
            self.silent += status in SILENT
        if self.silent >= OFFLINE and not self.answered:
            self.stop.set()
        if status == "ok":
            try:
                with opened(body) as picture:
                    converted(picture)
                    file = f"{name}.{SUFFIX[picture.format]}"
            except BadPicture as error:
                return row | {"status": f"not a picture: {error}"}
            with atomic(self.folder / file, "wb") as out:
                out.write(body)
            digest = hashlib.sha256(body).hexdigest()
            row |= {"file": file, "bytes": len(body), "sha256": digest}
        return row

    def ask(self, url):
        """(status, body) of an address, after redirects and rests; the body only if it is "ok"."""
        redirected = ""
        try:
            trail = Trail(url, self.rules)
            tries = 1
            left = self.longest
            while True:
                if self.stop.wait(max(0, self.busy.get(trail.host, 0) - time.monotonic())):
                    return "left", b""
                line = Line(trail)
                start = time.monotonic()
                try:
                    code, headers, body = within(left, line.get, self.most, {"Accept": "image/*"})
                finally:
                    left -= time.monotonic() - start
                    self.answered = self.answered or line.answered
                    line.hang_up()
                link = redirect_of(code, headers)
                if link:
                    redirected = "redirect, "
                    trail.follow(link)
                elif code in (429, 503) and tries < TRIES:
                    self.busy[trail.host] = time.monotonic() + rest_of(headers, tries)
                    tries += 1
                else:
                    return self.judged(code, headers, body)
        except TimeoutError:
            return "timeout", b""
        except (OSError, http.client.HTTPException):
            return "no connection", b""
        except Refused as error:
            return f"refused: {redirected}{error}", b""
        except ValueError:    # the parsers of addresses have many messages
            return f"refused: {redirected}not a web address", b""

    def judged(self, code, headers, body):
        """(status, body) of a last answer."""
        robots = ",".join(headers.get_all("X-Robots-Tag", [])).lower()
        if code != 200:
            return f"http {code}", b""
        if re.search(r"\bno(image)?ai\b", robots):
            return "refused: noai", b""
        if len(body) > self.most:
            return "too large", b""
        return "ok", body


def rest_of(headers, tries) -> float:
    """Seconds for which a busy host wants to be left alone: a number or a date; else 2, 4."""
    text = headers.get("Retry-After", "")
    try:
        if text.isdecimal():
            seconds = float(text)
        else:
            moment = parsedate_to_datetime(text)
            seconds = (moment - datetime.now(timezone.utc)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        seconds = 2 ** tries
    return min(max(seconds, 0), REST)


def new_name(key, n, names):
    """A new file name without its suffix: the key made harmless, and a number that is not taken.

    names: those taken, in lower case; the new one is added.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", key)[:60]
    if safe != key or not key:    # two keys may look the same by now
        safe += "-" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    while f"{safe}-{n}".casefold() in names:
        n += 1
    names.add(f"{safe}-{n}".casefold())
    return f"{safe}-{n}"
