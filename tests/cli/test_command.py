"""The order of precedence, without torch: what the parser gets, and in which order."""

import argparse
import re
from pathlib import Path

import pytest
import yaml

from bpn_lightning import registry
from bpn_lightning.cli.command import Command, read_command
from bpn_lightning.cli.config_files import CONFIGS
from bpn_lightning.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name


def configs(command: Command) -> list[str]:
    return [layer.name for layer in command.layers]


def test_files_come_first_then_the_method_then_the_flags_wherever_they_stand() -> None:
    extra = write("extra.yaml", "trainer: {max_steps: 3}")
    line = ["--seed_everything", "1", "--config=digits_inc.yaml", "--method", "ewc", "-c", extra]
    command = read_command([*line, "--trainer.devices=1"])
    method = CONFIGS / "methods" / "digits_inc" / "ewc.yaml"
    assert configs(command) == [str(CONFIGS / "digits_inc.yaml"), extra, str(method)]
    assert command.args[::2][:3] == ["--config"] * 3
    assert yaml.safe_load(command.args[5]) == yaml.safe_load(method.read_text())
    assert command.args[6:] == command.flags
    assert command.flags == [
        "--experiment=digits_inc",
        "--method=ewc",
        *("--seed_everything", "1", "--trainer.devices=1"),
    ]
    assert list(command.strategies) == ["ewc"]
    assert command.notices == []


@pytest.mark.parametrize(
    ("line", "gates"),
    [
        ("--config slda.yaml", ["slda"]),
        ("--config slda.yaml --config none.yaml", []),
        ("--config none.yaml --config slda.yaml --gate ncm+ppca", ["ncm", "ppca"]),
        ("--config slda.yaml --gate null", []),
    ],
)
def test_the_last_to_name_gates_decides_as_it_does_for_the_parser(
    line: str, gates: list[str]
) -> None:
    write("slda.yaml", "method: ewc\ngate: slda")
    write("none.yaml", "method: ewc\ngate: null")
    command = read_command(line.split())
    assert list(command.gates) == gates
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=yaml.safe_load, action="append")
    parser.add_argument("--gate", type=yaml.safe_load, action="append", default=[])
    parsed, _ = parser.parse_known_args(command.args)
    in_files = [config["gate"] for config in parsed.config if "gate" in config]
    assert [*in_files, *parsed.gate][-1] == ("+".join(gates) or None)


@pytest.mark.parametrize(
    ("line", "gates"), [("", ["slda"]), (" --gate ncm --front random", ["slda", "ncm"])]
)
def test_a_method_of_gates_trains_no_modes(line: str, gates: list[str]) -> None:
    command = read_command(f"--config digits_inc.yaml --method slda{line}".split())
    assert (command.strategies, list(command.gates)) == ({}, gates)
    assert command.gates_alone
    assert command.layers[-1].content == {"gates": {name: {"modes": 0} for name in gates}}
    assert not any("tuned values" in notice for notice in command.notices)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("--method psp+slda", "Give the gates by --gate: --method psp --gate slda."),
        ("--method slda --gate slda", "to name others than the method, but got 'slda' in both"),
        ("--method slda+slda", "Expected --method to name each gate once"),
    ],
)
def test_a_gate_is_named_once_and_apart_from_strategies(line: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(why)):
        read_command(["--config", "digits_inc.yaml", *line.split()])


@pytest.mark.parametrize("name", ["digits_inc", "digits_inc.yaml"])
def test_a_file_is_looked_up_before_the_packaged_ones(name: str) -> None:
    assert configs(read_command(["--config", name]))[0] == str(CONFIGS / "digits_inc.yaml")
    write(name, "method: ewc")
    assert configs(read_command(["--config", name]))[0] == name


def test_the_first_file_names_the_experiment_unless_one_says_so() -> None:
    first, second = write("a.yaml", "method: ewc"), write("b.yaml", "method: bd")
    assert read_command(["--config", first, "--config", second]).experiment == "a"
    third = write("c.yaml", "experiment: mine")
    assert read_command(["--config", first, "--config", third]).experiment == "mine"
    assert read_command(["--config", third, "--method=bd", "--experiment=x"]).experiment == "x"
    assert read_command(["--method", "bd"]).experiment == "unnamed"


def test_methods_are_looked_up_beside_the_experiment_too() -> None:
    write("mine/a.yaml", "method: slow")
    slow = write("mine/methods/a/slow.yaml", "strategies: {ewc: {strength: 1}, bd: {}}")
    command = read_command(["--config", "mine/a.yaml"])
    assert configs(command) == ["mine/a.yaml", slow]
    assert list(command.strategies) == ["ewc", "bd"]


