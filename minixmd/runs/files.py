"""Files that are whole or absent: written under a temporary name in the same folder, synced, then renamed."""
import json
import os
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

UMASK = os.umask(0)
os.umask(UMASK)  # it can only be read by setting it


def _publish(path, write, sync=True):
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if sync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)  # safetensors makes files that nobody else can read
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):  # the folder itself may be the trouble; the first error says so
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError)):  # safetensors reports a full disk as its own error
            said = getattr(error, "strerror", error)
            raise OSError(getattr(error, "errno", None) or 5, f"cannot write: {said}", str(path)) from error
        raise


def parse_json(data):
    """What UTF-8 bytes of JSON hold; ValueError also for brackets in brackets without an end and for half a character,
    as "\\ud800" is."""
    try:
        found = json.loads(data.decode("utf-8-sig"))
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
    """Replace `path` by `data` (bytes). Raises OSError, which names the path. sync: wait until it is on disk; False for
    small files that can be made again, since thousands of syncs take minutes."""
    _publish(path, lambda temporary: temporary.write_bytes(data), sync)


def write_text(path, text):
    write_bytes(path, text.encode())


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(path, tensors, metadata=None):
    """Replace `path` by a safetensors file of {name: tensor} with string metadata, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _publish(path, lambda temporary: save_file(tensors, temporary, metadata))
