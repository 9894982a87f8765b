"""What fine-tuning leaves behind: the encoder or what changed in it, its probe, predictions and tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.embeddings.encoder_bundle import EncoderBundle
from common.engines.finetuning import FineTuner
from common.handlers.probe_report import EvaluationReport
from common.networks.encoder import encoder_id, save_encoder
from common.networks.finetuned import merged_lora
from common.networks.hub import HUB
from common.networks.mil_probe import initial_probe, save_probe
from common.reports.paired_differences import MACRO, PREDICTIONS, paired_differences
from common.reports.results import ResultRow, read_predictions
from common.run.process import sha256_of

ADAPTER, ENCODER = "adapter.safetensors", "model.safetensors"


class FineTuneReport(EvaluationReport):
    """Write the best weights and their test results when a ``FineTuner`` has completed.

    ``adapter.safetensors`` holds what LoRA learned and names the weights it belongs to; ``model.safetensors``
    a whole encoder, of the other modes and where LoRA's base is random. Either is a file of encoder weights
    for every bundle. ``probe.safetensors`` and ``probe.json`` go with it, for ``predict``; predictions,
    tables and pictures are those of ``ProbeReport``.

    Rows in the results CSV are those of ``ProbeReport``, and, with ``frozen_probe``, four more of protocol
    ``<protocol>-frozen``: the paired differences from the probe on the frozen encoder.

    Args:
        encoder: bundle of the encoder that was tuned.
        mode: what of it learned, see :func:`common.networks.finetuned.let_learn`.
        lora: arguments of ``peft.LoraConfig``.
        pooler: name of the probe's pooler.
        protocol: name of the evaluation.
        dataset_name: name of the data.
        frozen_probe: folder of an evaluation of the frozen encoder on the same volumes, or None.
        num_resamples: bootstrap resamples of the paired difference.
        resampling: "patients" or "volumes".
        others: as :class:`EvaluationReport`.
    """

    def __init__(
        self,
        *,
        encoder: EncoderBundle,
        mode: str,
        lora: dict[str, Any],
        pooler: str,
        protocol: str,
        dataset_name: str,
        frozen_probe: str | Path | None,
        num_resamples: int,
        resampling: str,
        **others: Any,  # noqa: ANN401 (EvaluationReport's)
    ) -> None:
        super().__init__(**others)
        self.encoder, self.mode, self.lora, self.pooler = encoder, mode, lora, pooler
        self.protocol, self.dataset_name, self.frozen_probe = protocol, dataset_name, frozen_probe
        self.num_resamples, self.resampling = num_resamples, resampling

    def results(self, engine: FineTuner) -> list[ResultRow]:
        """Return the result rows."""
        predictions, encoder = engine.state.predictions, engine.encoder_name
        facts = {"dataset": self.dataset_name, "n": len(predictions.volumes)}
        rows = self.macro_rows(engine.state, encoder, protocol=self.protocol, **facts)
        if self.frozen_probe is not None:
            frozen = read_predictions(Path(self.frozen_probe) / PREDICTIONS)
            found = paired_differences(frozen, [predictions], self.num_resamples, self.resampling)
            numbers = {
                f"macro_{row['metric']}": (row["difference"], row["low"], row["high"])
                for row in found
                if row["class"] == MACRO
            }
            rows += self.rows(numbers, encoder=encoder, protocol=f"{self.protocol}-frozen", **facts)
        return rows

    def write(self, engine: FineTuner) -> None:
        """Write the files."""
        best, bags = engine.best, engine.cohorts["test"]
        learned = best.parameters
        of_probe = {k.removeprefix("probe."): v for k, v in learned.items() if k.startswith("probe.")}
        of_encoder = {k.removeprefix("encoder."): v for k, v in learned.items() if k.startswith("encoder.")}
        width = self.encoder["embed_dim"]
        probe = initial_probe(self.pooler, width, len(bags.class_names), self.seed)
        probe.load_state_dict(of_probe)
        report = engine.state.reports["probe"]
        card = {
            "pooler": self.pooler,
            "step": best.step,
            "seed": self.seed,
            "mode": self.mode,
            "validation_macro_auprc": best.auprc,
            "class_names": bags.class_names,
            "thresholds": best.thresholds.tolist(),
            "test": report["macro"],
            "test_intervals": engine.state.intervals["probe"]["macro"],
            "undefined_classes": report["undefined"],
            **self.encoder["embedding_identity"],
            "preprocessing": bags.strategy.name,
            "dim": width,
        }
        if of_encoder:
            path = self._write_encoder(of_encoder)
            parts = ("seed", "axes", "window", "layer_scale_init")
            card |= {"encoder_id": encoder_id(sha256_of(path), *(self.encoder[p] for p in parts))}
            card |= {"weights": str(path.absolute())}
        save_probe(self.output_dir, probe, card)
        title = f"{engine.encoder_name}, {self.mode}: {len(bags)} test volumes, step {best.step}"
        self.write_evaluation(engine.state, title)

    def _write_encoder(self, learned: Mapping[str, torch.Tensor]) -> Path:
        """Write what of the encoder learned, as a file of encoder weights; returns its path."""
        facts = self.encoder["identity"] | {"finetuned": self.mode}
        weights, scale = self.encoder["weights"], self.lora["lora_alpha"] / self.lora["r"]
        if self.mode == "lora":
            learned = {name.replace(".default.", "."): tensor for name, tensor in learned.items()}
        if self.mode == "lora" and weights.path is not None:
            on_hub = {"file": self.encoder["weights_name"], "repo_type": self.encoder["weights_repo_type"]}
            name = weights.name if weights.name.startswith(HUB) else str(weights.path.absolute())
            adapter = on_hub | {"base": name, "base_sha256": weights.sha256, "scale": scale}
            save_encoder(learned, self.output_dir / ADAPTER, facts | {"adapter": adapter})
            return self.output_dir / ADAPTER
        # built anew: the one that was tuned may be spread over the ranks
        self.encoder.update({"seed": self.encoder["seed"]})
        whole = self.encoder.network.state_dict()
        if self.mode == "lora":
            whole = merged_lora(whole, learned, scale)
        else:
            whole |= learned
        save_encoder(whole, self.output_dir / ENCODER, facts)
        return self.output_dir / ENCODER