def test_another_name_keeps_what_was_tuned_for_the_config() -> None:
    def read(*flags: str) -> Command:
        return read_command(["--config", "digits_inc.yaml", "--experiment", "mine", *flags])

    tuned = CONFIGS / "methods" / "digits_inc"
    for flags, method in (((), "bd+ewc"), (("--method", "ewc_task_mask"), "ewc_task_mask")):
        command = read(*flags)
        assert command.experiment == "mine"
        assert configs(command)[1:] == [str(tuned / f"{method}.yaml")]
        assert command.notices == [f"The values of {method} are those tuned for digits_inc."]
    own = write("methods/mine/ewc.yaml", "strategies: {ewc: {strength: 3}}")
    write("digits_inc.yaml", (CONFIGS / "digits_inc.yaml").read_text())
    command = read("--method", "ewc")  # of its own before those
    assert (configs(command)[1:], command.notices) == ([own], [])


def test_a_config_that_names_an_experiment_keeps_its_methods_under_another_name() -> None:
    stated = write("copy.yaml", "experiment: digits_inc\nmethod: ewc")
    command = read_command(["--config", stated, "--experiment", "mine"])
    assert configs(command)[1:] == [str(CONFIGS / "methods" / "digits_inc" / "ewc.yaml")]
    with pytest.raises(ConfigurationError, match="Expected experiment to be the name of a folder"):
        read_command(["--config", write("x.yaml", "experiment: ../y"), "--experiment", "z"])


def test_a_method_without_tuned_values_says_so_and_takes_its_parts_in_order() -> None:
    command = read_command(["--config", "digits_inc.yaml", "--method", "ewc+bd"])
    assert list(command.strategies) == ["ewc", "bd"]
    (notice,) = command.notices
    assert notice == (
        "There are no tuned values of ewc+bd for digits_inc: its strategies use their defaults."
    )


def test_an_alias_is_a_strategy_with_a_value() -> None:
    command = read_command(["--method", "gd"])
    assert list(command.strategies) == ["bd"]
    assert [layer.text for layer in command.layers] == [
        "strategies:\n  bd:\n    direction: gradient\n"
    ]


def test_a_file_with_strategies_comes_after_the_methods_file() -> None:
    over = write("over.yaml", "strategies: {bd: {epsilon: 0.5}}")
    command = read_command(["--config", "digits_inc.yaml", "--config", over])
    assert [Path(name).name for name in configs(command)] == [
        "digits_inc.yaml",
        "bd+ewc.yaml",
        "over.yaml",
    ]
    assert list(command.strategies) == ["bd", "ewc"]


def test_another_method_leaves_the_strategies_of_files_out() -> None:
    old = write("old.yaml", "method: bd+ewc\nseed_everything: 7\nstrategies: {bd: {epsilon: 0.5}}")
    command = read_command(["--config", old, "--method", "ewc"])
    assert list(command.strategies) == ["ewc"]
    assert [layer.text for layer in command.layers] == ["method: bd+ewc\nseed_everything: 7\n"]
    assert "--method ewc overrides the `strategies:` of old.yaml." in command.notices


def test_a_strategy_of_ones_own_comes_by_its_class_path() -> None:
    mine = write("mine.yaml", "method: bd+mine\nstrategies: {mine: {class_path: a.B}}")
    assert read_command(["--config", mine, "--trust"]).strategies == {
        "bd": registry.strategies()["bd"],
        "mine": None,
    }
    flags = ["--method", "mine+ewc", "--strategies.mine", "a.B"]
    assert list(read_command(flags).strategies) == ["mine", "ewc"]


def test_a_class_path_is_a_strategy_by_the_name_of_its_class() -> None:
    command = read_command(["--method", "bd+a.b.Mine", "--strategies.Mine.size", "3"])
    assert command.method == "bd+a.b.Mine"
    assert list(command.strategies) == ["bd", "Mine"]
    assert command.strategies["Mine"] == registry.Registered(
        "strategy", "Mine", "a.b:Mine", registry.CLASS_PATH
    )


def test_a_class_path_in_a_config_needs_no_values_there() -> None:
    mine = write("mine.yaml", "method: a.Mine+ewc+b.Other\nstrategies: {Mine: {size: 3}}")
    assert list(read_command(["--config", mine, "--trust"]).strategies) == ["Mine", "ewc", "Other"]


