"""Fetching one file: addresses in order, resumed where it broke off, checked before it gets its name.

Nothing that arrives is run or unpacked here. Until the file is whole it is called `<name>.part`.
"""
import http.client
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from .common import UserError, set_aside
from .common import sha256 as sha256_of

PASSING = {408, 416, 429, *range(500, 600)}    # HTTP answers after which the same address may still give the file
PAUSE = 1                                      # seconds before the same address is asked again


def download(urls, target, sha256=None, strict=False, tries=2, timeout=10, deadline=45) -> Path:
    """Fetch `target` from the first of `urls` that has it -> path of the file. A good file already there is kept.

    A mirror may keep `x.jsonl.gz` uncompressed: what comes from an address without `.gz` is stored without it.
    sha256: expected digest; another one gives a warning, with strict=True it counts as a failure of that address.
    tries: requests to one address that bring nothing new. timeout: seconds without an answer, or without a byte.
    deadline: seconds without a new byte after which no further request starts.

    Raises UserError naming every address with its reason, and where to put the file when it is fetched by hand.
    """
    target = Path(target)
    places = {url: target.with_suffix("") if target.suffix == ".gz" != Path(urlsplit(url).path).suffix else target
              for url in urls}
    for place in (target, *places.values()):
        if place.is_file() and not _defect(place, place.suffix, sha256 if strict else None):
            return place
    target.parent.mkdir(parents=True, exist_ok=True)
    reasons, last_byte = dict.fromkeys(urls, "not asked, the time was up"), time.monotonic()
    for url, place in places.items():
        part, left = place.with_name(place.name + ".part"), tries
        most = _size(part)
        while left and time.monotonic() - last_byte < deadline:
            try:
                _receive(url, part, timeout)
                _accept(part, place, sha256, strict)
                return place
            except (OSError, http.client.HTTPException, ValueError) as error:
                text = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
                reasons[url] = f"no answer within {timeout} s" if isinstance(text, TimeoutError) else str(text)
                code = getattr(error, "code", 500)
                left = 0 if isinstance(error, ValueError) or code not in PASSING else left - 1
                if code == 416:          # nothing lies after the part's end: it belongs to another file
                    part.unlink(missing_ok=True)
            if _size(part) > most:       # more than ever before, so that no server can keep us going for nothing
                most, left, last_byte = _size(part), tries, time.monotonic()
            time.sleep(PAUSE if left else 0)
    raise UserError(f"{target.name} could not be downloaded ({'; '.join(f'{u}: {r}' for u, r in reasons.items())}): "
                    f"fetch it by hand, put it into {target.parent.resolve()} under the name {target.name}, "
                    f"and run the same command again")


def _receive(url, part, timeout):
    """One request that takes `part` from its present size to the whole file.

    Raises OSError, HTTPException or ValueError; what arrived before stays in `part` unless it cannot be continued.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError("only http and https addresses are fetched")
    start = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "mmseqrec"} | (
        {"Range": f"bytes={start}-"} if start else {}))
    print(f"downloading {url}" + (f" from byte {start}" if start else ""), file=sys.stderr, flush=True)
    with _within(timeout, urllib.request.build_opener(_Redirects).open, request, timeout=timeout) as answer:
        length = answer.headers.get("Content-Length")
        total = int(length) if length else None
        if answer.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if not span or int(span[1]) != start:
                part.unlink(missing_ok=True)
                raise OSError("the server sent another part of the file than was asked for")
            total = int(span[2])
        else:
            start = 0                    # the server sends the file from its beginning
        with (open(part, "ab" if start else "wb") as file,
              tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar):
            while chunk := answer.read1(1 << 18):    # what has come, so that a stall loses nothing
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and _size(part) != total:
        raise OSError(f"{_size(part)} of {total} bytes arrived")


def _accept(part, place, sha256, strict):
    """Give a whole `part` its name; a file that is not good enough to be kept is set aside. Raises ValueError."""
    if defect := _defect(part, place.suffix, sha256 if strict else None):
        part.unlink()
        raise ValueError(defect)
    if sha256 and not strict and sha256_of(part) != sha256:
        print(f"warning: {place.name} has another SHA-256 than expected, {sha256}", file=sys.stderr)
    if place.exists():
        print(f"{place} was not usable and is now {set_aside(place)}", file=sys.stderr)
    os.replace(part, place)


def _defect(path, suffix, sha256=None) -> str:
    """What shows that a file is not what its name promises; "" when nothing does."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip()
    if not head:
        return "the file is empty"
    if suffix == ".gz" and head[:2] != b"\x1f\x8b":
        return "not a gzip file, perhaps a web page"
    if head[:1] == b"<":
        return "a web page instead of the file"
    return "the SHA-256 differs" if sha256 and sha256_of(path) != sha256 else ""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects between http and https addresses, but never from https down to http."""

    def redirect_request(self, request, file, code, message, headers, url):
        steps = urlsplit(request.full_url).scheme, urlsplit(url).scheme
        if steps[1] not in ("http", "https") or steps == ("https", "http"):
            raise urllib.error.HTTPError(request.full_url, code, f"redirect to {url} refused", headers, file)
        return super().redirect_request(request, file, code, message, headers, url)


def _within(seconds, call, *args, **kwargs):
    """The result of a call, or TimeoutError. A socket's timeout covers neither name lookup nor all of a host's IPs."""
    future = Future()

    def work():
        try:
            future.set_result(call(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(seconds)


def _size(path) -> int:
    return path.stat().st_size if path.exists() else 0
