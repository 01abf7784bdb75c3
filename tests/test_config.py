"""Configs: every mistake is one line that names the field and the value, before any work starts."""
import inspect
import json
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path

import pytest

from minixmd import config
from minixmd.config import (
    GRPO,
    SFT,
    TRAINING,
    Distill,
    Evaluate,
    Label,
    OnPolicy,
    Report,
    Switch,
    Toy,
    load,
)
from minixmd.config.field_checks import ConfigError, check_types, parse_field, stage
from minixmd.config.load import load_config
from minixmd.config.prompts import PROMPT, THINK_PROMPT
from minixmd.config.references import check_files, input_paths, resolve

EVALUATE = dict(name="before", model="m", manifest="d.jsonl")
TRAIN = dict(name="student", model="m", manifest="d.jsonl")
DISTILL = {**TRAIN, "teacher_labels": "t.jsonl"}
GIVEN = {Distill: DISTILL, SFT: TRAIN, GRPO: TRAIN, OnPolicy: TRAIN | {"teacher_model": "t"}}  # what each needs


@pytest.fixture
def write(tmp_path):
    """Writes the body of a config file and returns its path."""

    def write(body, name="my.py"):
        path = tmp_path / name
        path.write_text("from minixmd.config import *\n" + body)
        return path

    return write


