"""Find every clip of a csv file, open it once, and keep what was found.

A verdict is a dict. That of a clip which is dropped has "reason" (a phrase that can be counted: MediaError's,
run_tasks', `missing` and `too long`) and "detail". That of a good one has "seconds" of sound, "silent" and, where the
sound was extracted, "flac_bytes". An opened file's verdict also names it: "file", "bytes". These verdicts are kept in
OUT/opened, one file for CHUNK rows, written whole or not at all; a later run opens only what is new there or has
another name or size.
"""
import json
import os
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import soundfile
from children import Task, run_tasks
from tqdm import tqdm

from minixmd.inputs.audio import SAMPLE_RATE
from minixmd.inputs.image import smart_resize
from minixmd.inputs.media import MediaError, read_audio, read_frames
from minixmd.runs.files import write_text

CHUNK = 200  # rows; a killed run opens no more than these again
MIN_SAMPLES = 4_960  # at 16 kHz: the least that Cnn14 takes; Qwen2-Audio needs 321
MAX_SECONDS = 15.0  # of sound, where clips are cut to 10 at most: what is longer was never cut
STEP = 2.0**-15  # of 16-bit sound, full scale 1: what never moves by one is silent
SOUND_ONLY = (".wav", ".flac", ".ogg", ".mp3", ".m4a")


@dataclass
class Row:
    """One row of an official csv file."""

    id: str  # of the example: YouTube id and start, "xxxxxxxxxxx_000030"
    split: str
    names: tuple[str, ...]  # that its file may have in the folder of clips; the first is the official one
    facts: dict  # what the csv says about it
    drop: tuple[str, str] | None = None  # (reason, detail) of a row whose clip need not be looked for


def judge(rows, args, total, title, max_seconds=MAX_SECONDS):
    """Yield (row, verdict) for every row, in order, in constant memory.

    Args:
        rows: iterable of Row. total: how many, for the progress bar. title: of the bar.
        args: clips and out (folders), no_open, extract_audio, workers, time_limit (seconds a clip).
        max_seconds: of sound, that a clip may have.
    Raises:
        OSError: something cannot be written. ValueError: what an earlier run kept was edited.
    """
    folder = Path(args.out, "opened")
    for stale in Path(args.out, "audio").glob(".*.tmp"):  # of children that were killed
        stale.unlink(missing_ok=True)
    done = run_tasks(_tasks(rows, args, folder), partial(look, max_seconds=max_seconds), workers=args.workers,
                     limit_s=args.time_limit, preload=["minixmd.inputs.media"])
    with tqdm(total=total, desc=title, unit="clip", smoothing=0.1) as bar, closing(done):
        for number in count():
            chunk = []
            for task in islice(done, CHUNK):
                if task.job:  # also when its child was lost, which does not know the file
                    task.result = {**_file(*task.job[:2]), **task.result}
                chunk.append(task)
                bar.update()
            if not chunk:
                return
            if any(task.job for task in chunk):
                lines = [{"id": task.what.id, **task.result} for task in chunk if "bytes" in task.result]
                write_text(_chunk(folder, number), "".join(json.dumps(line) + "\n" for line in lines))
            for task in chunk:
                yield task.what, task.result


def _chunk(folder, number):
    return folder / f"{number:05d}.jsonl"


def _tasks(rows, args, folder):
    rows = iter(rows)
    for number in count():
        if not (chunk := list(islice(rows, CHUNK))):
            return
        stored = {} if args.no_open else _stored(_chunk(folder, number))
        for row in chunk:
            if row.drop:
                yield Task(row, dict(zip(("reason", "detail"), row.drop, strict=True)))
            elif args.no_open:
                yield Task(row, {"file": row.names[0]})
            else:
                yield _task(row, args, stored.get(row.id))


def _stored(path):
    """{row id: verdict} of an earlier run."""
    try:
        return {(line := json.loads(text)).pop("id"): line for text in path.read_text().splitlines()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{path}: not as it was written; delete it, and its clips are opened again") from None


def _task(row, args, stored):
    """The row with an earlier run's verdict, if it still holds, or with the job of opening its clip."""
    found = find(args.clips, row.names)
    if not found:
        return Task(row, {"reason": "missing", "detail": row.names[0]})
    flac = flac_file(args.out, row.id) if args.extract_audio else None
    if stored and stored.items() >= _file(*found).items() and (
            "reason" in stored or not flac or (flac.exists() and flac.stat().st_size == stored.get("flac_bytes"))):
        return Task(row, stored)
    return Task(row, None, (*found, os.path.join(args.clips, found[0]), flac))


def _file(name, size):
    return {"file": name, "bytes": size}


def flac_file(out, id):
    return Path(out, "audio", f"{id}.flac")


def find(folder, names):
    """(name, bytes) of the first of the names that is in the folder, or None."""
    for name in names:
        try:
            return name, os.stat(os.path.join(folder, name)).st_size
        except FileNotFoundError:
            continue
        except OSError:
            return name, -1  # it is there, and opening it will say what is wrong
    return None


def look(name, size, path, flac, max_seconds=MAX_SECONDS):
    """Decode one file as training will; its sound goes to `flac` if that is a path. Returns the verdict."""
    try:
        wave_S = read_audio(path)
        if len(wave_S) < MIN_SAMPLES:
            raise MediaError(path, "too short", f"{len(wave_S)} samples at 16 kHz, {MIN_SAMPLES} are needed")
        if len(wave_S) > max_seconds * SAMPLE_RATE:
            raise MediaError(path, "too long", f"{len(wave_S) / SAMPLE_RATE:.1f} s, at most {max_seconds:g}: not cut")
        if not name.lower().endswith(SOUND_ONLY):
            frames_TCHW, _ = read_frames(path)
            try:
                smart_resize(*frames_TCHW.shape[-2:])
            except ValueError as error:
                raise MediaError(path, "bad shape", str(error)) from None
    except MediaError as error:
        return {"reason": error.reason, "detail": error.detail}
    verdict = {"seconds": round(len(wave_S) / SAMPLE_RATE, 3), "silent": bool(wave_S.max() - wave_S.min() < STEP)}
    if flac:
        _write_flac(flac, wave_S)
        verdict["flac_bytes"] = flac.stat().st_size
    return verdict


def _write_flac(path, wave_S):
    """16 kHz mono of 16 bits; whole or absent.

    soundfile clamps to full scale, as VGGSound's own recipe does. Not synced, as 200,000 syncs take hours: its size is
    compared before it is used again.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(temporary, wave_S.numpy(), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        os.replace(temporary, path)
    except (OSError, soundfile.LibsndfileError) as error:
        with suppress(OSError):
            temporary.unlink()
        why = getattr(error, "strerror", None) or str(error)
        raise OSError(getattr(error, "errno", None) or 5, f"cannot write: {why}", str(path)) from None
