"""What a grid means, and that a wrong one is refused before anything runs."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bpn_lightning import datamodules
from bpn_lightning.bench.grid import (
    ARTIFACTS,
    GRIDS,
    Grid,
    find_grid,
    only,
    packaged_grids,
    read_grid,
)
from bpn_lightning.bench.report import MAKERS
from bpn_lightning.cli.config_files import methods_of
from bpn_lightning.datamodules import DATAMODULES, ClassIncrementalDataModule
from bpn_lightning.errors import ConfigurationError

Write = Callable[..., str]


def test_a_grid_is_experiments_times_methods_times_seeds(write_grid: Write) -> None:
    grid = read_grid(write_grid())
    assert [cell.name for cell in grid.cells] == [
        "digits_inc, ewc, seed 0",
        "digits_inc, ewc, seed 1",
        "digits_inc, bd+ewc, seed 0",
        "digits_inc, bd+ewc, seed 1",
    ]
    assert (grid.name, grid.title, grid.compare) == ("two", "Two methods", (("bd+ewc", "ewc"),))
    assert grid.cells[3].folder(Path("r")) == Path("r/digits_inc/bd+ewc/seed_1")
    assert grid.cells[3].flags == [
        *("--config", "digits_inc.yaml", "--method", "bd+ewc", "--trust=false"),
        *("--seed_everything", "1", "--data.init_args.class_order_seed=stream"),
    ]


def test_all_methods_are_those_with_tuned_values(write_grid: Write) -> None:
    grid = read_grid(write_grid("experiments: [{config: digits_inc, methods: all}]"))
    assert [cell.method for cell in grid.cells] == methods_of("digits_inc")


def test_settings_are_flags_and_variants_have_folders_of_their_own(write_grid: Write) -> None:
    text = """
    experiments:
      - config: digits_inc.yaml
        methods: [bd+ewc]
        label: short
        set: {model.backbone.init_args.hidden: [8], trainer.logger: null}
        vary: {strategies.bd.rank: [1, 10], strategies.bd.direction: [sign, gradient]}
        probes: [drift]
    compare: [["bd+ewc, rank 1, direction sign", "bd+ewc, rank 1, direction gradient"]]
    """
    grid = read_grid(write_grid(text))
    cells = grid.cells
    assert len(cells) == 4
    assert grid.compare == ((cells[0].row, cells[1].row),)
    folder = "r/short/rank=1,direction=gradient/digits_inc/bd+ewc/seed_0"
    assert cells[1].folder(Path("r")) == Path(folder)
    assert cells[1].flags[7:] == [
        "--model.backbone.init_args.hidden=[8]",
        "--trainer.logger=null",
        "--data.init_args.class_order_seed=stream",
        "--strategies.bd.rank=1",
        "--strategies.bd.direction=gradient",
        "--trainer.callbacks+=bpn_lightning.paper.probes.Drift",
    ]


ORDER = "data.init_args.class_order_seed"


def orders(grid: Grid) -> list[list[object]]:
    return [[v for k, v in cell.settings + cell.variant if k == ORDER] for cell in grid.cells]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("experiments: [{config: digits_inc, methods: [ewc]}]", [["stream"]]),
        ("order: fixed\nexperiments: [{config: digits_inc, methods: [ewc]}]", [[None]]),
        ("order: fixed\nexperiments: [{config: digits_inc, methods: [ewc], order: seed}]", [["stream"]]),
        # All classes in every task, or sets of their own: there is no such order.
        ("order: seed\nexperiments: [{config: permuted_mnist, methods: [ewc]}]", [[]]),
        ("experiments: [{config: gaussians, methods: [ewc]}]", [[]]),
        (f"experiments: [{{config: digits_inc, methods: [ewc], set: {{{ORDER}: 3}}}}]", [[3]]),
        (f"experiments: [{{config: digits_inc, methods: [ewc], vary: {{{ORDER}: [0, 1]}}}}]", [[0], [1]]),
    ],
)  # fmt: skip
def test_the_seed_draws_the_order_of_classes_unless_the_grid_says_otherwise(
    write_grid: Write, text: str, expected: list[list[object]]
) -> None:
    assert orders(read_grid(write_grid(text))) == expected


def test_a_config_with_an_order_of_its_own_keeps_it(write_grid: Write, tmp_path: Path) -> None:
    text = "data:\n  class_path: SplitDigits\n  init_args: {class_order_seed: 3}\nmethod: ewc\n"
    (tmp_path / "own.yaml").write_text(text)
    for order, expected in (("", []), (", order: fixed", []), (", order: seed", ["stream"])):
        grid = read_grid(write_grid(f"experiments: [{{config: own.yaml, methods: [ewc]{order}}}]"))
        assert orders(grid) == [expected]


def test_both_orders_are_rows_of_their_own(write_grid: Write) -> None:
    entry = "{config: digits_inc, methods: [ewc], order: [fixed, seed]}"
    grid = read_grid(
        write_grid(f'experiments: [{entry}]\ncompare: [["ewc, order seed", "ewc, order fixed"]]')
    )
    assert [cell.row for cell in grid.cells] == ["ewc, order fixed", "ewc, order seed"]
    assert grid.cells[1].folder(Path("r")) == Path("r/order=seed/digits_inc/ewc/seed_0")
    assert [cell.row for cell in only(grid.cells, ["order=fixed"])] == ["ewc, order fixed"]
    assert "--data.init_args.class_order_seed=null" in grid.cells[0].flags


def test_the_streams_with_an_order_of_classes_are_those_whose_names_say_so() -> None:
    for name in DATAMODULES:
        kind = getattr(datamodules, name)
        assert issubclass(kind, ClassIncrementalDataModule) == name.startswith("Split"), name


def test_what_is_not_run_keeps_its_reason_and_has_no_cells(write_grid: Write) -> None:
    entry = "- {config: cifar10_inc.yaml, methods: [ewc, stl], not_run: No images.}"
    grid = read_grid(write_grid(f"experiments:\n  {entry}\ncompare: [[ewc, stl]]"))
    assert grid.cells == ()
    (one,) = grid.not_run
    assert (one.experiment, one.methods, one.reason) == (
        "cifar10_inc",
        ("ewc", "stl"),
        "No images.",
    )


def test_only_takes_alternatives_of_a_kind_and_all_kinds_together(write_grid: Write) -> None:
    cells = read_grid(write_grid()).cells
    assert [cell.name for cell in only(cells, ["ewc", "seed_1"])] == ["digits_inc, ewc, seed 1"]
    assert len(only(cells, ["ewc", "bd+ewc", "seed_1"])) == 2
    with pytest.raises(ConfigurationError, match=r"but got 'bd\+ewk'\. Did you mean 'bd\+ewc'\?"):
        only(cells, ["bd+ewk"])


ONE = "experiments: [{config: digits_inc, methods: [ewc]}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experiments: [{config: digts_inc, methods: all}]", "Did you mean 'digits_inc.yaml'?"),
        ("experiments: [{config: digits_inc, methods: [bd+ewk]}]", "Did you mean 'ewc'?"),
        ("experiments: [{config: digits_inc, methods: al}]", "or `all` with tuned values, but got"),
        ("experiments: [{methods: all}]", "Expected config of experiment 1 of two.yaml"),
        ("experiments: []", "Expected experiments of two.yaml to be a list"),
        (f"{ONE}\nseeds: [0, 0]", "to be different numbers, but got [0, 0]"),
        (f"{ONE}\nseeds: [0, one]", "to be whole numbers from 0, but got 'one'"),
        (f"{ONE}\nseeds: [true]", "to be whole numbers from 0, but got True"),
        (f"{ONE}\nreports: [accuracy]", "but got 'reports'. Did you mean 'report'?"),
        (f"{ONE}\nreport: [figure_8]", "but got 'figure_8'. Did you mean 'figure_"),
        (f"{ONE}\ncompare: [[ewc, stl]]", "to name methods of the grid, but got 'stl'"),
        (f"{ONE}\ncompare: [ewc]", "to be pairs of methods, but got 'ewc'"),
        (
            "experiments: [{config: digits_inc, methods: [ewc], set: {modell.mask: task}}]",
            "but got 'modell.mask'. Did you mean 'model.'?",
        ),
        (
            "experiments: [{config: digits_inc, methods: [ewc], vary: {strategies.bd.rank: [1]}}]",
            "Expected --strategies.bd.rank to be about a strategy of the method 'ewc'",
        ),
        (
            "experiments: [{config: digits_inc, methods: [ewc], vary: {strategies.ewc.gamma: 1}}]",
            "a list of values, but got 1",
        ),
        (
            "experiments: [{config: digits_inc, methods: [ewc], probes: [drifts]}]",
            "Did you mean 'drift'?",
        ),
        (
            (
                "experiments: [{config: digits_inc, methods: [ewc]},"
                " {config: digits_inc, methods: [ewc]}]"
            ),
            "but got digits_inc, ewc, seed 0 twice",
        ),
        (
            f"{ONE}\norder: sead",
            "to be fixed, seed or [fixed, seed], but got 'sead'. Did you mean 'seed'?",
        ),
        (
            f"{ONE}\norder: [seed, seed]",
            "to be fixed, seed or [fixed, seed], but got ['seed', 'seed']",
        ),
        (f"{ONE}\norder: [[fixed]]", "to be fixed, seed or [fixed, seed], but got [['fixed']]"),
        (
            "experiments: [{config: permuted_mnist, methods: [ewc], order: seed}]",
            "to be left out, since PermutedMNIST has no order of classes, but got 'seed'",
        ),
        (
            f"experiments: [{{config: digits_inc, methods: [ewc], order: seed, set: {{{ORDER}: 3}}}}]",
            "to be left out where class_order_seed is set or varied, but got 'seed'",
        ),
        ("experiments: [a]", "to hold keys and values, but got 'a'"),
        ("[a", "to be a grid in YAML, but got an error"),
    ],
)
def test_what_is_wrong_is_named(write_grid: Write, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        read_grid(write_grid(text))


def test_an_unknown_grid_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigurationError, match=r"Did you mean 'digits\.yaml'\?"):
        read_grid("digts")


@pytest.mark.slow
@pytest.mark.parametrize("name", packaged_grids())
def test_every_packaged_grid_says_its_command_and_is_valid(name: str) -> None:
    assert find_grid(name).read_text(encoding="utf-8").startswith(f"# bpn-bench {name}")
    grid = read_grid(name)
    assert grid.cells or grid.not_run
    assert grid.text


def test_a_packaged_grid_names_packaged_experiments_and_no_grid_beside_it() -> None:
    """eight_datasets.yaml is both."""
    for name in ("four_datasets.yaml", str(GRIDS / "four_datasets.yaml")):
        assert {cell.config for cell in read_grid(name).cells} == {"eight_datasets.yaml"}


def test_every_artifact_can_be_made() -> None:
    assert sorted(MAKERS) == sorted(ARTIFACTS)
