"""A Weights & Biases workspace for what bpn_lightning logs.

    pip install 'bpn_lightning[workspace]'
    python wandb_workspace.py ENTITY PROJECT            # saves it: needs an account
    python wandb_workspace.py ENTITY PROJECT --print    # its specification as JSON: needs nothing

Seeds are aggregated: runs are grouped by experiment and method, and lines show their mean and
standard error. The keys are those of docs/wandb.md.
"""

import argparse
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.expr import Config

STEP = "trainer/global_step"
TASKS = "stream/tasks_learned"
SEEDS: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}


def line(title: str, key: str, x: str = STEP, **settings: Any) -> wr.LinePlot:
    """A chart of a metric; a key that ends with * is all that begin so."""
    if key.endswith("*"):
        return wr.LinePlot(title=title, x=x, metric_regex=f"^{key[:-1]}.*", **SEEDS, **settings)
    return wr.LinePlot(title=title, x=x, y=[key], **SEEDS, **settings)


def workspace(entity: str, project: str) -> ws.Workspace:
    """The workspace, not yet saved."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name="Continual learning",
        sections=[
            ws.Section(
                name="Over the stream",
                is_open=True,
                panels=[
                    line("Accuracy of each task", "accuracy/task_*", range_y=(0, 1)),
                    line("The task that is learned", "stream/task"),
                    wr.MediaBrowser(
                        title="Accuracy over the stream",
                        media_keys=["figures/accuracy_over_stream"],
                        num_columns=1,
                    ),
                    wr.MediaBrowser(
                        title="Accuracy matrix",
                        media_keys=["figures/accuracy_matrix"],
                        num_columns=1,
                    ),
                ],
            ),
            ws.Section(
                name="Figures",
                is_open=True,
                panels=[
                    line("ACC", "accuracy/average", x=TASKS, range_y=(0, 1)),
                    line("Backward transfer", "accuracy/bwt", x=TASKS),
                    line("Forward transfer", "accuracy/fwt", x=TASKS),
                    line("Forgetting", "accuracy/forgetting", x=TASKS),
                    line(
                        "Accuracy right after learning", "accuracy_after_learning/average", x=TASKS
                    ),
                    wr.BarPlot(
                        title="ACC with and without the task ID",
                        metrics=["accuracy/average", "accuracy_task_agnostic/average"],
                        range_x=(0, 1),
                        **SEEDS,
                    ),
                ],
            ),
            ws.Section(
                name="Training",
                is_open=True,
                panels=[
                    line("Loss", "train/loss"),
                    line("Its terms", "loss/*"),
                    line("Penalties", "penalty/*"),
                    line("Training accuracy", "train/accuracy", range_y=(0, 1)),
                    line("Norms of the biases", "bias_norm/*"),
                    line("Memories that object to the gradient", "memories/violated"),
                    line("Worst conflict with a memory (cosine)", "memories/lowest_cosine"),
                ],
            ),
            ws.Section(
                name="Costs",
                panels=[
                    line("Bytes held", "bytes_held/*", x=TASKS),
                    line("Bytes per task", "bytes_per_task/*", x=TASKS),
                    line("Seconds per step", "time/step"),
                ],
            ),
            ws.Section(
                name="Tables",
                panels=[
                    wr.WeavePanelSummaryTable(table_name="tables/accuracy"),
                    wr.WeavePanelSummaryTable(table_name="tables/accuracy_matrix"),
                ],
            ),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(groupby=[Config("experiment"), Config("method")]),
    )


def specification(made: ws.Workspace) -> str:
    """What would be sent to the server."""
    return str(made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=2))


def main() -> None:
    """Save the workspace, or print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("entity", help="a user or a team")
    parser.add_argument("project", help="bpn-fit logs to bpn_lightning, or to $WANDB_PROJECT")
    parser.add_argument("--print", action="store_true", help="print the specification instead")
    asked = parser.parse_args()
    made = workspace(asked.entity, asked.project)
    if asked.print:
        print(specification(made))
    else:
        made.save()


if __name__ == "__main__":
    main()
