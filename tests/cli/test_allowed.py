"""What a file may name is harmless, name by name and argument by argument; and nothing else is reached."""

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from bpn_lightning import registry
from bpn_lightning.bench.cell import PROBES
from bpn_lightning.cli.allowed import (
    FAMILIES,
    SINGLE,
    Given,
    allowed_objects,
    check_given,
    check_places,
)
from bpn_lightning.cli.export import main as export
from bpn_lightning.cli.main import main
from bpn_lightning.cli.trust import OPEN
from bpn_lightning.errors import ConfigurationError

pytestmark = pytest.mark.slow

Said = pytest.CaptureFixture[str]

MODULES = sorted({*FAMILIES, *(name.rpartition(".")[0] for name in SINGLE)})


def allowed(one: Any) -> bool:
    return any(one is other for other in allowed_objects())


def refused(one: Any) -> bool:
    try:
        check_given([Given("here.class_path", one, "a.B")])
    except ConfigurationError:
        return True
    return False


# --- every name ----------------------------------------------------------------------------------

#: Why a public name of the allowed modules may not be named, by kind; the first that holds.
KINDS: dict[str, Callable[[Any], bool]] = {
    "a module: what lies in it is named on its own": lambda one: isinstance(one, ModuleType),
    "a value, which is neither built nor called": lambda one: not callable(one),
    "a function that builds no network": lambda one: not isinstance(one, type),
    "of no family: its module shows it for other reasons": lambda one: (
        not issubclass(one, tuple(base_of(name) for name in FAMILIES))
    ),
}

#: Classes of the families' kinds that are left out all the same: servers, other hardware, and what
#: every run refuses or nobody names.
LEFT_OUT = {
    *(
        "CometLogger",
        "LitLogger",
        "Logger",
        "MLFlowLogger",
        "WandbLogger",
        "XLAProfiler",
        "Profiler",
    ),
    *("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAStrategy", "Strategy"),
}


#: Functions of ours that make networks of other libraries.
SOURCES = {
    f"{library}_backbone"
    for library in ("efficientnet_lite", "timm", "torchvision", "transformers")
}


def base_of(module: str) -> Any:
    path, _, name = FAMILIES[module].rpartition(".")
    return getattr(import_module(path), name)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_allowed_or_has_a_reason_and_is_refused(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bpn_lightning.cli.allowed._plugins", list
    )  # looked up for each, which takes long
    for name, one in vars(import_module(module)).items():
        if name.startswith("_") or allowed(one):
            continue
        assert refused(one), f"{module}.{name}"
        reason = next((kind for kind, holds in KINDS.items() if holds(one)), None)
        ours = module.startswith("bpn_lightning")
        assert reason or name in LEFT_OUT or ours, f"say why {module}.{name} is left out"


