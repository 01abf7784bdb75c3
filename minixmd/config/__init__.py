"""The stages of a run as dataclasses, the prompts they ask with, and the files that list them."""
from minixmd.config.prompts import AUDIO_COT_PROMPT, CHECK_PROMPT, PROMPT, THINK_PROMPT, TRACE_PROMPT
from minixmd.config.schema import ConfigError
from minixmd.config.stages import STAGES, Evaluate, FactCheck, Label, Report, Switch, Toy, Traces, Train

__all__ = ["AUDIO_COT_PROMPT", "CHECK_PROMPT", "PROMPT", "STAGES", "THINK_PROMPT", "TRACE_PROMPT", "ConfigError",
           "Evaluate", "FactCheck", "Label", "Report", "Switch", "Toy", "Traces", "Train"]  # fmt: skip
