"""Writes files that pass for clips and are meant to harm whoever opens them."""
import io
import os
import struct
import zlib

import av
import numpy as np
from media_files import grey_frames, sine, write_mp4, write_wav


def wav_header(channels=1, rate=16000, bits=16, data_bytes=32000, tag=1):
    block = channels * bits // 8
    fmt = struct.pack("<HHIIHH", tag, channels, rate, (rate * block) & 0xFFFFFFFF, block & 0xFFFF, bits)
    return (b"RIFF" + struct.pack("<I", min(36 + data_bytes, 0xFFFFFFFF)) + b"WAVEfmt " + struct.pack("<I", 16) + fmt
            + b"data" + struct.pack("<I", data_bytes))


def png(width, height):
    """A picture of one colour: a few kB a gigapixel."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
            + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def box(name, content):
    return struct.pack(">I", 8 + len(content)) + name + content


def write_hostile(folder):
    """{name: path} of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    good = write_mp4(folder / "good.mp4", grey_frames(30), sine(440, 3)).read_bytes()
    wav = write_wav(folder / "good.wav", sine(440, 1)).read_bytes()
    contents = {
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.wav\n#EXT-X-ENDLIST\n",
        "session": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
        "metadata script": b";FFMETADATA1\ntitle=x\n",
        "picture of 256 megapixels": png(16_000, 16_000),
        "picture one pixel high": png(100_000, 1),
        "65535 channels": wav_header(channels=65535, bits=8) + bytes(1 << 20),
        "rate of 2^31 - 1": wav_header(rate=2**31 - 1) + bytes(32000),
        "rate of zero": wav_header(rate=0) + bytes(32000),
        "no bits": wav_header(bits=0) + bytes(32000),
        "not finite": wav_header(tag=3, bits=32, data_bytes=64000) + np.full(16000, np.nan, "<f4").tobytes(),
        "tags without an end": b"ID3\4\0\0\x7f\x7f\x7f\x7f" * 1000,
        "many small tags": b"ID3\4\0\0\0\0\0\0" * 100_000,
        "boxes in boxes": box(b"ftyp", b"isom") + box(b"moov", box(b"trak", box(b"mdia", bytes(8))) * 50_000),
        "boxes without a length": box(b"ftyp", b"isom") + b"\0\0\0\0moov" * 1000,
        "chunks without a length": b"RIFF\xff\xff\xff\xffWAVE" + b"junk\0\0\0\0" * 200_000,
        "pages of nothing": (b"OggS\0\2" + bytes(20) + b"\1\0") * 100_000,
        "elements in elements": b"\x1a\x45\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xff" * 10_000,
        "half a film": good[:len(good) // 2],
        "a film's head with noise": good[:200] + np.random.default_rng(0).bytes(100_000),
        "two sounds": wav + wav,
        "compressed zeros": zlib.compress(bytes(1 << 26), 9),
    }
    paths = {}
    for i, (name, content) in enumerate(contents.items()):
        paths[name] = folder / f"{i}.mp4"
        paths[name].write_bytes(content)
    for i in range(30):  # each names the next one twice
        (folder / f"list{i}.mp4").write_text(f"ffconcat version 1.0\nfile list{i + 1}.mp4\nfile list{i + 1}.mp4\n")
    paths["script of scripts"] = folder / "list0.mp4"
    paths["named pipe"] = folder / "pipe.mp4"
    os.mkfifo(paths["named pipe"])
    paths["device"] = folder / "zero.mp4"
    paths["device"].symlink_to("/dev/zero")
    paths["link to itself"] = folder / "loop.mp4"
    paths["link to itself"].symlink_to("loop.mp4")
    paths["folder"] = folder / "folder.mp4"
    paths["folder"].mkdir()
    paths["10 hours of silence"] = folder / "sparse.mp4"
    with open(paths["10 hours of silence"], "wb") as file:
        file.write(wav_header(data_bytes=10 * 3600 * 32000))
        file.truncate(44 + 10 * 3600 * 32000)
    paths["a film of 4 GiB of nothing"] = folder / "nothing.mp4"
    with open(paths["a film of 4 GiB of nothing"], "wb") as file:
        file.write(good[:40])
        file.truncate(4 << 30)
    paths["time that runs backwards"] = folder / "backwards.mkv"
    write_backwards(paths["time that runs backwards"])
    paths["a thousand tracks"] = folder / "tracks.mkv"
    write_tracks(paths["a thousand tracks"], 1000)
    return paths


def write_backwards(path):
    """Sound whose blocks lie before the file's beginning, in falling order."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        [packet] = stream.encode(frame)
        out.mux(packet)
    data = path.read_bytes()
    at = data.index(b"\xa3") if b"\xa3" in data else len(data) - 8
    path.write_bytes(data[:at + 3] + b"\x80\x00" + data[at + 5:])


def write_tracks(path, count):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        for _ in range(count):
            out.add_stream("pcm_s16le", rate=8000, layout="mono")
        out.start_encoding()
    path.write_bytes(buffer.getvalue())
