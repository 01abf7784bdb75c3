"""Names of models on the Hugging Face hub, "owner/name" or "owner/name@revision", told apart from paths."""
import re

HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w-][\w.-]*)(?:@([^@\s]+))?", re.ASCII)


def parse_hub_name(value):
    """(owner/name, revision or None) of what could name a hub repository, else None. Callers try a folder first."""
    match = HUB_NAME.fullmatch(str(value))
    return match.groups() if match else None
