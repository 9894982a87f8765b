#!/usr/bin/env bash
# The whole path on a synthetic cohort: phantom -> shards -> pretraining -> embeddings -> probes -> one table.
# Everything lands in demo/out; a second run goes on where the first one stopped. Start over with: rm -r demo/out
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
VOLUMES=${VOLUMES:-340}
OUT=demo/out
ENCODER=bundles/dale_ct_2s
PROBE=bundles/eval_ct_rate
export MLFLOW_TRACKING_URI=sqlite:///$OUT/mlflow.db MLFLOW_DISABLE_TELEMETRY=true
# bfloat16 is three times as fast where the processor multiplies it, and slow where it does not
grep -q avx512_bf16 /proc/cpuinfo 2>/dev/null && AMP=bfloat16 || AMP=float32
mkdir -p "$OUT"

step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }
run() { printf '$ '; printf '%q ' "${@/#$PYTHON/python}"; printf '\n'; "$@"; }
started=$SECONDS

step "1. A synthetic chest-CT cohort in CT-RATE's layout, with labels and masks"
run "$PYTHON" -m data_prep phantom --volumes "$VOLUMES" --out "$OUT/cohort" --seed 1 --matrix 192 \
    --spacing-mm 4 6 --valid-share 0.35 --rex-share 1

step "2. WebDataset shards: HU slices, organ masks, findings"
run "$PYTHON" -m data_prep ct-rate --root "$OUT/cohort" --split train --out "$OUT/shards" \
    --rexgroundingct "$OUT/cohort/rexgroundingct/dataset.json" --rexgroundingct-masks "$OUT/cohort/rexgroundingct/segmentations"

step "3. Pretrain DALE-CT-2S at demo scale (demo/train.json makes the paper's recipe small)"
run "$PYTHON" -m monai.bundle run --config_file "['$ENCODER/configs/train.json','demo/train.json']" --bundle_root $ENCODER \
    --dataset_dir "$OUT/shards" --output_dir "$OUT/dale_ct_2s" --encoder_weights "$OUT/dale_ct_2s/model.safetensors" \
    --amp_dtype $AMP

step "4. Embed every slice of every volume: with the trained encoder, and with what it must beat"
for split in train valid; do
    embed() { # name, weights, config
        run "$PYTHON" -m monai.bundle run --config_file "['$ENCODER/configs/inference.json','$3']" --bundle_root $ENCODER \
            --dataset_dir "$OUT/cohort/dataset/${split}_fixed" --split $split --amp_dtype $AMP --num_workers 1 --name "$1" \
            --encoder_weights "$2" --output_dir "$OUT/embeddings/$1/$split"
    }
    embed random_weights '$None' demo/inference.json
    embed intensity_histogram '$None' bundles/_overlays/floors/intensity_histogram.json
    embed pixels '$None' bundles/_overlays/floors/pixels.json
    embed dale_ct_2s "$OUT/dale_ct_2s/model.safetensors" demo/inference.json
    # the ceiling: true areas of what was drawn for each label
    run "$PYTHON" -m data_prep lesion-areas --root "$OUT/cohort" --split $split --out "$OUT/embeddings/lesion_areas/$split"
done

step "5. Twenty probes each, the best by validation AUPRC, tested once: as in the paper, and on standardized tokens"
for standardize in False True; do
    for encoder in random_weights intensity_histogram pixels dale_ct_2s lesion_areas; do
        run "$PYTHON" -m monai.bundle run --config_file "['$PROBE/configs/train.json','demo/eval.json']" --bundle_root $PROBE \
            --embeddings_dir "$OUT/embeddings/$encoder" --labels_dir "$OUT/cohort/dataset/multi_abnormality_labels" \
            --standardize $standardize --num_seeds 1 --results_csv "$OUT/results/eval_ct_rate.csv" \
            --output_dir "$OUT/eval_ct_rate/$encoder$([ $standardize = False ] || echo _standardized)"
    done
done

step "Table III at demo scale, on held-out SYNTHETIC volumes"
"$PYTHON" -m dale_ct.cli show results "$OUT/results/eval_ct_rate.csv"
echo "Differences from the histogram of grey values, all standardized:"
for encoder in intensity_histogram random_weights pixels dale_ct_2s; do
    echo "$OUT/eval_ct_rate/${encoder}_standardized/test_predictions.csv"
done | xargs "$PYTHON" -m dale_ct.cli compare
printf '\n%d min %02d s. To look further:\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60))
cat <<TEXT
  .venv/bin/mlflow ui --backend-store-uri sqlite:///$OUT/mlflow.db     every run, its knobs, curves and files
  $OUT/dale_ct_2s/views.png                                  what the encoder trained on
  $OUT/eval_ct_rate/dale_ct_2s_standardized/                 the chosen probe, its thresholds, scores by class
  README.md, "Reproduce"                                          the same commands on CT-RATE
TEXT
