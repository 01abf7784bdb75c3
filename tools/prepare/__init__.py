"""What the prepare_* commands share, on the way from official files and a folder of clips to manifests.

    command_line       arguments; what is wrong with the input becomes one line on stderr
    official_files     csv files, lists of names and JSON records, as they are published
    clip_checks        finds a clip, decodes it once as training will, and keeps the verdict for the next run
    option_sampling    draws wrong options by class frequency, the same on every machine
    questions          benchmarks that bring their own questions: checks a record, writes a manifest a file
    manifests          writes manifests, drops.jsonl and summary.json
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # minixmd, from a checkout that need not be installed
