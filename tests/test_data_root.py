"""Where a manifest may lead: its folder, and the clips' folder that prepare_* recorded; no further unless told."""
import json
import os
from types import SimpleNamespace

import pytest
from media_files import sine, write_wav

from minixmd.inputs.examples import Example, data_root, read_examples, read_manifest
from minixmd.report.clips import Media

EXAMPLE = {"id": "a", "question": "Which?", "options": ["dog", "cat"]}


def write(folder, **paths):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "m.jsonl").write_text(json.dumps({**EXAMPLE, "audio": "inside.wav", **paths}) + "\n")
    return folder / "m.jsonl"


@pytest.mark.parametrize("field", ["audio", "video"])
@pytest.mark.parametrize("path", ["../secret.wav", "/etc/passwd", "clips/../../secret.wav", "../data2/a.wav", ".."])
def test_a_path_outside_of_the_manifests_folder_is_refused_with_its_line(tmp_path, field, path):
    manifest = write(tmp_path / "data", **{field: path})
    said = rf"m.jsonl:1: field '{field}' '{path}' is outside of {tmp_path}/data; .* allow_outside=True"
    with pytest.raises(ValueError, match=said):
        read_manifest(manifest)
    with pytest.raises(ValueError, match=said):
        read_examples(SimpleNamespace(name="stage", manifest=manifest, allow_outside=False))
    expected = os.path.normpath(tmp_path / "data" / path)
    assert getattr(read_manifest(manifest, allow_outside=True)[0], field) == expected


@pytest.mark.parametrize("path", ["a.wav", "clips/a.wav", "./clips/../a.wav", "..a/b.wav", "clips/..b.wav"])
def test_a_path_inside_of_it_is_taken(tmp_path, path, monkeypatch):
    manifest = write(tmp_path / "data", audio=path)
    expected = os.path.normpath(tmp_path / "data" / path)
    assert read_manifest(manifest)[0].audio == expected
    monkeypatch.chdir(tmp_path / "data")
    assert read_manifest("m.jsonl")[0].audio == expected


def test_a_manifest_named_with_dots_is_the_same(tmp_path, monkeypatch):
    manifest = write(tmp_path / "data", audio="clips/../a.wav")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert read_manifest("../data/m.jsonl")[0].audio == str(tmp_path / "data" / "a.wav")
    (tmp_path / "data" / "summary.json").write_text('{"clips_folder": "../clips"}')
    assert data_root("../data/m.jsonl") == data_root(manifest) == str(tmp_path)


def test_a_link_in_the_folder_leads_where_its_maker_wanted(tmp_path):
    (tmp_path / "disk").mkdir()
    manifest = write(tmp_path / "data", audio="disk/a.wav")
    (tmp_path / "data" / "disk").symlink_to(tmp_path / "disk")
    assert read_manifest(manifest)


@pytest.mark.parametrize("clips, path, root", [
    ("../clips", "../clips/a.wav", "."), ("../../raw/clips", "../../raw/clips/x/a.wav", ".."),
    ("clips", "clips/a.wav", "data"),
])  # fmt: skip
def test_the_clips_folder_that_was_recorded_counts_and_nothing_beyond(tmp_path, clips, path, root):
    base = tmp_path / "base"
    manifest = write(base / "data", audio=path)
    (base / "data" / "summary.json").write_text(json.dumps({"clips_folder": clips}))
    assert data_root(manifest) == os.path.normpath(base / root)
    assert read_manifest(manifest)[0].audio.endswith("a.wav")
    manifest = write(base / "data", audio="../" * 4 + "secret.wav")
    with pytest.raises(ValueError, match="is outside of"):
        read_manifest(manifest)


@pytest.mark.parametrize("summary", ["", "[]", "null", '{"clips_folder": 7}', '{"kept": {}}', "\xff"])
def test_a_summary_that_is_another_programs_allows_nothing(tmp_path, summary):
    manifest = write(tmp_path / "data", audio="../a.wav")
    (tmp_path / "data" / "summary.json").write_bytes(summary.encode("latin-1"))
    with pytest.raises(ValueError, match="is outside of"):
        read_manifest(manifest)


def test_a_report_embeds_what_decodes_and_nothing_else(tmp_path):
    write_wav(tmp_path / "good.wav", sine(440, 1))
    (tmp_path / "secret.wav").write_text("password")
    media = Media(tmp_path, limit_mib=1)
    for name, embedded in (("good.wav", True), ("secret.wav", False), ("gone.wav", False)):
        [file] = media.add(Example("a", str(tmp_path / name), None, "?", ("x", "y")))
        assert file["embedded"] == embedded, name
    assert list(media.data_uris) == ["good.wav"]
