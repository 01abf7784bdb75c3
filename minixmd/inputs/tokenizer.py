"""Processor: a conversation to a Prompt, in the family's chat template, placeholders expanded to their exact count."""
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from minixmd.inputs.audio import log_mel, num_audio_tokens, num_mel_frames
from minixmd.inputs.batch import Media, Prompt
from minixmd.inputs.image import patchify, resize
from minixmd.inputs.media import MediaError, read_audio, read_frames
from minixmd.inputs.positions import grid_offsets, interleave, positions_of

END = "<|im_end|>"
VIDEO_OPTIONS = ("fps", "min_pixels", "max_pixels", "nframes", "use_audio")


def common_vocab_size(processor, labels_path):
    """How many ids, from 0 on, stand for the same string to a model and to the teacher of some labels.

    labels_path: labels.jsonl of stage Label, beside which the teacher's tokenizer.json lies.
    """
    teacher = Tokenizer.from_file(str(Path(labels_path).parent / "tokenizer.json"))
    tables = []
    for tokenizer in (processor.tokenizer, teacher):
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        tables.append({i: token for token, i in vocabulary.items()})
    count = min(max(table) + 1 for table in tables)
    for i in range(count):
        if tables[0].get(i) != tables[1].get(i):
            return i
    return count


class Processor:
    """Callable: conversation -> Prompt. Also holds what depends on the tokenizer: letters, suppressed ids, decoding.

    Args:
        folder: holds tokenizer.json.
        config: models.families.ModelConfig; the ids of its media tokens must be the tokenizer's, its embedding must
            have a row for every token, and its context is the limit on a prompt's length.
    Raises:
        ValueError: no readable tokenizer.json, or one that belongs to another model.
    """

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
        family, part = config.family, config.part
        wanted = [END, "<|im_start|>"] + [kind[1] for kind in (family.audio, family.video) if kind]
        for token in wanted:
            if self.tokenizer.token_to_id(token) is None:
                raise ValueError(f"{path}: has no token {token}; it is not a {family.model_type} tokenizer")
        for name, token in family.token_fields.items():
            found = self.tokenizer.token_to_id(token)
            if part.get(name, found) != found:
                raise ValueError(f"{path}: {token} is {found}, but config.json has {name} {part[name]}; wrong "
                                 "tokenizer for the model")
        top = max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        if top >= self.vocab_size:
            raise ValueError(f"{path}: highest id {top}, but the model has {self.vocab_size} rows; wrong tokenizer for "
                             "the model")
        self.end_id = self.tokenizer.token_to_id(END)

    @property
    def suppressed_ids(self):
        """Sorted ids that are never sampled and are left out of scores: rows without a string, and every special
        token but the end of turn."""
        named = set(self.tokenizer.get_vocab(with_added_tokens=True).values())
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        return sorted((set(range(self.vocab_size)) - named) | (special - {self.end_id}))

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def letter_ids(self, count):
        """Ids of "A", "B", ... as the assistant's first token.

        Raises:
            ValueError: a letter is not one token.
        """
        ids = [self.encode(chr(ord("A") + i)) for i in range(count)]
        for i, one in enumerate(ids):
            if len(one) != 1:
                raise ValueError(f"{self.folder / 'tokenizer.json'}: letter {chr(ord('A') + i)} is {len(one)} tokens, "
                                 "not one")
        return [one[0] for one in ids]

    def __call__(self, conversation):
        """A conversation in the ecosystem's form to a Prompt.

        Args:
            conversation: [{"role": "user", "content": [{"type": "audio", "audio": path}, {"type": "text", …}]}]; media
                are paths, 16 kHz mono waves (float tensor (S,)) or frames (uint8 tensor (T, 3, H, W)); a video
                part may carry fps, min_pixels, max_pixels, nframes, and `"use_audio": True` (Omni): its sound track is
                heard too, in turns with the picture. A last assistant turn becomes the target; without one the prompt
                ends where the assistant would speak.
        Returns:
            Prompt, never truncated.
        Raises:
            MediaError: a clip that cannot be used, with its reason.
            ValueError: a malformed conversation, media the family does not take, or a prompt over the model's limit.
        """
        if not conversation or not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in conversation):
            raise ValueError("a conversation is a non-empty list of {'role': …, 'content': …}")
        ids, target, media, blocks, audios = [], [], [], [], 0

        def text(string, learn=False):
            new = self.encode(string)
            ids.extend(new)
            target.extend([learn] * len(new))

        if conversation[0]["role"] != "system":
            text(f"<|im_start|>system\n{self.family.system}{END}\n")
        for number, turn in enumerate(conversation):
            role, content = turn["role"], turn["content"]
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"turn {number}: role must be system, user or assistant, got {role!r}")
            learn = role == "assistant" and number == len(conversation) - 1
            pending = f"<|im_start|>{role}\n"
            if learn:  # a boundary that generation has too, so that no token spans it
                text(pending)
                pending = ""
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
                raise ValueError(f"turn {number}: content must be a string or a list of {{'type': …}} parts")
            for part in parts:
                kind = part.get("type")
                if kind == "text":
                    pending += self._text(part, number)
                    continue
                if learn:
                    raise ValueError(f"turn {number}: the last assistant turn is the target and must be text")
                before, ids_P, clips, offsets_3P, after = self._media(part, kind, number)
                audios += kind == "audio"
                text(pending + before.format(n=audios))
                media += [replace(clip, rows_P=clip.rows_P + len(ids)) for clip in clips]
                if offsets_3P is not None:
                    blocks.append((len(ids), offsets_3P))
                ids.extend(ids_P)
                target.extend([False] * len(ids_P))
                pending = after
            text(pending + END, learn)
            text("\n")
        if conversation[-1]["role"] != "assistant":
            text("<|im_start|>assistant\n")
        if len(ids) > self.max_positions:
            raise ValueError(f"the prompt has {len(ids)} tokens, over the model's limit of {self.max_positions}")
        return Prompt(torch.tensor(ids), positions_of(len(ids), blocks), tuple(media), torch.tensor(target))

    def _text(self, part, number):
        string = part.get("text")
        if not isinstance(string, str):
            raise ValueError(f"turn {number}: a text part's 'text' must be a string, got {string!r}")
        for kind in (self.family.audio, self.family.video):
            if kind and kind[1] in string:
                raise ValueError(f"text must not hold the placeholder {kind[1]}; give the clip as a media part")
        return string

    def _media(self, part, kind, number):
        """What a media part becomes: text before, ids of its rows, its clips (rows counted from the first of them), the
        rows' position offsets (None: one step a row), text after."""
        if kind not in ("audio", "video") or getattr(self.family, kind) is None:
            raise ValueError(f"turn {number}: a {self.family.model_type} model cannot take a part of type {kind!r}")
        if extra := sorted(set(part) - {"type", kind} - set(VIDEO_OPTIONS if kind == "video" else ())):
            raise ValueError(f"turn {number}: {kind} part has an unknown key {extra[0]!r}")
        if kind not in part:
            raise ValueError(f"turn {number}: {kind} part has no key {kind!r}")
        before, placeholder, after = getattr(self.family, kind)
        token = self.tokenizer.token_to_id(placeholder)
        if kind == "audio":
            clip = self._audio(part["audio"])
            return before, [token] * len(clip.rows_P), [clip], None, after
        clip, offsets_3P = self._video(part)
        if not part.get("use_audio"):
            return before, [token] * len(clip.rows_P), [clip], offsets_3P, after
        if self.config.chunk_s is None:
            raise ValueError(f"turn {number}: a {self.family.model_type} model cannot take a video with its sound")
        if isinstance(part["video"], torch.Tensor):
            raise ValueError(f"turn {number}: use_audio needs a video file; frames have no sound")
        sound = self._audio(part["video"])
        is_video_P, offsets_3P = interleave(offsets_3P, len(sound.rows_P), self.config.chunk_s * self.config.ids_per_s)
        # the two begin signs share the position before the block's, the two end signs the one after
        offsets_3P = torch.cat([torch.zeros(3, 2, dtype=torch.int64), offsets_3P + 1], dim=1)
        offsets_3P = torch.cat([offsets_3P, (offsets_3P.max() + 1).expand(3, 2)], dim=1)
        signs = [self.encode(before + self.family.audio[0]), self.encode(self.family.audio[2] + after)]
        heard = self.tokenizer.token_to_id(self.family.audio[1])
        ids_P = [*signs[0], *torch.where(is_video_P, token, heard).tolist(), *signs[1]]
        clips = [replace(clip, rows_P=is_video_P.nonzero()[:, 0] + 2),
                 replace(sound, rows_P=(~is_video_P).nonzero()[:, 0] + 2)]
        return "", ids_P, clips, offsets_3P, ""

    def _audio(self, source):
        wave_S = source if isinstance(source, torch.Tensor) else read_audio(source)
        frames = num_mel_frames(len(wave_S), self.family.audio_s)
        tokens = num_audio_tokens(frames)
        if tokens == 0:
            name = "audio" if isinstance(source, torch.Tensor) else source
            raise MediaError(name, "too short", f"{len(wave_S)} samples at 16 kHz; one audio token takes 321")
        return Media("audio", log_mel(wave_S, self.family.audio_s), torch.arange(tokens), frames=frames)

    def _video(self, part):
        source = part["video"]
        options = {"fps": 1.0, "min_pixels": 100_352, "max_pixels": 262_144, "nframes": None}
        options.update({k: part[k] for k in options if part.get(k) is not None})
        name, fps = "video", options["fps"]
        frames_TCHW = source
        if not isinstance(source, torch.Tensor):
            name = source
            frames_TCHW, sampled_fps = read_frames(source, fps=options["fps"], nframes=options["nframes"])
            fps = sampled_fps if self.family.sampled_fps or options["nframes"] else options["fps"]
            if fps is None and self.config.ids_per_s is not None:
                raise MediaError(source, "no frame rate", "this model places frames by their time")
        try:
            frames_TCHW = resize(frames_TCHW, min_pixels=options["min_pixels"], max_pixels=options["max_pixels"])
        except ValueError as error:
            raise MediaError(name, "bad shape", str(error)) from None
        patches_PC, grid_thw = patchify(frames_TCHW)
        offsets_3P = grid_offsets(grid_thw, ids_per_s=self.config.ids_per_s, fps=fps)
        return Media("video", patches_PC, torch.arange(offsets_3P.shape[1]), grid_thw=grid_thw), offsets_3P
