"""A model's folder by path or by its name on the Hugging Face hub, "owner/name" or "owner/name@revision".

Only what is read is fetched: config and tokenizer, the index, then the shards that hold tensors we build. It stays in
the hub's own cache. A name without a revision stands for the commit that `main` is when this process first asks."""
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from huggingface_hub import errors, snapshot_download

from minixmd.models.shards import INDEX, tensor_files
from minixmd.models.weights import BASE_FILE, PROCESSOR_FILES, config_of, digest_of
from minixmd.runs.files import read_json
from minixmd.runs.heartbeat import unwatched
from minixmd.runs.hub_names import parse_hub_name
from minixmd.runs.value_checks import check_fields

SMALL_FILES = ("config.json", "adapter_config.json", INDEX, *PROCESSOR_FILES)


def model_folder(name):
    """The local folder of a model or adapter, fetched from the hub if it is a name there and no folder here. Raises
    ValueError: no such folder, repository, revision or file; access refused; no network and no cached copy."""
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
    """What a model's name stands for now: a folder's absolute path, or "owner/name@commit". Raises as model_folder."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if parse_hub_name(name) is None:
        raise ValueError(f"{name}: no such model folder")
    return _pin(*parse_hub_name(name))


def base_folder(folder):
    """The local folder of the model that an adapter's folder names as its base; raises as model_folder."""
    config = read_json(Path(folder) / "adapter_config.json")
    name = config.get("base_model_name_or_path") or "unnamed"
    beside = Path(folder) / BASE_FILE
    if beside.is_file():
        base = read_json(beside)
        check_fields(base, {"path": str, "digest": str}, f"{beside}:")
        places = Path(str(name)).resolve(), Path(folder, base["path"]).resolve()  # or it moved together with its base
        there = [path for path in places if path.is_dir()]
        for path in there:
            with suppress(ValueError):  # it holds no model, or not a whole one
                if digest_of(path) == base["digest"]:
                    return path
        if there:
            raise ValueError(f"{folder}: {there[0]} is another model than the one that this adapter was trained on; "
                             f"to use it all the same, delete {beside}")
    hub_name = parse_hub_name(name)
    if not isinstance(name, str) or not (Path(name).is_dir() or hub_name):
        raise ValueError(f"{folder}: the adapter's base model {name} is not there; if it moved, write its path into "
                         "adapter_config.json as base_model_name_or_path")
    if not Path(name).is_dir() and config.get("revision") and hub_name[1] is None:
        name = f"{name}@{config['revision']}"
    try:
        return model_folder(name)
    except ValueError as error:
        raise ValueError(f"{folder}: the adapter's base model: {error}") from error


def base_and_adapters(folder):
    """(a model's folder, [the adapters' that stand on it, each on the one before]); folder: of a model or an adapter.
    Raises as model_folder, and ValueError for an adapter that stands on itself."""
    adapters = []
    while (folder / "adapter_config.json").is_file():
        if folder in adapters:
            raise ValueError(f"{folder}: the adapter's base model is the adapter itself")
        adapters.insert(0, folder)
        folder = base_folder(folder)
    return folder, adapters


@cache  # so that every stage of a run sees the same commit
def _pin(repo, revision):
    commit = _snapshot(f"{repo}@{revision}" if revision else repo, SMALL_FILES).name
    if revision is None:
        print(f"minixmd: {repo} is taken at its main, {commit}; to pin it, write {repo}@{commit}", file=sys.stderr)
    return f"{repo}@{commit}"


def _snapshot(name, files):
    """The cache's folder of a commit, with those of the files that the repository has."""
    repo, revision = parse_hub_name(name)
    try:
        with unwatched():
            return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # of the transport too, whose package changes with the hub library's version
        reason = _reason(error, revision)
        if reason is None:
            raise
        raise ValueError(f"{name}: {reason}") from error


def _reason(error, revision):
    """Why the hub did not serve a repository; None where the trouble is this machine's, such as a full disk."""
    if isinstance(error, errors.GatedRepoError):
        return "access to it must be granted: ask for it on its page, then log in with: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such folder, and no such repository on the hub, or a private one (log in with: hf auth login)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {revision}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        network = _first_line(error.__cause__ or error)
        return f"no such folder, the hub cannot be reached ({network}), and its cache holds no whole copy"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub answered {error.response.status_code}"
    return None if isinstance(error, OSError) else f"cannot be fetched: {_first_line(error)}"


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
