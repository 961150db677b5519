"""Kills every command at every moment, and looks whether its next start makes up for it.

    python tests/soak.py                                  all phases
    python tests/soak.py --only train-mdsrec --seed 3     one of them, with other random moments
    python tests/soak.py --every 20 --random 0            a short one

A phase is a command in a folder of its own. It runs once undisturbed, and what it leaves is the
truth. Then it is killed, like `kill -9`,

    change     before its n-th change of a file, for every n: opening for writing, renaming ...
    write      in the middle of a write, when a file grows beyond so many bytes
    random     at random moments, and the runs that go on are killed as well
    ctrl-c     interrupted before its n-th change: it must end with exit code 130

and started again until it comes to its end. What lies in the folder then must be the same to the
bit, but for seconds and dates; not a file more, not one less. At last it is started twice at once
(two): both come to their end, or the second says that another process is writing. Linux, one
thread, the CPU.

The commands are the real ones. Each runs in a child forked from a process that has imported
everything, which saves the three seconds that this takes.
"""
import argparse
import contextlib
import gzip
import hashlib
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

import data
import extract_features
from common.files import command
from common.web import Rules
from helpers import Server, drawn, encoded, write_shop

SCRIPTS = ("data", "extract_features", "train", "evaluate", "recommend")
MODULES = {name: importlib.import_module(name) for name in SCRIPTS}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
SIZES = (90, 700, 3_000, 9_000, 30_000)    # bytes at which a growing file ends the process
MOST = 4        # random kills of one command before it may come to its end
OTHER = "was begun with other settings"    # it then says: leave --resume out
LIMIT = 300     # seconds that one command may take
SMALL = "--data shop --text hash --image pixels --device cpu --epochs 3 --patience 3 --dim 16"


# ---------------- the phases

@dataclass
class Phase:
    """A command, what must have run before it, and how it is started again."""
    name: str
    line: str                                     # the command
    before: list = field(default_factory=list)    # commands; a function is called with the folder
    resumes: bool = False                         # whether the next start needs --resume
    makes: str = None                             # a file or folder that every start makes anew

    @property
    def again(self):
        return f"{self.line} --resume" if self.resumes else self.line


def phases(address) -> list:
    """address: of the server that `serve` has started."""
    prepare = "data shop"
    features = "extract_features --data shop --text hash --image pixels --device cpu"
    ready = [shop, prepare, features]
    trained = {
        "sasrec": f"train --model sasrec {SMALL}",
        "mdsrec": f"train --model mdsrec {SMALL} --neighbors 3 --centers 4 --inner 16",
        "msm4sr": f"train --model msm4sr {SMALL} --pretrain_epochs 2 --experts 2",
        "fmmsrec": f"train --model fmmsrec {SMALL} --pretrain_epochs 2",
        "mmsr": f"train --model mmsr {SMALL} --text_encoder tiny --image_encoder tiny --epochs 2",
    }
    two = [*ready, trained["sasrec"], trained["mdsrec"]]
    runs = "runs/mdsrec-shop-0 runs/sasrec-shop-0"
    return [
        Phase("prepare", prepare, [shop]),
        Phase("prepare-again", prepare, [*ready, changed]),
        Phase("download", f"data amazon2018:Tiny --mirror {address}"),
        Phase("pictures", features, [lambda folder: shop_of_addresses(folder, address), prepare]),
        Phase("features", features, [shop, prepare]),
        *(Phase(f"train-{name}", line, ready, True) for name, line in trained.items()),
        Phase("train-again", f"{trained['sasrec']} --lr 0.01", [*ready, trained["sasrec"]], True),
        Phase("train-longer", f"{trained['sasrec']} --epochs 5 --patience 5 --resume",
              [*ready, trained["sasrec"]]),
        Phase("everything", f"train --model sasrec,srmml {SMALL} --epochs 1", [shop]),
        Phase("table", f"evaluate {runs} --out table", two),
        Phase("against", f"evaluate {runs.replace(' ', ' --against ')} --device cpu", two),
        Phase("recommend-all", "recommend runs/mdsrec-shop-0 --all --out top.csv --device cpu",
              two, makes="top.csv"),
        Phase("recommend-page", "recommend runs/mdsrec-shop-0 --user u1 --html u1.html --device "
              "cpu", two, makes="u1.html"),
        Phase("vectors", "recommend runs/mdsrec-shop-0 --export vectors --device cpu", two,
              makes="vectors"),
    ]


