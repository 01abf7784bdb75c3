"""Finds the clip of every row, decodes it once as training will, and keeps the verdict.

A verdict is a dict. A clip that is dropped has "reason", a phrase that can be counted (a MediaError's, a lost job's,
"missing" or "too long"), and "detail". A good one has "seconds" of sound, "silent" and, where its sound was extracted,
"flac_bytes". The verdict on a clip that was opened also names its file: "file", "bytes".

Verdicts on opened clips are kept in OUT/opened, CHUNK rows a file, each written whole or not at all. A later run opens
only clips that are new there, or whose file has another name or size.
"""
import json
import os
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from math import inf, isinf
from pathlib import Path

import soundfile
from tqdm import tqdm

from minixmd.config.prompts import ClipReading
from minixmd.inputs.audio import SAMPLE_RATE, WINDOW_S
from minixmd.inputs.clips import Cache, load_clip
from minixmd.inputs.image import smart_resize
from minixmd.inputs.media import MediaError, read_audio, read_frames
from minixmd.inputs.prompts import prefetch
from minixmd.inputs.tokenizer import VIDEO_DEFAULTS
from minixmd.runs.files import write_text

TASKS_AHEAD = 32  # rows read ahead a worker, so that a slow clip does not stop the others
CHUNK = 200  # rows; a run that is killed loses the verdicts on at most so many
MIN_SAMPLES = 4_960  # at 16 kHz: the least that Cnn14 takes; Qwen2-Audio needs 321
MAX_SECONDS = 15.0  # clips are cut to 10 s at most: a longer one was never cut
SILENCE_STEP = 2.0**-15  # one step of 16-bit sound at full scale 1: a wave that moves by less is silent
SOUND_ONLY = (".wav", ".flac", ".ogg", ".mp3", ".m4a")  # files without a picture


@dataclass
class Row:
    """A clip that is asked for: one row of an official csv file, or the clip of one or more ready questions."""

    id: str  # of the example, such as "xxxxxxxxxxx_000030": YouTube id and start
    split: str
    file_names: tuple[str, ...]  # under which it may lie in the folder of clips; the first is the official one
    facts: dict  # what the official file says about it
    drop: dict | None = None  # its verdict (dropped), if its clip need not be looked for


@dataclass
class Task:
    """A row with its verdict, or with what opening its clip takes: the file's name, its bytes, its path and the FLAC
    file to write."""

    item: Row
    result: dict | None = None
    job: tuple | None = None


def dropped(reason, detail=""):
    """The verdict on a clip that is left out."""
    return {"reason": reason, "detail": detail}


def check_clips(rows, args, total, title, max_seconds=MAX_SECONDS):
    """Yields (row, verdict) for every row, in order, in constant memory.

    Args:
        rows: iterable of Row. total: their number, for the progress bar. title: of the bar.
        args: clips and out (folders), no_open, extract_audio, workers, time_limit (seconds a clip).
        max_seconds: length of sound above which a clip is "too long".
    Raises:
        OSError: something cannot be written.
        ValueError: a file of an earlier run's verdicts was edited.
    """
    folder = Path(args.out, "opened")
    for leftover in Path(args.out, "audio").glob(".*.tmp"):  # of child processes that were killed
        leftover.unlink(missing_ok=True)
    cache = Cache(str(Path(args.out, "cache")), inf) if args.extract else None
    check = partial(check_clip, max_seconds=max_seconds, keep_in=cache)
    tasks = prefetch(_decide, _tasks(rows, args, folder), _lose, load=check, ahead=TASKS_AHEAD * args.workers,
                     reading=ClipReading(args.time_limit), workers=args.workers)
    with tqdm(total=total, desc=title, unit="clip", smoothing=0.1) as bar, closing(tasks):
        for number in count():
            chunk = []
            for task in islice(tasks, CHUNK):
                if task.job:  # also when its process was lost, which could not name the file
                    name, size, *_ = task.job
                    task.result = {**_file(name, size), **task.result}
                chunk.append(task)
                bar.update()
            if not chunk:
                return
            if any(task.job for task in chunk):
                _keep_verdicts(folder, number, chunk)
            for task in chunk:
                yield task.item, task.result


def _decide(task, check):
    """The task with its result; called by a thread."""
    if task.result is None:
        name, _, path, flac = task.job
        task.result = check(path, name, flac)
    return task


def _lose(task, error):
    task.result = dropped(error.reason, error.detail)
    return task


