"""Seeds for independent random streams, derived from a run's seed."""
import hashlib

import torch


def hash_seed(*parts):
    """A 63-bit seed that is a pure function of its parts (ints and strings), the same on every machine. Each use names
    its purpose, as in hash_seed(seed, "order", epoch), so that no two random streams share a seed."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def shuffled(items, *seed):
    """The items in a random order, which depends on the parts of the seed alone."""
    generator = torch.Generator().manual_seed(hash_seed(*seed))
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
