"""Draws the wrong options of a multiple-choice question, by how often each class occurs."""
from bisect import bisect
from hashlib import blake2b
from itertools import accumulate, count
from struct import unpack

MAX_OPTIONS = 26  # of a question: the letters A to Z


def uniforms(*key):
    """Yields numbers in [0, 1) that depend on the key alone, the same on every machine and with every library."""
    for block in count():
        digest = blake2b(repr((*key, block)).encode()).digest()
        for number in unpack(">8Q", digest):
            yield (number >> 11) / 2**53


class OptionSampler:
    """Draws options by frequency, without repeats, with the right one at a random position.

    Args:
        frequency: {class: how often it occurs}; a class that never does is not drawn.
        num_options: of a question. seed: a question's options depend on (seed, its id) alone.
    """

    def __init__(self, frequency, num_options, seed):
        self.names = [name for name in frequency if frequency[name]]
        if len(self.names) < num_options:
            raise ValueError(f"{num_options} options need as many classes, got {len(self.names)}")
        self.cumulative = list(accumulate(frequency[name] for name in self.names))
        self.num_options, self.seed = num_options, seed

    def draw(self, id, right, excluded=frozenset()):
        """(options, index of `right`) for the clip of this id; no wrong option is in `excluded`.

        Raises:
            ValueError: too few classes are left.
        """
        num_wrong, excluded = self.num_options - 1, excluded | {right}
        if len(self.names) - len(excluded) < num_wrong:
            raise ValueError(f"{self.num_options} options are wanted, and of the {len(self.names)} classes "
                             f"{len(excluded)} cannot be a wrong answer for {id}")
        numbers, wrong = uniforms(self.seed, id), []
        while len(wrong) < num_wrong:
            name = self.names[bisect(self.cumulative, next(numbers) * self.cumulative[-1])]
            if name not in excluded and name not in wrong:
                wrong.append(name)
        answer = int(next(numbers) * self.num_options)
        return (*wrong[:answer], right, *wrong[answer:]), answer
