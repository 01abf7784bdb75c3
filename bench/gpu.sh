#!/usr/bin/env bash
# All benches of the kernels, and a 7B's decode step, on one GPU, most important first, in less than 9 minutes:
# bench/gpu.sh [FOLDER]
# Each writes FOLDER/<name>_gpu.json (FOLDER is bench/results unless given) after every row, and is killed 5 s after its
# time is over, so what was measured stays. A failure does not stop the others; the exit status is 1 if there was one.
# PYTHON chooses the interpreter (default python). TRL, Liger and PEFT are compared with where they are installed.
# Not here: bench_train, bench_slots, bench_load, bench_label, bench_prepare, bench_media, bench_memory, bench_grpo_step,
# bench_processes, bench_start: on a CPU.
set -u
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="${1:-$root/bench/results}"
mkdir -p "$folder" && folder="$(cd "$folder" && pwd)" && cd "$root" || exit 1
status=0

run() {  # seconds, name
    printf '\n+ bench_%s, at most %s s\n' "$2" "$1"
    rm -f "$folder/$2_gpu.json"  # an old result must not pass for this run's
    if ! timeout --kill-after=5 "$1" "${PYTHON:-python}" -m "bench.bench_$2" --device cuda --out "$folder/$2_gpu.json"
    then
        printf 'bench_%s failed or ran out of time\n' "$2"
        status=1
    fi
}

run 90 head
run 65 lora
run 55 logprob
run 60 grpo
run 60 distill
run 100 decode
run 40 passes
run 25 adamw
exit "$status"
