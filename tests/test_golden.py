"""The numbers of golden.py on this machine: ids and counts exactly, figures to 1e-4 (machines round differently).

Seen between two kinds of CPU: 1e-6, and of the switch, whose batch norms see a few clips, 1.2e-3.
"""
import json
import math

import golden
import torch

TOLERANCE = {"switch": 1e-2}


def near(a, b, tolerance):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key], tolerance) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(near(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-4)
    return a == b


def test_the_golden_numbers_hold(tmp_path):
    assert torch.get_num_threads() == 1
    kept, found = json.loads(golden.GOLDEN.read_text()), golden.compute(tmp_path)
    wrong = [name for name in kept if not near(kept[name], found[name], TOLERANCE.get(name, 1e-4))]
    assert kept.keys() == found.keys() and not wrong, (
        f"{wrong} differ: {golden.differences(kept, found)}; "
        "if that is meant: python tests/golden.py --write, in a commit that says why")
