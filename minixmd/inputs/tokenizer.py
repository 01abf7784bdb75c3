"""Processor: a conversation to a Prompt, in the family's chat template, placeholders expanded to their exact count."""
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase

import torch
from tokenizers import Tokenizer

from minixmd.inputs.audio import num_audio_tokens
from minixmd.inputs.batch import Media, Prompt
from minixmd.inputs.clips import load_clip
from minixmd.inputs.image import grid_of
from minixmd.inputs.media import MediaError
from minixmd.inputs.positions import grid_offsets, interleave, positions_of

START, END = "<|im_start|>", "<|im_end|>"
VIDEO_DEFAULTS = {"fps": 1.0, "min_pixels": 100_352, "max_pixels": 262_144, "nframes": None}


def common_vocab_size(processor, folder):
    """How many ids from 0 on are the same string to a model and to a teacher whose tokenizer.json is in a folder."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it says what the ids that are stored there mean")
    ours, theirs = processor.tokenizer, Tokenizer.from_file(str(path))
    count = min(max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1 for tokenizer in (ours, theirs))
    return next((i for i in range(count) if ours.id_to_token(i) != theirs.id_to_token(i)), count)


@dataclass
class Draft:
    """A Prompt that is being written."""
    load: Callable  # reads a clip's file, as load_clip does
    ids: list = field(default_factory=list)
    target: list = field(default_factory=list)
    media: list = field(default_factory=list)
    blocks: list = field(default_factory=list)  # as positions_of takes them
    first_clip: str = "prompt"  # its name, for messages

    def read(self, source, kind, options):
        """A clip as load_clip gives it."""
        if isinstance(source, torch.Tensor):
            return load_clip(source, kind, options)
        if self.first_clip == "prompt":
            self.first_clip = source
        return self.load(source, kind, options)

    def add(self, ids, target=False):
        self.ids += ids
        self.target += [target] * len(ids)

    def add_clips(self, ids, clips, offsets_3P):
        """Adds Media whose rows count from the first of `ids`; offsets_3P: the ids' positions, None = one step each."""
        first = len(self.ids)
        self.media += [replace(clip, rows_P=clip.rows_P + first) for clip in clips]
        if offsets_3P is not None:
            self.blocks.append((first, offsets_3P))
        self.add(ids)


