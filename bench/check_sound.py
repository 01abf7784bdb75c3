"""Reads 225 sound files as people have them, 9 formats x 25 states, beside ffmpeg: python bench/check_sound.py

Each file must give ffmpeg's samples (its length to 1 %, 40 dB) and, of what was encoded, at least 99 %; or a reason
that can be counted. A part must never pass for the whole. Where ffmpeg 5.1 itself is wrong, samples may be those of the
parts of a joined or padded file, each by ffmpeg, or libsndfile's. Prints a table and writes JSON with --out. Needs
ffmpeg, which the library does not.
"""
import argparse
import json
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile

from minixmd.inputs.media import MediaError, read_audio

RATE = 48_000
SECONDS = 3.0
CODECS = {  # format -> ffmpeg's arguments
    "wav": [],
    "rf64": ["-rf64", "always", "-f", "wav"],
    "aiff": [],
    "flac": [],
    "mp3": ["-q:a", "0"],
    "ogg": ["-c:a", "libvorbis", "-q:a", "8"],
    "opus": ["-c:a", "libopus", "-b:a", "192k"],
    "m4a": ["-c:a", "aac", "-b:a", "192k"],
    "mka": ["-c:a", "aac", "-b:a", "192k"],
}
DEPTHS = {  # by sample format, those of the PCM containers
    "8 bit": {"wav": "pcm_u8", "rf64": "pcm_u8", "aiff": "pcm_s8"},
    "24 bit": {"wav": "pcm_s24le", "rf64": "pcm_s24le", "aiff": "pcm_s24be"},
    "float": {"wav": "pcm_f32le", "rf64": "pcm_f32le", "aiff": "pcm_f32be"},
}
SELF_FRAMED = ("mp3",)  # a cut of these shows in a header that counts frames only


def ffmpeg(*arguments, data=None):
    done = subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, arguments)], input=data,
                          capture_output=True)
    return done.stdout


