"""Deliberate bugs that the tests must notice: ``python tests/mutants.py``, which takes its time.

Each row puts one bug into a copy of the repository and runs the tests that should fail. A bug that none of
them notices is a gap in the tests: close it there, never here. ``python tests/mutants.py sigreg slabs`` runs
the rows whose file's path holds one of the words.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
COPIED = ("common", "dale_ct", "data_prep", "study", "bundles", "tests", "pyproject.toml", "requirements.txt")
TWO_RANKS = "tests/distributed/test_two_ranks.py"
LATE_RANKS = "tests/distributed/test_late_ranks.py"
CHECKS = "tests/common/ct/test_checks.py"


class Mutant(NamedTuple):
    """One bug.

    Args:
        file: where, from the root of the repository.
        right: text that stands in the file once.
        wrong: what takes its place.
        test: file that must fail; by default the one that mirrors the module.
    """

    file: str
    right: str
    wrong: str
    test: str = ""


MUTANTS = (
    Mutant("common/ct/checks.py", "inside = levels > often[0] + PADDED_WIDTH_HU", "inside = levels > -INF"),
    Mutant(
        "common/ct/checks.py", "often[0] - PADDED_WIDTH_HU].sum() >", "often[0] - PADDED_WIDTH_HU].sum() < -"
    ),
    Mutant(
        "common/ct/checks.py", "lowest = np.where(is_padded, np.iinfo(np.int16).max, few)", "lowest = few"
    ),
    Mutant("common/ct/chest_rules.csv", "highest,not HU,,31743", "highest,not HU,,65535", CHECKS),
    Mutant("common/ct/chest_rules.csv", "lung_edges,refused,,0.3,", "lung_edges,refused,,1,", CHECKS),
    Mutant("common/ct/chest_rules.csv", "lung_ends,refused,,0.6,", "lung_ends,refused,,1,", CHECKS),
    Mutant("common/ct/chest_rules.csv", "shape,refused,0.95,", "shape,refused,0.4,", CHECKS),
    Mutant(
        "common/ct/anatomy.py", "within[-third:].mean() - within", "within[:third].mean() - within", CHECKS
    ),
    Mutant(
        "common/ct/anatomy.py",
        "columns.mean() - anatomy.spine[1]",
        "anatomy.spine[1] - columns.mean()",
        CHECKS,
    ),
    Mutant("common/ct/anatomy.py", "is_lung = np.asarray(~is_gas & (", "is_lung = np.asarray((", CHECKS),
    Mutant(
        "common/ct/anatomy.py",
        "part_of(box[2:], 1 / 3), part_of(box[2:], 2 / 3)",
        "0, body.shape[2] - 1",
    ),
    Mutant("common/ct/checks.py", "    check_hu(ct)\n", "", CHECKS),
    Mutant(
        "common/engines/chest_cts.py",
        "tokens[torch.from_numpy(has_image)",
        "tokens[torch.from_numpy(has_image | True)",
        "tests/common/engines/test_predict.py",
    ),
    Mutant("common/engines/overview.py", "int(other_slices[best])", "int(best) + 1"),
    Mutant("common/engines/overview.py", "int(at.min()) * n", "int(at.min()) * n + 1"),
    Mutant("data_prep/audit/volume.py", "if z % every_z == 0:", "if z % every_z == 0 and z:"),
    Mutant("common/embeddings/store.py", 'if header["crc32"] != _header_crc32(header)', "if False"),
    Mutant("common/embeddings/dense_labels.py", "for name in TENSORS:\n", "for name in TENSORS[1:]:\n"),
    Mutant("common/shards/index.py", "MemoryError, *DAMAGED_ZIP)", "MemoryError)"),
    Mutant("common/run/config.py", "if isinstance(node, dict) else []", "if node else []"),
    Mutant("common/run/process.py", "LOCK_EX | fcntl.LOCK_NB", "LOCK_SH | fcntl.LOCK_NB"),
    Mutant("common/run/process.py", "fcntl.lockf(file", "fcntl.flock(file"),
    Mutant("common/run/process.py", "if os.getpid() == owner:", "if True:"),
    Mutant("common/run/process.py", "    on_stop(lambda again: os._exit(128 + again))\n", ""),
    Mutant("common/handlers/checkpoint.py", "exit_status = 128 + asked", "exit_status = 128"),
    Mutant("common/handlers/tracking.py", "known.get(run_id, {})", "{}"),
    Mutant("common/handlers/tracking.py", "self.thread.join(seconds)", "self.thread.join()"),
    Mutant("common/handlers/tracking.py", 'self.client.delete_tag(known["run_id"], "error")', "pass"),
    Mutant("common/losses/lejepa.py", "weights = 2 * (2 * self", "weights = (2 * self"),
    Mutant("common/losses/lejepa.py", "weights[-1] /= 2", "weights[-1] /= 1"),
    Mutant("common/losses/lejepa.py", "value = num_samples * (weights", "value = (weights"),
    Mutant("common/losses/lejepa.py", "torch.stack([sine, -cosine], 1)", "torch.stack([sine, cosine], 1)"),
    Mutant("common/losses/lejepa.py", "slopes * sum_over_ranks(gradient)", "slopes * gradient", TWO_RANKS),
    Mutant("common/losses/lejepa.py", "views[:num_global].mean(0)", "views.mean(0)"),
    Mutant("common/losses/lejepa.py", '"invariance": 1 - sigreg_weight', '"invariance": 1'),
    Mutant("common/losses/lejepa.py", "square().mean((0, 2))", "square().sum(2).mean(0)"),
    Mutant("common/losses/auxiliary.py", ", pos_weight=pos_weight.to(dtype)\n", "\n"),
    Mutant("common/losses/auxiliary.py", '{"ts": has_ts, "rex": has_rex}', '{"ts": has_rex, "rex": has_ts}'),
    Mutant("common/losses/auxiliary.py", "torch.stack(groups).mean(0)", "torch.stack(groups).sum(0)"),
    Mutant("common/losses/dino.py", "self.centre.to(mean).lerp", "self.centre.lerp"),
    Mutant(
        "common/networks/mil_probe.py",
        "copy.deepcopy(self.trained_poolers[rate *",
        "copy.deepcopy(self.trained_poolers[0 *",
    ),
    Mutant(
        "common/networks/mil_probe.py",
        "if type(pooler) is LearnedQueryAttentionPool:",
        "if isinstance(pooler, LearnedQueryAttentionPool):",
    ),
    Mutant("common/networks/mil_probe.py", "*poolers.parameters()]", "]"),
    Mutant("common/networks/mil_probe.py", "copy.deepcopy(pooler) for _", "pooler for _"),
    Mutant(
        "common/networks/mil_probe.py",
        "copy.deepcopy(self.fixed_poolers[nth])",
        "build_pooler(self.names[index][0], self.dim)",
    ),
    Mutant("common/engines/probe_grid.py", ' == "fixed")]', ' != "fixed")]'),
    Mutant("common/networks/poolers.py", "self.gate(slices).sigmoid()", "self.gate(slices).tanh()"),
    Mutant(
        "common/networks/poolers.py", ", device=bags.device) + 0.5) / count", ", device=bags.device) + 0.5)"
    ),
    Mutant("common/networks/poolers.py", "src_key_padding_mask=~mask", "src_key_padding_mask=None"),
    Mutant(
        "common/networks/poolers.py",
        "    if mask.is_cuda:",
        "    if False:",
        "tests/common/networks/test_mil_probe.py",
    ),
    Mutant("common/embeddings/store.py", "name in found and found[name] != value:", "False:"),
    Mutant("common/networks/encoder.py", "if value is None and name not in stated:", "if False:"),
    Mutant("common/networks/encoder.py", "if value is not None} | dict(stated)", "if value is not None}"),
    Mutant("dale_ct/weights.py", "            stated |= stated_identity(path)\n", "            pass\n"),
    Mutant("dale_ct/weights.py", "math.isqrt(positions) * patch", "math.isqrt(positions)"),
    Mutant("dale_ct/weights.py", "releases.get(repository, {})", "[*releases.values(), {}][0]"),
    Mutant(
        "common/networks/encoder.py",
        "stated or (facts if release",
        "stated or (facts if True",
        "tests/common/networks/test_hub.py",
    ),
    Mutant(
        "common/networks/encoder.py",
        "stated or (facts if release else {})",
        "facts",
        "tests/common/networks/test_hub.py",
    ),
    Mutant(
        "common/networks/encoder.py",
        "is_release = repository == weights_repo",
        "is_release = True",
        "tests/common/networks/test_hub.py",
    ),
    Mutant(
        "common/networks/encoder.py",
        "and blob.name != digest",
        "and not digest",
        "tests/common/networks/test_hub.py",
    ),
    Mutant("common/networks/hub.py", "TELEMETRY = True", "TELEMETRY = False"),
    Mutant("common/networks/timm_keys.py", '["cls_token"] + result["pos_embed"][:, :1]', '["cls_token"]'),
    Mutant("dale_ct/weights.py", '"crop_pct": 1.0', '"crop_pct": 0.875'),
    Mutant("dale_ct/weights.py", '"interpolation": "bilinear"', '"interpolation": "bicubic"'),
    Mutant("dale_ct/onnx_export.py", '{**facts, "size_px": size_px}', '{"size_px": size_px}'),
    Mutant("common/losses/dino.py", "num_global * (num_views - 1)", "num_global * num_views"),
    Mutant("common/losses/dino.py", "with_itself - with_every", "-with_every"),
    Mutant("common/losses/dino.py", "mean, 1 - CENTRE_MOMENTUM", "mean, CENTRE_MOMENTUM"),
    Mutant("common/losses/dino.py", "1 / sum_over_ranks(rows @ scores)", "1 / (rows @ scores)", TWO_RANKS),
    Mutant("common/losses/dino.py", "sum_over_ranks(present @ logits)", "(present @ logits)", TWO_RANKS),
    Mutant("common/losses/dino.py", "-(weights * by_patch).sum()", "-by_patch.sum()"),
    Mutant("common/losses/dino.py", "fill_(-2)", "fill_(2)"),
    Mutant("common/losses/dino.py", ".mean(1).sum()", ".mean()"),
    Mutant("common/losses/visreg.py", ".to(samples) + 0.5)", ".to(samples) + 1e-3)"),
    Mutant("common/losses/visreg.py", "std.detach()", "std"),
    Mutant("common/run/distributed.py", "num_ranks() * included", "included", TWO_RANKS),
    Mutant("common/metrics/multilabel.py", 'positive[tied], "right")', 'positive[tied], "left")'),
    Mutant("common/metrics/multilabel.py", "score >= threshold[", "score > threshold["),
    Mutant("common/metrics/multilabel.py", "scores[::-1][values[::-1].argmax()]", "scores[values.argmax()]"),
    Mutant("common/metrics/multilabel.py", "array[defined].mean()", "np.nan_to_num(array).mean()"),
    Mutant("common/metrics/bootstrap.py", "(sums.tied @ weight) / 2", "(sums.tied @ weight)"),
    Mutant("common/metrics/bootstrap.py", "2 * (1 + smaller)", "2 * smaller"),
    Mutant("common/metrics/bootstrap.py", "if not is_merged:", "if is_merged:"),
    Mutant("common/metrics/bootstrap.py", "level[chosen], groups[chosen]", "level[chosen], level[chosen]"),
    Mutant("common/metrics/bootstrap.py", "[0.025, 0.975]", "[0.05, 0.95]"),
    Mutant("common/metrics/multilabel.py", ", weights=bins.counts", ""),
    Mutant("common/metrics/spread.py", "centred - centred.mean(0)", "centred"),
    Mutant("common/metrics/slice_paths.py", "prepend=0).min() / 2", "prepend=0).min()"),
    Mutant("common/metrics/spread.py", "ranks[1:] - expected", "ranks[:-1] - expected"),
    Mutant("common/metrics/slice_paths.py", "2 * np.arctan2", "np.arctan2"),
    Mutant("common/metrics/slice_paths.py", "tokens / lengths", "tokens"),
    Mutant("common/metrics/linear_readout.py", "penalty * scale", "penalty"),
    Mutant("common/metrics/neighbours.py", ", k * num_queries)", ", num_queries)"),
    Mutant("common/metrics/neighbours.py", "num_in_bank * num_queries", "num_in_bank"),
    Mutant(
        "common/metrics/organ_span.py", "(predicted[1] - 1, true[1] - 1)", "(predicted[1] - 1, true[1] - 2)"
    ),
    Mutant("common/metrics/paired_samples.py", "groups / (groups - 1) * ", ""),
    Mutant("common/metrics/spread.py", "(len(sums) - 1) * ((without", "((without"),
    Mutant("common/metrics/slice_paths.py", "near.sum(1).argmin()", "near.sum(1).argmax()"),
    Mutant("common/shards/slab_dataset.py", " + 0.5)", ")"),
    Mutant("common/shards/slab_dataset.py", "np.minimum(starts, max(num_slices - length, 0))", "starts"),
    Mutant("common/shards/slab_dataset.py", "(OTHER_POOL, place - before)", "(OTHER_POOL, place)"),
    Mutant("common/shards/slab_dataset.py", "[self.seed, VIEWS, place]", "[self.seed, VIEWS]"),
    Mutant("common/shards/slab_dataset.py", "[self.seed, pool, passes]", "[self.seed, pool]"),
    Mutant("common/shards/slab_dataset.py", "Fraction(str(rex_fraction))", "Fraction(rex_fraction)"),
    Mutant("common/shards/slab_dataset.py", "filled.cumsum() - 1", "filled.cumsum()"),
    Mutant("common/shards/slab_dataset.py", "(step * self.world_size + self.rank)", "(step + self.rank)"),
    Mutant("common/shards/slab_dataset.py", "count(self.start_step)", "count(0)"),
    Mutant(
        "common/networks/poolers.py",
        "    return _masked(bags, mask).sum(1) / mask.sum(1, keepdim=True)",
        "    return _masked(bags, mask).mean(1)",
    ),
    Mutant("common/networks/poolers.py", "fill=-math.inf).amax(1)", "fill=0.0).amax(1)"),
    Mutant("common/networks/poolers.py", " / math.sqrt(slices.shape[-1])", ""),
    Mutant("common/networks/poolers.py", "bags, mask).mean(1)", "bags, mask).sum(1)"),
    Mutant(
        "common/networks/poolers.py", "len(lengths) * longest), -math.inf)", "len(lengths) * longest), 0.0)"
    ),
    Mutant("common/engines/probe_grid.py", "losses.sum().backward()", "losses.mean().backward()"),
    Mutant("common/engines/probe_grid.py", " or step == self.num_steps:", ":"),
    Mutant(
        "common/engines/probe_grid.py",
        "self.best.thresholds.numpy()",
        "0 * self.best.thresholds.numpy() + 0.5",
    ),
    Mutant("common/engines/probe_grid.py", "start_step = self.state.iteration", "start_step = 0"),
    Mutant(
        "common/engines/probe_grid.py",
        "thresholds = f1_thresholds(val_scores, self.val_bags",
        "thresholds = f1_thresholds(val_scores * 0 + 0.5, self.val_bags",
    ),
    Mutant("common/engines/probe_grid.py", "auprc[index] <= self.auprc", "auprc[index] < self.auprc"),
    Mutant(
        "common/run/process.py",
        'os.environ.pop("SLURM_JOB_ID", None)',
        "pass",
        "tests/bundles/test_slurm_runs.py",
    ),
    Mutant("common/run/process.py", "items, item, group=_meeting", "items, item", LATE_RANKS),
    Mutant("common/engines/pretraining_trainer.py", "if math.isfinite(loss):", "if loss == loss:"),
    Mutant("common/engines/pretraining_trainer.py", "            self.stop_if_not_finite()\n", ""),
    Mutant("common/engines/pretraining_trainer.py", "step % self.log_every == 0", "step > 0"),
    Mutant("common/engines/pretraining_trainer.py", "weight * (name == term)", "weight"),
    Mutant("common/engines/pretraining_trainer.py", "            loss.eval()\n", "            pass\n"),
    Mutant("common/cohort/cohort.py", "np.log(np.asarray(pos_weight, np.float64)) + ", ""),
    Mutant("common/embeddings/store.py", "if (volume, name) not in self._checked:", "if False:"),
    Mutant("common/embeddings/bags.py", "if volume not in self._checked:", "if False:"),
    Mutant("common/embeddings/bags.py", "min(BAGS_PER_CHUNK, CHUNK_BYTES // largest)", "BAGS_PER_CHUNK"),
    Mutant("common/networks/mil_probe.py", ", output_size=sum(lengths)", ""),
    Mutant("common/shards/slab_dataset.py", "needed * ranks > free", "needed > free"),
)


def noticed(mutant: Mutant, copy: Path) -> bool:
    """Whether a test fails because of the bug; an error that keeps tests from running is none."""
    file = copy / mutant.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
    try:
        status = run_tests(mirrored(mutant), copy)
    finally:
        file.write_text(text, encoding="utf-8")
    if status not in (0, 1):
        raise SystemExit(f"the tests must run, got exit status {status} of pytest for {mutant}.")
    return status == 1


def mirrored(mutant: Mutant) -> str:
    file = Path(mutant.file)
    return mutant.test or str("tests" / file.with_name(f"test_{file.name}"))


def run_tests(test: str, copy: Path) -> int:
    """Exit status of pytest, stopped at the first failure."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "-p", "no:cacheprovider", test]
    # no bytecode: a bug of the same length, written within a second, would run as the file before it
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, check=False).returncode


def main(words: list[str]) -> None:
    """Run the rows whose path holds one of the words; exit with 1 if a bug went unnoticed."""
    chosen = [mutant for mutant in MUTANTS if any(word in mutant.file for word in words)]
    for mutant in chosen:
        times = (REPOSITORY / mutant.file).read_text(encoding="utf-8").count(mutant.right)
        if times != 1:
            raise SystemExit(f"'{mutant.right}' must stand once in {mutant.file}, got {times} times.")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = REPOSITORY / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        for test in dict.fromkeys(map(mirrored, chosen)):
            if run_tests(test, copy):
                raise SystemExit(f"{test} must pass before a bug is put in.")
        survivors = 0
        for mutant in chosen:
            verdict = "noticed" if noticed(mutant, copy) else "SURVIVED"
            survivors += verdict == "SURVIVED"
            sys.stdout.write(f"{verdict:9} {mutant.file}: {mutant.right.strip()} -> {mutant.wrong.strip()}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - survivors} of {len(chosen)} bugs noticed\n")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main(sys.argv[1:] or [""])