class Processor:
    """Callable: conversation -> Prompt. Also holds what depends on the tokenizer: letters, suppressed ids, decoding.

    folder: holds tokenizer.json. config: models.families.ModelConfig, whose context limits a prompt's length. Raises
    ValueError: no readable tokenizer.json, or one of another model: other media tokens, or more tokens than rows."""

    def __init__(self, folder, config):
        self.folder, self.config, self.family = Path(folder), config, config.family
        self.vocab_size, self.max_positions = config.text.vocab_size, config.text.max_position_embeddings
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises a bare Exception
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
        self.placeholders = [template.placeholder for template in (self.family.audio, self.family.video) if template]
        for token in (END, START, *self.placeholders):
            if self.tokenizer.token_to_id(token) is None:
                raise ValueError(f"{path}: has no token {token}; it is not a {self.family.model_type} tokenizer")
        highest = max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        if highest >= self.vocab_size:
            raise ValueError(f"{path}: highest id {highest}, but the model has {self.vocab_size} rows; wrong tokenizer "
                             "for the model")
        self.end_id = self.tokenizer.token_to_id(END)

    @property
    def suppressed_ids(self):
        """Sorted ids never sampled or scored: rows without a string, and special tokens but the end of turn."""
        named = set(self.tokenizer.get_vocab(with_added_tokens=True).values())
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        return sorted((set(range(self.vocab_size)) - named) | (special - {self.end_id}))

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def letter_ids(self, count):
        """Ids of "A", "B", … as the assistant's first token; ValueError if a letter is not one token."""
        letter_ids = []
        for letter in ascii_uppercase[:count]:
            ids = self.encode(letter)
            if len(ids) != 1:
                raise ValueError(f"{self.folder / 'tokenizer.json'}: letter {letter} is {len(ids)} tokens, not one")
            letter_ids += ids
        return letter_ids

    def __call__(self, conversation, load=load_clip, max_new_tokens=0):
        """A conversation in transformers' form to a Prompt, which is never truncated.

        conversation: [{"role": "user", "content": [{"type": "audio", "audio": path}, {"type": "text", …}]}]; media are
        paths, 16 kHz mono waves (float tensor (S,)) or frames (uint8 tensor (T, 3, H, W)). A video part may carry fps,
        min_pixels, max_pixels, nframes, and `"use_audio": True` (Omni) for its sound track, in turns with the picture.
        A last assistant turn is the target; without one the prompt ends where it would start. load: reads a clip's
        file, as load_clip. max_new_tokens: tokens to be written after the prompt, for which there must be room.
        Raises MediaError: a clip that cannot be used; "too long" for a prompt over the model's limit. ValueError: a
        malformed conversation, or media the family does not take."""
        if not conversation or not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in conversation):
            raise ValueError("a conversation is a non-empty list of {'role': …, 'content': …}")
        draft = Draft(load)
        if conversation[0]["role"] != "system":
            draft.add(self.encode(f"{START}system\n{self.family.system}{END}\n"))
        for number, turn in enumerate(conversation):
            role, content = turn["role"], turn["content"]
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"turn {number}: role must be system, user or assistant, got {role!r}")
            is_target = role == "assistant" and number == len(conversation) - 1
            text = f"{START}{role}\n"  # what is still to be tokenised, up to the next clip
            if is_target:  # a boundary that generation has too, so that no token spans it
                draft.add(self.encode(text))
                text = ""
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
                raise ValueError(f"turn {number}: content must be a string or a list of {{'type': …}} parts")
            for part in parts:
                if part.get("type") == "text":
                    text += self._text(part, number)
                    continue
                if is_target:
                    raise ValueError(f"turn {number}: the last assistant turn is the target and must be text")
                text = self._add_media(draft, text, part, number)
            draft.add(self.encode(text + END), is_target)
            draft.add(self.encode("\n"))
        if conversation[-1]["role"] != "assistant":
            draft.add(self.encode(f"{START}assistant\n"))
        length = len(draft.ids)
        if length + max_new_tokens > self.max_positions:
            written = f" and max_new_tokens is {max_new_tokens}" if max_new_tokens else ""
            detail = f"the prompt has {length} tokens{written}, over the model's limit of {self.max_positions}"
            raise MediaError(draft.first_clip, "too long", detail)
        return Prompt(torch.tensor(draft.ids), positions_of(length, draft.blocks), tuple(draft.media),
                      torch.tensor(draft.target))

    def _text(self, part, number):
        string = part.get("text")
        if not isinstance(string, str):
            raise ValueError(f"turn {number}: a text part's 'text' must be a string, got {string!r}")
        if held := [sign for sign in self.placeholders if sign in string]:
            raise ValueError(f"text must not hold the placeholder {held[0]}; give the clip as a media part")
        return string

    def _add_media(self, draft, text, part, number):
        """Adds an audio or video part after `text` to the draft. Returns the text that follows it."""
        kind = part.get("type")
        template = getattr(self.family, kind) if kind in ("audio", "video") else None
        if template is None:
            raise ValueError(f"turn {number}: a {self.family.model_type} model cannot take a part of type {kind!r}")
        known = {"type", kind, *VIDEO_DEFAULTS, "use_audio"} if kind == "video" else {"type", kind}
        if extra := sorted(part.keys() - known):
            raise ValueError(f"turn {number}: {kind} part has an unknown key {extra[0]!r}")
        if kind not in part:
            raise ValueError(f"turn {number}: {kind} part has no key {kind!r}")
        if kind == "audio":
            media, offsets_3P = self._audio(part["audio"], draft), None
        else:
            media, offsets_3P = self._video(part, draft)
        if part.get("use_audio"):
            if self.config.chunk_s is None:
                raise ValueError(f"turn {number}: a {self.family.model_type} model cannot take a video with its sound")
            if isinstance(part["video"], torch.Tensor):
                raise ValueError(f"turn {number}: use_audio needs a video file; frames have no sound")
            draft.add(self.encode(text))
            self._add_sounded(draft, media, offsets_3P, self._audio(part["video"], draft))
            return ""
        audios = sum(clip.kind == "audio" for clip in [*draft.media, media])
        draft.add(self.encode(text + template.before.format(n=audios)))
        placeholder = self.tokenizer.token_to_id(template.placeholder)
        draft.add_clips([placeholder] * len(media.rows_P), [media], offsets_3P)
        return template.after

    def _add_sounded(self, draft, video, video_3P, audio):
        """Adds a video and its sound, in turns. The two tokens that begin share a position, as do the two that end."""
        is_video_P, offsets_3P = interleave(video_3P, len(audio.rows_P), self.config.chunk_s * self.config.ids_per_s)
        begin_3P = torch.zeros(3, 2, dtype=torch.int64)
        end_3P = (offsets_3P.max() + 2).expand(3, 2)
        video_sign, audio_sign = self.family.video, self.family.audio
        video_id, audio_id = (self.tokenizer.token_to_id(sign.placeholder) for sign in (video_sign, audio_sign))
        ids = self.encode(video_sign.before + audio_sign.before)
        ids += torch.where(is_video_P, video_id, audio_id).tolist()
        ids += self.encode(audio_sign.after + video_sign.after)
        clips = [replace(video, rows_P=is_video_P.nonzero()[:, 0] + 2),
                 replace(audio, rows_P=(~is_video_P).nonzero()[:, 0] + 2)]
        draft.add_clips(ids, clips, torch.cat([begin_3P, offsets_3P + 1, end_3P], dim=1))

    def _audio(self, source, draft):
        """The Media of a sound file or wave; its rows count from 0."""
        mel_MA, frames = draft.read(source, "audio", dict(max_s=self.family.max_audio_s))
        return Media("audio", torch.as_tensor(mel_MA), torch.arange(num_audio_tokens(frames)), frames=frames)

    def _video(self, part, draft):
        """The Media of a video part, whose rows count from 0, and the rows' position offsets."""
        source = part["video"]
        options = VIDEO_DEFAULTS | {name: part[name] for name in VIDEO_DEFAULTS if part.get(name) is not None}
        frames_TCHW, sampled_fps = draft.read(source, "video", options)
        fps = sampled_fps if self.family.sampled_fps or options["nframes"] else options["fps"]
        if fps is None and self.config.ids_per_s is not None:
            raise MediaError(source, "no frame rate", "this model places frames by their time")
        frames_TCHW = torch.as_tensor(frames_TCHW)
        grid_thw = grid_of(frames_TCHW)
        offsets_3P = grid_offsets(grid_thw, ids_per_s=self.config.ids_per_s, fps=fps)
        return Media("video", frames_TCHW, torch.arange(offsets_3P.shape[1]), grid_thw=grid_thw), offsets_3P
