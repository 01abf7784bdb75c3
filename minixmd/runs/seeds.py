"""Seeds for independent random streams, derived from a run's seed."""
import hashlib


def hash_seed(*parts):
    """A 63-bit seed that is a pure function of its parts (ints and strings), the same on every machine. Each use names
    its purpose, as in hash_seed(seed, "order", epoch), so that no two random streams share a seed."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