def message(build, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        build(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# one stage


def test_a_stage_is_frozen_and_survives_json():
    stage = SFT(**TRAIN)
    with pytest.raises(FrozenInstanceError):
        stage.lr = 1.0
    assert json.loads(json.dumps(asdict(stage)))["betas"] == [0.9, 0.999]


def test_every_field_carries_a_comment_or_is_named_by_its_stage():
    for cls in config.STAGES:
        lines = [line for kind in cls.__mro__[:-1] for line in inspect.getsource(kind).splitlines()]
        for field in fields(cls):
            line = next(line for line in lines if line.strip().startswith(f"{field.name}:"))
            plain = field.name in {"name", "seed", "lora_rank", "epochs", "betas", "eps"}
            assert plain or "  # " in line, f"{cls.__name__}.{field.name}"


def test_an_unknown_field_is_answered_with_the_nearest():
    said = message(SFT, **TRAIN, batch_sise=4)
    assert said == "config: sft 'student' has no field 'batch_sise'; did you mean 'batch_size'?"


def test_an_unknown_field_like_no_other_is_named_alone():
    assert message(Evaluate, **EVALUATE, zzz=4) == "config: evaluate 'before' has no field 'zzz'"


def test_a_field_that_is_not_given_is_named():
    assert message(Evaluate, name="before") == "config: evaluate 'before' needs 'manifest'"
    assert message(Evaluate, model="m", manifest="d") == "config: evaluate needs 'name'"


@pytest.mark.parametrize("cls, field, value, owners", [
    (SFT, "beta", 0.1, "GRPO, OnPolicy"),  # and not betas, which is spelt like it
    (SFT, "group_size", 4, "GRPO, OnPolicy"),
    (Distill, "decode_slots", 64, "Evaluate, Label, Traces, SFT, GRPO, OnPolicy"),
    (SFT, "teacher_labels", "@t", "Distill, GRPO, OnPolicy"), (SFT, "student_labels", "@s", "Distill"),
    (SFT, "switch", "@w", "Distill, OnPolicy, Report"), (SFT, "gate", "never", "Distill, OnPolicy"),
    (SFT, "temperature", 2.0, "Evaluate, Label, Traces, Distill, GRPO, OnPolicy"),
    (Distill, "traces", "t.jsonl", "Evaluate, FactCheck, SFT, OnPolicy, Report"),
    (Distill, "beta", 0.0, "GRPO, OnPolicy"),
    (Distill, "truncated", "mask", "GRPO, OnPolicy"), (GRPO, "student_labels", "@s", "Distill"),
    (GRPO, "switch", "@w", "Distill, OnPolicy, Report"), (GRPO, "teacher_loss", "kl", "Distill, SFT"),
    (Label, "num_samples", "8", "Evaluate, Traces"),
])
def test_a_field_of_another_stage_is_answered_with_the_stages_that_have_it(cls, field, value, owners):
    base = GIVEN.get(cls, EVALUATE)
    assert message(cls, **base, **{field: value}) == (
        f"config: {cls.__name__.lower()} {base['name']!r} has no field {field!r}; it is a field of {owners}")


@pytest.mark.parametrize("cls", TRAINING)
def test_a_way_to_train_refuses_every_field_that_only_the_others_have(cls):
    own = {field.name for field in fields(cls)}
    others = {field.name: other for other in TRAINING for field in fields(other) if field.name not in own}
    assert len(others) >= 3
    for name, other in others.items():
        said = message(cls, **GIVEN[cls], **{name: getattr(other(**GIVEN[other]), name)})
        assert f"has no field {name!r}; it is a field of " in said and other.__name__ in said


@pytest.mark.parametrize("given, said", [
    (dict(lr="fast"), "lr must be a float, got 'fast'"),
    (dict(lr=True), "lr must be a float, got True"),
    (dict(lr=float("nan")), "lr must be a float, got nan"),
    (dict(lr=float("inf")), "lr must be a float, got inf"),
    (dict(lr=None), "lr must be a float, got None"),
    (dict(epochs=1.0), "epochs must be an int, got 1.0"),
    (dict(epochs=True), "epochs must be an int, got True"),
    (dict(max_steps="5"), "max_steps must be an int or None, got '5'"),
    (dict(traces=3), "traces must be a str or None, got 3"),
    (dict(manifest=Path("d.jsonl")), f"manifest must be a str, got {Path('d.jsonl')!r}"),
    (dict(betas=0.9), "betas must be 2 floats, got 0.9"),
    (dict(betas=(0.9,)), "betas must be 2 floats, got (0.9,)"),
    (dict(betas=(0.9, "x")), "betas must be 2 floats, got (0.9, 'x')"),
    (dict(model=""), "model is empty"),
    (dict(name="a/b"), "name must be letters, digits, '_' and '-', got 'a/b'"),
    (dict(name=".."), "name must be letters, digits, '_' and '-', got '..'"),
])
def test_a_value_of_the_wrong_type_is_refused(given, said):
    assert message(SFT, **{**TRAIN, **given}) == f"config: {said}"


def test_an_int_stands_for_a_float_and_a_list_for_a_tuple():
    stage = SFT(**TRAIN, lr=1, betas=[0, 0.5])
    assert (stage.lr, type(stage.lr), stage.betas) == (1.0, float, (0.0, 0.5))


def test_report_tables_are_dicts_of_dicts_of_str():
    for wrong in ({"row": "@x"}, {"row": {"column": 1}}, [("row", {})]):
        assert message(Report, tables=wrong) == f"config: tables must be a dict of dicts of str, got {wrong!r}"


@pytest.mark.parametrize("cls, given, said", [
    (SFT, dict(media="text"), "media must be 'audio', 'video', 'both', 'sounded' or 'none', got 'text'"),
    (SFT, dict(device="gpu"), "device must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
    (SFT, dict(dtype="fp32"), "dtype must be 'float32', 'bfloat16' or 'float16', got 'fp32'"),
    (SFT, dict(trainable="all"), "trainable must be 'lora', 'decoder' or 'full', got 'all'"),
    (SFT, dict(lr=0.0), "lr must be > 0, got 0.0"),
    (SFT, dict(epochs=0), "epochs must be >= 1, got 0"),
    (SFT, dict(max_steps=0), "max_steps must be >= 1, got 0"),
    (SFT, dict(lora_rank=0), "lora_rank must be >= 1, got 0"),
    (SFT, dict(lora_alpha=0), "lora_alpha must be > 0, got 0"),
    (SFT, dict(batch_size=0), "batch_size must be >= 1, got 0"),
    (SFT, dict(micro_batch_tokens=0), "micro_batch_tokens must be >= 1, got 0"),
    (SFT, dict(warmup_ratio=1.5), "warmup_ratio must be <= 1, got 1.5"),
    (SFT, dict(warmup_ratio=-0.1), "warmup_ratio must be >= 0, got -0.1"),
    (SFT, dict(weight_decay=-1.0), "weight_decay must be >= 0, got -1.0"),
    (SFT, dict(max_grad_norm=-1.0), "max_grad_norm must be >= 0, got -1.0"),
    (SFT, dict(eps=0.0), "eps must be > 0, got 0.0"),
    (SFT, dict(betas=(0.9, 1.0)), "betas must be >= 0 and < 1, got (0.9, 1.0)"),
    (SFT, dict(save_every=-1), "save_every must be >= 0, got -1"),
    (SFT, dict(eval_every=-1), "eval_every must be >= 0, got -1"),
    (SFT, dict(fps=0.0), "fps must be > 0, got 0.0"),
    (SFT, dict(nframes=1), "nframes must be >= 2, got 1"),
    (SFT, dict(max_bad=1.1), "max_bad must be <= 1, got 1.1"),
    (SFT, dict(max_bad=-0.1), "max_bad must be >= 0, got -0.1"),
    (SFT, dict(min_pixels=0), "min_pixels must be >= 1, got 0"),
    (SFT, dict(seed=-1), "seed must be >= 0, got -1"),
    (Distill, {"temperature": 0.0}, "temperature must be > 0, got 0.0"),
    (GRPO, {"temperature": 0.0}, "temperature must be > 0, got 0.0"),
    (GRPO, {"group_size": 1}, "group_size must be >= 2, got 1"),
    (GRPO, {"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
    (GRPO, {"beta": -0.1}, "beta must be >= 0, got -0.1"),
    (GRPO, {"kl": "k2"}, "kl must be 'k3' or 'k1', got 'k2'"),
    (GRPO, {"clip_low": 1.1}, "clip_low must be <= 1, got 1.1"),
    (GRPO, {"clip_low": -0.1}, "clip_low must be >= 0, got -0.1"),
    (GRPO, {"clip_high": -0.1}, "clip_high must be >= 0, got -0.1"),
    (GRPO, {"ratio": "word"}, "ratio must be 'token' or 'sequence', got 'word'"),
    (GRPO, {"aggregation": "mean"}, "aggregation must be 'sequence', 'token' or 'constant', got 'mean'"),
    (GRPO, {"scale_rewards": "batch"}, "scale_rewards must be 'std' or 'none', got 'batch'"),
    (GRPO, {"truncated": "drop"}, "truncated must be 'keep' or 'mask', got 'drop'"),
    (GRPO, {"zero_variance": "drop"}, "zero_variance must be 'keep' or 'skip', got 'drop'"),
    (GRPO, {"num_iterations": 0}, "num_iterations must be >= 1, got 0"),
    (GRPO, {"completions_every": -1}, "completions_every must be >= 0, got -1"),
])
def test_a_value_out_of_range_is_refused(cls, given, said):
    assert message(cls, **{**GIVEN[cls], **given}) == f"config: {said}"


@pytest.mark.parametrize("cls, given, said", [
    (Distill, {"teacher_labels": None}, "distill needs teacher_labels, got None"),
    (SFT, dict(max_new_tokens=64), "sft without traces does not use max_new_tokens, got 64"),
    (SFT, dict(trace_filter="first"), "sft without traces does not use trace_filter, got 'first'"),
    (GRPO, {"decode_slots": "all"}, "decode_slots must be an int or 'auto', got 'all'"),
    (GRPO, {"decode_slots": 0}, "decode_slots must be >= 1, got 0"),
    (SFT, {"decode_slots": 8}, "sft without traces does not use decode_slots, got 8"),
    (GRPO, {"stop": ("",)}, "a stop string must not be empty, got ''"),
    (GRPO, {"beta": 0, "kl": "k1"}, "beta 0.0 does not use kl, got 'k1'"),
    (Distill, {"student_labels": "@s"}, "gate 'always' does not use student_labels, got '@s'"),
    (Distill, {"gate": "never"}, "gate 'never' needs student_labels, got None"),
    (Distill, {"gate": "never", "student_labels": "@s"}, "gate 'never' does not use teacher_labels, got 't.jsonl'"),
    (Distill, {"gate": "never", "student_labels": "@s", "teacher_labels": None, "teacher_loss": "kl"},
     "gate 'never' does not use teacher_loss, got 'kl'"),
    (Distill, {"gate": "oracle"},
     "gate 'oracle' with switch None: 'learned' and 'oracle' need a switch, others none"),
    (Distill, {"switch": "@w"},
     "gate 'always' with switch '@w': 'learned' and 'oracle' need a switch, others none"),
    (SFT, dict(trainable="full", dtype="float16"),
     "trainable 'full' needs dtype 'float32' or 'bfloat16', got 'float16'"),
    (SFT, dict(trainable="decoder", dtype="float16"),
     "trainable 'decoder' needs dtype 'float32' or 'bfloat16', got 'float16'"),
    (GRPO, {"dtype": "float16"}, "grpo needs dtype 'float32' or 'bfloat16', got 'float16'"),
    (SFT, dict(min_pixels=9, max_pixels=8), "min_pixels 9 is more than max_pixels 8"),
    (SFT, dict(eval_every=10), "eval_every 10 needs val_manifest, got None"),
    (SFT, dict(lora_targets="("),
     "lora_targets '(' is no regular expression: missing ), unterminated subpattern at position 0"),
])
def test_a_contradiction_names_both_values(cls, given, said):
    assert message(cls, **{**GIVEN[cls], **given}) == f"config: {said}"


def test_the_ends_of_a_range_are_allowed():
    SFT(**TRAIN, warmup_ratio=1.0, max_bad=1.0, max_grad_norm=0.0, weight_decay=0.0, epochs=1, min_pixels=9,
        max_pixels=9, nframes=2)
    SFT(**TRAIN, warmup_ratio=0.0, max_bad=0.0, max_steps=1, batch_size=1, micro_batch_tokens=1, save_every=0,
        betas=(0, 0))


def test_a_switch_without_student_labels_is_allowed():
    assert Distill(**DISTILL, switch="@w", gate="learned").student_labels is None


def test_a_gate_that_never_follows_the_teacher_needs_no_teacher():
    assert Distill(**TRAIN, gate="never", student_labels="@s").teacher_labels is None


@pytest.mark.parametrize("trainable, dtypes", [("lora", "float32 bfloat16 float16"), ("decoder", "float32 bfloat16"),
                                               ("full", "float32 bfloat16")])
def test_adapters_train_beside_any_weights_and_the_others_in_float32_or_bfloat16(trainable, dtypes):
    for dtype in dtypes.split():
        assert SFT(**TRAIN, trainable=trainable, dtype=dtype).trainable == trainable


def test_prompt_and_temperature_default_by_stage_and_survive_a_copy():
    for cls, more, prompt, temperature in ((SFT, {}, PROMPT, 1.0), (SFT, {"traces": "t.jsonl"}, THINK_PROMPT, 1.0),
                                           (Distill, {}, PROMPT, 2.0), (GRPO, {}, THINK_PROMPT, 1.0)):
        stage = cls(**GIVEN[cls], **more)
        for made in (stage, replace(stage, seed=3)):
            assert (made.prompt, getattr(made, "temperature", None)) == (prompt, temperature)
        assert cls(**GIVEN[cls], **more, prompt="{options}").prompt == "{options}"


def test_grpo_has_the_papers_defaults():
    grpo = GRPO(**TRAIN)
    assert (grpo.group_size, grpo.beta, grpo.temperature, grpo.kl, grpo.ratio) == (8, 0.04, 1.0, "k3", "token")
    assert (grpo.aggregation, grpo.scale_rewards, grpo.truncated, grpo.zero_variance) == ("sequence", "std", "keep",
                                                                                          "keep")
    assert grpo.clip_low == grpo.clip_high == 0.2 and grpo.num_iterations == 1
    assert GRPO(**TRAIN, teacher_labels="@t", beta=0.0, clip_low=1.0, group_size=2).kl == "k3"


@pytest.mark.parametrize("prompt, said", [
    ("{options} {optoins}", "prompt has no placeholder 'optoins'; did you mean 'options'?"),
    ("{options.x}", "prompt has no placeholder 'options.x'; did you mean 'options'?"),
    ("{options} {}", "prompt has no placeholder ''"),
    ("{question}", "prompt '{question}' must hold the placeholder 'options'"),
    ("{options} }", "prompt '{options} }' is no format string: Single '}' encountered in format string"),
    ("{options:d}", "prompt '{options:d}' is no format string: Unknown format code 'd' for object of type 'str'"),
    ("{options:{width}}", "prompt '{options:{width}}' is no format string: 'width'"),
])
@pytest.mark.parametrize("cls, base", [(Evaluate, EVALUATE), (Label, EVALUATE), (SFT, TRAIN), (GRPO, TRAIN)])
def test_a_wrong_prompt_is_refused(cls, base, prompt, said):
    assert message(cls, **base, prompt=prompt) == f"config: {said}"


def test_the_default_prompt_and_doubled_braces_are_allowed():
    assert Evaluate(**EVALUATE).prompt == PROMPT
    assert Evaluate(**EVALUATE, prompt="{{json}} {options}").prompt == "{{json}} {options}"


def test_label_asks_with_the_fields_and_defaults_of_evaluate_but_one_greedy_answer():
    evaluate, label = ({f.name: (f.type, f.default) for f in fields(cls)} for cls in (Evaluate, Label))
    own = {"rule", "num_samples", "stop", "traces"}, {"top_k"}
    assert (evaluate.keys() - label.keys(), label.keys() - evaluate.keys()) == own
    shared = evaluate.keys() & label.keys() - {"temperature"}  # of the sampling; of what is stored for distillation
    assert all(evaluate[name] == label[name] for name in shared)


# files


def test_a_config_file_gives_stages_and_a_run_directory(write):
    path = write("stages = [Toy(), Evaluate(name='e', model='@toy/student', manifest='@toy/test.jsonl')]")
    read = load_config(path)
    assert (read.run_dir, read.source, read.stages) == (Path("runs/my"), path, (
        Toy(), Evaluate(name="e", model="@toy/student", manifest="@toy/test.jsonl")))
    assert load_config(str(write("stages = [Toy()]; run_dir = 'elsewhere'"))).run_dir == Path("elsewhere")


def test_a_bundled_recipe_is_found_by_its_bare_name(write, monkeypatch, tmp_path):
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr(load, "__file__", str(tmp_path / "config" / "load.py"))
    recipe = write("stages = [Toy(seed=5)]", "recipes/little.py")
    write("", "recipes/big.py")
    write("", "recipes/__init__.py")
    assert load_config("little").source == recipe
    assert load_config("little").stages == (Toy(seed=5),)
    said = message(load_config, "litle")
    assert said == "config: no recipe 'litle'; did you mean 'little'? (available: big, little)"


def test_a_missing_file_is_named(tmp_path):
    for source in (tmp_path / "no.py", tmp_path / "folder", "no.py"):
        assert message(load_config, source) == f"config: no file {source}"


@pytest.mark.parametrize("body, said", [
    ("x = 1", "config: {path} defines no list of stages named 'stages'"),
    ("stages = []", "config: {path} defines no list of stages named 'stages'"),
    ("stages = Toy()", "config: {path} defines no list of stages named 'stages'"),
    ("stages = [Toy(), 3]", "config: {path}: stages[1] must be a stage, got 3"),
    ("stages = [Toy(), Toy()]", "config: two stages are named 'toy'"),
    ("stages = [Toy()]; run_dir = 3", "config: run_dir must be a path, got 3"),
    ("\nstages = [", "config: {path}:3: '[' was never closed"),
    ("\nstages = [Toi()]", "config: {path}:3: NameError: name 'Toi' is not defined"),
    ("def f():\n    return 1 / 0\nstages = f()", "config: {path}:3: ZeroDivisionError: division by zero"),
    ("raise ValueError('two\\nlines')", "config: {path}:2: ValueError: two lines"),
    ("stages = [\n  Toy(sed=1)]", "config: toy has no field 'sed'; did you mean 'seed'? ({path}:3)"),
    ("stages = [Toy('world')]", "config: {path}:2: TypeError: "),
])
def test_a_fault_in_the_file_is_one_line_with_file_and_line(write, body, said):
    path = write(body)
    wanted = said.format(path=path)
    got = message(load_config, path)
    assert got == wanted or (said.endswith(": ") and got.startswith(wanted))  # Python words some of them by version


def test_a_file_that_is_no_text_is_one_line(tmp_path):
    path = tmp_path / "my.py"
    path.write_bytes(b"\xff\xfe\x00")
    assert message(load_config, path).startswith(f"config: {path}:1: ")


# overrides

TWO = """
stages = [SFT(name='a', model='m', manifest='d'), Evaluate(name='b', model='@a', manifest='d')]
"""


def overridden(write, *overrides):
    return load_config(write(TWO), overrides)


def test_overrides_are_read_by_the_field_type(write):
    a = overridden(write, "a.lr=3e-4", "a.batch_size=16", "a.betas=0.8, 0.9", "a.max_steps=7", "a.model=x=y").stages[0]
    assert (a.lr, a.batch_size, a.betas, a.max_steps, a.model) == (3e-4, 16, (0.8, 0.9), 7, "x=y")
    assert overridden(write, "a.max_steps=7", "a.max_steps=none").stages[0].max_steps is None


def test_a_bare_field_is_set_in_every_stage_that_has_it(write):
    a, b = overridden(write, "seed=3", "epochs=2").stages
    assert (a.seed, b.seed, a.epochs) == (3, 3, 2)


def test_the_last_override_wins(write):
    assert [s.seed for s in overridden(write, "seed=3", "b.seed=4").stages] == [3, 4]
    assert [s.seed for s in overridden(write, "b.seed=4", "seed=3").stages] == [3, 3]
    assert overridden(write, "run_dir=x", "run_dir=y").run_dir == Path("y")


def test_overrides_of_one_stage_are_checked_together(write):
    a = overridden(write, "a.min_pixels=300000", "a.max_pixels=400000").stages[0]  # the default of 262,144 is less
    assert (a.min_pixels, a.max_pixels) == (300_000, 400_000)


@pytest.mark.parametrize("override, said", [
    ("a.batch_sise=4", "sft 'a' has no field 'batch_sise'; did you mean 'batch_size'?"),
    ("a.beta=0.1", "sft 'a' has no field 'beta'; it is a field of GRPO, OnPolicy"),
    ("beta=0.1", "no stage has a field 'beta'; it is a field of GRPO, OnPolicy"),
    ("sede=1", "no stage has a field 'sede'; did you mean 'seed'?"),
    ("aa.seed=1", "no stage 'aa'; did you mean 'a'?"),
    (".seed=1", "no stage ''"),
    ("a.lr=fast", "lr must be a float, got 'fast'"),
    ("a.lr=nan", "lr must be a float, got nan"),
    ("a.epochs=1.5", "epochs must be an int, got '1.5'"),
    ("a.epochs=none", "epochs must be an int, got 'none'"),
    ("a.max_steps=x", "max_steps must be an int or None, got 'x'"),
    ("a.betas=0.9", "betas must be 2 floats, got '0.9'"),
    ("a.model=", "model is empty"),
    ("a.min_pixels=400000", "min_pixels 400000 is more than max_pixels 262144"),
    ("b.model=@b", "evaluate 'b' model '@b' names a stage that does not run before it"),
    ("a.name=c", "a stage's name is set in the config file only, got override 'a.name'"),
    ("--seed", "override '--seed' must read stage.field=value, field=value or run_dir=path"),
    ("run_dir=", "run_dir must be a path, got ''"),
])
def test_a_wrong_override_is_refused(write, override, said):
    assert message(overridden, write, override) == f"config: {said}"


def test_a_table_cannot_be_overridden(write):
    path = write("stages = [Report(tables={})]")
    assert message(load_config, path, ["report.tables=x"]) == "config: tables must be a dict of dicts of str, got 'x'"


@stage
class Kinds:  # types that no shipped stage has yet
    name: str = "kinds"
    flag: bool = False
    words: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        check_types(self)


@pytest.mark.parametrize("name, text, value", [
    ("flag", "true", True), ("flag", "false", False), ("words", "a,b", ("a", "b")), ("words", "", ()),
    ("sizes", "1,2,3", (1, 2, 3)),
])
def test_bools_and_open_tuples_are_read(name, text, value):
    assert parse_field(Kinds(), name, text) == value


def test_wrong_bools_and_tuples_are_refused():
    assert message(parse_field, Kinds(), "flag", "1") == "config: flag must be true or false, got '1'"
    assert message(parse_field, Kinds(), "sizes", "1,x") == "config: sizes must be a list of int, got '1,x'"
    assert message(Kinds, flag=1) == "config: flag must be true or false, got 1"
    assert message(Kinds, sizes=(1, True)) == "config: sizes must be a list of int, got (1, True)"


# references

CHAIN = (
    Toy(),
    Evaluate(name="teacher", model="@toy/teacher", manifest="@toy/analysis.jsonl", media="video"),
    Evaluate(name="before", model="@toy/student", manifest="@toy/analysis.jsonl"),
    Label(name="own", model="@toy/student", manifest="@toy/train.jsonl"),
    Label(name="seen", model="@toy/teacher", manifest="@toy/train.jsonl", media="video"),
    Switch(name="gate", teacher="@teacher", student="@before", manifest="@toy/analysis.jsonl",
           train_manifest="@toy/train.jsonl"),
    Distill(name="student", model="@toy/student", manifest="@toy/train.jsonl", teacher_labels="@seen",
            student_labels="@own", switch="@gate", gate="learned"),
    Evaluate(name="after", model="@student", manifest="@toy/test.jsonl"),
    Report(tables={"student": {"before": "@before", "after": "@after"}}),
)


@pytest.mark.parametrize("value, path", [
    ("@student", "run/student/best"), ("@own", "run/own/labels.jsonl"), ("@gate", "run/gate/switch.jsonl"),
    ("@after", "run/after/results.json"), ("@toy/test.jsonl", "run/toy/test.jsonl"), ("models/x", "models/x"),
    ("@student/log.jsonl", "run/student/log.jsonl"), ("@toy/clips/a.wav", "run/toy/clips/a.wav"),
])
def test_a_reference_stands_for_the_stage_output_or_its_file(value, path):
    assert resolve(value, Path("run"), CHAIN) == Path(path)


def references(stage):
    """The (field, stage name) pairs of what a stage reads of others."""
    found = input_paths(stage, Path("run"), CHAIN)
    return [(field, path.parts[1]) for field, path in found.items() if path.parts[0] == "run"]


def test_references_list_fields_and_stages_and_see_into_tables():
    assert references(CHAIN[6]) == [("model", "toy"), ("manifest", "toy"), ("teacher_labels", "seen"),
                                    ("student_labels", "own"), ("switch", "gate")]
    assert references(CHAIN[-1]) == [("tables.student.before", "before"), ("tables.student.after", "after")]
    assert references(CHAIN[0]) == []
    assert references(Evaluate(**EVALUATE, prompt="@x {options}")) == []  # a prompt names no file


def test_input_paths_resolve_every_file_of_a_stage():
    assert input_paths(CHAIN[7], "run", CHAIN) == {"model": Path("run/student/best"),
                                                   "manifest": Path("run/toy/test.jsonl")}
    assert input_paths(CHAIN[-1], "run", CHAIN)["tables.student.after"] == Path("run/after/results.json")


@pytest.mark.parametrize("stages, said", [
    ("Evaluate(name='e', model='@toy/m', manifest='@toi/d')",
     "evaluate 'e' manifest '@toi/d' names no stage; did you mean '@toy'?"),
    ("Evaluate(name='e', model='@x', manifest='d'), SFT(name='x', model='m', manifest='d')",
     "evaluate 'e' model '@x' names a stage that does not run before it"),
    ("Evaluate(name='e', model='@toy', manifest='d')", "evaluate 'e' model '@toy' names no file; write '@toy/FILE'"),
    ("Evaluate(name='e', model='@toy/', manifest='d')", "evaluate 'e' model '@toy/' names no file; write '@toy/FILE'"),
    ("Evaluate(name='e', model='@', manifest='d')", "evaluate 'e' model '@' names no stage"),
    ("Label(name='l', model='m', manifest='d'), Evaluate(name='e', model='@l', manifest='d')",
     "evaluate 'e' model '@l' is the output of a label stage, not the output of a distill or sft or grpo or "
     "onpolicy stage"),
    ("Label(name='l', model='m', manifest='d'), Evaluate(name='e', model='m', manifest='@l')",
     "evaluate 'e' manifest '@l' is the output of a label stage, not a manifest"),
    ("Report(tables={'row': {'column': '@x'}})", "report 'report' tables.row.column '@x' names no stage"),
])
def test_a_wrong_reference_is_found_before_any_work(write, stages, said):
    assert message(load_config, write(f"stages = [Toy(), {stages}]")) == f"config: {said}"


def test_a_file_that_the_user_must_bring_is_checked(tmp_path):
    (tmp_path / "d.jsonl").touch()
    stages = [Toy(), Evaluate(name="e", model="@toy/m", manifest=str(tmp_path / "d.jsonl"))]
    check_files(stages)
    stages.append(Evaluate(name="f", model="@toy/m", manifest="no.jsonl"))
    assert message(check_files, stages) == ("config: evaluate 'f' manifest 'no.jsonl' does not exist; if it "
                                            "moved, add f.manifest=PATH to the command")
