"""pack by hand: rows, segments, positions and targets of prompts and groups; what it refuses."""
import pytest
import torch
from tiny import audio_media

from minixmd import Group, Prompt, pack
from minixmd.inputs.batch import Segment, consecutive_segments


def prompt_of(ids, target=(), media=()):
    """Positions count from 0, twice as fast in height, so that the largest is not the last row's index."""
    positions_3N = torch.stack([torch.arange(len(ids)) * speed for speed in (1, 2, 1)])
    target_N = torch.tensor([i in target for i in range(len(ids))])
    return Prompt(torch.tensor(ids), positions_3N, media, target_N)


def test_prompts_and_groups_are_packed_as_by_hand():
    clip, _ = audio_media(11, 1, 0)  # 3 tokens, at rows 1 to 3
    answered = prompt_of([10, 11, 12, 13], target=(2, 3))
    asked = prompt_of([20, 21, 22, 23, 24], target=(4,), media=(clip,))
    group = Group(asked, (torch.tensor([30, 31]), torch.tensor([32])))
    batch = pack([answered, group, prompt_of([40, 41])])
    assert batch.ids_N.tolist() == [10, 11, 12, 13, 20, 21, 22, 23, 24, 30, 31, 32, 40, 41]
    assert batch.segments == (Segment(0, 4), Segment(4, 5), Segment(9, 2, 1), Segment(11, 1, 1), Segment(12, 2))
    assert batch.spans == ((0, 4), (4, 12), (12, 14))
    assert batch.positions_3N[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 9, 10, 9, 0, 1]  # after the largest, 2 x 4
    assert batch.positions_3N[1].tolist() == [0, 2, 4, 6, 0, 2, 4, 6, 8, 9, 10, 9, 0, 2]
    assert [m.rows_P.tolist() for m in batch.media] == [[5, 6, 7]]
    # each target is predicted by the row before it; of a completion's first token that is the prompt's last
    assert batch.target_row_T.tolist() == [1, 2, 8, 9, 8]
    assert batch.target_id_T.tolist() == [12, 13, 30, 31, 32]  # a group's prompt is not learnt
    assert batch.target_segment_T.tolist() == [0, 0, 2, 2, 3] and batch.target_weight_T.tolist() == [1.0] * 5
    assert pack([Prompt(torch.tensor([1]), torch.zeros(3, 1, dtype=torch.int64))]).target_id_T.tolist() == []


def test_consecutive_segments_follow_each_other():
    assert consecutive_segments([2, 3, 1]) == (Segment(0, 2), Segment(2, 3), Segment(5, 1))


@pytest.mark.parametrize("items, line", [
    ([], "pack needs at least one Prompt or Group"),
    ([prompt_of([1, 2], target=(0,))], "the first token of a Prompt cannot be a target: nothing precedes it"),
    ([Group(prompt_of([1, 2]), (torch.tensor([3]), torch.tensor([], dtype=torch.int64)))],
     "a Group has an empty completion"),
])  # fmt: skip
def test_what_cannot_be_packed_is_one_line(items, line):
    with pytest.raises(ValueError) as caught:
        pack(items)
    assert str(caught.value) == line
