#!/usr/bin/env bash
# Table I, Table V and Figure 2 at demo scale, on the SYNTHETIC validation split of `make demo`, and pictures of real CT
# where DALE_CT_TEST_DATA has some. Needs what `make demo` leaves in demo/out; a second run goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
SOURCE=${SOURCE:-demo/out}
OUT=${OUT:-demo/out}
DATA=${DALE_CT_TEST_DATA:-../shared/data}
ENCODER=bundles/dale_ct_2s
COHORT=$SOURCE/cohort
export PYTHONPATH=. MLFLOW_TRACKING_URI=sqlite:///$OUT/mlflow.db MLFLOW_DISABLE_TELEMETRY=true
grep -q avx512_bf16 /proc/cpuinfo 2>/dev/null && AMP=bfloat16 || AMP=float32

[ -d "$COHORT" ] || { echo "$COHORT is not there: run 'make demo' first."; exit 1; }
mkdir -p "$OUT/dense"
run() { printf '$ '; printf '%q ' "${@/#$PYTHON/python}"; printf '\n'; "$@"; }

# what every patch shows, through the crop of its image: 96 / 16 = 6 patches along a side
run "$PYTHON" -m data_prep dense-labels --root "$COHORT" --rexgroundingct "$COHORT/rexgroundingct/dataset.json" \
    --rexgroundingct-masks "$COHORT/rexgroundingct/segmentations" --grid 6 --out "$OUT/dense/labels"
printf 'VolumeName\n' > "$OUT/dense/labelled.csv"
find "$OUT/dense/labels" -name '*.safetensors' -printf '%f\n' | sort | sed 's/\.safetensors$//' >> "$OUT/dense/labelled.csv"

for name in dale_ct_2s random_weights; do
    [ "$name" = dale_ct_2s ] && weights="$SOURCE/dale_ct_2s/model.safetensors" || weights='$None'
    run "$PYTHON" -m monai.bundle run --config_file "['$ENCODER/configs/inference.json','demo/inference.json']" \
        --bundle_root $ENCODER --dataset_dir "$COHORT/dataset/valid_fixed" --subset_csv "$OUT/dense/labelled.csv" \
        --name $name --encoder_weights "$weights" --amp_dtype $AMP --embedding_dtype float16 --patch_tokens True \
        --output_dir "$OUT/dense/embeddings/$name"
    run "$PYTHON" -m monai.bundle run --config_file bundles/eval_dense_2d/configs/train.json \
        --bundle_root bundles/eval_dense_2d --embeddings_dir "$OUT/dense/embeddings/$name" \
        --labels_dir "$OUT/dense/labels" --output_dir "$OUT/dense/eval_dense_2d/$name" \
        --results_csv "$OUT/results/eval_dense_2d.csv" --learning_rates "[3.0, 1.0, 0.3, 0.1]" --max_steps 3000 \
        --val_interval 1000 --checkpoint_every 1000
done
"$PYTHON" -m common.handlers.results_table "$OUT/results/eval_dense_2d.csv"

run "$PYTHON" -m monai.bundle run --config_file bundles/eval_slab_depth/configs/evaluate.json \
    --bundle_root bundles/eval_slab_depth --slab_embeddings_dir "$OUT/dense/embeddings/dale_ct_2s" \
    --flat_embeddings_dir "$OUT/dense/embeddings/random_weights" --dense_labels_dir "$OUT/dense/labels" \
    --classification_csv "$SOURCE/results/eval_ct_rate.csv" \
    --probe_dirs "['$SOURCE/eval_ct_rate/dale_ct_2s','$SOURCE/eval_ct_rate/random_weights']" \
    --labels_csv "$COHORT/dataset/multi_abnormality_labels/valid_predicted_labels.csv" \
    --output_dir "$OUT/dense/eval_slab_depth" --results_csv "$OUT/results/eval_slab_depth.csv"

PICTURES=$OUT/dense/pictures
mkdir -p "$PICTURES"
like_trained=(--bundle $ENCODER --weights "$SOURCE/dale_ct_2s/model.safetensors" --overrides demo/inference.json --size-px 96)
finer=("${like_trained[@]:0:6}" --size-px 256)
volume=$(sed -n 2p "$OUT/dense/labelled.csv")
ct=$(find "$COHORT/dataset/valid_fixed" -name "$volume.nii.gz")
map=$(find "$COHORT/dataset/ts_seg/ts_total/valid_fixed" -name "$volume.nii.gz")
run "$PYTHON" -m data_prep dense-overlay "$ct" "$map" --out "$PICTURES/overlay_synthetic.png"
run "$PYTHON" -m common.visualize.probe_maps "$ct" "${like_trained[@]}" --probes "$OUT/dense/eval_dense_2d/dale_ct_2s" \
    --name liver --name heart --name lung_upper_lobe_left --out "$PICTURES/probe_maps_synthetic.png"

if [ -d "$DATA" ]; then
    lidc=$DATA/lidc_idri_0314_ct_1p56x1p56x2mm.nii.gz
    run "$PYTHON" -m data_prep dense-overlay "$DATA/totalseg_dicom_ct_native.nii.gz" \
        "$DATA/totalseg_dicom_seg117_native.nii.gz" --out "$PICTURES/overlay_real.png"
    run "$PYTHON" -m common.visualize.probe_maps "$lidc" "${like_trained[@]}" --name liver --name heart \
        --name lung_upper_lobe_left --probes "$OUT/dense/eval_dense_2d/dale_ct_2s" --out "$PICTURES/probe_maps_real.png"
    run "$PYTHON" -m common.visualize.pca_patches "$lidc" "${finer[@]}" --out "$PICTURES/pca_patches_real.png"
    run "$PYTHON" -m common.visualize.similar_patches "$lidc" "${finer[@]}" --out "$PICTURES/similar_patches_real.png"
    run "$PYTHON" -m common.visualize.same_level "$lidc" "$DATA/totalseg_example_ct_3mm.nii.gz" \
        "$DATA/crlm_ct_1004_ct_1p59x1p59x5mm.nii.gz" "${like_trained[@]}" --out "$PICTURES/same_level_real.png"
    run "$PYTHON" -m common.visualize.z_positions "$lidc" "$DATA/lidc_idri_0314_ct_native_slices130_162.nii.gz" \
        "$DATA/crlm_ct_1004_ct_1p59x1p59x5mm.nii.gz" "$DATA/totalseg_example_ct_3mm.nii.gz" "${like_trained[@]}" \
        --out "$PICTURES/z_positions_real.png"
fi
