"""Stage Switch: for every clip of a split, is the teacher the stronger one?

The answer is a table, "the teacher beats the student on this class of the analysis split", looked up by the class that
the student itself predicts; a training clip's true label is never read. A tie, and a class that the analysis split does
not have, leave the student its own answer.
"""
import json
from pathlib import Path

from tqdm import tqdm

from minixmd.files import read_json, write_text
from minixmd.learning.scoring import read_records


def run(stage, folder, log):
    """Writes switch.jsonl: {"id", "class": predicted, "p_teacher": 1.0 or 0.0}."""
    teacher, student = (read_json(path)["classes"] for path in (stage.teacher, stage.student))
    if set(teacher) != set(student):
        odd = sorted(set(teacher) ^ set(student))[0]
        raise ValueError(f"{stage.name}: teacher {stage.teacher} and student {stage.student} were evaluated on "
                         f"different classes, for example {odd!r}")
    if not teacher:
        raise ValueError(f"{stage.name}: {stage.teacher} has no classes: the switch needs an analysis manifest whose "
                         "examples have a 'label'")
    gain = {name: teacher[name]["accuracy"] - student[name]["accuracy"] for name in teacher}
    won, lost = sum(g > 0 for g in gain.values()), sum(g < 0 for g in gain.values())
    lines, on, unknown = [], 0, 0
    for record in read_records(Path(stage.labels)):
        if "bad" in record:
            continue
        unknown += record["option"] not in gain
        p_teacher = float(gain.get(record["option"], 0.0) > 0)
        on += p_teacher > 0
        decision = {"id": record["id"], "class": record["option"], "p_teacher": p_teacher}
        lines.append(json.dumps(decision, ensure_ascii=False))
    if unknown == len(lines):
        raise ValueError(f"{stage.name}: no clip of {stage.labels} is labelled with a class of {stage.student}; its "
                         f"classes are such as {sorted(gain)[0]!r}")
    write_text(folder / "switch.jsonl", "".join(line + "\n" for line in lines))
    log({"classes_won": won, "classes_tied": len(gain) - won - lost, "classes_lost": lost, "clips": len(lines),
         "clips_to_teacher": int(on), "clips_of_unknown_class": unknown})
    tqdm.write(f"{stage.name}: the teacher wins {won} classes, ties {len(gain) - won - lost}, loses {lost}; "
               f"{int(on)} of {len(lines)} clips go to the teacher"
               + (f", {unknown} are of classes that analysis does not have" if unknown else ""))
