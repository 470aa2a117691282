"""How much of the variance between runs is due to the order of classes, where a grid's design tells."""

from collections.abc import Sequence

from bpn_lightning.analysis.artifact import Artifact, slug
from bpn_lightning.analysis.collection import Collection
from bpn_lightning.analysis.comparison import MethodRow, method_rows, score_title
from bpn_lightning.analysis.table import Cell, Table
from bpn_lightning.analysis.variance import crossed, order_share
from bpn_lightning.run.identity import CLASS_ORDER, SEED_ORDER, named_value

__all__ = ["order_variance"]

_SHOWN = ("average", "average_task_agnostic")


def order_variance(collection: Collection) -> list[Artifact]:
    """For each place: rows of several orders crossed with several seeds, or of drawn orders next to a fixed one."""
    found = []
    for place in collection.places():
        rows = method_rows(collection.records, place)
        body = [
            line for group in _groups(rows) for score in _SHOWN for line in _lines(group, score)
        ]
        if body:
            caption = (
                f"{place}. The share of the variance of a score between runs that is due to the order of classes. With several "
                "orders and seeds crossed: components of a two-way random-effects model, with chance among the "
                "rest. With drawn orders next to a fixed one: 1 less the ratio of the variances over seeds, with the "
                "95 % interval by quantiles of F; with few seeds it is very wide."
            )
            table = Table(("method", "of", "share of the order", "interval", "design"), body)
            title = f"{place}: the order of classes"
            found.append(Artifact(f"order_{slug(place)}", title, caption, table))
    return found


def _groups(rows: Sequence[MethodRow]) -> list[list[MethodRow]]:
    """Rows that differ in their order of classes alone."""
    groups: dict[str, list[MethodRow]] = {}
    for row in rows:
        if CLASS_ORDER in row.records[0].variant:
            groups.setdefault(_without_order(row), []).append(row)
    return list(groups.values())


def _without_order(row: MethodRow) -> str:
    """The name of a row, but for its order."""
    order = "{} {}".format(*named_value(CLASS_ORDER, row.records[0].variant[CLASS_ORDER]))
    return ", ".join(one for one in row.name.split(", ") if one != order)


def _lines(group: Sequence[MethodRow], score: str) -> list[list[Cell]]:
    orders = {row.records[0].variant[CLASS_ORDER]: row.by_seed(score) for row in group}
    name, title = _without_order(group[0]), score_title(score, group[0].records)
    lines: list[list[Cell]] = []
    fixed, drawn = orders.get(None), orders.get(SEED_ORDER)
    share = order_share(fixed, drawn) if fixed and drawn else None
    if share is not None:
        design = f"{len(fixed or ())} seeds of one order, {len(drawn or ())} of drawn ones"
        lines.append([name, title, share.share, f"{share.low:.3f} to {share.high:.3f}", design])
    single = {order: values for order, values in orders.items() if order != SEED_ORDER}
    seeds = sorted(set.intersection(*map(set, single.values()))) if single else []
    if len(single) > 1 and len(seeds) > 1:
        parts = crossed([[values[seed] for values in single.values()] for seed in seeds])
        if parts.share is not None:
            lines.append(
                [name, title, parts.share, None, f"{len(seeds)} seeds x {len(single)} orders"]
            )
    return lines
