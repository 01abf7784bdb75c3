"""A model's folder by path or by its name on the Hugging Face hub, "owner/name" or "owner/name@revision".

Only what is read is fetched: config and tokenizer, the index, then the shards that hold tensors we build. All of it
stays in the hub's own cache, which serves without a network what it has. Name a commit, and a run can be repeated;
without one the name stands for the commit that `main` is when this process first asks, and stderr says which.
"""
import sys
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from minixmd.models.shards import INDEX, tensor_files
from minixmd.models.weights import PROCESSOR_FILES, config_of
from minixmd.runs.files import read_json
from minixmd.runs.hub_names import parse_hub_name

SMALL_FILES = ("config.json", "adapter_config.json", INDEX, *PROCESSOR_FILES)


def model_folder(name):
    """The local folder of a model or adapter, fetched from the hub if it is a name there and no folder here.

    Raises:
        ValueError: no such folder, repository, revision or file; access refused; neither a network nor a cached copy.
    """
    if Path(name).is_dir():
        return Path(name)
    name = pinned(name)
    folder = _snapshot(name, SMALL_FILES)
    if (folder / "adapter_config.json").is_file():
        files = ["adapter_model.safetensors"]
    elif (folder / "config.json").is_file():
        files = tensor_files(folder, config_of(folder).family)
    else:
        raise ValueError(f"{name}: the repository has neither config.json nor adapter_config.json")
    _snapshot(name, files)
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{name}: the repository, or its cached copy, has no {', '.join(missing)}")
    return folder


def pinned(name):
    """What a model's name stands for now: a folder's absolute path, or "owner/name@commit".

    Raises:
        ValueError: as model_folder.
    """
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if parse_hub_name(name) is None:
        raise ValueError(f"{name}: no such model folder")
    return _commit(*parse_hub_name(name))


def base_folder(folder):
    """The local folder of the model that an adapter's folder names as its base, fetched if need be.

    Raises:
        ValueError: as model_folder; the line names the adapter.
    """
    config = read_json(Path(folder) / "adapter_config.json")
    name = config.get("base_model_name_or_path") or "unnamed"
    if not isinstance(name, str) or not (Path(name).is_dir() or parse_hub_name(name)):
        raise ValueError(f"{folder}: the adapter's base model {name} is not there")
    if not Path(name).is_dir() and config.get("revision") and parse_hub_name(name)[1] is None:
        name = f"{name}@{config['revision']}"
    try:
        return model_folder(name)
    except ValueError as error:
        raise ValueError(f"{folder}: the adapter's base model: {error}") from error


@cache  # so that every stage of a run sees the same commit
def _commit(repo, revision):
    commit = _snapshot(f"{repo}@{revision}" if revision else repo, SMALL_FILES).name
    if revision is None:
        print(f"minixmd: {repo} is taken at its main, {commit}; to pin it, write {repo}@{commit}", file=sys.stderr)
    return f"{repo}@{commit}"


def _snapshot(name, files):
    """The cache's folder of a commit, with those of the files that the repository has."""
    repo, revision = parse_hub_name(name)
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except GatedRepoError as error:
        said = "access to it must be granted: ask for it on its page, then log in with: hf auth login"
        raise ValueError(f"{name}: {said}") from error
    except RepositoryNotFoundError as error:
        said = "no such folder, and no such repository on the hub, or a private one (log in with: hf auth login)"
        raise ValueError(f"{name}: {said}") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name}: the repository has no revision {revision}") from error
    except HFValidationError as error:
        raise ValueError(f"{name}: no such folder, and no name of a repository on the hub") from error
    except LocalEntryNotFoundError as error:
        said = f"no such folder, the hub cannot be reached ({_first_line(error.__cause__ or error)}), and its cache"
        raise ValueError(f"{name}: {said} holds no whole copy") from error
    except HfHubHTTPError as error:
        raise ValueError(f"{name}: the hub answered {error.response.status_code}") from error
    except OSError:  # of this machine, such as a full disk
        raise
    except Exception as error:  # of the transport, whose package changes with the hub library's version
        raise ValueError(f"{name}: cannot be fetched: {_first_line(error)}") from error


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
