#!/usr/bin/env bash
# The DINOv2 baseline at demo scale on the SYNTHETIC shards of `make demo`, and its row beside those encoders that
# `make demo` and variants.sh have trained. Needs what `make demo` leaves in demo/out; a second run goes on where the
# first one stopped. OUT names another folder for what it makes.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
DEMO=${DEMO:-demo/out}
OUT=${OUT:-$DEMO}
export PYTHONPATH=. MLFLOW_TRACKING_URI=sqlite:///$OUT/mlflow.db MLFLOW_DISABLE_TELEMETRY=true
grep -q avx512_bf16 /proc/cpuinfo 2>/dev/null && AMP=bfloat16 || AMP=float32

[ -d "$DEMO/shards" ] || { echo "$DEMO/shards is not there: run 'make demo' first."; exit 1; }
mkdir -p "$OUT"
"$PYTHON" -m data_prep ct-rate --root "$DEMO/cohort" --split valid --out "$OUT/shards"
"$PYTHON" -m monai.bundle run --bundle_root bundles/dinov2_ct --run_name dinov2_ct --amp_dtype $AMP \
    --config_file "['bundles/dinov2_ct/configs/train.json','demo/train_dinov2.json']" --dataset_dir "$DEMO/shards" \
    --output_dir "$OUT/variants/dinov2_ct" --encoder_weights "$OUT/variants/dinov2_ct/model.safetensors"

encoders=(--encoder "dinov2_ct=$OUT/variants/dinov2_ct/model.safetensors")
for weights in "$DEMO"/variants/dale_ct_*/model.safetensors "$DEMO/dale_ct_2s/model.safetensors"; do
    [ -f "$weights" ] && encoders+=(--encoder "$(basename "$(dirname "$weights")")=$weights")
done
"$PYTHON" demo/compare_variants.py --shards "$OUT/shards" --split valid --out "$OUT/variants/dinov2.csv" "${encoders[@]}"