def source(seconds, seed, channels=1, silence_s=0.0):
    """(S, channels) float32: bursts of noise, which no part resembles another of."""
    rng = np.random.default_rng(seed)
    count = round(seconds * RATE)
    loudness_S = np.repeat(rng.uniform(0.05, 0.3, -(-count // 2400)), 2400)[:count, None]
    smooth = np.cumsum(rng.standard_normal((count + 8, channels)), 0)
    wave = (smooth[8:] - smooth[:-8]) / 4 * loudness_S
    silence = np.zeros((round(silence_s * RATE), channels))
    return np.concatenate([wave, silence]).astype(np.float32)


def encode(wave, suffix, path, *extra, to_pipe=False):
    raw = ["-f", "f32le", "-ar", RATE, "-ac", wave.shape[1], "-i", "pipe:"]
    name = "wav" if suffix == "rf64" else suffix
    muxer = {"m4a": ["-f", "mp4", "-movflags", "frag_keyframe+empty_moov"], "mka": ["-f", "matroska"]}.get(name, [])
    codec = [*CODECS[suffix], *extra]
    if to_pipe:
        fmt = [] if "-f" in codec or muxer else ["-f", {"opus": "ogg"}.get(name, name)]
        path.write_bytes(ffmpeg(*raw, *codec, *muxer, *fmt, "pipe:1", data=wave.tobytes()))
    else:
        ffmpeg(*raw, *codec, path, data=wave.tobytes())
    return path


def length_fields(data, suffix):
    """[(place, struct width, byte order)] of the header's lengths of the sound."""
    if suffix == "wav":
        return [(data.index(b"data") + 4, 4, "little")]
    if suffix == "rf64":
        return [(data.index(b"ds64") + 16, 8, "little"), (data.index(b"ds64") + 24, 8, "little")]
    if suffix == "aiff":
        return [(4, 4, "big"), (data.index(b"SSND") + 4, 4, "big")]
    if suffix == "flac":
        return [(22, 4, "big")]
    if suffix == "mp3":
        return [(max(data.find(b"Xing"), data.find(b"Info")) + 8, 4, "big")]
    return []


def with_lengths(data, suffix, change):
    data = bytearray(data)
    for place, width, order in length_fields(data, suffix):
        old = int.from_bytes(data[place:place + width], order)
        data[place:place + width] = min(change(old), 256**width - 1).to_bytes(width, order)
    return bytes(data)


def id3(size=1000):
    body = b"TIT2" + (size).to_bytes(4, "big") + b"\0\0" + b"\0" + b"a" * (size - 1)
    length = len(body)
    return b"ID3\3\0\0" + bytes(length >> shift & 0x7F for shift in (21, 14, 7, 0)) + body


def states(suffix, folder):
    """Yields (name of a state, path, samples that were encoded, clean files of which it is made).

    The samples are 0 where a decoder cannot know, and -1 for SECONDS at another rate.
    """
    count = round(SECONDS * RATE)
    wave = source(SECONDS, 0)
    plain = encode(wave, suffix, folder / f"plain.{suffix if suffix != 'rf64' else 'wav'}")
    data = plain.read_bytes()
    second = encode(source(2.0, 1), suffix, folder / f"other{plain.suffix}")
    other = second.read_bytes()
    unit = len(data) // 7

    def made(name, content):
        path = folder / f"{name.replace(' ', '_')}{plain.suffix}"
        path.write_bytes(content)
        return path

    yield "plain", plain, count, [plain]
    yield "cut to 60 %", made("cut60", data[:len(data) * 6 // 10]), count, [plain]
    yield "cut to 95 %", made("cut95", data[:len(data) * 95 // 100]), count, [plain]
    yield "cut to a tenth", made("cut10", data[:len(data) // 10]), count, [plain]
    yield "joined to itself", made("twice", data + data), 2 * count, [plain, plain]
    yield "joined to another", made("joined", data + other), count + 2 * RATE, [plain, second]
    yield "length zero", made("zero", with_lengths(data, suffix, lambda old: 0)), count, [plain]
    yield "length unknown", made("unknown", with_lengths(data, suffix, lambda old: 256**8)), count, [plain]
    yield "length too short", made("short", with_lengths(data, suffix, lambda old: old // 2)), count, [plain]
    yield "length too long", made("long", with_lengths(data, suffix, lambda old: 2 * old)), count, [plain]
    yield "tag in front", made("tag", id3() + data), count, [plain]
    yield "long tag in front", made("longtag", id3(200_000) + data), count, [plain]
    yield "tag behind", made("tagend", data + b"TAG" + b"x" * 125), count, [plain]
    yield "zeros behind", made("zeros", data + bytes(4096)), count, [plain]
    yield "noise behind", made("noise", data + np.random.default_rng(5).bytes(4096)), count, [plain]
    damage = np.random.default_rng(6).bytes(512)
    yield "noise inside", made("inside", data[:3 * unit] + damage + data[3 * unit + 512:]), count, [plain]
    yield "a part missing", made("hole", data[:3 * unit] + data[4 * unit:]), count, [plain]
    for depth, codecs in DEPTHS.items():
        extra = ["-c:a", codecs[suffix]] if suffix in codecs else ["-ar", {"8 bit": 8000, "24 bit": 24000,
                                                                          "float": 16000}[depth]]
        yield depth if suffix in codecs else f"another rate ({depth})", \
            encode(wave, suffix, folder / f"{depth.replace(' ', '')}{plain.suffix}", *extra), -1, []
    yield "6 channels", encode(source(SECONDS, 2, 6), suffix, folder / f"six{plain.suffix}"), count, []
    quiet = source(2.0, 3, silence_s=4.0)
    yield "loud, then silence", encode(quiet, suffix, folder / f"quiet{plain.suffix}"), len(quiet), []
    extra = ["-write_xing", "0"] if suffix == "mp3" else []
    yield "to a pipe", encode(quiet, suffix, folder / f"pipe{plain.suffix}", *extra, to_pipe=True), len(quiet), []
    yield "50 ms", encode(source(0.05, 4), suffix, folder / f"brief{plain.suffix}"), 0, []
    yield "no sample", encode(source(0.0, 4), suffix, folder / f"none{plain.suffix}"), 0, []


def reference(path):
    """(mono float32 samples, rate) by ffmpeg."""
    probe = subprocess.run(["ffprobe", "-v", "error", "-select_streams", "a:0", "-show_entries",
                            "stream=sample_rate,channels", "-of", "csv=p=0", path], capture_output=True, text=True)
    try:
        rate, channels = map(int, probe.stdout.strip().split("\n")[0].split(",")[:2])
    except ValueError:
        return np.zeros(0, np.float32), 0
    raw = ffmpeg("-i", path, "-map", "0:a:0", "-f", "f32le", "-c:a", "pcm_f32le", "pipe:1")
    return np.frombuffer(raw, np.float32).reshape(-1, channels).mean(1), rate


def by_libsndfile(path):
    try:
        return soundfile.read(path, dtype="float32", always_2d=True)[0].mean(1)
    except (soundfile.LibsndfileError, ValueError):
        return np.zeros(0, np.float32)


def difference(ours, theirs):
    """What is wrong with our samples beside others; "" if nothing."""
    if abs(len(ours) - len(theirs)) > max(0.01 * len(theirs), 2400):
        return f"{len(ours)} samples, not {len(theirs)}"
    n = min(len(ours), len(theirs))
    noise = float(np.square(ours[:n] - theirs[:n]).sum())
    power = float(np.square(theirs[:n]).sum())
    return f"{10 * np.log10(power / noise):.0f} dB" if noise > 1e-4 * power else ""


def differs_from_pieces(ours, pieces):
    """Whether our samples are not those of the pieces; a decoder that goes on over a join needs 0.1 s for the next."""
    at = 0
    for number, piece in enumerate(pieces):
        theirs, rate = reference(piece)
        skipped = rate // 10 if number else 0
        if difference(ours[at + skipped:at + len(theirs)], theirs[skipped:]):
            return True
        at += len(theirs)
    return len(ours) - at > 0.01 * at


def judge(path, encoded, pieces):
    """("read" | a reason, fault or "")."""
    theirs, rate = reference(path)
    if not rate and pieces:
        rate = reference(pieces[0])[1]
    try:
        ours = read_audio(path, sample_rate=rate or 16_000).numpy()
    except MediaError as error:
        return error.reason, ""
    seconds = SECONDS if encoded < 0 else encoded / RATE
    if len(ours) / rate < 0.99 * seconds:
        return "read", f"a part: {len(ours) / rate:.2f} of {seconds:.2f} s"
    fault = difference(ours, theirs)
    if fault and pieces:
        fault = fault if differs_from_pieces(ours, pieces) else ""
    if fault:
        fault = difference(ours, by_libsndfile(path)) and fault
    return "read", fault


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--formats", nargs="*", default=list(CODECS), choices=list(CODECS))
    args = parser.parse_args(argv)
    table, faults = {}, []
    for suffix in args.formats:
        with tempfile.TemporaryDirectory() as folder:
            table[suffix] = {}
            for state, *made in states(suffix, Path(folder)):
                outcome, fault = judge(*made)
                table[suffix][state] = outcome
                if fault:
                    faults.append(f"{suffix}, {state}: {fault}")
        counts = Counter(table[suffix].values())
        listed = ", ".join(f"{number} {outcome}" for outcome, number in counts.most_common())
        print(f"{suffix:6}{counts.total():4} files  {listed}")
    print("\n".join(faults) or "no fault")
    if args.out:
        args.out.write_text(json.dumps({"table": table, "faults": faults}, indent=1) + "\n")
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
