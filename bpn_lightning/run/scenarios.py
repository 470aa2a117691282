"""The three scenarios of continual learning (van de Ven & Tolias, 2019), https://arxiv.org/abs/1904.07734.

- *Task-incremental*: the task ID of a test sample is given.
- *Domain-incremental*: all tasks have the same classes, so that no answer needs the task ID; it may be given.
- *Class-incremental*: tasks have classes of their own, and all of them compete; the task ID is not given.

No torch here.
"""

from collections.abc import Mapping
from typing import Any

from bpn_lightning.run.schema import Scenario, Scenarios

__all__ = ["SCENARIOS", "scenario", "scenario_text", "scenarios"]


SCENARIOS = ("task-incremental", "domain-incremental", "class-incremental")


def scenario(mask: str, task_id_given: bool) -> Scenario:
    """The scenario of an accuracy.

    Args:
        mask: of the module; ``shared`` is that of tasks with the same classes.
        task_id_given: whether the method was given the task ID of each test sample.

    >>> scenario("all", task_id_given=False)["name"]
    'class-incremental'
    """
    kind = "task-incremental" if task_id_given else "class-incremental"
    return {
        "name": "domain-incremental" if mask == "shared" else kind,
        "task_id_given": task_id_given,
    }


def scenarios(mask: str, task_id_at_inference: bool, agnostic: bool) -> Scenarios:
    """The scenarios of a run's accuracies.

    Args:
        mask: of the module.
        task_id_at_inference: of the stream.
        agnostic: whether accuracies without the task ID were measured.
    """
    return {
        "accuracy": scenario(mask, task_id_at_inference),
        "accuracy_task_agnostic": scenario(mask, task_id_given=False) if agnostic else None,
    }


def scenario_text(one: Mapping[str, Any]) -> str:
    """For people.

    >>> scenario_text(scenario("shared", task_id_given=True))
    'domain-incremental, task ID given'
    """
    return f"{one['name']}, task ID {'given' if one['task_id_given'] else 'not given'}"
