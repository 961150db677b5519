"""Errors for the user, safe writes, JSON and safetensors, the lock on a folder, and the device.

Every file is written under a temporary name, synced, and renamed: whoever opens it finds the old
one or the new one, never half of one. Nothing is pickled.
"""
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
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


def first_line(error) -> str:
    """What an exception says, on one line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def command(main):
    """Run a script's main(). A UserError becomes one line and exit code 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):    # a pipe or file on Windows cannot write every letter
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:    # a full disk, a read-only folder
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not memory_is_full(error):
            raise
        print(f"error: the memory is full ({first_line(error)}): end what else uses it, or give "
              f"--device cpu or less data", file=sys.stderr)
        sys.exit(2)
    except UnicodeEncodeError as error:    # the name of a file
        letters = ascii(error.object[max(error.start - 20, 0):error.end + 20].strip('"'))
        print(f"error: {letters} is no UTF-8: rename the file or folder of that name",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; what was finished is on disk", file=sys.stderr)
        sys.exit(130)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def sentence_of(error) -> str:
    """What an OSError says of which file, and what to do."""
    if error.errno in FULL:
        advice = "make room there and run the same command again"
    elif error.errno in FORBIDDEN:
        advice = "ask for the right to, or work in another folder"
    else:
        advice = "look at what is there and run the same command again"
    if error.filename is None:    # of no file: a pipe that was closed, a network
        return str(error)
    return f"{error.filename} cannot be read or written ({error.strerror}): {advice}"


def memory_is_full(error) -> bool:
    """Whether an error says that there is no more memory, of a GPU or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    told = str(error)
    return any(words in told for words in ("out of memory", "can't allocate memory"))


# ---------------- writing and reading

@contextmanager
def atomic(path, mode="w"):
    """Open a temporary file beside `path`; on success it takes the place of `path` in one step."""
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, lock = reserved(path)
        try:
            with open(temporary, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            if lock is not None:
                os.close(lock)


def unfinished(path) -> Path:
    """The name of a file or folder until it is whole."""
    return path.with_name(f".{path.name}.unfinished")


def reserved(path) -> tuple:
    """(the name under which a file is written, a handle that keeps others from it until closed).

    It is always the same name, so that what a killed process has left under it is written over.
    Where there are no locks, every writer has a name of its own, and no handle.
    """
    name = unfinished(path)
    while fcntl is not None:
        try:
            handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        except OSError:    # what lies there is not ours to write
            break
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)    # waits for another process
        except OSError:    # a file system without locks
            os.close(handle)
            name.unlink()
            break
        if name.exists() and os.path.samestat(os.fstat(handle), name.stat()):
            os.fchmod(handle, 0o644)
            return name, handle
        os.close(handle)    # the other process has renamed it
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}"), None


@contextmanager
def filled(out, last):
    """An empty folder, to be filled and then renamed to `out`, while alone in the folder above.

    It goes where that fails, and what a killed process has left of it goes first. last: the file
    that is written last; a folder that has it and whose elder was set aside already is kept.
    """
    with naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if has_locks(out.parent):
            made = unfinished(out)
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
        else:    # another process may be making the same
            made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        made.chmod(0o755)
        try:
            yield made
        except BaseException:
            if out.exists() or not (made / last).is_file():
                shutil.rmtree(made, ignore_errors=True)
            raise


@contextmanager
def naming(path):
    """Let an OSError from within name this file, and not the temporary one or none at all."""
    try:
        yield
    except OSError as error:
        own = str(unfinished(path)).removesuffix("unfinished")
        if error.filename is not None and not str(error.filename).startswith(own):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def write_json(path, value):
    with atomic(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


AGAIN = "remove it and run the same command again"
SURROGATE = re.compile("[\ud800-\udfff]")    # JSON may hold half a letter, which no file can


def read_text(path, advice=AGAIN) -> str:
    """A whole file in UTF-8. Raises UserError, which ends with the advice."""
    path = Path(path)
    try:
        refuse_endless(path)
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {advice}") from None


def refuse_endless(path):
    """Raises OSError for a pipe or a device, which may have no end."""
    if Path(path).exists() and not Path(path).is_file():
        raise OSError("it is no file")


def read_json(path, form=object, advice=AGAIN):
    """The value in a JSON file. form: what it must be, as `has_form` takes it.

    Raises UserError, which ends with the advice, where the file is missing, damaged or of another
    form.
    """
    text = read_text(path, advice)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {advice}") from None
    if not has_form(value, form):
        raise UserError(f"{path} holds something else than it should: {advice}")
    return value


def has_form(value, form) -> bool:
    """Whether a value has a form: a type; (form, form): one of them; [form]: a list of it;
    {str: form}: a dict with such values; {"a": form, ...}: a dict with these keys and perhaps
    others. An int is a float as well; a bool is neither; what 64 bits cannot hold is no int."""
    if isinstance(form, tuple):
        return any(has_form(value, one) for one in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(has_form(part, form[0]) for part in value)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        if str in form:
            return all(has_form(part, form[str]) for part in value.values())
        return all(key in value and has_form(value[key], form[key]) for key in form)
    if form in (int, float):
        kinds = (int, float) if form is float else int
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        return is_number and (isinstance(value, float) or abs(value) < 2 ** 63)
    if form is str:
        return isinstance(value, str) and not SURROGATE.search(value)
    return isinstance(value, form)


def save_tensors(path, tensors, about=None):
    """Write tensors by name, whatever device they are on, and a small dict about them."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_tensors(path, copies, about)


def write_tensors(path, tensors, about=None):
    """`save_tensors` of tensors on the CPU that share no memory."""
    about = about or {}
    # one key: the order of several would not be the same each time
    sealed = json.dumps({"about": about, "sha256": tensors_sha256(tensors, about)})
    with atomic(path, "wb") as file:
        file.write(safetensors.torch.save(tensors, {"about": sealed}))


def load_tensors(path, advice=AGAIN):
    """(tensors by name, what was said about them).

    The tensors are copies: a file that is still mapped into memory cannot be replaced on Windows.
    Raises UserError, which ends with the advice, where the file is damaged or, if save_tensors
    wrote it, one bit is not as it was written.
    """
    try:
        refuse_endless(path)
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
        if isinstance(about, dict) and "sha256" in about:    # older files and others' have none
            digest = about["sha256"]
            about = about["about"]
            if digest != tensors_sha256(tensors, about):
                raise ValueError("its numbers are not those that were written")
        return tensors, about
    except Exception as error:    # the reader has types of its own for each kind of damage
        raise UserError(f"{path} cannot be read ({first_line(error)}): {advice}") from None


def load_arrays(path, advice=AGAIN) -> dict:
    """The arrays of an .npz file that numpy.savez wrote. Raises UserError, which ends with the
    advice, where it is damaged, or compressed: then it may be far larger than it looks."""
    try:
        refuse_endless(path)
        with np.load(path, allow_pickle=False) as file:
            if any(member.compress_type for member in file.zip.infolist()):
                raise ValueError("it is compressed")
            return dict(file)
    except Exception as error:    # a truncated or foreign file can raise almost anything
        raise UserError(f"{path} cannot be read ({first_line(error)}): {advice}") from None


def has_locks(folder) -> bool:
    """Whether processes can keep each other out here; not on Windows and some network disks."""
    if fcntl is None:
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


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


def tensors_sha256(tensors, about) -> str:
    """SHA-256 of tensors, their names, types and shapes, and what is said about them."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def arrays_sha256(arrays) -> str:
    """SHA-256 of arrays in their order: what ties a run to the sequences that it was trained on."""
    digest = hashlib.sha256()
    for number, array in enumerate(arrays):
        digest.update(b"\n" if number else b"")
        flat = array.reshape(-1)
        for first in range(0, len(flat), 1 << 17):    # in pieces, which need little memory
            digest.update(flat[first:first + (1 << 17)].tobytes().hex().encode())
    return digest.hexdigest()


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
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({first_line(error)}): try --device cpu"
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
        return first_line(error)
    return None


def precision(device, name="bfloat16"):
    """The context of a forward pass: mixed precision on a GPU, unless the name is float32; plain
    float32 on a CPU."""
    mixed = device.type == "cuda" and name == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed)
