"""Writes the manifests of a data set, the list of dropped clips and the summary."""
import json
import os
from collections import Counter
from hashlib import sha256
from pathlib import Path

from minixmd.inputs.examples import Example
from minixmd.runs.files import write_json
from minixmd.toy.world import QUESTION
from prepare.clip_checks import SOUND_ONLY

ENCODE = json.JSONEncoder(ensure_ascii=False).encode


class ManifestWriter:
    """Writes OUT/<split>.jsonl and drops.jsonl; they appear when the `with` block ends well, and not before.

    Args:
        args: clips and out (folders), no_open, extract_audio.
        source: name of the data set. splits: names of the manifests.
    """

    def __init__(self, args, source, splits):
        self.args, self.source = args, source
        self.kept = Counter({split: 0 for split in splits})
        self.dropped = Counter()  # (reason, split) -> number
        self.silent = 0
        # resolved first, since ".." of a folder that is a link leads elsewhere
        self.clips = os.path.relpath(os.path.realpath(args.clips), os.path.realpath(args.out))

    def __enter__(self):
        self.files = {}
        for name in (*self.kept, "drops"):
            self.files[name] = open(self._unfinished(name), "w", encoding="utf-8")
        return self

    def _path(self, name):
        return Path(self.args.out, f"{name}.jsonl")

    def _unfinished(self, name):
        return Path(self.args.out, f".{name}.jsonl.tmp")

    def keep_class(self, split, row, verdict, *, label, options, answer, **meta):
        """Writes the question which class a row's clip is of."""
        meta |= {"youtube": row.facts["youtube"], "start_s": row.facts["start_s"]}
        self.keep(split, row.id, verdict, id=row.id, question=QUESTION, options=options, answer=answer, label=label,
                  source=f"{self.source}/{row.split}", meta=meta)

    def keep(self, split, clip_id, verdict, *, meta, **fields):
        """Writes a question about the clip of this id: the line of examples.manifest_text, five times faster."""
        file = f"{self.clips}/{verdict['file']}"
        if verdict.get("silent"):
            meta["silent"] = True
            self.silent += 1
        extracted = self.args.extract_audio and not self.args.no_open
        example = Example(audio=f"audio/{clip_id}.flac" if extracted else file,
                          video=None if file.lower().endswith(SOUND_ONLY) else file, meta=meta, **fields)
        self.files[split].write(ENCODE(vars(example)) + "\n")
        self.kept[split] += 1

    def drop(self, row, verdict):
        """Lists a row that is left out, with its reason."""
        self.dropped[verdict["reason"], row.split] += 1
        line = {"id": row.id, "split": row.split, "reason": verdict["reason"], "detail": verdict["detail"], **row.facts}
        self.files["drops"].write(json.dumps(line) + "\n")

    def __exit__(self, kind, error, trace):
        """Raises ValueError if nothing was kept; the manifests of an earlier run, and its drops.jsonl, then stay."""
        for file in self.files.values():
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
        any_kept = any(self.kept.values())
        any_earlier = any(self._path(split).exists() for split in self.kept)
        for name in self.files:
            if name == "drops":
                publish = any_kept or not any_earlier
            else:
                publish = self.kept[name] > 0
            if kind is None and publish:
                os.replace(self._unfinished(name), self._path(name))
                continue
            os.unlink(self._unfinished(name))
            if kind is None and any_kept:
                self._path(name).unlink(missing_ok=True)  # of an earlier run; an empty manifest is not written
        if kind is None and not any_kept:
            reasons = self._reasons()
            hint = f"; is {self.args.clips} the folder of the clips?" if reasons["missing"] else ""
            listed = ", ".join(f"{reason} {number:,}" for reason, number in reasons.most_common())
            raise ValueError(f"no clip is left{hint} ({listed})")

    def _reasons(self):
        """Counter of the reasons for dropping, over all splits."""
        reasons = Counter()
        for (reason, _), number in self.dropped.items():
            reasons[reason] += number
        return reasons

    def summarise(self, inputs, **more):
        """Writes summary.json and prints what was dropped. inputs: files that were read. more: further fields."""
        args, reasons = self.args, self._reasons()
        by_reason = {reason: {} for reason, _ in reasons.most_common()}
        for (reason, split), number in sorted(self.dropped.items()):
            by_reason[reason][split] = number
        summary = {"clips_folder": self.clips, "kept": self.kept, "dropped": by_reason, "silent": self.silent}
        for name in ("options", "seed"):
            if name in args:
                summary[name] = getattr(args, name)
        hashes = {Path(path).name: sha256(Path(path).read_bytes()).hexdigest() for path in inputs}
        write_json(Path(args.out, "summary.json"), {**summary, "opened": not args.no_open, **more, "sha256": hashes})
        print(f"dropped: {reasons.total():,}, listed with their reasons in {self._path('drops')}")
        for reason, by_split in by_reason.items():
            parts = ", ".join(f"{split} {number:,}" for split, number in by_split.items())
            print(f"  {reason:24}{reasons[reason]:>9,}   {parts}")
        if self.silent:
            print(f"silent and kept: {self.silent:,}, marked in their meta")
