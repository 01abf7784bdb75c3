"""Files that are whole or absent: written under a temporary name in the same folder, synced, then renamed."""
import codecs
import hashlib
import json
import os
from contextlib import suppress
from functools import lru_cache, wraps
from pathlib import Path

import torch

from minixmd.runs.heartbeat import beat

WHOLE_BYTES = 64 << 20  # up to here a file is read whole
SAMPLES, SAMPLE_BYTES = 256, 64 << 10  # beyond it, so many blocks of so many bytes
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
               torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
               torch.bool: "BOOL"}  # in a safetensors file


def _publish(path, write, sync=True):
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if sync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):  # the folder itself may be the trouble; the first error says so
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno or 5, f"cannot write: {error.strerror or error}", str(path)) from error
        raise


def fingerprint(path):
    """Hex digest of a file or folder; ValueError if there is none. A file's is the SHA-256 of its content; above 64 MiB
    that of its size and of 256 blocks spread evenly over it, for the whole of a 15 GB checkpoint would take a minute on
    every start. A folder's is that of its files' names and fingerprints."""
    path = Path(path)
    if path.is_dir():
        digest = hashlib.sha256()
        for part in sorted(path.rglob("*")):
            if part.is_file() and not part.name.startswith("."):
                digest.update(f"{part.relative_to(path).as_posix()}\n{fingerprint(part)}\n".encode())
        return digest.hexdigest()
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if size <= WHOLE_BYTES:
                return hashlib.sha256(file.read()).hexdigest()
            digest = hashlib.sha256(str(size).encode())
            for i in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
            return digest.hexdigest()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file or folder") from None


def remembered(count):
    """Makes a function of a path and other arguments remember its last `count` results, each for as long as its file is
    the same. Nobody may change them."""
    def decorate(read):
        last = lru_cache(count)(lambda digest, written, *args: read(*args))

        @wraps(read)
        def read_once(path, *args):  # of a large file the digest alone does not see everything
            return last(fingerprint(path), os.stat(path).st_mtime_ns, str(path), *args)

        return read_once

    return decorate


def parse_json(data):
    """What UTF-8 bytes of JSON hold; ValueError also for endless nesting and for half a character, as "\\ud800"."""
    try:
        found = json.loads(data.removeprefix(codecs.BOM_UTF8).decode())
    except RecursionError:
        raise ValueError("too many brackets in brackets") from None
    if b"\\u" in data:
        json.dumps(found, ensure_ascii=False).encode()
    return found


def read_json(path):
    """The object in a JSON file; ValueError, naming the file, if it holds none."""
    try:
        found = parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(found).__name__}")
    return found


def write_bytes(path, data, sync=True):
    """Replaces `path` by `data`, bytes or an iterable of such; an OSError names it. sync: wait until it is on disk,
    which takes some milliseconds."""
    def write(temporary):
        with open(temporary, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)

    _publish(path, write, sync)


def write_text(path, text):
    write_bytes(path, text.encode())


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(path, tensors, metadata=None):
    """Replaces `path` by a safetensors file of {name: tensor} with string metadata. Tensors are written one by one; of
    those on a GPU or not contiguous one at a time is copied, where safetensors' own writer would copy all."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # so that each is aligned
    header = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = dict(dtype=DTYPE_NAMES[tensor.dtype], shape=list(tensor.shape), data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary):
        largest = max((tensor.nbytes for tensor in tensors.values()), default=0)
        room = torch.empty(largest, dtype=torch.uint8)
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                beat()
                tensor = tensors[name].detach()
                if tensor.device.type != "cpu" or not tensor.is_contiguous():
                    copy = room[:tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                    tensor = copy.copy_(tensor)
                file.write(tensor.view(-1).view(torch.uint8).numpy())

    _publish(path, write)
