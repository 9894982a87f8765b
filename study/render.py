"""Write docs/results.md from what a study has measured: no number in it is typed.

``python -m study.render --study study/out/small`` keeps the study's rows and pictures in docs/study and
writes docs/results.md from them and from results.md.template beside them. ``--check`` only says whether the
page is up to date.
"""

import csv
import json
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from common.cohort.cohort import table_rows
from common.reports.results import FIELDS, ResultRow, read_rows
from common.run.process import atomic_file
from docs.render_results import PAPER, cell
from study.plan import DENSE_ENCODERS, FLOORS, TABLE_ENCODERS
from study.stages import REPOSITORY, TURNS

KEPT = REPOSITORY / "docs" / "study"
PAGE = REPOSITORY / "docs" / "results.md"
PICTURES = {"curves.png": "curves.png", "eval_slab_depth/figure_2.png": "figure_2.png"}
STAGE = ("stage", "seconds", "finished", "hardware", "commit")
DIFFERENCES = ("encoder", "reference", "measure", "difference", "low", "high", "p")
REFERENCE = "dale_ct_2s"
GEOMETRY = (
    *("continuity_cosine", "continuity_chord", "continuity_geodesic", "continuity_cosine_matched"),
    *(
        "z_position_r2_mm",
        "z_position_mae_mm",
        "tau_principal_axis",
        "tau_nearest_neighbours",
        "effective_rank",
    ),
)
"""What is shown of Table V's measures; docs/study/results.csv has all."""

Row = dict[str, str]
Results = dict[tuple[str, str, str], ResultRow]
"""By encoder, protocol and metric."""

REPEATED = {
    "III: AUPRC": ("mil_probe", "macro_auprc"),
    "IV, frozen: AUROC": ("frozen", "macro_auroc"),
    "IV, retrained: AUROC": ("retrained", "macro_auroc"),
    "I, organs in patches: AUPRC": ("dense_patch totalsegmentator", "macro_auprc"),
}
"""What docs/study/earlier_training.csv has of an earlier run, trained mostly on one core."""

CHANGED = {
    "2s_frozen_heads": "auxiliary heads never trained, as released",
    "2s_released_guidance": "guidance as released: global views unguided",
    "2s_fractional_rex": "finding targets: share of the area, as released, not presence",
    "2s_wide_knots": "SIGReg: 27 knots on ±5, not 17 on ±3",
    "2s_stream_shuffle": "batches from a stream of volumes through a buffer of 100 slabs",
}


def keep(study: Path) -> None:
    """Copy what the page is made of from a finished study to docs/study.

    Raises:
        FileNotFoundError: if the study has not been finished.
    """
    records = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((study / "done").glob("*.json"))
    ]
    if not records:
        raise FileNotFoundError(
            f"study must hold done/*.json, got none in '{study}'. Run python -m study.run."
        )
    KEPT.mkdir(parents=True, exist_ok=True)
    results = sorted((study / "results").glob("*.csv"))
    rows = (row for path in results for row in table_rows(path, "results", FIELDS))
    _write_csv(KEPT / "results.csv", FIELDS, rows)
    _write_csv(KEPT / "differences.csv", DIFFERENCES, _differences(study / "differences"))
    _write_csv(KEPT / "stages.csv", STAGE, records)
    for source, name in PICTURES.items():
        shutil.copyfile(study / source, KEPT / name)


def _differences(folder: Path) -> Iterable[Row]:
    """Yield the paired differences of macro means, all with the columns of ``DIFFERENCES``."""
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row.get("class", "macro") == "macro":
                    measure = row.get("measure") or f"{path.stem} {row['metric']}"
                    yield {name: row.get(name, "") for name in DIFFERENCES} | {"measure": measure}


def _write_csv(path: Path, fields: Iterable[str], rows: Iterable[Row]) -> None:
    with atomic_file(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(fields), lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _results(path: Path) -> Results:
    results: Results = {}
    for row in read_rows(path):
        dataset = f" {row.dataset}" if row.protocol.startswith("dense_") else ""
        results[row.encoder, row.protocol + dataset, row.metric] = row
    return results


def markdown(heads: Iterable[str], lines: Iterable[Iterable[str]], num_names: int = 1) -> str:
    """Lay out a table; a line without any number after its names is left out."""
    heads = list(heads)
    kept = [line for line in map(list, lines) if any(line[num_names:])]
    if not kept:
        return "Not measured in this run."
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *kept])


