#!/usr/bin/env bash
# Tables IV and VI at demo scale, on SYNTHETIC CT: the probes of `make demo` (site A) on a second phantom site, frozen
# and trained anew; slices turned on purpose; seven preprocessing strategies; neighbours, sequence heads, few labels.
# Needs what `make demo` leaves in demo/out; a second run goes on where the first one stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
DEMO=${DEMO:-demo/out}
OUT=${OUT:-$DEMO/external}
ENCODER=bundles/dale_ct_2s
LABELS=$DEMO/cohort/dataset/multi_abnormality_labels
CONFIG="['$ENCODER/configs/inference.json','demo/inference.json']"
export PYTHONPATH=. MLFLOW_TRACKING_URI=${MLFLOW_TRACKING_URI:-sqlite:///$DEMO/mlflow.db} MLFLOW_DISABLE_TELEMETRY=true
grep -q avx512_bf16 /proc/cpuinfo 2>/dev/null && AMP=bfloat16 || AMP=float32

[ -d "$DEMO/eval_ct_rate/dale_ct_2s" ] || { echo "$DEMO/eval_ct_rate is not there: run 'make demo' first."; exit 1; }
step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }
started=$SECONDS

embed() { # volumes, folder of the store, encoder, further knobs
    local weights="$DEMO/dale_ct_2s/model.safetensors"
    [ "$3" = random_weights ] && weights='$None'
    "$PYTHON" -m monai.bundle run --config_file "$CONFIG" --bundle_root $ENCODER --dataset_dir "$1" --output_dir "$2" \
        --name "$3" --encoder_weights "$weights" --amp_dtype $AMP "${@:4}"
}

step "1. Site B: other scanners, in RAD-ChestCT's layout; its tst turned on purpose"
"$PYTHON" -m data_prep phantom --volumes 140 --out "$OUT/site_b" --site b --seed 2 --matrix 192 --spacing-mm 4 6 \
    --valid-share 0.35 --rex-share 0 --npz-spacing-mm 2.5
"$PYTHON" -m data_prep rad-labels --root "$OUT/site_b/rad_chestct" --out "$OUT/rad_chestct_labels.csv"
"$PYTHON" -m data_prep turned --root "$OUT/site_b/rad_chestct" --npz-spacing-mm 2.5 --turn right --out "$OUT/ct/right"
for turn in transposed flipped sagittal; do
    "$PYTHON" -m data_prep turned --root "$OUT/site_b/rad_chestct" --npz-spacing-mm 2.5 --prefix tst --turn $turn \
        --out "$OUT/ct/$turn"
done

step "2. Table IV: frozen, retrained and turned"
for encoder in random_weights dale_ct_2s; do
    for turn in right transposed flipped sagittal; do
        embed "$OUT/ct/$turn" "$OUT/embeddings/$encoder/$turn" $encoder
    done
    "$PYTHON" -m monai.bundle run --config_file "['bundles/eval_rad_chestct/configs/train.json','demo/eval.json']" \
        --bundle_root bundles/eval_rad_chestct --max_steps 600 --val_interval 100 --labels_dir "$OUT" \
        --train_embeddings_dir "$OUT/embeddings/$encoder/right" \
        --output_dir "$OUT/eval_rad_chestct/$encoder" --results_csv "$OUT/results/eval_rad_chestct.csv" --ct_dir '$None'
    "$PYTHON" -m monai.bundle run --config_file bundles/eval_rad_chestct/configs/evaluate.json \
        --bundle_root bundles/eval_rad_chestct --labels_csv "$OUT/rad_chestct_labels.csv" \
        --test_embeddings_dir "$OUT/embeddings/$encoder/right" \
        --transposed_embeddings_dir "$OUT/embeddings/$encoder/transposed" \
        --flipped_embeddings_dir "$OUT/embeddings/$encoder/flipped" \
        --sagittal_embeddings_dir "$OUT/embeddings/$encoder/sagittal" \
        --frozen_probe "$DEMO/eval_ct_rate/$encoder" --retrained_probe "$OUT/eval_rad_chestct/$encoder" \
        --results_csv "$OUT/results/eval_rad_chestct.csv"
done

step "3. Table VI: seven strategies (at 48 and 96 px) on a subset of site A, and what each costs"
STRATEGIES="raw_48 cropped_48 raw_96 cropped_96 raw_full cropped_full tiled_5cut"
for split in train valid; do
    patients=$([ $split = train ] && echo 40 || echo 30)
    "$PYTHON" -m data_prep subset --labels "$LABELS/${split}_predicted_labels.csv" --patients $patients \
        --out "$OUT/subset_$split.csv"
    embed "$DEMO/cohort/dataset/${split}_fixed" "$OUT/strategies/$split" dale_ct_2s --subset_csv "$OUT/subset_$split.csv" \
        --strategies "[$(printf "'%s'," $STRATEGIES)]"
done
"$PYTHON" -m common.engines.each_preprocessing $(printf -- '--strategy %s ' $STRATEGIES) \
    --train-embeddings-dir "$OUT/strategies/train/{}" --test-embeddings-dir "$OUT/strategies/valid/{}" \
    --results-csv "$OUT/results/eval_preprocessing.csv" \
    --config_file "['bundles/eval_preprocessing/configs/train.json','demo/eval.json']" \
    --train_labels_csv "$OUT/subset_train.csv" --test_labels_csv "$OUT/subset_valid.csv" --num_val_patients 12 \
    --max_steps 600 --val_interval 100 --num_seeds 1 --ct_dir '$None' --output_dir "\$'$OUT/eval_preprocessing/' + @train::dataset.identity['preprocessing']"
"$PYTHON" -m common.engines.embedding_cost $(printf -- '--strategy %s ' $STRATEGIES) --volumes 6 \
    --config-file $ENCODER/configs/inference.json --config-file demo/inference.json \
    --dataset-dir "$DEMO/cohort/dataset/valid_fixed" --results-csv "$OUT/results/eval_preprocessing.csv" \
    --encoder_weights "$DEMO/dale_ct_2s/model.safetensors" --amp_dtype $AMP

step "4. Beside Table III: neighbours, heads that see the sequence, a tenth of the labels"
"$PYTHON" -m common.engines.neighbour_probe --num-val-patients 40 --results-csv "$OUT/results/further.csv" \
    --train-embeddings "$DEMO/embeddings/dale_ct_2s/train" --train-labels "$LABELS/train_predicted_labels.csv" \
    --test-embeddings "$DEMO/embeddings/dale_ct_2s/valid" --test-labels "$LABELS/valid_predicted_labels.csv"
for overlay in gated_abmil transformer low_shot_10; do
    "$PYTHON" -m monai.bundle run --bundle_root bundles/eval_ct_rate --max_steps 400 --val_interval 50 --num_seeds 1 \
        --config_file "['bundles/eval_ct_rate/configs/train.json','demo/eval.json','bundles/_overlays/probe/$overlay.json']" \
        --embeddings_dir "$DEMO/embeddings/dale_ct_2s" --labels_dir "$LABELS" --ct_dir '$None' \
        --output_dir "$OUT/further/$overlay" --results_csv "$OUT/results/further.csv"
done

step "Tables at demo scale, on SYNTHETIC volumes"
"$PYTHON" docs/render_results.py "$DEMO"/results/eval_ct_rate.csv "$OUT"/results/*.csv | tee "$OUT/tables.md"
printf '\n%d min %02d s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60))