def test_no_other_name_of_any_imported_module_gets_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever leads through an open module: aliases of other modules, functions, methods of classes."""
    monkeypatch.setattr("bpn_lightning.cli.allowed._plugins", list)
    seen = {id(one) for one in allowed_objects()}
    count = 0
    for module in [name for name in sys.modules if name.startswith(tuple(f"{o}." for o in OPEN))]:
        for one in list(vars(sys.modules[module]).values()):
            parts = list(vars(one).values()) if isinstance(one, type) else []
            for reached in (one, *parts):
                if callable(reached) and id(reached) not in seen:
                    seen.add(id(reached))
                    count += 1
                    assert refused(reached), f"{reached} in {module}"
    assert count > 3_000


def test_what_is_allowed_is_of_a_kind_that_only_computes() -> None:
    from lightning.pytorch import Callback, LightningDataModule
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler
    from torchmetrics import Metric
    from torchvision import models

    kinds = (
        nn.Module,
        torch.optim.Optimizer,
        torch.optim.lr_scheduler.LRScheduler,
        Metric,
        Callback,
    )
    single = {name.rpartition(".")[2] for name in SINGLE}
    for one in allowed_objects():
        name = one.__name__
        if not isinstance(one, type):
            networks = {models.get_model_builder(name) for name in models.list_models(models)}
            assert one in networks or name in SOURCES | {"sgd"}
        elif issubclass(one, LightningDataModule):
            assert name in registry.streams()
        elif not issubclass(one, kinds):
            assert issubclass(one, Logger | Profiler) or name in single


# --- every argument ------------------------------------------------------------------------------

ALLOWED_ONLY = "a function or a class: of those that are allowed"
TABLE = "a name, looked up in a fixed table or in the network"
PLACE = "a place, which has to lie below the run's folder"
PART = "a part of a name below that place"
TEXT = "a text that is shown or logged"
READ = "a place that is read, with the bounds of all data; published files are fetched to it"
DATA = "values, which are neither built nor called"

#: What each argument may be that takes a text, a function, a class, or anything.
ARGUMENTS = {
    ALLOWED_ONLY: """activation activation_layer amount apply_pruning avg_fn batch_size_fn block block_type
        blocks custom_decoder custom_encoder ddp_comm_hook ddp_comm_wrapper distance_function
        downsample_layer inception_blocks inverted_residual lambda_func length_fn lr_lambda modules
        norm_layer pruning_fn scale_fn setup stem_type teardown use_lottery_ticket_hypothesis""",
    TABLE: """adjust_lr_fn approximate attr_name batch_arg_name class_order class_order_seed device duration interval layer
        layers line_search_fn margin_mode mode monitor name nonlinearity padding parameter_names
        parameters_to_prune process_group_backend reduction sets sort_by_key usual weights dtype
        padding_mode reduce""",
    PLACE: "dirpath exclude_batches_path root_dir save_dir cache_dir",
    PART: "filename prefix sub_dir version",
    READ: "folder path root weights_file",
    DATA: """config console_kwargs defaults options parameters params process_group table_kwargs values
        _random_samples add_bias_kv add_zero_attn affine batch_first bias dilation dropout embed_dim eps
        groups in_channels kdim kernel_size momentum num_heads out_channels output_padding size_average
        stride track_running_stats transposed vdim""",
}
REASON = {name: reason for reason, names in ARGUMENTS.items() for name in names.split()}


def arguments(one: Any) -> Iterator[inspect.Parameter]:
    for maker in one.__mro__ if isinstance(one, type) else [one]:
        try:
            found = inspect.signature(maker).parameters.values()
        except (TypeError, ValueError):
            continue
        yield from (p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def test_every_argument_that_takes_more_than_numbers_has_a_reason() -> None:
    asking = ("str", "Path", "Callable", "Any", "type[", "Type[", "_empty")
    for one in allowed_objects():
        for parameter in arguments(one):
            said = str(parameter.annotation)
            hook = parameter.name.startswith("on_") and "Callable" in said  # of LambdaCallback
            if any(word in said for word in asking) and not hook:
                assert parameter.name in REASON, f"{one.__name__}({parameter.name}: {said})"


HOSTILE = "/nowhere/marked.so"
_heard: list[str] | None = None


def _listen(event: str, args: tuple[Any, ...]) -> None:
    if _heard is None:
        return
    grave = event.startswith(("os.", "subprocess.", "socket.", "shutil.", "pty.", "ctypes.dlopen"))
    if (grave or event in ("open", "exec", "compile", "import")) and "marked" in repr(args):
        _heard.append(f"{event}{args!r}")


def test_python_itself_hears_nothing_of_hostile_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each allowed class is built with a path in each argument in turn; an audit hook hears what is done."""
    global _heard
    monkeypatch.chdir(tmp_path)
    for library in ("timm", "efficientnet_lite_pytorch", "transformers"):
        with suppress(ImportError):
            import_module(library)  # whose sources have the word
    sys.addaudithook(_listen)
    tried = 0
    for one in allowed_objects():
        names = list(
            dict.fromkeys(p.name for p in arguments(one) if p.name not in ("self", "args"))
        )
        if not isinstance(one, type):
            names = names[:1]  # of torchvision, all of one form
        needed = {p.name: 1 for p in arguments(one) if p.default is p.empty}
        for name in names:
            values = {key: 1 for key in needed if key in names} | {name: HOSTILE}
            _heard = []
            with suppress(Exception), torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                one(**values)  # most refuse it
            heard, _heard = _heard, None
            tried += 1
            read = REASON.get(name) == READ and all(word.startswith("open") for word in heard)
            assert not heard or read, f"{one.__name__}({name}): {heard}"
    assert tried > 2_000
    assert list(tmp_path.iterdir()) == []


# --- as a user meets it --------------------------------------------------------------------------