def _short(text: str) -> str:
    """Return a cell without its interval."""
    return text.partition(" ")[0]


IV_PROTOCOLS = ("frozen", "retrained", "retrained-frozen", "frozen_standardized", "retrained_standardized")


class Page:
    """The rows that docs/study keeps, and each table that is made of them."""

    def __init__(self) -> None:
        self.rows = _results(KEPT / "results.csv")
        self.earlier = _results(KEPT / "earlier_training.csv")
        with (KEPT / "differences.csv").open(newline="", encoding="utf-8") as file:
            self.differences = {(row["encoder"], row["measure"]): row for row in csv.DictReader(file)}
        with PAPER.open(newline="", encoding="utf-8") as file:
            self.paper = {
                (row["table"], row["encoder"], row["protocol"]): row for row in csv.DictReader(file)
            }
        with (KEPT / "stages.csv").open(newline="", encoding="utf-8") as file:
            self.stages = sorted(csv.DictReader(file), key=lambda stage: stage["finished"])
        self.commits = sorted({row.commit for row in self.rows.values()})

    def macro(self, encoder: str, protocol: str, signed: bool = False) -> list[str]:
        """Return the cells of AUROC, AUPRC, F1 and balanced accuracy."""
        metrics = ("auroc", "auprc", "f1", "balanced_accuracy")
        return [self.cell(encoder, protocol, f"macro_{metric}", signed) for metric in metrics]

    def cell(self, encoder: str, protocol: str, metric: str, signed: bool = False) -> str:
        """Return one result with its interval; empty where it was not measured."""
        row = self.rows.get((encoder, protocol, metric))
        return cell(row.numbers if row else None, signed)

    def less(self, encoder: str, measure: str) -> str:
        """Return the paired difference to the reference, with its interval."""
        row = self.differences.get((encoder, measure))
        if row is None:
            return ""
        return cell((float(row["difference"]), float(row["low"]), float(row["high"])), signed=True)

    def theirs(self, table: str, encoder: str, protocol: str) -> str:
        """Return the paper's AUROC and AUPRC."""
        row = self.paper.get((table, encoder, protocol))
        return f"{row['auroc']} / {row['auprc']}" if row else ""

    def table_i(self) -> str:
        """Dense probes: kind of token and labels by encoder."""
        kinds = {"cls": "CLS", "patch": "patches"}
        tasks = {"rexgroundingct": "findings", "totalsegmentator": "organs"}
        lines = []
        for kind, tokens in kinds.items():
            for task, labels in tasks.items():
                for encoder in DENSE_ENCODERS:
                    protocol = f"dense_{kind} {task}"
                    line = [f"{tokens}, {labels}", f"`{encoder}`", *self.macro(encoder, protocol)[:2]]
                    line += self.macro(encoder, f"dense_{kind}_standardized {task}")[:2]
                    line += [self.less(encoder, f"{kind} {task} auprc"), self.theirs("I", encoder, protocol)]
                    lines.append(line)
        heads = ["tokens, labels", "encoder", "AUROC", "AUPRC", "standardized: AUROC", "AUPRC"]
        heads += ["AUPRC less 2S's", "paper: AUROC / AUPRC"]
        return markdown(heads, lines, num_names=2)

    def table_iii(self, kind: str = "") -> str:
        """MIL probes on site A."""
        lines = []
        for encoder in ("prevalence", *TABLE_ENCODERS):
            seeds = self.macro(encoder, f"mil_probe{kind}_seeds")[1]
            less = self.less(encoder, f"table_iii{kind} auprc")
            theirs = [] if kind else [self.theirs("III", encoder, "mil_probe")]
            lines.append([f"`{encoder}`", *self.macro(encoder, f"mil_probe{kind}"), seeds, less, *theirs])
        heads = ["encoder", "AUROC", "AUPRC", "F1", "BA", "AUPRC, five seeds", "AUPRC less 2S's"]
        return markdown(heads if kind else [*heads, "paper: AUROC / AUPRC"], lines)

    def table_iii_standardized(self) -> str:
        """The same probes on standardized tokens."""
        return self.table_iii("_standardized")

    def beside_table_iii(self) -> str:
        """Other readers of the 2S's embeddings."""
        known = {protocol for encoder, protocol, _ in self.rows if encoder == REFERENCE}
        names = sorted(
            name for name in known if name.startswith(("knn", "mil_probe_", "low_shot", "gated", "transf"))
        )
        lines = [[f"`{name}`", *self.macro(REFERENCE, name)] for name in names if not name.endswith("_seeds")]
        return markdown(("protocol", "AUROC", "AUPRC", "F1", "BA"), lines)

    def table_iv(self) -> str:
        """Frozen and retrained probes on site B."""
        lines = []
        for encoder in TABLE_ENCODERS:
            for protocol in IV_PROTOCOLS:
                numbers = self.macro(encoder, protocol, "-" in protocol)
                lines.append([f"`{encoder}`", protocol, *numbers, self.theirs("IV", encoder, protocol)])
        heads = ("encoder", "probe", "AUROC", "AUPRC", "F1", "BA", "paper: AUROC / AUPRC")
        return markdown(heads, lines, num_names=2)

    def orientation(self) -> str:
        """What turned slices cost the frozen probe."""
        lines = [[turn, *self.macro(REFERENCE, f"frozen_{turn}-frozen", signed=True)[:2]] for turn in TURNS]
        return markdown(("slices", "AUROC less right", "AUPRC less right"), lines)

    def table_v(self) -> str:
        """Slabs against single slices."""
        slab, flat = "dale_ct_0", "dale_ct_0_single_slice"
        names = (slab, flat, *FLOORS)
        paper = [self.paper["V", arm, "mil_probe"] for arm in ("slab", "flat")]
        lines = []
        for metric in ("auroc", "auprc"):
            own = [self.cell(encoder, "mil_probe", f"macro_{metric}") for encoder in names]
            row = self.differences.get((slab, f"table_v {metric}"))
            p = f"{float(row['p']):.2g}" if row else ""
            theirs = " and ".join(row[metric] for row in paper)
            lines.append([f"macro {metric.upper()}", *own, self.less(slab, f"table_v {metric}"), p, theirs])
        for measure in GEOMETRY:
            own = [self.cell(encoder, "latent_geometry", measure) for encoder in names]
            pair, tests = f"{slab} - {flat}", (measure, f"{measure}_p_wilcoxon", f"{measure}_p_permutation")
            difference, *ps = (self.rows.get((pair, "latent_geometry", name)) for name in tests)
            p = ", ".join(f"{row.value:.2g}" for row in ps if row)
            theirs = " and ".join(row["latent_continuity"] for row in paper) if measure == GEOMETRY[0] else ""
            lines.append(
                [f"`{measure}`", *own, cell(difference.numbers if difference else None, True), p, theirs]
            )
        floors = (name.replace("_", " ") for name in FLOORS)
        heads = ("measure", "12 mm slab", "single slice", *floors, "slab less single slice", "p", "paper")
        return markdown(heads, lines)

    def table_vi(self) -> str:
        """Preprocessing strategies, with what they cost."""
        lines = []
        prefix = "preprocessing_"
        known = dict.fromkeys(protocol for _, protocol, _ in self.rows if protocol.startswith(prefix))
        for strategy in (protocol.removeprefix(prefix) for protocol in known):
            protocol = f"preprocessing_{strategy}"
            cost = [
                self.rows.get((REFERENCE, protocol, name))
                for name in ("slices_per_second", "tokens_per_slice")
            ]
            costs = [f"{row.value:.0f}" if row else "" for row in cost]
            less = self.less(strategy, "table_vi auprc")
            lines.append([strategy.replace("_", " "), *self.macro(REFERENCE, protocol)[:2], less, *costs])
        heads = ("strategy", "AUROC", "AUPRC", f"AUPRC less {lines[0][0]}'s", "slices/s", "tokens per slice")
        return markdown(heads, lines)

    def paper_vi(self) -> str:
        """The paper's Table VI."""
        theirs = [row for (table, _, _), row in self.paper.items() if table == "VI"]
        return markdown(
            ("strategy", "AUROC", "AUPRC"), [[row["row"], row["auroc"], row["auprc"]] for row in theirs]
        )

    def ablations(self) -> str:
        """One change to DALE-CT-2S each."""
        dense = ("patch totalsegmentator", "patch rexgroundingct")
        lines = []
        for name, change in {REFERENCE: "as in the paper", **CHANGED}.items():
            auroc, auprc = self.macro(name, "mil_probe")[:2]
            less = [self.less(name, f"{measure} auprc") for measure in ("table_iii", *dense)]
            shown = [self.macro(name, f"dense_{protocol}")[1] for protocol in dense]
            pairs = (part for pair in zip(shown, less[1:], strict=True) for part in pair)
            lines.append([change, auroc, auprc, less[0], *pairs])
        heads = ["change", "AUROC", "AUPRC", "less 2S's", "patches, organs: AUPRC", "less 2S's"]
        heads += ["patches, findings: AUPRC", "less 2S's"]
        return markdown(heads, lines)

    def robustness(self) -> str:
        """What changes of the scan do to each encoder's AUROC, and to the calls and tokens."""
        prefix, names = "robustness_", ("macro_auroc_change", "calls_flipped", "token_cosine")
        known = dict.fromkeys(protocol for _, protocol, _ in self.rows if protocol.startswith(prefix))
        lines = []
        for protocol in known:
            change = protocol.removeprefix(prefix).replace("_", " ")
            for encoder in DENSE_ENCODERS:
                cells = [self.cell(encoder, protocol, name, name == names[0]) for name in names]
                lines.append([change, f"`{encoder}`", *cells])
        heads = ("change", "encoder", "AUROC, change", "calls flipped", "cosine of tokens")
        return markdown(heads, lines, num_names=2)

    def two_trainings(self) -> str:
        """What the encoders of two runs of the study score; seeds are the same, orders of sums are not."""
        lines = []
        for name in (*TABLE_ENCODERS, *CHANGED):
            pairs = [
                (self.earlier.get((name, *key)), self.rows.get((name, *key))) for key in REPEATED.values()
            ]
            shown = ([_short(cell(row.numbers if row else None)) for row in pair] for pair in pairs)
            lines.append([f"`{name}`", *(" / ".join(two) if all(two) else "" for two in shown)])
        return markdown(("encoder", *(f"{name}, earlier / this" for name in REPEATED)), lines)

    def times(self) -> str:
        """How long the stages took."""
        groups: dict[str, list[int]] = {}
        for stage in self.stages:
            words = stage["stage"].split()
            head = " ".join(words[:2]) if words[0] == "table" else words[0]
            groups.setdefault(head, []).append(int(stage["seconds"]))
        lines = [[name, str(len(seconds)), f"{sum(seconds) / 60:.1f}"] for name, seconds in groups.items()]
        lines.append(
            ["all", str(sum(map(len, groups.values()))), f"{sum(map(sum, groups.values())) / 60:.1f}"]
        )
        return markdown(("stages", "number", "minutes"), lines)

    def write(self) -> str:
        """Return the whole page: the template, with a fact or a table in place of each ``@NAME@``."""
        facts = {
            "DATE": self.stages[-1]["finished"][:10],
            "HARDWARE": "; ".join(sorted({stage["hardware"] for stage in self.stages})),
            "COMMITS": ", ".join(self.commits),
        }
        text = (KEPT / "results.md.template").read_text(encoding="utf-8")
        return re.sub(
            r"@([A-Z_]+)@", lambda name: facts.get(name[1]) or getattr(self, name[1].lower())(), text
        )


def main(
    study: Annotated[Path | None, typer.Option(help="Finished study to take the numbers from.")] = None,
    check: Annotated[bool, typer.Option(help="Only say whether docs/results.md is up to date.")] = False,
) -> None:
    """Render docs/results.md from docs/study, first taken from a study if one is given."""
    if study is not None:
        keep(study)
    text = Page().write()
    if check:
        if PAGE.read_text(encoding="utf-8") != text:
            sys.exit("docs/results.md is out of date. Edit docs/study, then run python -m study.render.")
        return
    with atomic_file(PAGE, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    typer.run(main)
