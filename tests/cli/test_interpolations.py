"""Interpolations are bounded before they are resolved, and what is bounded is what OmegaConf makes."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError

from bpn_lightning.cli.config_files import read_yaml
from bpn_lightning.cli.interpolations import MOST_CHARACTERS, _Sizes, check_interpolations
from bpn_lightning.cli.main import main
from bpn_lightning.errors import ConfigurationError

Said = pytest.CaptureFixture[str]


def doubling(count: int, first: str = "x") -> dict[str, Any]:
    return {"k0": first} | {f"k{i + 1}": f"${{.k{i}}}${{.k{i}}}" for i in range(count)}


@pytest.mark.parametrize("count", [3, 9, 40])
@pytest.mark.parametrize("first", ["", "x", "longer"])
def test_what_passes_makes_no_more_than_it_may(count: int, first: str) -> None:
    config = {"a": doubling(count, first), "b": ["${a.k1}", "${.0}-${oc.env:NOWHERE,${.1}}"][:1]}
    if count == 40:
        with pytest.raises(ConfigurationError, match="at most 100,000 characters"):
            check_interpolations(config)
    else:
        check_interpolations(config)
        made = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
        assert len(str(made)) <= MOST_CHARACTERS


def test_bounds_count_as_omegaconf_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to name a key leads where OmegaConf goes: what is large there is refused here."""
    big = "x" * 30_000
    monkeypatch.setenv("BIG", big)
    config = {"top": big, "a": {"here": big, "list": [big, {"deep": big}], "b": {}}}
    for text in (
        *("${top}", "${a.here}", "${..here}", "${...top}", "${a.list.0}", "${a.list[1].deep}"),
        *("${a[here]}", "${oc.env:BIG}", f"${{oc.env:NOWHERE,{big}}}", "${a.list}"),
    ):
        config["a"]["b"] = {"one": text}
        resolved = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
        assert len(str(resolved["a"]["b"]["one"])) >= len(big)  # type: ignore[index, call-overload]
        config["a"]["b"] = {f"n{i}": text for i in range(4)}
        with pytest.raises(ConfigurationError):
            check_interpolations(config)
    check_interpolations({"a": "x" * 1_000_000})


def size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(len(str(key)) + size(one) for key, one in value.items())
    return sum(map(size, value)) if isinstance(value, list) else len(str(value))


def test_what_is_counted_is_never_below_what_omegaconf_makes() -> None:
    """Names of all kinds that lead to something, in trees with keys that look like numbers."""
    random = Random(0)
    keys = ["000", "001", "0", "1", "a", "1_0", "01", "10", 1, 0]
    read = 0
    for _ in range(800):
        tree: dict[Any, Any] = {
            random.choice(keys): random.choice(
                ["x" * 50, 10**30, None, ["y" * 40] * 12, dict.fromkeys(keys[:7], "z" * 30)]
            )
            for _ in range(5)
        }
        for i in range(4):
            first, second = random.choice(list(tree)), random.choice(keys)
            deep = random.choice(["", f".{second}", f"[{second}]"])
            name = f"${{{random.choice(['', '.'])}{first}{deep}}}"
            tree[f"k{i}"] = random.choice(["", "-", name]) + name
        try:
            check_interpolations(tree)
        except ConfigurationError:
            continue
        try:
            made = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
        except InterpolationKeyError:  # OmegaConf 2.3 does not find keys that are numbers
            continue
        read += 1
        assert size(made) <= _Sizes(tree).of((), tree), tree
    assert read > 10


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"a": "${b}", "b": "${a}"}, "but got a cycle: a -> b -> a. Set one of them to a value."),
        ({"a": {"b": "${a}"}}, "but got a cycle: a.b -> a -> a.b."),
        ({f"k{i}": f"${{k{i + 1}}}" for i in range(5000)}, "in at most 50 steps"),
        ({"a": {"x": 1}, "b": "${a}", "c": "${b.x}"}, "which goes through '${a}'"),
        ({"a": "${oc.create:{x:1}}"}, "but got '${oc.create:{x:1}}' in a. Other resolvers"),
        ({"a": "${oc.decode:1}"}, "an environment variable, but got '${oc.decode:1}' in a."),
        (
            {"a": {"b": "${oc.dict.values:a}"}},
            "in a.b. Other resolvers and nesting are not supported.",
        ),
        ({"a": "${${b}}", "b": "a"}, "but got '${${b}}' in a."),
        ({"a": "${oc.env:X,${b}}", "b": "a"}, "but got '${oc.env:X,${b}}' in a."),
        ({"a": "x", "b": "${c.d}"}, "error in b: Interpolation key 'c.d' not found."),
        ({"a": ["x"] * 11, "b": "${a[1_0]}"}, "in b: Interpolation key 'a[1_0]' not found."),
        ({"a": ["x"] * 11, "b": "${a.01}"}, "in b: Interpolation key 'a.01' not found."),
        ({"1": "x", 1: "y", "b": "${.1}"}, "in b: Interpolation key '.1' not found."),
        ({"a": 10**4000, "b": "${a}" * 30}, "at most 100,000 characters"),
        (
            {"000": "x" * 100} | {f"{i + 1:03}": f"${{.{i:03}}}" * 2 for i in range(30)},
            "at most 100,000 characters",
        ),
        ({"a": "${ b }"}, "but got '${ b }' in a."),
    ],
)
def test_what_cannot_be_bounded_is_refused(config: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_interpolations(config)
    assert part in str(caught.value)


BOMB = ", ".join(f"{key}: '{value}'" for key, value in doubling(40).items())
BAR = "trainer: {callbacks: {class_path: lightning.pytorch.callbacks.RichProgressBar, init_args: {console_kwargs: {%s}}}}"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (BAR % BOMB, "to expand to at most 100,000 characters, but got more in trainer.callbacks"),
        (BAR % "a: '${.b}', b: '${.a}'", "but got a cycle: trainer.callbacks"),
        ("data: {class_path: SplitDigits, init_args: bomb.yaml}", "SplitDigits"),
        ("data: bomb.yaml", "configs cannot include others"),
        ("trainer: {callbacks: [bomb.yaml]}", "configs cannot include others"),
        (BAR.replace("{%s}", "bomb.yaml"), "console_kwargs to be dict"),
    ],
)
def test_a_run_is_refused_before_anything_is_put_together(
    text: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bomb.yaml").write_text(f"{{{BOMB}}}")
    Path("x.yaml").write_text(text)
    line = ["--config", "digits_inc.yaml", "--config", "x.yaml", "--trainer.accelerator", "cpu"]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("bpn-fit: error: ")
    assert part in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bomb.yaml", "x.yaml"]


def test_aliases_repeat_text_and_keys_too(tmp_path: Path) -> None:
    for text, times in ((f"a: &a {'x' * 1_000_000}", 20), (f"a: &a {{{'x' * 1000}: 1}}", 9_000)):
        path = tmp_path / "x.yaml"
        path.write_text(f"{text}\nb: [{', '.join(['*a'] * times)}]")
        with pytest.raises(ConfigurationError, match="at most 100,000 values"):
            read_yaml(path)
