"""The suite's options, and which promise is examined for which strategy."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from bpn_lightning.conformance.pair import TwoProcesses
from bpn_lightning.errors import ConfigurationError

pytest.register_assert_rewrite("bpn_lightning.conformance.promises")
pytest.register_assert_rewrite("bpn_lightning.conformance.gate_promises")

PROMISES = "promises.py"
GATE_PROMISES = "gate_promises.py"

_STATE = pytest.StashKey["_State"]()


class _State:
    """What lives as long as the run of pytest."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="conformance_")
        self.arguments: dict[str, Any] = {}
        self.cases: list[Any] = []
        self.scenarios: dict[str, Any] = {}
        self.two_processes: TwoProcesses | None = None
        self.not_applicable: dict[str, dict[str, str]] = {}  # reasons by promise and strategy

    def subfolder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder.name))

    def scenario(self, case: Any) -> Any:
        from bpn_lightning.conformance.scenarios import Scenario

        if case.name not in self.scenarios:
            self.scenarios[case.name] = Scenario(case, self.subfolder())
        return self.scenarios[case.name]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Name the strategies, and their arguments."""
    group = parser.getgroup("bpn_lightning", "conformance of continual-learning strategies")
    group.addoption(
        "--strategy",
        "--gate",
        action="append",
        default=[],
        metavar="NAME",
        help="a class path (my_lab.MyStrategy), a registered name (ewc), or several that run "
        "together (bd+ewc); may be repeated. Gates are strategies, with promises of their own",
    )
    group.addoption(
        "--strategy-arguments",
        action="append",
        default=[],
        metavar="MAPPING",
        help="arguments of constructors as YAML or JSON, by the strategy's name as it is written in "
        "--strategy: '{my_lab.MyStrategy: {strength: 3}}'; may be repeated",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect the promises, whatever files and functions the author's own tests are in."""
    config.stash[_STATE] = _State()
    config.addinivalue_line("python_files", PROMISES)
    config.addinivalue_line("python_files", GATE_PROMISES)
    config.addinivalue_line("python_functions", "test_")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Read the options and import the strategies, while two more processes get ready."""
    config, state = session.config, session.config.stash[_STATE]
    names = config.getoption("--strategy")
    try:
        for text in config.getoption("--strategy-arguments"):
            state.arguments.update(_read_mapping(text))
        if names and not config.option.collectonly:
            state.two_processes = TwoProcesses(state.subfolder())
        from bpn_lightning.conformance.cases import read_cases

        state.cases = read_cases(names, state.arguments)
    except ConfigurationError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what gates promise where none is examined."""
    if collection_path.name != GATE_PROMISES:
        return None
    from bpn_lightning.conformance.declarations import has_no_gate

    return all(map(has_no_gate, config.stash[_STATE].cases)) or None


def _read_mapping(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise ConfigurationError(
            f"Expected --strategy-arguments to be a mapping in YAML or JSON, but got {text!r}. "
            "Write '{my_lab.MyStrategy: {strength: 3}}'."
        )
    return found


def pytest_report_header(config: pytest.Config) -> str:
    """Say what is examined."""
    return f"conformance of strategies: {', '.join(config.getoption('--strategy'))}"


def pytest_pycollect_makeitem(collector: Any, name: str, obj: object) -> list[Any] | None:
    """Leave out a promise that no strategy of this run has made."""
    if not hasattr(obj, "not_applicable"):
        return None
    state = collector.config.stash[_STATE]
    reasons = {case.name: obj.not_applicable(case) for case in state.cases}
    state.not_applicable[name] = {case: reason for case, reason in reasons.items() if reason}
    return None if len(state.not_applicable[name]) < len(reasons) else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Examine a promise for every strategy that makes it."""
    if not hasattr(metafunc.function, "not_applicable"):
        return
    state = metafunc.config.stash[_STATE]
    without = state.not_applicable[metafunc.function.__name__]
    cases = [case for case in state.cases if case.name not in without]
    names = [case.name for case in cases]
    metafunc.parametrize("scenario", cases, ids=names, indirect=True, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What two processes learn comes last: they work while the other promises are examined."""
    items.sort(key=_asks_two_processes)


def _asks_two_processes(item: pytest.Item) -> bool:
    return item.path.name == PROMISES and "two_processes" in getattr(item, "fixturenames", ())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the two processes begin, if somebody will ask what they have learned."""
    state = session.config.stash[_STATE]
    asked: list[Any] = [
        item.callspec.params["scenario"]
        for item in session.items
        if isinstance(item, pytest.Function) and _asks_two_processes(item)
    ]
    if state.two_processes is not None and asked:
        state.two_processes.begin([case.name for case in asked], state.arguments)
    elif state.two_processes is not None:
        state.two_processes.stop()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say which promises were not examined, and which declaration says so."""
    lines = [
        f"{name}[{case}]: {reason}"
        for name, reasons in config.stash[_STATE].not_applicable.items()
        for case, reason in reasons.items()
    ]
    if lines:
        terminalreporter.section("not applicable, by declaration")
        for line in lines:
            terminalreporter.line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End what was started."""
    state = config.stash.get(_STATE, None)
    if state is not None:
        if state.two_processes is not None:
            state.two_processes.stop()
        state.folder.cleanup()


@pytest.fixture(scope="session")
def scenario(request: pytest.FixtureRequest) -> Any:
    """One case and what it did."""
    return request.config.stash[_STATE].scenario(request.param)


@pytest.fixture(scope="session")
def two_processes(request: pytest.FixtureRequest) -> TwoProcesses | None:
    """What two processes have learned together."""
    return request.config.stash[_STATE].two_processes
