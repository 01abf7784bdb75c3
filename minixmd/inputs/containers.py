"""What a file says of its own length. A demuxer takes what is there for the whole; these headers tell a part from it.

Containers with a length in their header: WAV, AIFF, AVI, MP4, Matroska. Ogg marks its last page; FLAC and, where an
encoder left a Xing header, MP3 count samples. A placeholder (0, all bits set), as programs leave it that write to a
pipe, is no length. ID3 tags in front are passed over. What stands behind the announced end is ignored where it is
zeros, a tag, or less than 1 % of the file, and does not begin a file."""
import re
import struct
import zlib
from dataclasses import dataclass

MP4_BOXES = (b"ftyp", b"styp", b"sidx", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"uuid")
BEGINNINGS = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM")  # of another file joined to this one
TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")  # that stand behind sound
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
UNKNOWN_BYTES = 0x7FFFF000  # a 32-bit length from here on is a placeholder


@dataclass(frozen=True)
class Announced:
    end: int = 0  # the file's bytes, at least; 0 = it does not say
    samples: int = 0  # of its sound, 0 = it does not say
    joined: str = ""  # why what follows is no part of this file; "" = nothing follows, or it belongs here


def announced(file, size):
    """The Announced of an open file of `size` bytes."""
    start = _after_id3(file)
    head = _read(file, start, 40)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _chunks(file, start + 12, size, ">4sI" if head[:4] == b"RIFX" else "<4sI", b"data")
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _chunks(file, start + 12, size, ">4sI", b"SSND")
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return _avi(file, start, size)
    for sign, at, read in ((b"ftyp", 4, _mp4), (EBML, 0, _matroska), (b"OggS", 0, _ogg)):
        if head.startswith(sign, at):
            return read(file, start, size)
    if head[:4] == b"fLaC":
        return Announced(samples=struct.unpack(">Q", head[18:26])[0] & (1 << 36) - 1)
    return Announced(samples=_xing_samples(_read(file, start, 4096)))


def _read(file, at, count):
    file.seek(at)
    return file.read(count).ljust(min(count, 64), b"\0")


def _after_id3(file):
    """Where the file begins behind the ID3 tags in front of it."""
    start = 0
    while (head := _read(file, start, 10))[:3] == b"ID3":
        length = 0
        for byte in head[6:10]:
            length = length << 7 | byte & 0x7F
        start += 10 + length + (10 if head[5] & 0x10 else 0)  # the flag: a footer
    return start


def _ends_at(file, end, size):
    """Announced of a file whose last byte is known."""
    rest = _read(file, end, 1 << 16) if end < size else b""
    ignored = not rest.strip(b"\0") or rest.startswith(TAGS) or size - end < 0.01 * end
    return Announced(end, joined="" if ignored and not rest.startswith(BEGINNINGS) else "more sound than announced")


def _chunks(file, at, size, head_format, content):
    """Announced of a chain of chunks (name, length, that many bytes), of which `content` holds the sound."""
    end, long_length = 0, None
    while at + 8 <= size:
        head = _read(file, at, 64)
        name, length = struct.unpack_from(head_format, head)
        if name == b"ds64":  # RF64's lengths of 64 bits: of the file, then of the sound
            long_length = struct.unpack("<Q", head[16:24])[0]
        if name == content and end:
            return Announced(end, joined="a second sound follows")
        if name == content:
            if length >= UNKNOWN_BYTES:
                length = long_length
            if not length:
                return Announced()
            end = at + 8 + length
        elif end:
            legible = re.fullmatch(rb"[ -~]{4}", name) and at + 8 + length <= size + 1
            if name in BEGINNINGS or not legible:
                return _ends_at(file, at, size)
        at += 8 + length + length % 2
    return Announced(end)


def _avi(file, start, size):
    """A chain of RIFF chunks: "AVI ", and above 1 GB "AVIX"."""
    at = start
    while True:
        length = struct.unpack("<I", _read(file, at + 4, 4)[:4])[0]
        if not 0 < length < UNKNOWN_BYTES:
            return Announced()
        at += 8 + length
        head = _read(file, at, 12) if at < size else b""
        kind = head[8:12] if head[:4] == b"RIFF" else b""
        if kind != b"AVIX":
            return Announced(at, joined="another film follows" if kind == b"AVI " else "")


def _mp4(file, start, size):
    """A chain of boxes, each 4 bytes of size and 4 of name."""
    end, indices = start, 0
    while end + 16 <= size:
        length, name, long_length = struct.unpack(">I4sQ", _read(file, end, 16)[:16])
        length = long_length if length == 1 else length
        if length < 8 or name not in MP4_BOXES:
            break  # 0 means "to the end"; anything else is padding or junk, the decoder's business
        indices += name == b"moov"
        end += length
    return Announced(end, joined="another film follows" if indices > 1 else "")


def _matroska(file, start, size):
    """An EBML header and a segment, each a name and a length of 1 to 8 bytes."""
    at = start
    for name in (EBML, SEGMENT):
        head = _read(file, at, 12)
        width = 9 - head[4].bit_length()
        if head[:4] != name or width > 8:
            return Announced()
        length = int.from_bytes(head[4:4 + width], "big") & (1 << 7 * width) - 1
        if length == (1 << 7 * width) - 1:  # all bits set
            return Announced()
        at += 4 + width + length
    return Announced(at, joined="another film follows" if at < size and _read(file, at, 4)[:4] == EBML else "")


def _ogg(file, at, size):
    """A chain of pages, whose checksums and numbers must be right; each stream's last page must say that it is."""
    last = {}  # stream -> its last page's number and whether it is the stream's end
    while at < size:
        head = _read(file, at, 27 + 255)
        if head[:4] != b"OggS":
            break
        flags, stream, number, checksum = head[5], *struct.unpack("<III", head[14:26])
        length = 27 + head[26] + sum(head[27:27 + head[26]])
        if at + length > size:
            return Announced(at + length)
        if not flags & 2 and last.get(stream, (-1, False))[0] != number - 1:
            return Announced(at, joined=f"page {number} does not follow")
        if _ogg_checksum(_read(file, at, length)) != checksum:
            return Announced(at, joined="a damaged page follows")
        last[stream] = number, bool(flags & 4)
        at += length
    if not all(is_last for _, is_last in last.values()):
        return Announced(size + 1)
    return _ends_at(file, at, size)


def _ogg_checksum(page):
    """CRC-32 without the reflection and inversions that zlib's has, over a page with 0 in its checksum's place."""
    page = (page[:22] + bytes(4) + page[26:]).translate(REVERSED_BITS)
    reflected = zlib.crc32(page, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(reflected.to_bytes(4, "little").translate(REVERSED_BITS), "big")


def _xing_samples(head):
    """Samples by the Xing header of an MP3's first frame, less what a player may cut from both ends; 0 without one."""
    match = re.match(rb"\0*\xff([\xe2-\xff])..(?:.{0,36}?)(?:Xing|Info)(....)(....)", head, re.DOTALL)
    if not match or not match[2][3] & 1:
        return 0
    frame = 1152 if match[1][0] & 0x08 else 576  # MPEG 1; MPEG 2 and 2.5
    count = struct.unpack(">I", match[3])[0]
    return (count - 3) * frame if 3 < count < UNKNOWN_BYTES else 0
