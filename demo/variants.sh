#!/usr/bin/env bash
# DALE-CT-0, 1S and the pure-2D arm at demo scale, beside the 2S of `make demo`, on its SYNTHETIC shards; then one
# table: docs/results.md. Needs what `make demo` leaves in demo/out; a second run goes on where the first one stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
OUT=demo/out
export PYTHONPATH=. MLFLOW_TRACKING_URI=sqlite:///$OUT/mlflow.db MLFLOW_DISABLE_TELEMETRY=true
grep -q avx512_bf16 /proc/cpuinfo 2>/dev/null && AMP=bfloat16 || AMP=float32

[ -d "$OUT/shards" ] || { echo "demo/out/shards is not there: run 'make demo' first."; exit 1; }
"$PYTHON" -m data_prep ct-rate --root "$OUT/cohort" --split valid --out "$OUT/shards"

train() { # name, bundle, overlays
    local name=$1 bundle=$2 overlays=$3
    "$PYTHON" -m monai.bundle run --bundle_root "bundles/$bundle" --run_name "$name" --amp_dtype $AMP \
        --config_file "['bundles/$bundle/configs/train.json','demo/train.json'$overlays]" --dataset_dir "$OUT/shards" \
        --output_dir "$OUT/variants/$name" --encoder_weights "$OUT/variants/$name/model.safetensors"
}
train dale_ct_0_single_slice dale_ct_0 ",'bundles/_overlays/single_slice.json'"
train dale_ct_0 dale_ct_0 ""
train dale_ct_1s dale_ct_1s ""

encoders=()
for name in dale_ct_0_single_slice dale_ct_0 dale_ct_1s; do
    encoders+=(--encoder "$name=$OUT/variants/$name/model.safetensors")
done
encoders+=(--encoder "dale_ct_2s=$OUT/dale_ct_2s/model.safetensors")
"$PYTHON" demo/compare_variants.py --shards "$OUT/shards" --split valid --out "$OUT/variants/comparison.csv" "${encoders[@]}"
"$PYTHON" demo/draw_curves.py --tracking-uri "$MLFLOW_TRACKING_URI" --out "$OUT/variants/curves.png" \
    --run dale_ct_0_single_slice --run dale_ct_0 --run dale_ct_1s --run dale_ct_2s