def test_a_method_with_class_paths_may_have_tuned_values() -> None:
    write("x.yaml", "method: ewc+a.Mine")
    tuned = write("methods/x/ewc+a.Mine.yaml", "strategies: {Mine: {size: 3}, ewc: {}}")
    command = read_command(["--config", "x.yaml", "--trust"])
    assert configs(command) == ["x.yaml", tuned]
    assert {name: one and one.target for name, one in command.strategies.items()} == {
        "Mine": "a:Mine",
        "ewc": "bpn_lightning.strategies.ewc:EWC",
    }


def test_a_class_path_may_have_the_name_of_a_built_in_strategy() -> None:
    one = read_command(["--method", "a.ewc", "--strategies.ewc.size", "3"]).strategies["ewc"]
    assert one is not None
    assert one.target == "a:ewc"


NOT_HERE = "Expected --config to be a file or a packaged config, but got "
LIST = " `bpn-fit --list` lists"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--config digts_inc.yaml",
            f"{NOT_HERE}'digts_inc.yaml'. Did you mean 'digits_inc.yaml'?{LIST} the packaged ones.",
        ),
        ("--config .", f"{NOT_HERE}'.'.{LIST} the packaged ones."),
        (
            "--config digits_inc --method bd+ewk",
            (
                "Expected --method to be strategies joined by '+', but got 'bd+ewk' with the unknown "
                f"'ewk'. Did you mean 'ewc'?{LIST} methods and strategies; use the full import path of your own class, package.module.Class."
            ),
        ),
        (
            "--method bd+gd",
            "Expected --method to name each strategy once, but got 'bd+gd'. Leave one 'gd' out.",
        ),
        (
            "--method a.Mine+b.Mine",
            (
                "Expected --method to list classes with different names, but got 'a.Mine+b.Mine' with "
                "'Mine' twice. Leave one out, or give one another name: `strategies: {other: {class_path: b.Mine}}`."
            ),
        ),
        (
            "--method ewc+a.ewc",
            "Expected --method to name each strategy once, but got 'ewc+a.ewc'. Leave one 'a.ewc' out.",
        ),
        (
            "--method bd+a.Mine --strategies.a.Mine.size 3",
            (
                "Expected --strategies.a.Mine.size to be about a strategy of the method 'bd+a.Mine' "
                f"(bd, Mine), but got 'a'.{LIST} all strategies."
            ),
        ),
        (
            "--method bd --strategies.ewc.strength 5",
            (
                "Expected --strategies.ewc.strength to be about a strategy of the method 'bd' (bd), but "
                "got 'ewc'. Add it, such as by --method ewc, or leave it out."
            ),
        ),
        (
            "--method bd+ewc --strategies.ewk.strength=5",
            (
                "Expected --strategies.ewk.strength to be about a strategy of the method 'bd+ewc' "
                f"(bd, ewc), but got 'ewk'. Did you mean 'ewc'?{LIST} all strategies."
            ),
        ),
        (
            "--config",
            (
                "Expected -c/--config to be followed by a value, but got none. `bpn-fit --help` shows the usage."
            ),
        ),
        (
            "--seed_everything 1",
            (
                "Expected --method (or `method:` in a config) to name a method, but got none. "
                f"Try --method bd+ewc;{LIST} them."
            ),
        ),
        (
            "--method bd --data SplitDigit",
            (
                "Expected data.class_path to be a stream, but got 'SplitDigit'. Did you mean "
                f"'SplitDigits'?{LIST} them; use the full import path of your own class, package.module.Class."
            ),
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(line: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_command(line.split())
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [b", "Expected x.yaml to be YAML, but got an error in line 1: "),
        ("- a", "Expected x.yaml to hold keys and values, but got ['a']. "),
        ("trainer: 3", "Expected `trainer:` in x.yaml to be a mapping, but got 3. "),
        (
            "strategies: {bd: }",
            "Expected `strategies.bd:` in x.yaml to be a mapping, but got None. ",
        ),
        (
            "method: bd\nstrategies: {bdd: {}}",
            "Expected strategies.bdd to be about a strategy of the method 'bd'",
        ),
        ("data: {class_path: SplitDigit}", "Expected data.class_path to be a stream, but got"),
        ("method: bdd", "Expected --method to be strategies joined by '+', but got 'bdd'"),
    ],
)
def test_a_file_that_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_command(["--config", write("y.yaml", "method: bd"), "--config", write("x.yaml", text)])
    assert str(caught.value).startswith(message)
