"""The stages of a run as dataclasses, the prompts they ask with, and the files that list them."""
from minixmd.config.field_checks import ConfigError
from minixmd.config.prompts import AUDIO_COT_PROMPT, CHECK_PROMPT, PROMPT, THINK_PROMPT, TRACE_PROMPT, PromptFormat
from minixmd.config.stages import (
    GRPO,
    SFT,
    Answers,
    Distill,
    Evaluate,
    FactCheck,
    Label,
    OnPolicy,
    Report,
    Switch,
    Toy,
    Traces,
)

TRAINING = (Distill, SFT, GRPO, OnPolicy)
STAGES = (Toy, Evaluate, Label, Answers, Traces, FactCheck, Switch, *TRAINING, Report)
__all__ = ["AUDIO_COT_PROMPT", "CHECK_PROMPT", "GRPO", "PROMPT", "SFT", "STAGES", "THINK_PROMPT", "TRACE_PROMPT",
           "TRAINING", "Answers", "ConfigError", "Distill", "Evaluate", "FactCheck", "Label", "OnPolicy",
           "PromptFormat", "Report", "Switch", "Toy", "Traces"]  # fmt: skip
