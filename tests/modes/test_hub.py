"""A bundle goes to a hub and comes back; huggingface_hub talks HTTP to a server that does what the hub documents."""

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch

from bpn_lightning import ContinualModule
from bpn_lightning.cli.bundle import main
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError, ConfigurationError, ResultsError
from bpn_lightning.export.exporting import export_module
from bpn_lightning.modes import hub, load
from bpn_lightning.modes.bundle import read_bundle
from bpn_lightning.modes.contents import contents
from bpn_lightning.modes.training_state import check_training_state
from bpn_lightning.nn import MLP
from bpn_lightning.strategies import BeneficialPerturbation

huggingface_hub = pytest.importorskip("huggingface_hub")
pytestmark = [
    pytest.mark.slow,
    # huggingface_hub hands files to its HTTP client in a way that this one is about to drop.
    pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning"),
]

IMAGES = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
REPOSITORY = "lab/digits"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Double:
    """What one repository holds, and what it says of that."""

    files: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # lies
    endless: str = ""
    made: list[Any] = field(default_factory=list)
    url: str = ""

    def tree(self) -> list[dict[str, Any]]:
        return [self._entry(path, content) for path, content in self.files.items()]

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        size = self.sizes.get(path, len(content))
        entry: dict[str, Any] = {"type": "file", "oid": "0" * 40, "path": path, "size": size}
        if path.endswith(".safetensors"):
            entry["lfs"] = {"oid": sha256(content).hexdigest(), "size": size, "pointerSize": 130}
        return entry

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    self.files[value["path"]] = self.uploads[value["oid"]]
                case "deletedFile":
                    del self.files[value["path"]]