def shop(folder):
    """A shop of our own, with pictures."""
    write_shop(folder / "shop")
    (folder / "shop/img").mkdir()
    for n in range(1, 13):
        drawn(n).save(folder / f"shop/img/i{n}.png")
    give_pictures(folder / "shop", lambda n: f"img/i{n}.png")


def shop_of_addresses(folder, address):
    write_shop(folder / "shop")
    give_pictures(folder / "shop", lambda n: f"{address}/{n}.png")


def give_pictures(folder, where):
    path = folder / "items.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for n in range(1, 13):
        rows[n]["images"] = [where(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def changed(folder):
    """One more purchase: the shop must be prepared anew, and its features still fit."""
    with open(folder / "shop/interactions.csv", "a") as file:
        file.write("u1,i1,1700000000\n")


# ---------------- a server on this machine, in a process of its own

def serve():
    """Start it -> (address, its process). It has Tiny, a category of Amazon 2018, and pictures."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        server = Server()
        server.routes = dict(routes())
        os.write(writer, server.base.encode())
        signal.pause()
    return os.read(reader, 100).decode(), process


def routes():
    rng = random.Random(0)
    reviews, products = [], []
    for u in range(40):
        for n, item in enumerate(rng.sample(range(20), 8)):
            when = 1_500_000_000 + 86_400 * (u + 9 * n)
            reviews.append({"reviewerID": f"U{u}", "asin": f"B{item:09}", "unixReviewTime": when,
                            "reviewText": f"{rng.random()}" * 20})
    for item in range(20):
        products.append({"asin": f"B{item:09}", "title": f"thing {item}", "brand": "Acme"})
    for path, rows in (("categoryFilesSmall/Tiny_5", reviews), ("metaFiles2/meta_Tiny", products)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        yield f"/{path}.json.gz", in_pieces(gzip.compress(text.encode(), mtime=0))
    for n in range(1, 13):
        yield f"/{n}.png", in_pieces(encoded(drawn(n)), 2)


def in_pieces(body, pieces=20):
    """An answer that takes its time, and goes on where it is asked to."""
    def answer(handler):
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        code = 416 if asked and start >= len(body) else 206 if asked else 200
        handler.send_response(code)
        left = body[start:]
        if code == 206:
            span = f"bytes {start}-{len(body) - 1}/{len(body)}"
            handler.send_header("Content-Range", span)
        handler.send_header("Content-Length", str(len(left)))
        handler.end_headers()
        step = len(body) // pieces + 1
        for first in range(0, len(left), step):
            time.sleep(.01)
            handler.wfile.write(left[first:first + step])
    return answer


# ---------------- one command in a child

def start(line, folder, log, stop=(None, None), largest=None, counter=None) -> int:
    """Fork a child that runs a command in a folder -> its process number.

    stop: the number of the change of a file, from 1, before which it sends itself a signal, and the
    signal. largest: bytes of a file beyond which it is ended. counter: a file descriptor to which
    it writes a byte for every change.
    """
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.chdir(folder)
        with open(log if largest is None else os.devnull, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), write_through=True)
        torch.set_num_threads(1)
        extract_features.PART.update(text=8, image=4)    # several parts of a small shop
        data.Rules = lambda hosts: Rules(hosts=hosts, private=True)    # the server is on this host
        script, *sys.argv[1:] = line.split()
        sys.argv[0] = f"{script}.py"
        if largest is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)    # Python ignores it
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell may have it ignored
        sys.addaudithook(watch(folder, stop, counter))
        command(MODULES[script].main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code if isinstance(code, int) else 1)


def watch(folder, stop, counter):
    """An audit hook, called before each change of a file in the folder."""
    inside = str(folder) + os.sep
    number, kind = stop
    count = 0

    def hook(event, args):
        nonlocal count
        changes = event in CHANGES or (event == "open" and args[2] & WRITING)
        if not changes or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        if not os.path.abspath(os.fsdecode(args[0])).startswith(inside):
            return
        count += 1
        if counter is not None:
            os.write(counter, b".")
        if count == number:
            os.kill(os.getpid(), kind)
    return hook


def end_of(process, seconds=None) -> int:
    """Wait -> exit code, or minus the signal that ended it. seconds: after these, kill it."""
    deadline = time.monotonic() + (LIMIT if seconds is None else seconds)
    while True:
        pid, status, _ = os.wait4(process, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            return code if seconds is not None else "hangs"
        time.sleep(.002)


# ---------------- what lies in a folder

def snapshot(folder) -> dict:
    """{path of a file: SHA-256 of what must be the same}; of a folder "folder"."""
    return {
        str(path.relative_to(folder)): fingerprint(path) if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def fingerprint(path) -> str:
    body = path.read_bytes()
    with contextlib.suppress(ValueError, KeyError, IndexError):    # damaged: compared as it is
        body = without_times(path, body)
    return hashlib.sha256(body).hexdigest()


def without_times(path, body) -> bytes:
    """A file's content without seconds and dates."""
    if path.name.startswith("metrics.json"):
        return without(json.loads(body), "seconds", "seconds_training")
    if path.name == "log.jsonl":
        rows = [without(json.loads(line), "seconds") for line in body.splitlines()]
        return b"\n".join(rows)
    if path.name == "report.html":
        return re.sub(rb"\d+ s on", b"", body)
    if path.name.startswith("table") and path.suffix == ".json":
        return re.sub(rb'"seconds": [\d.e-]+', b"", body)
    if path.name.startswith("table") and path.suffix == ".md":
        rows = [line.split(b"|") for line in body.splitlines() if line.startswith(b"|")]
        column = rows[0].index(b" seconds ")
        return b"\n".join(b"|".join(row[:column] + row[column + 1:]) for row in rows)
    if path.name == "source.json":
        return re.sub(rb'"mtime_ns": \d+', b"", body)
    if path.name == "manifest.jsonl":    # answers come in any order
        return b"\n".join(sorted(body.splitlines()))
    if path.name == "state.safetensors":
        size = int.from_bytes(body[:8], "little")
        head = json.loads(body[8:8 + size])
        about = json.loads(head.pop("__metadata__")["about"])["about"]    # its sum has the seconds
        return without(about, "seconds") + without(head) + body[8 + size:]
    return body


def without(row, *names) -> bytes:
    return json.dumps({name: value for name, value in row.items() if name not in names}).encode()


def differences(truth, found) -> list:
    """What is missing, too much, or other."""
    lines = [f"lacks {path}" for path in truth.keys() - found.keys()]
    lines += [f"has {path} too much" for path in found.keys() - truth.keys()]
    both = truth.keys() & found.keys()
    lines += [f"has another {path}" for path in both if truth[path] != found[path]]
    return sorted(lines)


# ---------------- a phase

class Soak:
    """A phase, what it leaves undisturbed, and what is counted."""

    def __init__(self, phase, top, rng):
        self.phase = phase
        self.rng = rng
        self.work = top / "work"      # always the same path: it stands in some files
        self.base = top / "base"
        self.log = top / "log.txt"
        self.kills = {"change": 0, "write": 0, "random": 0, "ctrl-c": 0}
        self.pairs = 0
        self.resumes = 0
        self.mismatches = []

    def prepare(self):
        """Make the folder that the command begins in, and learn what it leaves, and when."""
        for folder in (self.work, self.base):
            shutil.rmtree(folder, ignore_errors=True)
        self.work.mkdir()
        for step in self.phase.before:
            if callable(step):
                step(self.work)
            else:
                self.must(end_of(start(step, self.work, self.log)), step)
        shutil.copytree(self.work, self.base)
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        begin = time.monotonic()
        code = end_of(start(self.phase.line, self.work, self.log, counter=writer))
        self.seconds = time.monotonic() - begin
        self.must(code, self.phase.line)
        self.changes = len(os.read(reader, 1 << 16))
        os.close(reader)
        os.close(writer)
        self.truth = snapshot(self.work)

    def must(self, code, line):
        if code != 0:
            sys.exit(f"{line}: exit code {code}\n{self.log.read_text()[-2000:]}")

    def disturb(self, every, randoms):
        for n in range(1, self.changes + 1, every):
            self.kill("change", [dict(stop=(n, signal.SIGKILL))], f"before change {n}")
        for n in range(1, self.changes + 1, 2 * every):
            self.kill("ctrl-c", [dict(stop=(n, signal.SIGINT))], f"by Ctrl-C before change {n}")
        for size in SIZES[::min(every, 3)]:
            self.kill("write", [dict(largest=size)], f"at byte {size}")
        for _ in range(randoms):
            moments = [self.rng.random() for _ in range(self.rng.randint(1, MOST))]
            shown = " ".join(f"{moment * self.seconds:.3f}" for moment in moments)
            self.kill("random", [dict(seconds=m * self.seconds) for m in moments], f"at {shown} s")
        self.two_at_once()

    def kill(self, kind, ways, told):
        """Start, kill in each of these ways, start again until it ends, and compare."""
        self.begin()
        line = self.phase.line
        for way in ways:
            seconds = way.pop("seconds", None)
            code = end_of(start(line, self.work, self.log, **way), seconds)
            if code in (-signal.SIGKILL, -signal.SIGXFSZ) or (kind, code) == ("ctrl-c", 130):
                self.kills[kind] += 1
                self.resumes += 1
                line = self.phase.again
            elif code != 0:
                return self.mismatch(told, [f"exit code {code}"])
            else:    # it was over before it could be killed
                break
        else:
            code = end_of(start(line, self.work, self.log))
            if code == 2 and OTHER in self.log.read_text():    # the killed run had not begun
                code = end_of(start(self.phase.line, self.work, self.log))
            if code != 0:
                return self.mismatch(told, [f"the next start ends with exit code {code}"])
        different = differences(self.truth, snapshot(self.work))
        if different:
            self.mismatch(told, different)

    def begin(self):
        shutil.rmtree(self.work)
        shutil.copytree(self.base, self.work)
        self.log.write_bytes(b"")

    def two_at_once(self):
        """The command twice at the same time. The second may keep what the first has made under
        another name, where every start makes it anew."""
        self.begin()
        pair = [start(self.phase.line, self.work, self.log) for _ in range(2)]
        codes = sorted(map(end_of, pair))
        self.pairs += 1
        refused = codes == [0, 2] and "another process is writing" in self.log.read_text()
        if codes != [0, 0] and not refused:
            return self.mismatch("never, two at once", [f"exit codes {codes}"])
        earlier = f"{self.phase.makes}~1"
        found = {path: bits for path, bits in snapshot(self.work).items()
                 if not path.startswith(earlier)}
        different = differences(self.truth, found)
        if different:
            self.mismatch("never, two at once", different)

    def mismatch(self, told, lines):
        self.mismatches.append(told)
        print(f"  MISMATCH {self.phase.name}, killed {told}: {'; '.join(lines[:6])}", flush=True)
        if "exit code" in lines[0]:    # what it said
            print("    " + self.log.read_text()[-600:].strip().replace("\n", "\n    "), flush=True)

    def row(self) -> str:
        kills = "".join(f"{count:>8}" for count in self.kills.values())
        return (f"{self.phase.name:<16}{self.seconds:>8.2f}{self.changes:>9}{kills}"
                f"{self.resumes:>9}{self.pairs:>5}{len(self.mismatches):>12}")


HEAD = (f"{'phase':<16}{'seconds':>8}{'changes':>9}{'change':>8}{'write':>8}{'random':>8}"
        f"{'ctrl-c':>8}{'resumes':>9}{'two':>5}{'mismatches':>12}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="phases, as A,B (default: all)")
    parser.add_argument("--every", type=int, default=1, help="kill before every so manieth change")
    parser.add_argument("--random", type=int, default=6, help="commands killed at random moments")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.monotonic()
    address, server = serve()
    done = []
    try:
        chosen = phases(address)
        if args.only:
            names = args.only.split(",")
            chosen = [phase for phase in chosen if phase.name in names]
        print(HEAD, flush=True)
        with tempfile.TemporaryDirectory() as top:
            for number, phase in enumerate(chosen):
                soak = Soak(phase, Path(top).resolve(), random.Random(f"{args.seed} {number}"))
                soak.prepare()
                soak.disturb(args.every, args.random)
                print(soak.row(), flush=True)
                done.append(soak)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    stops = sum(soak.kills.pop("ctrl-c") for soak in done)
    kills = sum(sum(soak.kills.values()) for soak in done)
    resumes = sum(soak.resumes for soak in done)
    mismatches = sum(len(soak.mismatches) for soak in done)
    print(f"{kills} kills, {stops} interrupts, {resumes} resumes, {mismatches} mismatches, "
          f"{time.monotonic() - begin:.0f} s, seed {args.seed}")
    return int(mismatches > 0 or kills == 0)


if __name__ == "__main__":
    sys.exit(main())
