"""The numbers of Wen et al., "Beneficial Perturbation Network ...": facts of its tables and text.

Accuracies are fractions of 1 unless a name says percent; bytes are per task.
"""

from typing import NamedTuple

__all__ = [
    "COLLAPSES",
    "DATA_SETS",
    "FIGURE_7",
    "NOT_IN_TABLE_1",
    "PARAMETERS_PER_TASK",
    "TABLE_1",
    "TABLE_1_FROM_TEXT",
    "TABLE_2",
    "Paper",
]


class Paper(NamedTuple):
    """A row of Table I.

    Attributes:
        first_task: accuracy on task 1 after all tasks.
        bytes: stored for each task; None where the table has no such cell.
    """

    first_task: float
    bytes: int | None = None


#: Table I, by experiment and method; GEM is named by its images per class.
TABLE_1: dict[str, dict[str, Paper]] = {
    "mnist_inc": {"gem_10": Paper(0.980, 47_040), "bd+ewc": Paper(0.980, 4_808)},
    "cifar10_inc": {
        "gem_256": Paper(0.800, 4_718_592),
        "gem_150": Paper(0.698, 2_764_800),
        "bd+ewc": Paper(0.795, 4_808),
    },
    "cifar100_inc": {
        "gem_256": Paper(0.790, 4_718_592),
        "gem_209": Paper(0.775, 3_852_288),
        "bd+psp": Paper(0.850, 20_776),
        "psp": Paper(0.830, 15_968),
        "bd+ewc": Paper(0.845, 4_808),
    },
}

#: What its text adds: EWC falls to 0, and BD+EWC is so and so many percent below single-task
#: networks. The percentages are relative, as those beside Table I are, and whole, so the figures
#: that follow from them are good to about one point.
TABLE_1_FROM_TEXT: dict[str, dict[str, Paper]] = {
    "mnist_inc": {"stl": Paper(0.980 / 0.99), "ewc": Paper(0.0, 0)},
    "cifar10_inc": {"stl": Paper(0.795 / 0.96), "ewc": Paper(0.0, 0)},
    "cifar100_inc": {
        "stl": Paper(0.845 / 0.99),
        "ewc": Paper(0.0, 0),
        "gem_10": Paper(0.845 / 1.224),
    },
}

#: Methods that the text says to fail, without a figure.
COLLAPSES = ("gd+ewc",)

#: Methods of other papers that a grid of Table I may have too: they are in its other tables.
NOT_IN_TABLE_1 = ("der", "er", "gdumb", "icarl")

DATA_SETS = ("Flower", "Scenes", "Birds", "Cars", "Aircraft", "Actions", "Letters", "SVHN")

#: Table II in percent: eight data sets and the average; (None) is a dash. What has a star there was
#: taken from other papers.
TABLE_2: dict[str, tuple[tuple[float | None, ...], float, bool]] = {
    "imm": ((67.44, 47.08, 42.28, 39.19, 18.93, 32.88, 46.35, 53.15), 43.41, True),
    "lwf": ((65.68, 46.04, 42.47, 37.24, 30.75, 34.55, 50.31, 88.89), 49.49, True),
    "ewc": ((None,) * 8, 50.00, True),
    "ebll": ((None,) * 8, 50.29, True),
    "si": ((74.58, 52.53, 48.65, 43.96, 32.19, 38.22, 47.70, 66.09), 50.49, True),
    "mas": ((76.34, 55.30, 49.03, 44.59, 33.48, 41.76, 51.93, 69.13), 52.69, True),
    "bd+ewc": ((65.67, 47.99, 42.70, 27.96, 40.17, 47.61, 66.97, 83.24), 52.79, False),
    "slnid": ((None,) * 8, 54.50, True),
    "psp": ((75.36, 52.39, 40.85, 28.08, 42.45, 48.64, 66.52, 83.74), 54.75, False),
    "bd+psp": ((78.47, 56.04, 47.96, 34.40, 47.58, 51.61, 71.19, 83.73), 58.87, False),
}

#: Text about Fig. 7: by how many percent the first is better after 100 tasks. Relative like those
#: beside Table I, or points: the text does not say.
FIGURE_7: dict[tuple[str, str], float] = {("bd+psp", "psp"): 30.14, ("bd+ewc", "ewc"): 35.47}

#: Share of the network's parameters that a task adds, in percent.
PARAMETERS_PER_TASK = 0.3
