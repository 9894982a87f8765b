"""Train a model to write reports from embeddings, and measure what the reports owe to the embeddings."""

# N volumes, S tokens of a bag, D embedding, C classes, R resamples

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.embeddings.bags import BagReader, EmbeddingBags, ShuffledBatches, check_cohorts
from common.embeddings.store import EmbeddingStore
from common.engines.probe_grid import ProbeTrainer
from common.metrics.bootstrap import RESAMPLING_SEED, groups_of, resample_weights
from common.networks.pretraining_model import clip_by_global_norm
from common.reports.results import Numbers
from common.run.distributed import sum_over_ranks
from common.run.process import gather_objects, rank_and_ranks
from common.writing.labels import report_labels
from common.writing.model import Generated, ReportModel
from common.writing.scores import (
    decision_samples,
    macro_differences,
    macro_numbers,
    share_owed,
    text_scores,
)

logger = logging.getLogger(__name__)

REAL, CONSTANT, ALL = "real", "constant_report", "all_classes"
CONTROLS = ("shuffled", "zero", "mean")


class BestWeights:
    """Keeps what learned at the step with the lowest validation loss; ties keep the earlier."""

    def __init__(self) -> None:
        self.loss, self.step = math.inf, -1
        self.parameters: dict[str, torch.Tensor] = {}

    def offer(self, loss: float, step: int, learned: nn.ParameterDict) -> None:
        """Keep a copy of the weights if the loss is the lowest so far."""
        if loss < self.loss:
            self.loss, self.step = loss, step
            self.parameters = {name: weight.detach().cpu().clone() for name, weight in learned.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain numbers only."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        vars(self).update(state)


class ReportTrainer(ProbeTrainer):
    """Train on batches of volumes and their reports; the loss is the mean over all words of a batch.

    Ranks share a batch, validation and writing; but for dropout, each step is that of one process.

    Every ``val_interval`` steps and after the last, the loss is measured on validation; the weights of the
    lowest are kept, and write the reports of the test set when training has ended: from the embeddings
    ("real"), and in place of them from those of another patient ("shuffled"), zeros ("zero"), and the mean
    training token ("mean"). Beside them stand two floors: the training report that would serve best for all
    ("constant_report": by macro F1 on validation), and stating all 18 classes ("all_classes").

    After the test ``engine.state.written`` holds what was written by condition, ``samples`` F1, precision and
    recall by class and resample, ``reports`` the numbers of each condition and floor, ``differences`` those
    of "real" less each of the others, and ``labels`` those of the radiologists' reports, ``(N, C)``.

    Source: controls: our choice. Ker-VLJEPA-3B (arXiv:2603.23308) states what its reports owe to the image.

    Args:
        train_data_loader: ``ShuffledBatches`` of places in the training cohort.
        cohorts: embeddings by "train", "validation" and "test"; their labels are not used.
        reports: volume to text, of all cohorts.
        network: a ``ReportModel``, of :func:`common.networks.pretraining_model.distribute` on several ranks.
        learned: what of it learns.
        best: the choice so far; saved in checkpoints.
        clip_norm: largest global norm of the gradient.
        seed: of dropout and of the shuffled patients.
        max_words: longest report in words of the model.
        eval_batch_size: volumes that are validated and written about at once.
        controls: which of ``CONTROLS`` to measure.
        labeller: see :func:`common.writing.labels.report_labels`.
        num_resamples: bootstrap resamples of the test set.
        resampling: "patients" or "volumes": what a resample draws.
        others: as :class:`ProbeTrainer`.

    Raises:
        ValueError: if cohorts differ in the origin of their embeddings or share a patient, zones are asked of
            tokens that do not lie along z, a control is unknown, or one patient has more than half of the
            test set.
        FloatingPointError: in training, if a loss is not finite.
    """

    def __init__(
        self,
        *,
        train_data_loader: ShuffledBatches,
        cohorts: Mapping[str, EmbeddingBags],
        reports: Mapping[str, str],
        network: nn.Module,
        learned: nn.ParameterDict,
        best: BestWeights,
        clip_norm: float,
        seed: int,
        max_words: int,
        eval_batch_size: int,
        controls: Sequence[str],
        labeller: str,
        num_resamples: int,
        resampling: str,
        **others: Any,  # noqa: ANN401 (the trainer's)
    ) -> None:
        check_cohorts(cohorts, resampling)
        if unknown := [name for name in controls if name not in CONTROLS]:
            raise ValueError(f"controls must be among {CONTROLS}, got {unknown}.")
        self.cohorts, self.best, self.learned, self.seed = dict(cohorts), best, learned, seed
        whole = network.module if isinstance(network, DistributedDataParallel) else network
        self.model = cast(ReportModel, whole)
        if self.model.bridge.kind == "zones":
            check_tokens_lie_along_z(cohorts["train"])
        self.texts = {name: [reports[volume] for volume in bags.volumes] for name, bags in cohorts.items()}
        self.words = {name: [self.model.words(text) for text in texts] for name, texts in self.texts.items()}
        self.max_words, self.eval_batch_size = max_words, eval_batch_size
        self.controls, self.labeller = list(controls), labeller
        groups = groups_of(cohorts["test"].volumes, resampling)
        self.weights = resample_weights(groups, num_resamples, RESAMPLING_SEED)
        self.partners = other_patients(groups, seed) if "shuffled" in controls else []
        self.readers: dict[str, BagReader] = {}
        super().__init__(
            train_data_loader=train_data_loader,
            sampler=train_data_loader,
            network=network,
            loss_function=network,  # the model knows its loss
            **others,
        )

        def clip(*_: object) -> None:
            clip_by_global_norm(network, clip_norm)

        self.optimizer.register_step_pre_hook(clip)

    def prepare(self) -> None:
        """Put the embeddings where they are used; finds any damaged bag."""
        self.readers = {name: BagReader(bags, self.state.device) for name, bags in self.cohorts.items()}

    def losses(self, batch: list[int]) -> torch.Tensor:
        """Return the mean loss over the words of a batch, its places in the training cohort."""
        rank, ranks = rank_and_ranks()
        seeds = np.random.SeedSequence([self.seed, self.state.iteration, rank]).generate_state(1)
        torch.manual_seed(int(seeds[0]))  # of dropout
        mine = batch[rank::ranks]
        # the ranks must run equally often: one without a volume takes another's, which does not count
        total = self._loss(self.network, "train", mine or batch[:1]) * bool(mine)
        loss = sum_over_ranks(total) / self._num_words("train", batch)
        if not loss.isfinite():
            volumes = [self.cohorts["train"].volumes[index] for index in batch]
            raise FloatingPointError(f"The loss is {loss} at step {self.state.iteration}, of {volumes}.")
        return loss

    def _loss(self, network: nn.Module, cohort: str, places: Sequence[int]) -> torch.Tensor:
        words = [self.words[cohort][index] for index in places]
        total: torch.Tensor = network(self.readers[cohort](places), words)
        return total

    def _num_words(self, cohort: str, places: Sequence[int]) -> int:
        return sum(len(self.words[cohort][index]) for index in places)

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """Measure the mean loss over the words of validation and keep the weights if it is the lowest."""
        self.network.eval()
        places = range(len(self.cohorts["validation"]))

        def measure(part: range) -> float:
            return float(self._loss(self.model, "validation", part))

        total = sum(shared(places, self.eval_batch_size, measure))
        loss = total / self._num_words("validation", places)
        if not math.isfinite(loss):
            raise FloatingPointError(f"The validation loss is {loss} at step {step}. Lower lr.")
        self.best.offer(loss, step, self.learned)
        self.state.metrics |= {"val_loss": loss, "val_loss_best": self.best.loss}
        logger.info(
            "Step %d: validation loss %.4f, best %.4f at step %d.", step, loss, self.best.loss, self.best.step
        )

    def test(self) -> None:
        """Let the best weights write; the network has its last ones again afterwards."""
        last = {name: weight.detach().clone() for name, weight in self.learned.items()}
        self._set(self.best.parameters)
        written = {name: self._write(name) for name in (REAL, *self.controls)}
        self._set(last)
        texts = {name: [one.text for one in found] for name, found in written.items()}
        labels = {name: report_labels(of_cohort, self.labeller) for name, of_cohort in self.texts.items()}
        best = best_constant(labels["train"], labels["validation"])
        texts[CONSTANT] = [self.texts["train"][best]] * len(self.texts["test"])
        called = {name: report_labels(found, self.labeller) for name, found in texts.items()}
        called[ALL] = np.ones_like(labels["test"])
        samples = {name: decision_samples(c, labels["test"], self.weights) for name, c in called.items()}
        numbers: dict[str, Numbers] = {name: macro_numbers(of_one) for name, of_one in samples.items()}
        for name, of_name in texts.items():
            scores = text_scores(of_name, self.texts["test"])
            numbers[name] |= {metric: (value, math.nan, math.nan) for metric, value in scores.items()}
        self.state.differences = {
            name: {metric: of_one[:3] for metric, of_one in macro_differences(samples[REAL], other).items()}
            | {"share_of_f1_owed": share_owed(samples[REAL], other)}
            for name, other in samples.items()
            if name != REAL
        }
        for name, found in written.items():
            unended = sum(not one.ended for one in found)
            numbers[name]["share_not_ended"] = (unended / len(found), math.nan, math.nan)
            if unended:
                logger.warning(
                    "%d of %d reports (%s) did not end within max_words = %d and are measured as they are.",
                    *(unended, len(found), name, self.max_words),
                )
        self.state.written, self.state.samples, self.state.labels = written, samples, labels["test"]
        self.state.metrics |= {f"test_{metric}": value for metric, (value, *_) in numbers[REAL].items()}
        self.state.reports = numbers

    def _write(self, condition: str) -> list[Generated]:
        """Write the reports of the test set from what a condition puts in place of its embeddings."""
        self.network.eval()
        reader, mean = self.readers["test"], None
        if condition == "mean":
            train = self.readers["train"]
            sums = [train([index])[0].double().sum(0) for index in range(len(self.cohorts["train"]))]
            mean = (torch.stack(sums).sum(0) / int(self.cohorts["train"].lengths.sum())).float()

        def write(places: range) -> list[Generated]:
            bags = reader([self.partners[place] for place in places] if condition == "shuffled" else places)
            if condition == "zero":
                bags = [torch.zeros_like(bag) for bag in bags]
            elif mean is not None:
                bags = [mean.expand(len(bag), -1) for bag in bags]
            return self.model.write(bags, self.max_words)

        places, title = range(len(self.cohorts["test"])), f"Writing reports, {condition}"
        return sum(shared(places, self.eval_batch_size, write, title), [])

    @torch.no_grad()
    def _set(self, parameters: Mapping[str, torch.Tensor]) -> None:
        for name, weight in self.learned.items():
            weight.copy_(parameters[name])


def check_tokens_lie_along_z(bags: EmbeddingBags) -> None:
    """Refuse tokens whose order does not follow z: of organs, or of a grid whose first axis is another.

    Raises:
        ValueError: if they are such; plain arrays do not say what they are, and pass.
    """
    kind = bags.identity["token_kind"]
    if kind not in ("grid", "organ"):
        return
    axes = cast(EmbeddingStore, bags.store).read(bags.volumes[0]).metadata.get("axcodes", "unknown")
    if kind == "organ" or axes[0] not in "SI":
        of = "of organs" if kind == "organ" else f"of a grid with axes {axes}"
        raise ValueError(
            f"--bridge zones needs tokens in the order of z, those of '{bags.identity['encoder']}' are {of}. "
            "Pass --bridge perceiver."
        )


def shared(places: range, size: int, work: Callable[[range], Any], progress: str | None = None) -> list[Any]:
    """Do a work part by part, in turns among the ranks; return all results in order, on every rank.

    Args:
        places: places of a cohort.
        size: places of a part, at most.
        work: what to do with a part.
        progress: title of a progress bar; None for no bar.
    """
    parts = [places[first : first + size] for first in range(0, len(places), size)]
    rank, ranks = rank_and_ranks()
    bar = {"desc": progress, "unit": "batch", "dynamic_ncols": True, "disable": progress is None or rank > 0}
    found = gather_objects([work(part) for part in tqdm(parts[rank::ranks], **bar)])
    return [found[number % ranks][number // ranks] for number in range(len(parts))]


def other_patients(groups: Sequence[str], seed: int) -> list[int]:
    """Return for each volume the place of one of another group, each volume once; groups are patients.

    Raises:
        ValueError: if one group has more than half of the volumes.
    """
    shift, size = max(Counter(groups).values()), len(groups)
    if 2 * shift > size:
        raise ValueError(f"One patient has {shift} of {size} test volumes: none is left to swap with.")
    names = sorted(set(groups))
    place = dict(zip(names, np.random.default_rng(seed).permutation(len(names)).tolist(), strict=True))
    row = sorted(range(size), key=lambda index: place[groups[index]])  # patient by patient
    partner = {index: row[(number + shift) % size] for number, index in enumerate(row)}
    return [partner[index] for index in range(size)]


def best_constant(train: NDArray[np.float64], validation: NDArray[np.float64]) -> int:
    """Return the training report, as a place in ``train (N, C)``, that serves best for every volume.

    That is by macro F1 on validation, where stating a class of prevalence p always has F1 2p / (1 + p).
    """
    prevalence = validation.mean(0)
    return int((train @ (2 * prevalence / (1 + prevalence))).argmax())