class Handler(BaseHTTPRequestHandler):
    """The hub's API, as far as a bundle needs it."""

    protocol_version = "HTTP/1.1"
    double: Double

    def log_message(self, *_: Any) -> None: ...

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _say(self, value: Any, status: int = 200) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        double, path = self.double, unquote(urlsplit(self.path).path)
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            return self._say(double.tree())
        if path == f"/api/models/{REPOSITORY}" or path.startswith(
            f"/api/models/{REPOSITORY}/revision/"
        ):
            return self._say({"id": REPOSITORY, "sha": COMMIT, "siblings": []})
        name = path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")
        if name == double.endless:
            return self._send_without_end()
        if name in double.files:
            return self._say(double.files[name])
        return self._say({"error": "Repository not found"}, 404)

    def _send_without_end(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"10000\r\n" + bytes(2**16) + b"\r\n")
        except OSError:
            self.close_connection = True

    def do_POST(self) -> None:
        double, body = self.double, self._body()
        path = urlsplit(self.path).path
        if path == "/api/validate-yaml":  # the front matter of the model card
            return self._say({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            double.made.append(json.loads(body))
            return self._say({"url": f"{double.url}/{REPOSITORY}"})
        if path.startswith(f"/api/models/{REPOSITORY}/preupload/"):
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self._say({"files": files})
        if path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            objects = [
                {**one, "actions": {"upload": {"href": f"{double.url}/upload/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._say({"transfer": "basic", "objects": objects})
        if path.startswith(f"/api/models/{REPOSITORY}/commit/"):
            double.commit([json.loads(line) for line in body.splitlines()])
            address = f"{double.url}/{REPOSITORY}/commit/{COMMIT}"
            return self._say({"commitUrl": address, "commitOid": COMMIT})
        return self._say({"error": "not found"}, 404)

    def do_PUT(self) -> None:
        content = self._body()
        self.double.uploads[self.path.rpartition("/")[2]] = content
        self._say({})


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Double]:
    from huggingface_hub import constants

    made = Double()
    handler = type("Own", (Handler,), {"double": made})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    before = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + before)
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", "hf_double")
    yield made
    huggingface_hub.utils.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fits import trainer_of

    folder = tmp_path_factory.mktemp("trained")
    module = ContinualModule(MLP([16]), mask="seen")
    trainer = trainer_of(1, [BeneficialPerturbation(4)], default_root_dir=folder)
    trainer.fit(module, SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=64, seed=0))
    export_module(module.eval(), folder / "whole", names=["a", "b"], training_state=True)
    return export_module(module.eval(), folder / "out", names=["a", "b"])


@pytest.fixture
def bundle(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, tmp_path / "out"))


def test_there_and_back(
    bundle: Path, double: Double, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "training").mkdir()
    (bundle / "training" / "memory.safetensors").write_bytes(b"private")
    (bundle / "tasks" / "a" / "notes.txt").write_text("private")
    double.files = {".gitattributes": b"*", "tasks/old/adapter_config.json": b"{}"}
    assert main(["push", "out", REPOSITORY]) == 0
    assert capsys.readouterr().out == f"{double.url}/{REPOSITORY}/commit/{COMMIT}\n"
    assert double.made[0]["visibility"] == "private"
    wanted = contents(bundle)
    assert "tasks/a/adapter_model.safetensors" in wanted
    assert sorted(double.files) == sorted([".gitattributes", *wanted])
    assert main(["pull", REPOSITORY, "back"]) == 0
    said = capsys.readouterr()
    assert said.out == "back\n"
    assert "1 other files were left there, such as .gitattributes" in said.err
    for path in wanted:
        assert (tmp_path / "back" / path).read_bytes() == (bundle / path).read_bytes()
    assert torch.equal(load("back")(IMAGES, task="b"), load(bundle)(IMAGES, task="b"))
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


def test_a_training_state_goes_along_where_that_is_asked_for(
    trained: Path, bundle: Path, double: Double, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", "out", REPOSITORY, "--training_state"]) == 2
    assert "Expected a training state in out, but there is none" in capsys.readouterr().err
    assert not double.made
    shutil.copytree(trained.with_name("whole"), bundle, dirs_exist_ok=True)
    assert main(["push", "out", REPOSITORY, "--training_state"]) == 0
    own = contents(bundle, training_state=True)
    assert sorted(double.files) == own
    assert "training_state/state.json" in own
    assert main(["pull", REPOSITORY, "whole", "--training_state"]) == 0
    check_training_state(tmp_path / "whole", read_bundle("whole"))
    assert contents(tmp_path / "whole", training_state=True) == own
    assert main(["pull", REPOSITORY, "weights"]) == 0
    assert not (tmp_path / "weights" / "training_state").exists()
    assert "2 other files were left there, such as training_state/state" in capsys.readouterr().err

    assert main(["push", "out", REPOSITORY]) == 0  # what is there is of an earlier bundle
    assert sorted(double.files) == contents(bundle)
    assert main(["pull", REPOSITORY, "none", "--training_state"]) == 2
    assert "to hold a training state, but it has none" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_training_state_of_other_weights_is_not_sent(
    trained: Path, double: Double, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(trained.with_name("whole"), tmp_path / "whole"))
    path = whole / "training_state" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights": "0" * 64}))
    with pytest.raises(CheckpointError, match="to be of the bundle's weights and tasks"):
        hub.push(whole, REPOSITORY, training_state=True)
    assert not double.made


@pytest.fixture
def pushed(bundle: Path, double: Double) -> Double:
    hub.push(bundle, REPOSITORY)
    return double


MODEL = "model.safetensors"


def _flip(double: Double) -> None:
    content = bytearray(double.files["tasks/a/adapter_model.safetensors"])
    content[-1] ^= 1
    double.files["tasks/a/adapter_model.safetensors"] = bytes(content)


def _lie(double: Double) -> None:
    double.sizes[MODEL] = 10


def _bomb(double: Double) -> None:
    double.sizes[MODEL] = 2**40


def _endless(double: Double) -> None:
    double.endless = "README.md"


def _out(double: Double) -> None:
    double.files["../evil"] = b""


def _hidden(double: Double) -> None:
    double.files["tasks/..\\..\\evil/adapter_config.json"] = b""


def _half(double: Double) -> None:
    del double.files[MODEL]


def _other(double: Double) -> None:
    double.files = {"pytorch_model.bin": b""}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_flip, "not the file of"),
        (_lie, "of 10 bytes that the repository lists, but got more"),
        (_bomb, "at most 17,179,869,184 bytes, but got 1,099,5"),
        (_endless, "bytes that the repository lists, but got more"),
        (_out, "names within its folder, but got '../evil'"),
        (_hidden, "names within its folder"),
        (_half, "No such file|FileNotFoundError"),
        (_other, "to hold a bundle, with config.json, but got pytorch_model.bin"),
    ],
)
def test_what_is_not_taken(
    change: Callable[[Double], None], said: str, pushed: Double, tmp_path: Path
) -> None:
    change(pushed)
    with pytest.raises(CheckpointError, match=said):
        hub.pull(REPOSITORY, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_is_not_sent(bundle: Path, double: Double, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle / "tasks" / "a" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["push", "out", REPOSITORY]) == 2
    assert "truncated or changed" in capsys.readouterr().err
    assert not double.made


def test_places_that_cannot_be(pushed: Double, bundle: Path) -> None:
    with pytest.raises(ResultsError, match="to be a new folder, but it exists"):
        hub.pull(REPOSITORY, bundle)
    with pytest.raises(
        ConfigurationError, match=r"'lab/none' to be a repository of models to read"
    ):
        hub.pull("lab/none", "back")
    with pytest.raises(
        ConfigurationError, match=r"to be a repository of models to write, but got HF"
    ):
        hub.push(bundle, "lab/../x")
    assert not Path("back").exists()
