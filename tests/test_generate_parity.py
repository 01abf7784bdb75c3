"""Greedy decoding against transformers' generate, token for token: re-randomised models, media, unlike lengths."""
from types import SimpleNamespace

import pytest
import torch
from tiny import REFERENCES, audio_media, full_mel, prompt, video_media

from minixmd.learning.rollout import decode
from minixmd.models.weights import load_model

pytest.importorskip("transformers")

NEW, SUPPRESSED = 24, [3, 40, 41, *range(86, 97)]
START, STOP = 93, 94  # around a video, from which the reference finds its positions


def cases_of(kind):
    if kind == "audio":
        return [prompt([5, audio_media(211, 0, 1)[0], 4]), prompt([6]),
                prompt([3, audio_media(999, 0, 2)[0], 2, audio_media(150, 0, 3)[0], 7]), prompt([31], seed=2)]
    # none longer in time than in height or width: there the reference has other positions (tests/test_positions.py)
    videos = [([5], (2, 4, 6), [4]), ([3], (2, 8, 4), [2]), ([30], (3, 6, 10), [9])]
    texts = [prompt([6]), prompt([31], seed=2)]
    return texts + [framed(*parts, seed=i) for i, parts in enumerate(videos)]


def framed(before, grid, after, seed):
    """A prompt whose video stands between the two signs."""
    p = prompt([before[0] + 1, video_media(grid, 0, seed), after[0] + 1], seed)
    rows = p.media[0].rows_P
    p.ids_N[rows[0] - 1], p.ids_N[rows[-1] + 1] = START, STOP
    return p


def theirs(kind, reference, p, end):
    inputs = dict(input_ids=p.ids_N[None], attention_mask=torch.ones(1, len(p), dtype=torch.long))
    if p.media and kind == "audio":
        mask = torch.stack([torch.arange(3000) < m.frames for m in p.media]).long()
        inputs.update(input_features=torch.stack([full_mel(m) for m in p.media]), feature_attention_mask=mask)
    elif p.media:
        inputs.update(pixel_values_videos=torch.cat([m.patches() for m in p.media]),
                      video_grid_thw=torch.tensor([m.grid_thw for m in p.media]),
                      mm_token_type_ids=2 * (p.ids_N == 91).long()[None])
    said = reference.generate(**inputs, do_sample=False, max_new_tokens=NEW, suppress_tokens=SUPPRESSED,
                              eos_token_id=end, pad_token_id=0)
    return said[0, len(p):].tolist()


@pytest.mark.parametrize("kind, kv", [("audio", 4), ("audio", 2), ("vision", 4), ("vision", 1)])
def test_greedy_tokens_equal_transformers_generate(kind, kv, tmp_path):
    reference = REFERENCES[kind](kv, False)
    with torch.no_grad():
        reference.lm_head.weight.mul_(3)  # no two logits nearly equal
    reference.save_pretrained(tmp_path)
    model, cases = load_model(tmp_path), cases_of(kind)
    options = dict(max_new_tokens=NEW, temperature=0)
    processor = SimpleNamespace(end_id=-1, decode=str, suppressed_ids=SUPPRESSED)

    def draw(i):
        return torch.zeros(NEW, dtype=torch.float64)  # not read at temperature 0

    free = decode(model, processor, cases, len(cases), draw, **options)
    end = free[1].ids[NEW // 2]  # a token that ends some turns early
    wanted = [theirs(kind, reference, p, end) for p in cases]
    assert len({len(ids) for ids in wanted}) > 1 and len({token for ids in wanted for token in ids}) > 4
    assert len(set(map(tuple, wanted))) == len(cases)
    processor.end_id = end
    for decode_slots in (None, 2):
        ours = decode(model, processor, cases, len(cases), draw, decode_slots=decode_slots, **options)
        assert [list(c.ids) for c in ours] == wanted
        assert [c.finished for c in ours] == [ids[-1] == end for ids in wanted]
