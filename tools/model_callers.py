"""Three ways to ask another model, for tools/answers_of.py.

Each is made of the arguments, the model's folder or its name on the hub, and its commit there. It has a sample_rate and
answer(content, clips), which returns the text and whether the model ended it. content: of the user's turn, as
build_conversation makes it; clips: what was read of each medium in it.
"""
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import soundfile
import torch

from minixmd.inputs.audio import SAMPLE_RATE
from minixmd.inputs.examples import MEDIA_KINDS
from minixmd.inputs.image import sample_frames
from minixmd.inputs.media import film, open_media


class TransformersModel:
    """A model and its processor as transformers loads them; ValueError for one that is of no use here."""

    def __init__(self, args, name, revision):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.args, source = args, {"revision": revision, "trust_remote_code": args.trust_remote_code}
        raw, _ = transformers.PretrainedConfig.get_config_dict(name, revision=revision)
        if "auto_map" in raw and not args.trust_remote_code:
            raise ValueError("it brings code of its own (auto_map); who trusts that code adds --trust-remote-code")
        config = transformers.AutoConfig.from_pretrained(name, **source)
        if "AutoModelForCausalLM" in raw.get("auto_map", {}):
            auto_class = transformers.AutoModelForCausalLM
        elif type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING:
            auto_class = transformers.AutoModelForMultimodalLM
        elif type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            auto_class = transformers.AutoModelForSeq2SeqLM
        else:
            raise ValueError(f"transformers has no multimodal model of its type, {config.model_type!r}")
        self.processor = transformers.AutoProcessor.from_pretrained(name, **source)
        hears = getattr(self.processor, "feature_extractor", getattr(self.processor, "audio_processor", None))
        readers = {"audio": hears, "video": getattr(self.processor, "video_processor", None)}
        for kind in MEDIA_KINDS[args.media]:
            if readers[kind] is None:
                raise ValueError(f"its {type(self.processor).__name__} takes no {kind}; choose another --media")
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(f"its {type(self.processor).__name__} has no chat template")
        self.sample_rate = hears.sampling_rate if hears is not None else None
        model, loaded = auto_class.from_pretrained(name, dtype=getattr(torch, args.dtype), output_loading_info=True,
                                                   **source)
        if absent := sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]])):
            raise ValueError(f"{len(absent)} weights are not in its files as its config says, such as {absent[0]}")
        self.model = getattr(model, "thinker", model).to(args.device).eval()  # the part of an Omni model that writes
        ends = self.model.generation_config.eos_token_id
        if ends is None:  # of a thinker
            ends = self.processor.tokenizer.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]

    @torch.inference_mode()
    def answer(self, content, clips):
        filled, options = [], {}
        for part, clip in zip(content, [*clips, None], strict=True):
            if part["type"] == "audio":
                part = {"type": "audio", "audio": clip.numpy()}
            elif part["type"] == "video":
                frames_TCHW, sampled_fps = clip
                frames = which_frames(part["video"], len(frames_TCHW), sampled_fps, self.args.fps)
                options = {"do_sample_frames": False, "fps": sampled_fps, "video_metadata": [frames]}
                part = {"type": "video", "video": frames_TCHW.numpy()}
            filled.append(part)
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": filled}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", processor_kwargs=options).to(self.model.device, self.model.dtype)
        greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": self.args.max_new_tokens}
        [ids] = self.model.generate(**inputs, **greedy, eos_token_id=self.ends)
        if not self.model.config.is_encoder_decoder:
            ids = ids[inputs["input_ids"].shape[1]:]
        return self.processor.decode(ids, skip_special_tokens=True), int(ids[-1]) in self.ends


def which_frames(path, count, sampled_fps, fps):
    """Which `count` of a file's frames read_frames picked: processors write the time of each into the prompt."""
    with open_media(path, decodes_film=False) as container:
        rate = float(film(container, path).average_rate)
    total = round(count / sampled_fps * rate)
    return {"fps": rate, "total_num_frames": total, "duration": total / rate,
            "frames_indices": sample_frames(total, rate, fps=fps)}


class QwenAudioChat:
    """Qwen-Audio-Chat, by the code in its repository. That gives text alone, as Kimi-Audio's does: it counts as ended
    if it has fewer tokens than are allowed."""

    sample_rate = SAMPLE_RATE

    def __init__(self, args, name, revision):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.limit, source = args.max_new_tokens, {"revision": revision, "trust_remote_code": True}
        self.tokenizer = AutoTokenizer.from_pretrained(name, **source)
        model = AutoModelForCausalLM.from_pretrained(name, torch_dtype=getattr(torch, args.dtype), **source)
        model.generation_config.do_sample = False
        model.generation_config.max_new_tokens = self.limit
        self.model = model.to(args.device).eval()

    def answer(self, content, clips):
        with sound_file(content[0]["audio"], clips[0]) as path:
            query = self.tokenizer.from_list_format([{"audio": path}, {"text": content[1]["text"]}])
            text, _ = self.model.chat(self.tokenizer, query=query, history=None)
        return text, len(self.tokenizer.encode(text)) < self.limit


class KimiAudio:
    """Kimi-Audio-7B-Instruct, by the package kimia_infer of its repository."""

    sample_rate = SAMPLE_RATE

    def __init__(self, args, name, revision):
        from huggingface_hub import snapshot_download
        from kimia_infer.api import kimia

        self.limit, folder = args.max_new_tokens, name
        if revision is not None:
            folder = snapshot_download(name, revision=revision)
        self.model = kimia.KimiAudio(model_path=folder, load_detokenizer=False)

    def answer(self, content, clips):
        with sound_file(content[0]["audio"], clips[0]) as path:
            messages = [{"role": "user", "message_type": "text", "content": content[1]["text"]},
                        {"role": "user", "message_type": "audio", "content": path}]
            _, text = self.model.generate(messages, output_type="text", text_temperature=0.0, audio_temperature=0.0,
                                          max_new_tokens=self.limit)
        return text, len(self.model.prompt_manager.text_tokenizer.encode(text)) < self.limit


@contextmanager
def sound_file(path, wave_S):
    """The path of a file of sound alone: the clip's or, where that has pictures, that of a temporary wav."""
    with open_media(path, decodes_film=False) as container:
        has_pictures = bool(container.streams.video)
    with TemporaryDirectory() as folder:
        if has_pictures:
            path = str(Path(folder, "sound.wav"))
            soundfile.write(path, wave_S.numpy(), SAMPLE_RATE, "FLOAT")
        yield path
