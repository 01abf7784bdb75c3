"""The numbers of golden.py on this machine: ids and counts exactly, figures to 1e-4 (machines round differently)."""
import json
import math

import golden
import torch


def near(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(near, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4)
    return a == b


def test_the_golden_numbers_hold(tmp_path):
    assert torch.get_num_threads() == 1
    kept, found = json.loads(golden.GOLDEN.read_text()), golden.compute(tmp_path)
    wrong = [name for name in kept if not near(kept[name], found[name])]
    assert kept.keys() == found.keys() and not wrong, (
        f"{wrong} differ: {golden.differences(kept, found)}; "
        "if that is meant: python tests/golden.py --write, in a commit that says why")