RUN = "import os; os.system('touch owned')\n"
GRAPH = f"torch.fx.graph_module.reduce_graph_module, init_args: {{body: {{_code: pass}}, import_block: {RUN!r}}}"
LOAD = "load_from_checkpoint, init_args: {checkpoint_path: x.ckpt, weights_only: false}"
LAYER = "torch.nn.TransformerEncoderLayer, init_args: {d_model: 8, nhead: 2, activation: %s}"
UP = "{epoch].__class__.__name__[0:.>2.0}/"
EVIL = {
    "the issue's": f"model: {{backbone: {{class_path: {GRAPH}}}}}",
    "as an argument": "model: {backbone: {class_path: torch.nn.DataParallel, init_args: {module: "
    f"{{class_path: {GRAPH}}}}}}}}}",
    "in a list": f"trainer: {{callbacks: [{{class_path: {GRAPH}}}]}}",
    "by its short name": "model: {backbone: {class_path: GraphModule, init_args: {root: {}}}}",
    "an alias": "model: {backbone: {class_path: torch.nn.modules.module.torch.load}}",
    "a module's module": "model: {backbone: torchvision.models._api.importlib.import_module}",
    "of the system": "trainer: {callbacks: lightning.pytorch.callbacks.model_checkpoint.os.system}",
    "a method that unpickles": f"data: {{class_path: bpn_lightning.datamodules.SplitDigits.{LOAD}}}",
    "a function of ours": "model: {optimizer: bpn_lightning.run.checkpoints.read_checkpoint}",
    "a function as a value": "trainer: {callbacks: {class_path: LambdaCallback, init_args: "
    "{on_fit_start: torchvision.models.get_model}}}",
    "the shell as a value": "trainer: {callbacks: {class_path: LambdaCallback, init_args: "
    "{on_fit_start: os.system}}}",
    "an installed package's": "model: {backbone: sklearn.datasets.load_svmlight_file}",
    "weights to fetch": "model: {backbone: {class_path: torchvision.models.resnet18, init_args: "
    "{weights: DEFAULT}}}",
    "under an older name": "model: {backbone: {class_path: torchvision.models.resnet18, dict_kwargs: "
    "{pretrained: true}}}",
    "a logger with a server": "trainer: {logger: {class_path: MLFlowLogger, init_args: "
    "{tracking_uri: 'http://x'}}}",
    "a folder elsewhere": "trainer: {callbacks: {class_path: ModelCheckpoint, init_args: {dirpath: /tmp}}}",
    "a folder beside": "trainer: {logger: {class_path: CSVLogger, init_args: {save_dir: logs}}}",
    "a name that leads up": "trainer: {callbacks: {class_path: ModelCheckpoint, init_args: "
    "{filename: ../../../../x}}}",
    "a name that leads up when it is formatted": "trainer: {callbacks: {class_path: ModelCheckpoint, "
    f"init_args: {{auto_insert_metric_name: false, filename: '{UP}{UP}{UP}{UP}x'}}}}}}",
    "a field that is a place": "trainer: {callbacks: {class_path: ModelCheckpoint, init_args: "
    "{filename: '{/tmp/x}'}}}",
    "a variable": "trainer: {logger: {class_path: TensorBoardLogger, init_args: "
    "{save_dir: '$HOME/ewc/seed_0/x'}}}",
    "a variable in all runs": "runs: $HOME",
    "a variable in a part": "trainer: {logger: {class_path: TensorBoardLogger, init_args: {save_dir: "
    "runs/digits_inc/bd+ewc/seed_0/x, sub_dir: $HOME}}}",
    "a variable in a name": "experiment: $HOME",
    "a store": "trainer: {callbacks: {class_path: ModelCheckpoint, init_args: {dirpath: 's3://x'}}}",
    "an environment's": "trainer: {default_root_dir: '${oc.env:HOME}'}",
    "a profile": "trainer: {profiler: {class_path: SimpleProfiler, init_args: {dirpath: ., filename: x}}}",
    "all runs": "runs: /tmp",
    "all runs, up": "runs: ../up",
    "a cache": "data: {class_path: EightDatasets, init_args: {cache_dir: /tmp}}",
}


