"""The clips of stage Report's page: a card each, with its media to play. Every string from the data is escaped."""
import base64
from collections import Counter
from pathlib import PurePath
from urllib.parse import quote

from minixmd.report.charts import NAMES, esc

MIME = {".wav": "audio/wav", ".flac": "audio/flac", ".mp3": "audio/mpeg", ".ogg": "audio/ogg", ".m4a": "audio/mp4",
        ".mp4": "video/mp4", ".webm": "video/webm", ".mkv": "video/webm"}


def clips(one, embedded, card, more=""):
    """Cards of each kind of clip, and by which rule they were chosen; more: the rest of the rule."""
    size = sum(map(len, embedded.values())) / 2**20
    linked = sum(not file["embedded"] for kind in one["kinds"] for clip in kind["clips"] for file in clip["media"])
    text = (f"<p>From the {one['of']:,} clips of {esc(one['column'])}; of each kind the first of each class in the "
            f"manifest's order, then the second of each{more}. The page holds {len(embedded)} media files of "
            f"{size:.1f} MiB")
    text += f" of at most {one['embed_mib']:g}; {linked} are linked where they lie.</p>" if linked else ".</p>"
    for kind in one["kinds"]:
        text += (f"<h3>{esc(kind['title'])} ({len(kind['clips'])} of {kind['count']:,} shown)</h3>"
                 + "<div class='grid small'>" + "".join(card(clip, embedded) for clip in kind["clips"]) + "</div>")
    return text


def card(clip, embedded):
    """A clip, what teacher and student said of it, and, unfolded, what they were asked."""
    rows, written = said(clip["answers"], NAMES)
    return shown(clip, embedded, f"<table>{rows}</table><details><summary>What was asked</summary>{asked(clip)}"
                                 f"{written}</details>")


def thought(clip, embedded):
    """A clip, what it was asked, the rows' answers, and, unfolded, their thoughts and the teacher's with the verdicts.
    """
    rows, written = said(clip["answers"], {row: row for row in clip["answers"]})
    text = f'{asked(clip)}<table class="long">{rows}</table>'
    text += f"<details><summary>What they wrote</summary>{written}</details>" if written else ""
    if not clip["traces"]:
        return shown(clip, embedded, text)
    verdicts = Counter(trace["verdict"] for trace in clip["traces"])
    text += "<details><summary>The teacher's traces: " + esc(", ".join(f"{n} {one}" for one, n in verdicts.items()))
    text += "</summary>"
    for trace in clip["traces"]:
        score = f", score {trace['score']:+.2f}" if "score" in trace else ""
        text += f"<p>Sample {esc(trace['sample'])}, {esc(trace['verdict'])}{score}"
        text += "" if trace["right"] is None else f"; {marked(trace['right'], trace['option'])}"
        text += f"</p><pre>{esc(trace['text'])}</pre>"
    return shown(clip, embedded, text + "</details>")


def shown(clip, embedded, text):
    return (f'<div class="clip"><h4>{esc(clip["right"])} <small>{esc(clip["id"])}</small></h4>'
            f"{''.join(player(file, embedded) for file in clip['media'])}{text}</div>")


def asked(clip):
    return f"<p>{esc(clip['question'])}</p><ul>{''.join(f'<li>{esc(option)}</li>' for option in clip['options'])}</ul>"


def said(answers, names):
    """(table rows, what was written) of {row: answer}."""
    rows, written = "", ""
    for row, answer in answers.items():
        rows += (f'<tr><th scope="row">{esc(names[row])}</th><td class="said">'
                 f"{marked(answer['right'], answer['option'])}</td></tr>")
        written += f"<p>{esc(names[row])} wrote:</p><pre>{esc(answer['text'])}</pre>" if "text" in answer else ""
    return rows, written


def marked(right, option):
    return f"{'✓ right' if right else '✗ wrong'}: {'no answer' if option is None else esc(option)}"


def player(file, embedded):
    """A video, muted, as its model sees it, a sound, or both: from the page itself, or linked where it lies."""
    tag, link = "audio" if file["kind"] == "audio" else "video", quote(file["path"])
    if file["bytes"] is None:
        return f'<p class="dim">The {tag} {esc(file["path"])} is not there.</p>'
    note = f'<p class="dim">Not in this page: <a href="{link}">{esc(file["path"])}</a></p>'
    if file["embedded"]:
        data = base64.b64encode(embedded[file["path"]]).decode()
        link, note = f"data:{MIME[PurePath(file['path']).suffix.lower()]};base64,{data}", ""
    return f'<{tag} controls preload="metadata"{" muted" * (file["kind"] == "video")} src="{link}"></{tag}>{note}'
