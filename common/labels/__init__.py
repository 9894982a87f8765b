"""The one home of every class list: ``load_labels(name)`` reads the CSV of that name beside this file."""

import csv
from importlib import resources
from typing import NamedTuple


class Label(NamedTuple):
    """One class of a label list.

    Args:
        index: place in the list, from 0.
        name: what the dataset calls the class.
        code: short code of the dataset, empty where it has none.
        pos_weight: weight of a positive in binary cross entropy.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody looks for here
    name: str
    code: str
    pos_weight: float


def load_labels(name: str) -> list[Label]:
    """Read a label list.

    ``ct_rate`` (18), ``rad_chestct`` (16): classes of the probes in the dataset's order, unweighted.
    ``rexgroundingct`` (14): finding categories ``1a`` to ``2h``; weight 800 each, as DALE-CT's authors train.
    ``totalsegmentator`` (118): background and the 117 classes of TotalSegmentator 2's task ``total``, names
    from its class map; weights as DALE-CT's authors train: 1 for background and anatomy outside the chest,
    elsewhere one over the share of the class in all voxels, at most 1000.

    Args:
        name: file stem of the list.

    Returns:
        The classes in order.

    Raises:
        ValueError: if there is no such list.

    Example:
        >>> load_labels("rexgroundingct")[9]
        Label(index=9, name='Nodules and masses', code='2d', pos_weight=800.0)
        >>> len(load_labels("totalsegmentator"))
        118
    """
    folder = resources.files(__name__)
    names = sorted(file.name.removesuffix(".csv") for file in folder.iterdir() if file.name.endswith(".csv"))
    if name not in names:
        raise ValueError(f"name must be one of {names}, got '{name}'.")
    rows = csv.DictReader(folder.joinpath(f"{name}.csv").read_text(encoding="utf-8").splitlines())
    return [Label(int(row["index"]), row["name"], row["code"], float(row["pos_weight"])) for row in rows]


def pos_weights(name: str) -> list[float]:
    """Return the positive weights of a label list, in its order, for a bundle's config.

    Args:
        name: file stem of the list.

    Raises:
        ValueError: if there is no such list.

    Example:
        >>> pos_weights("totalsegmentator")[:3]
        [1.0, 184.42, 635.22]
    """
    return [label.pos_weight for label in load_labels(name)]
