#!/usr/bin/env bash
# Everything on a CUDA card in one call of at most eight minutes, from a bare clone:
#
#     bash benchmarks/gpu.sh [V1_PATH] [OUT_DIR]
#
# V1_PATH is a clone of ActionFormer's official code ("" for none); JSON files, plots and what each step printed land in
# OUT_DIR (outputs/gpu). A step that fails or takes too long says so, and the rest goes on. The environment may change
# DEVICE (cuda), LENGTH (2048: that of the backbone; the others follow), BUDGET (470 seconds in all), PYTHON (python3) and
# OPTIONS (more options of the commands, such as "--n-in 16 --n-embd 32" for a trial). With SBHAR, the folder of that data set,
# loss curves in float32, bfloat16 and float16 come last.
set -u
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
V1=${1:-}
OUT=${2:-outputs/gpu}
DEVICE=${DEVICE:-cuda}
LENGTH=${LENGTH:-2048}
BUDGET=${BUDGET:-470}
PYTHON=${PYTHON:-python3}
read -r -a MORE <<<"${OPTIONS:-}"
mkdir -p "$OUT" || exit 1
[ -z "$V1" ] || V1=$(cd "$V1" && pwd) || exit 1
OUT=$(cd "$OUT" && pwd)
cd "$ROOT" || exit 1
export PYTHONPATH="$ROOT:$ROOT/benchmarks${PYTHONPATH:+:$PYTHONPATH}"

THUMOS=$((LENGTH * 9 / 8)) # 2304, the length of THUMOS14's training
V2=thumos14_v2:thumos14,use_rope=true,use_swiglu=true,use_rms_norm=true,mask_conv_inputs=true
FAILED=()

# step NAME SECONDS COMMAND...: what it prints goes to OUT_DIR/NAME.txt too.
step() {
    local name=$1 limit=$2 left=$((BUDGET - SECONDS))
    shift 2
    echo
    echo "== $name (${SECONDS} s so far)"
    if [ "$left" -lt 10 ]; then
        echo "-- $name: left out, the $BUDGET s are over"
        FAILED+=("$name")
        return
    fi
    timeout --kill-after=20 "$((left < limit ? left : limit))" "$@" 2>&1 | tee "$OUT/$name.txt"
    local status=${PIPESTATUS[0]}
    if [ "$status" -ne 0 ]; then
        echo "-- $name: failed with exit status $status$([ "$status" -eq 124 ] && echo " (took too long)")"
        FAILED+=("$name")
    fi
}

# bench NAME SECONDS SCRIPT OPTIONS...: with v1, if there is one.
bench() {
    local name=$1 limit=$2 script=$3
    shift 3
    local files=(--json "$OUT/$name.json")
    [ "$script" != longest_input ] && "$PYTHON" -c "import matplotlib" 2>/dev/null && files+=(--plot "$OUT/$name.png")
    step "$name" "$limit" "$PYTHON" "benchmarks/$script.py" --device "$DEVICE" ${V1:+--v1 "$V1"} "${files[@]}" "$@" \
        "${MORE[@]}"
}

# The first rows that a reader looks for come first; compiling takes longest.
bench latency 60 latency --length "$LENGTH" --variants balanced v1_compatible MQA:balanced,n_kv_head=1 GQA:balanced,n_kv_head=2 \
    --dtype float32 bfloat16 --backends sdpa eager --v1-dtype float32 bfloat16
bench latency_no_tf32 40 latency --length "$LENGTH" --variants v1_compatible balanced --tf32 off
bench detector 60 latency --model detector --batch 1 --length "$THUMOS" --variants thumos14 "$V2" \
    --dtype float32 bfloat16 --backends sdpa eager
bench training_step 60 training_step --length "$THUMOS" --variants thumos14 "$V2" --dtype float32 bfloat16 autocast
bench latency_compiled 120 latency --length "$LENGTH" --variants balanced --dtype bfloat16 \
    --compile off default reduce-overhead
step cuda_tests 60 "$PYTHON" -c "import harness, pytest, sys; sys.exit(pytest.main(sys.argv[1:]))" \
    tests -m cuda -q -p no:cacheprovider
step queries 30 "$PYTHON" benchmarks/queries.py --device "$DEVICE" --length "$THUMOS" --json "$OUT/queries.json"
bench scaling 120 scaling --dtype bfloat16 --windows 19 0 --repeats 3 \
    --lengths "$LENGTH" "$((8 * LENGTH))" "$((128 * LENGTH))" \
    --global-max-length "$((8 * LENGTH))" --v1-max-length "$((8 * LENGTH))"
bench longest_input 60 longest_input --variants v1_compatible balanced --memory-gb 4 --global-max-length 131072 \
    --max-length 262144
bench detector_compiled 90 latency --model detector --batch 1 --length "$THUMOS" --variants "$V2" --dtype bfloat16 \
    --compile off reduce-overhead
bench backends 60 latency --length "$LENGTH" --variants balanced --dtype bfloat16 \
    --backends sdpa flash_attention_2 flex_attention
[ -z "${SBHAR:-}" ] || step precision 120 "$PYTHON" benchmarks/precision.py "$SBHAR" --output "$OUT/precision" \
    --json "$OUT/precision.json" --num_train_epochs 10

echo
echo "All done in ${SECONDS} s: $OUT"
if [ "${#FAILED[@]}" -ne 0 ]; then
    echo "Failed or left out: ${FAILED[*]}"
    exit 1
fi