#: Not allowed, of another type, or elsewhere.
REFUSALS = (
    "needs no trust",
    "runs or loads code",
    "to match its type",
    "to be below",
    "to be a name in which braces contain only",
    "to be a name without variables",
    "without slashes or variables",
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "trust"),
    [*((kind, []) for kind in EVIL), *((kind, ["--trust", "false"]) for kind in list(EVIL)[:6])],
)
def test_a_strangers_config_is_refused_and_writes_nothing(
    kind: str, trust: list[str], here: Path, capsys: Said
) -> None:
    Path("evil.yaml").write_text(EVIL[kind])
    line = ["--config", "digits_inc.yaml", "--config", "evil.yaml", "--trainer.accelerator", "cpu"]
    assert main([*line, *trust]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("bpn-fit: error: Expected ")
    assert any(reason in said.err for reason in REFUSALS)
    assert os.listdir() == ["evil.yaml"]


@pytest.mark.parametrize("kind", ["the issue's", "as an argument", "an alias", "weights to fetch"])
def test_a_strangers_run_is_not_exported(kind: str, here: Path, capsys: Said) -> None:
    config = yaml.safe_load(EVIL[kind])
    config["model"]["mask"] = "all"
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert export([".", "--to", "out"]) == 2
    assert capsys.readouterr().err.startswith("bpn-export: error: Expected ")
    assert os.listdir() == ["config.yaml"]


def test_the_same_object_is_allowed_by_every_name_that_it_has(here: Path, capsys: Said) -> None:
    layers = "{class_path: torch.nn.%s, init_args: {in_features: 8, out_features: 4}}"
    for name in ("Linear", "modules.Linear", "modules.linear.Linear"):
        Path("x.yaml").write_text(f"model: {{backbone: {layers % name}}}")
        line = ["--config", "digits_inc.yaml", "--config", "x.yaml", "--trainer.accelerator", "cpu"]
        assert main([*line, "--data.validation_fraction", "2"]) == 2  # got as far as the data
        assert "validation_fraction" in capsys.readouterr().err


def test_what_is_typed_is_the_users_and_a_default_is_nobodys(here: Path) -> None:
    check_given(
        [Given("x.class_path", torch.fx.GraphModule, "torch.fx.GraphModule")],
        {"torch.fx.GraphModule"},
    )
    with pytest.raises(ConfigurationError, match="needs no trust"):
        check_given(
            [Given("x.class_path", torch.fx.GraphModule, "torch.fx.GraphModule")],
            {"torch.fx.Graph"},
        )
    Path("x.yaml").write_text(
        "trainer: {callbacks: BackboneFinetuning}"
    )  # by default with a function
    line = ["--config", "digits_inc.yaml", "--config", "x.yaml", "--trainer.accelerator", "cpu"]
    assert main([*line, "--data.validation_fraction", "2"]) == 2


@pytest.mark.parametrize(
    ("name", "good"),
    [
        *((name, True) for name in ("{epoch}", "{epoch:02d}-{val/loss:.3f}", "best-{step:d}", "x")),
        *(
            (name, False)
            for name in ("{epoch!r}", "{epoch:>9}", "{a.b}", "{a[0]}", "{}", "{0}", "{{x")
        ),
        *(
            (name, False)
            for name in ("{step:0999999999d}", "{x:.999999999f}", "{/tmp/x}", "{../x}")
        ),
    ],
)
def test_a_files_name_is_formatted_with_plain_fields_only(
    name: str, good: bool, here: Path
) -> None:
    value = [Given("trainer.callbacks.init_args.filename", name)]
    check_places(value, here, {name})  # a user may type it
    if good:
        check_places(value, here)
    else:
        with pytest.raises(ConfigurationError, match="in which braces contain only a key"):
            check_places(value, here)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            f"model: {{backbone: {{class_path: {LAYER % 'torch.load'}}}}}",
            (
                "Expected model.backbone to be valid arguments of TransformerEncoderLayer, but it raised RuntimeError: activation should be relu/gelu, not torch.load."
            ),
        ),
        (
            (
                "trainer: {callbacks: {class_path: lightning.pytorch.callbacks.ModelCheckpoint, "
                "init_args: {every_n_epochs: -3}}}"
            ),
            (
                "Expected trainer.callbacks to be valid for one of its classes, but got an error: "
                "Invalid value for every_n_epochs=-3. Must be >= 0"
            ),
        ),
    ],
)
def test_what_a_class_raises_is_said_with_its_key(
    text: str, part: str, here: Path, capsys: Said
) -> None:
    Path("x.yaml").write_text(text)
    line = ["--config", "digits_inc.yaml", "--config", "x.yaml", "--trainer.accelerator", "cpu"]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert part in said
    if "backbone" in text:
        config = yaml.safe_load(text)
        config["model"]["mask"] = "all"
        Path("config.yaml").write_text(yaml.safe_dump(config))
        assert export([".", "--to", "out"]) == 2
        assert part in capsys.readouterr().err


def test_a_grids_probes_need_no_trust() -> None:
    wanted = {f"bpn_lightning.paper.probes.{name}" for name in PROBES.values()}
    assert wanted <= set(SINGLE)
