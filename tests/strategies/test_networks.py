"""Every built-in strategy on a ResNet-18, a small ViT and an LSTM: it learns, or is refused by name."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS, small_images

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.strategies.table import STRATEGIES

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "README.md"
OPTIONS: dict[str, dict[str, Any]] = {
    "bd": {"rank": 4},
    "ebll": {"code_size": 2, "autoencoder_epochs": 1},
    "gem": {"memory_size": 4},
    "agem": {"memory_size": 4},
}
REFUSED = {("slnid", name): "but no ReLU is" for name in NETWORKS} | {
    ("prompt", name): "none that can have prompts" for name in NETWORKS if name != "vit"
}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.filterwarnings(
    "ignore:There is a performance drop:UserWarning"
)  # of torch.func's LSTM
def test_a_strategy_learns_or_is_refused(strategy: str, network: str, fit: Any) -> None:
    module_name, _, kind = STRATEGIES[strategy].partition(":")
    made = getattr(import_module(module_name), kind)(**OPTIONS.get(strategy, {}))
    torch.manual_seed(0)
    backbone = NETWORKS[network]()
    before = {name: value.clone() for name, value in backbone.named_parameters()}

    def learn() -> Any:
        return fit([made], backbone=backbone, stream=small_images(each=4), mask="task", lr=0.01)[0]

    if (strategy, network) in REFUSED:
        with pytest.raises(ConfigurationError, match=REFUSED[strategy, network]):
            learn()
        return
    module = learn()
    assert not module.accuracy_matrix.accuracy.isnan().any()
    with torch.no_grad():
        for task in (0, 1):
            columns = slice(*module.network.columns(task))
            logits = module.network(torch.randn(2, 1, 8, 8), task=task)[:, columns]
            assert logits.isfinite().all()
    after = dict(module.network.backbone.named_parameters())
    assert all(after[name].isfinite().all() for name in before)
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_the_table_of_the_docs_is_that_of_the_tests() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    found = {
        (strategy, network): cell.startswith("refused")
        for strategy, *cells in rows
        for network, cell in zip(NETWORKS, cells, strict=True)
    }
    wanted = {(s, n): (s, n) in REFUSED for s in STRATEGIES for n in NETWORKS}
    assert found == wanted
