"""Fold a LoRA adapter into its base model and write the whole model, or rewrite the adapter for another program.

    python tools/merge_adapter.py ADAPTER OUT                   the base with the adapter merged into it
    python tools/merge_adapter.py ADAPTER OUT --layout new|old  the adapter itself, under other module paths

ADAPTER is a folder in PEFT's format, or "owner/name[@revision]" on the hub; its base is found under the name that it
records. OUT must be new or empty. A merge needs the base's size in memory (in float32 if --dtype or the file is).
"""
import argparse
import sys
from functools import reduce
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from minixmd.models.hub import base_and_adapters, model_folder  # noqa: E402
from minixmd.models.lora import merge_lora  # noqa: E402
from minixmd.models.shards import DTYPES, read_headers  # noqa: E402
from minixmd.models.weights import (  # noqa: E402
    build,
    config_of,
    load_adapter,
    load_model,
    read_adapter,
    save_model,
    write_adapter,
)

DTYPE_OF = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}  # by its name


def stored_dtype(folder):
    """The dtype of a checkpoint's tensors; of several, the one that holds them all."""
    infos = read_headers(folder, config_of(folder).family)
    dtypes = {DTYPES[info.dtype] for info in infos.values() if info.dtype in DTYPES}
    return reduce(torch.promote_types, dtypes) if dtypes else torch.float32  # load_model says what is wrong


def merge(adapters, base, out, dtype=None):
    """Writes the base to `out` with adapters, each on those before it, in its weights. dtype: None = the base's own."""
    stored = stored_dtype(base)
    if dtype is None:
        dtype = stored
    model = load_model(base, dtype=torch.promote_types(stored, dtype))  # rounded once, at the end
    for adapter in adapters:
        load_adapter(model, adapter)
        merge_lora(model)
    save_model(model.to(dtype), base, out)
    count = sum(p.numel() for p in model.parameters())
    return f"{out}: {count:,} parameters in {str(dtype).removeprefix('torch.')}"


def rewrite(adapter, base, out, layout):
    """Writes the adapter to `out` with transformers 5's module paths ("new") or the published checkpoint's ("old")."""
    model = build(config_of(base))
    config, pairs = read_adapter(model, adapter)
    family = model.config.family
    write_adapter(out, config, pairs, family.transformers_path if layout == "new" else family.checkpoint_name)
    return f"{out}: {len(pairs)} adapted layers under {layout} module paths"


def main(argv=None):
    """Returns the exit status; what is wrong with the input is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", metavar="ADAPTER")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--dtype", choices=DTYPE_OF, help="of the merged model; the default is the base's own")
    parser.add_argument("--layout", choices=("new", "old"), help="do not merge: write the adapter with the module "
                        "paths of transformers 5 (new; what train writes) or of the published checkpoint (old; what "
                        "transformers 4 and programs of its time look for)")
    args = parser.parse_args(argv)
    try:
        if args.layout and args.dtype:
            raise ValueError("--dtype is of a merged model; --layout merges nothing")
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise ValueError(f"{args.out}: exists and is not an empty folder")
        adapter = model_folder(args.adapter)
        if not (adapter / "adapter_config.json").is_file():
            raise ValueError(f"{args.adapter}: holds no adapter_config.json, so it is no adapter")
        base, adapters = base_and_adapters(adapter)
        if args.layout:
            summary = rewrite(adapter, base, args.out, args.layout)
        else:
            summary = merge(adapters, base, args.out, DTYPE_OF.get(args.dtype))
    except (ValueError, OSError) as error:
        print(f"merge_adapter: {error}", file=sys.stderr)
        return 1
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