def _tasks(rows, args, folder):
    """A Task for every row: with its verdict if that is known, else with the job of opening its clip."""
    rows = iter(rows)
    for number in count():
        chunk = list(islice(rows, CHUNK))
        if not chunk:
            return
        earlier = {} if args.no_open else _earlier_verdicts(folder, number)
        for row in chunk:
            if row.drop:
                yield Task(row, row.drop)
            elif args.no_open:
                yield Task(row, {"file": row.file_names[0]})
            else:
                yield _open_task(row, args, earlier.get(row.id))


def _open_task(row, args, earlier):
    """The Task of a row whose clip is looked for. earlier: the verdict of an earlier run, or None."""
    found = find_file(args.clips, row.file_names)
    if found is None:
        return Task(row, dropped("missing", row.file_names[0]))
    name, size = found
    flac = Path(args.out, "audio", f"{row.id}.flac") if args.extract_audio else None
    if earlier and earlier.items() >= _file(name, size).items():
        sound_is_there = flac is None or flac.exists() and flac.stat().st_size == earlier.get("flac_bytes")
        if "reason" in earlier or sound_is_there and (earlier.get("extracted") or not args.extract):
            return Task(row, earlier)
    return Task(row, job=(name, size, os.path.join(args.clips, name), flac))


def find_file(folder, names):
    """(name, bytes) of the first of the names that is in the folder, or None."""
    for name in names:
        try:
            return name, os.stat(os.path.join(folder, name)).st_size
        except FileNotFoundError:
            continue
        except OSError:
            return name, -1  # it is there, and opening it will say what is wrong
    return None


# ---- verdicts on disk ----


def _file(name, size):
    return {"file": name, "bytes": size}


def _verdicts_path(folder, number):
    return folder / f"{number:05d}.jsonl"


def _keep_verdicts(folder, number, chunk):
    lines = []
    for task in chunk:
        if "bytes" in task.result:  # it was opened
            lines.append(json.dumps({"id": task.item.id, **task.result}) + "\n")
    write_text(_verdicts_path(folder, number), "".join(lines))


def _earlier_verdicts(folder, number):
    """{row id: verdict} of a chunk that an earlier run finished; empty if none did."""
    path, found = _verdicts_path(folder, number), {}
    try:
        for line in path.read_text().splitlines():
            verdict = json.loads(line)
            found[verdict.pop("id")] = verdict
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{path}: not as it was written; delete it, and its clips are opened again") from None
    return found


# ---- one clip, in a child process ----


def check_clip(path, name, flac, max_seconds=MAX_SECONDS, keep_in=None):
    """Decodes a file as training will; its sound is written to `flac` unless that is None, and what a model's Processor
    reads of it to the Cache `keep_in`. Returns the verdict."""
    try:
        wave_S = read_audio(path, max_s=None if isinf(max_seconds) else max_seconds + 1)
        if len(wave_S) < MIN_SAMPLES:
            raise MediaError(path, "too short", f"{len(wave_S)} samples at 16 kHz, {MIN_SAMPLES} are needed")
        if len(wave_S) > max_seconds * SAMPLE_RATE:
            raise MediaError(path, "too long", f"more than {max_seconds:g} s: not cut")
        if not name.lower().endswith(SOUND_ONLY):
            _check_picture(path)
    except MediaError as error:
        return dropped(error.reason, error.detail)
    silent = bool(wave_S.max() - wave_S.min() < SILENCE_STEP)
    verdict = {"seconds": round(len(wave_S) / SAMPLE_RATE, 3), "silent": silent}
    if flac:
        _write_flac(flac, wave_S)
        verdict["flac_bytes"] = flac.stat().st_size
    if keep_in is not None:
        load_clip(path, "audio", {"max_s": WINDOW_S}, keep_in)
        if not name.lower().endswith(SOUND_ONLY):
            load_clip(path, "video", VIDEO_DEFAULTS, keep_in)
        verdict["extracted"] = True
    return verdict


def _check_picture(path):
    frames_TCHW, _ = read_frames(path)
    try:
        smart_resize(*frames_TCHW.shape[-2:])
    except ValueError as error:
        raise MediaError(path, "bad shape", str(error)) from None


def _write_flac(path, wave_S):
    """Writes 16 kHz mono sound of 16 bits, whole or not at all.

    soundfile clamps to full scale, as VGGSound's own recipe does. The file is not synced, since 200,000 syncs take
    hours: a later run compares its size before it uses it.
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
