#!/usr/bin/env bash
# What the plugin does on a GPU, unattended and without network: four stages in order of worth, each with a limit of its
# own, each with its Markdown table, which is written row by row: a run that is cut off keeps what it has.
#
#   tests/bench/gpu.sh OUT                         the environment of `python3` has the plugin
#   WHEELS=wheels tests/bench/gpu.sh OUT           it has torch but not LLaMA-Factory: README.md lists the wheels
#   SIZE=tiny DEVICE=cpu tests/bench/gpu.sh OUT    the same on a CPU, to test this script
#
# OUT: the folder of the tables, or the variable OUT. PYTHON: an interpreter other than python3. LIMIT: seconds a stage
# (90), TRAINING_LIMIT: of training, whose 15 rows are processes of their own (6 x LIMIT). STAGES: the numbers of those to run ("1 2 3 4"). Exit code 1 if one of them failed or ran out of time.
set -uo pipefail

out=${1:-${OUT:?Name the folder for the tables: gpu.sh FOLDER}}
python=${PYTHON:-python3}
size=${SIZE:-2b} device=${DEVICE:-cuda} limit=${LIMIT:-90}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bench=$repository/tests/bench
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
# A checkpoint of 2B has 4 GB; memory is faster than a disk.
if [ -z "${TMPDIR:-}" ] && [ "$size" = 2b ] && [ "$(df --output=avail -k /dev/shm 2>/dev/null | tail -1)" -gt 16000000 ] 2>/dev/null; then
  TMPDIR=/dev/shm
fi
work=$(mktemp -d "${TMPDIR:-/tmp}/gpu_run.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
child=
stop() { # the stage has a process group of its own, which no Ctrl-C reaches
  [ -z "$child" ] || kill "$child" 2>/dev/null
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
export TMPDIR=$work HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 MPLBACKEND=Agg
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} # transformers would split a batch among several
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# An environment of the wheels, in front of that of $python, whose packages it sees; the plugin is this working copy.
make_environment() {
  "$python" -m venv --without-pip "$work/env" || return
  local site
  site=$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return
  "$python" - >"$site/behind.pth" <<'END'
import sys
for path in sys.path:
    if path.endswith("-packages"):
        print(f"import site; site.addsitedir({path!r})")  # their .pth files count too
END
  "$python" -m pip --python "$work/env/bin/python" install --quiet --no-index --no-deps --no-compile --ignore-installed \
    "$WHEELS"/*.whl || return
  echo "$repository" >"$site/_chatreid_plugin.pth" # read before chatreid_autoload.pth
  cp "$repository/chatreid_plugin/autoload/chatreid_autoload.pth" "$site/" || return
  # LLaMA-Factory takes torchrun from PATH; the one of $python would start that interpreter.
  printf '#!/bin/sh\nexec "%s" -m torch.distributed.run "$@"\n' "$work/env/bin/python" >"$work/env/bin/torchrun"
  chmod +x "$work/env/bin/torchrun"
  python=$work/env/bin/python
  export PATH=$work/env/bin:$PATH
}

# run_stage NUMBER NAME SCRIPT ARGUMENT...: the table into NUMBER_NAME.md, the rest into log.txt, a row into summary.md.
run_stage() {
  local number=$1 name=$2 script=$3 state code start=$SECONDS
  shift 3
  case " ${STAGES:-1 2 3 4} " in *" $number "*) ;; *) return ;; esac
  echo "=== $number $name: $script $*" >>"$out/log.txt"
  (cd "$repository" && exec timeout --kill-after=5 "$limit" "$python" "$bench/$script" "$@") \
    >"$out/${number}_$name.md" 2>>"$out/log.txt" &
  child=$!
  wait "$child"
  code=$?
  child=
  case $code in
    0) state=done ;;
    124 | 137) state="stopped after $limit s" ;;
    *) state="failed ($code)" ;;
  esac
  [ "$code" = 0 ] || failed=1
  echo "| $number | $name | $state | $((SECONDS - start)) |" | tee -a "$out/summary.md"
}

failed=0
rm -f "$out"/[1-4]_*.md
: >"$out/log.txt"
{
  echo "$(date -u +%F), $size on $device, commit $(git -C "$repository" rev-parse --short HEAD 2>/dev/null || echo unknown)"
  [ "$device" = cpu ] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  echo
  echo "| stage | | state | s |"
  echo "|---|---|---|---|"
} 2>>"$out/log.txt" | tee "$out/summary.md"
if [ -n "${WHEELS:-}" ]; then
  WHEELS=$(cd "$WHEELS" && pwd) && make_environment >>"$out/log.txt" 2>&1 || {
    echo "The environment of $WHEELS cannot be made; see $out/log.txt" | tee -a "$out/summary.md"
    exit 1
  }
fi

if [ "$size" = tiny ]; then
  scoring="--queries 2 --candidates 6 --naive-candidates 2"
  training="--steps 2 --warm-up 1" vision="--crops 2 --layers 1 --repeats 1" dtype=float32
else
  scoring="--queries 8 --candidates 100 --naive-candidates 10"
  training="--batch 4 8 16 --steps 6 --warm-up 3 --workers 4" vision="--crops 64 512 --layers 32 --repeats 5" dtype=bfloat16
fi
# shellcheck disable=SC2086  # options, to be split
{
  run_stage 1 scoring bench_scoring.py --size "$size" --device "$device" --dtype $dtype $scoring
  limit=${TRAINING_LIMIT:-$((6 * limit))} run_stage 2 training bench_training.py --size "$size" --device "$device" $training
  run_stage 3 vision bench_vision_tower.py --device "$device" --dtype $dtype $vision
  run_stage 4 launchers run_launchers.py --launcher torchrun --stage stage2
}
exit $failed
