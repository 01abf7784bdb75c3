"""Processor: a conversation to a Prompt, in the family's chat template, placeholders expanded to their exact count."""
from pathlib import Path

import torch
from tokenizers import Tokenizer

from minixmd.inputs.audio import log_mel, num_audio_tokens, num_mel_frames
from minixmd.inputs.batch import Media, Prompt, positions_of
from minixmd.inputs.image import patchify, resize
from minixmd.inputs.media import MediaError, read_audio, read_video

END = "<|im_end|>"
VIDEO_OPTIONS = ("fps", "min_pixels", "max_pixels", "nframes")


class Processor:
    """Callable: conversation -> Prompt. Also holds what depends on the tokenizer: letters, banned ids, decoding.

    Args:
        folder: holds tokenizer.json.
        family: models.families.Family.
        vocab_size: rows of the model's embedding, at least the tokenizer's.
        max_positions: the model's limit on a prompt's length, in tokens.
        config: config.json as a dict; its media token ids must be the tokenizer's.
    Raises:
        ValueError: no readable tokenizer.json, or one that belongs to another model.
    """

    def __init__(self, folder, family, *, vocab_size, max_positions, config):
        self.folder, self.family = Path(folder), family
        self.vocab_size, self.max_positions = vocab_size, max_positions
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises a bare Exception
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
        wanted = [END, "<|im_start|>"] + [p for kind in (family.audio, family.video) if kind for p in kind[1:2]]
        for token in wanted:
            if self.tokenizer.token_to_id(token) is None:
                raise ValueError(f"{path}: has no token {token}; it is not a {family.model_type} tokenizer")
        for name, token in family.token_fields.items():
            found = self.tokenizer.token_to_id(token)
            if config.get(name, found) != found:
                raise ValueError(f"{path}: {token} is {found}, but config.json has {name} {config[name]}; wrong "
                                 "tokenizer for the model")
        top = max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        if top >= vocab_size:
            raise ValueError(f"{path}: highest id {top}, but the model has {vocab_size} rows; wrong tokenizer for the "
                             "model")
        self.end_id = self.tokenizer.token_to_id(END)

    @property
    def banned(self):
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
                part may carry fps, min_pixels, max_pixels, nframes. A last assistant turn becomes the target; without
                one the prompt ends where the assistant would speak.
        Returns:
            Prompt, never truncated.
        Raises:
            MediaError: a clip that cannot be used, with its reason.
            ValueError: a malformed conversation, media the family does not take, or a prompt over the model's limit.
        """
        if not conversation or not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in conversation):
            raise ValueError("a conversation is a non-empty list of {'role': …, 'content': …}")
        ids, target, media, audios = [], [], [], 0

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
                before, clip, after = self._media(part, kind, number)
                audios += kind == "audio"
                text(pending + before.format(n=audios))
                media.append(Media(start=len(ids), **clip))
                ids.extend([self.tokenizer.token_to_id(getattr(self.family, kind)[1])] * clip["tokens"])
                target.extend([False] * clip["tokens"])
                pending = after
            text(pending + END, learn)
            text("\n")
        if conversation[-1]["role"] != "assistant":
            text("<|im_start|>assistant\n")
        if len(ids) > self.max_positions:
            raise ValueError(f"the prompt has {len(ids)} tokens, over the model's limit of {self.max_positions}")
        return Prompt(torch.tensor(ids), positions_of(len(ids), media), tuple(media), torch.tensor(target))

    def _text(self, part, number):
        string = part.get("text")
        if not isinstance(string, str):
            raise ValueError(f"turn {number}: a text part's 'text' must be a string, got {string!r}")
        for kind in (self.family.audio, self.family.video):
            if kind and kind[1] in string:
                raise ValueError(f"text must not hold the placeholder {kind[1]}; give the clip as a media part")
        return string

    def _media(self, part, kind, number):
        if kind not in ("audio", "video") or getattr(self.family, kind) is None:
            raise ValueError(f"turn {number}: a {self.family.model_type} model cannot take a part of type {kind!r}")
        if extra := sorted(set(part) - {"type", kind} - set(VIDEO_OPTIONS if kind == "video" else ())):
            raise ValueError(f"turn {number}: {kind} part has an unknown key {extra[0]!r}")
        if kind not in part:
            raise ValueError(f"turn {number}: {kind} part has no key {kind!r}")
        before, _, after = getattr(self.family, kind)
        source = part[kind]
        if kind == "audio":
            wave_S = source if isinstance(source, torch.Tensor) else read_audio(source)
            frames = num_mel_frames(len(wave_S))
            tokens = num_audio_tokens(frames)
            if tokens == 0:
                name = "audio" if isinstance(source, torch.Tensor) else source
                raise MediaError(name, "too short", f"{len(wave_S)} samples at 16 kHz; one audio token takes 321")
            return before, dict(kind="audio", features=log_mel(wave_S), tokens=tokens, frames=frames), after
        options = {"fps": 1.0, "min_pixels": 100_352, "max_pixels": 262_144, "nframes": None}
        options.update({k: part[k] for k in VIDEO_OPTIONS if part.get(k) is not None})
        frames_TCHW = source
        if not isinstance(source, torch.Tensor):
            frames_TCHW = read_video(source, fps=options["fps"], nframes=options["nframes"])
        try:
            frames_TCHW = resize(frames_TCHW, min_pixels=options["min_pixels"], max_pixels=options["max_pixels"])
        except ValueError as error:
            name = "video" if isinstance(source, torch.Tensor) else source
            raise MediaError(name, "bad shape", str(error)) from None
        patches_PC, grid_thw = patchify(frames_TCHW)
        t, h, w = grid_thw
        return before, dict(kind="video", features=patches_PC, tokens=t * h * w // 4, grid_thw=grid_thw), after
