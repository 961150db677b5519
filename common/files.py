"""Errors for the user, safe writes, JSON and safetensors, the lock on a folder, and the device.

Every file is written under a temporary name, synced, and renamed: whoever opens it finds the old
one or the new one, never half of one. Nothing is pickled.
"""
import hashlib
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F

try:
    import fcntl
except ImportError:    # Windows has none
    fcntl = None


# ---------------- errors

class UserError(ValueError):
    """Input that cannot be used. The message is one sentence: what, where, what to do."""


def command(main):
    """Run a script's main(). A UserError becomes one line and exit code 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):    # a pipe or file on Windows cannot write every letter
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        sys.exit(main() or 0)
    except (UserError, OSError) as error:    # OSError: a full disk, a read-only folder
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; what was finished is on disk", file=sys.stderr)
        sys.exit(130)


# ---------------- writing and reading

@contextmanager
def atomic(path, mode="w"):
    """Open a temporary file beside `path`; on success it takes the place of `path` in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        if hasattr(os, "fchmod"):    # not everywhere on Windows
            os.fchmod(handle, 0o644)
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path, value):
    with atomic(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


def read_json(path):
    """The value in a JSON file. Raises UserError where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): remove it and run the same command again"
        ) from None


def save_tensors(path, tensors, about=None):
    """Write tensors by name, whatever device they are on, and a small dict about them."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic(path, "wb") as file:
        file.write(safetensors.torch.save(copies, {"about": json.dumps(about or {})}))


def load_tensors(path):
    """(tensors by name, the dict about them). Raises UserError where the file is damaged.

    The tensors are copies: a file that is still mapped into memory cannot be replaced on Windows.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("about", "{}")
            names = file.keys()
            return {name: file.get_tensor(name).clone() for name in names}, json.loads(about)
    except Exception as error:    # the reader has types of its own for each kind of damage
        raise UserError(
            f"{path} cannot be read ({error}): remove it and run the same command again"
        ) from None


def set_aside(path):
    """Rename a file or folder to the first free `path~N`, so that nothing on disk is lost."""
    path = Path(path)
    n = 1
    while path.with_name(f"{path.name}~{n}").exists():
        n += 1
    aside = path.with_name(f"{path.name}~{n}")
    path.rename(aside)
    return aside


@contextmanager
def alone_in(folder, wait=True):
    """Work in an existing folder while no other process does.

    If another one holds it: wait for it, or with wait=False raise a UserError. The operating system
    releases the lock when the process ends, however it ends. Without effect on Windows.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(
                    f"another process is writing {folder}: wait for its end, or give another --out"
                ) from None
            print(f"waiting for another process that works in {folder}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:    # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


# ---------------- fingerprints

def sha256(path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keys_sha256(keys) -> str:
    """SHA-256 of strings in their order: what ties a feature file to the items of its catalog."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


# ---------------- the device

def pick_device(name=None):
    """torch.device of a name, or the best there is. Raises UserError for one that is not there."""
    if name is None:
        name = best_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} cannot be used here ({reason}): try --device cpu"
        ) from None
    if device.type == "cuda":
        # cuDNN's attention builds a graph for every new shape, and trimmed batches have many shapes
        torch.backends.cuda.enable_cudnn_sdp(False)
        # float32 means float32 in convolutions and recurrent networks as well
        torch.backends.cudnn.allow_tf32 = False
    return device


def best_device() -> str:
    """cuda; mps where it can do what the models ask for; else cpu, and a line that says so."""
    if torch.cuda.is_available():
        return "cuda"
    why = "no GPU found"
    if torch.backends.mps.is_available():
        lacking = lacks("mps")
        if lacking is None:
            return "mps"
        why = f"the Apple GPU cannot do all that is needed ({lacking})"
    print(f"{why}: running on the CPU with {torch.get_num_threads()} threads")
    return "cpu"


def lacks(device):
    """What a device cannot do of the less usual things that the models ask for; None: nothing."""
    try:
        weight = torch.ones(8, 8, device=device, requires_grad=True)
        torch.sparse.mm(torch.eye(8, device=device).to_sparse(), weight.detach())
        ids = torch.arange(8, device=device)
        ids.unique(return_inverse=True)
        torch.searchsorted(ids, ids, right=True)
        (ids > 3).to(torch.uint8).argsort(descending=True, stable=True)
        pooled = F.embedding_bag(ids[:, None], weight, mode="mean")
        x = pooled.view(1, 2, 4, 8)
        mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=device)
        F.scaled_dot_product_attention(x, x, x, mask).sum().backward()
        torch.optim.Adam([weight], fused=True).step()
        weight.sum().item()
    except Exception as error:    # each operation that is missing has an error of its own
        return str(error).splitlines()[0]
    return None


def precision(device, name="bfloat16"):
    """The context of a forward pass: mixed precision on a GPU, unless the name is float32; plain
    float32 on a CPU."""
    mixed = device.type == "cuda" and name == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed)
