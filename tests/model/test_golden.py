"""A checkpoint of this schema that lies in the repository: it is loaded, and a run continues from it.

``python tests/model/test_golden.py`` writes it, when the schema has changed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.nn import MLP
from bpn_lightning.nn.structure import SCHEMA
from bpn_lightning.strategies import EWC, BeneficialPerturbation

GOLDEN = Path(__file__).parent / "golden" / f"schema_{SCHEMA}.ckpt"
SAVED_AT = 8  # updates: in the middle of the second task's first epoch

# The golden file was written with a newer Lightning than the oldest that is supported.
pytestmark = pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning")


class Save(Callback):
    """Writes the golden checkpoint on the way."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(GOLDEN)


def run(
    folder: Path, more: Sequence[Callback] = (), ckpt_path: Path | None = None
) -> ContinualModule:
    """A tiny run with everything that a checkpoint holds."""
    seed_everything(0, verbose=False)
    module = ContinualModule(
        MLP([4]),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        evaluate_every="epoch",
        patience=2,
    )
    trainer = Trainer(
        max_epochs=-1,
        callbacks=[BeneficialPerturbation(rank=2), EWC(10.0, update="clamped"), *more],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    stream = SplitDigits(
        num_tasks=2, epochs_per_task=2, batch_size=100, validation_fraction=0.2, seed=0
    )
    trainer.fit(module, stream, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module


def test_a_run_goes_on_from_it(tmp_path: Path) -> None:
    """To what the run that was never stopped gets; up to rounding, which differs between machines."""
    saved = torch.load(GOLDEN, weights_only=True)
    assert GOLDEN.stat().st_size < 100_000
    assert saved["global_step"] == SAVED_AT
    whole, rest = run(tmp_path), run(tmp_path, ckpt_path=GOLDEN)
    assert (rest.closed, rest.schedule.lengths) == (1, whole.schedule.lengths)
    earlier = saved["state_dict"]["network.accuracy_matrix.accuracy"][:2]
    assert torch.equal(rest.accuracy_matrix.accuracy[:2], earlier)  # read, and not measured again
    assert [point["epoch"] for point in rest.curve] == [0, 1, 2, 3, 4]
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(
            rest.state_dict()[name], value, rtol=1e-3, atol=1e-3, equal_nan=True
        )


def test_it_is_loaded_and_exported(tmp_path: Path) -> None:
    module = ContinualModule.load_from_checkpoint(GOLDEN, backbone=MLP([4])).eval()
    assert (module.opened, module.closed) == (1, 0)
    saved = torch.load(GOLDEN, weights_only=True)
    assert saved["continual"]["strategies"] == ["bd", "ewc"]
    assert "ewc" in saved["callbacks"]
    state = module.state_dict()
    for name, value in saved["state_dict"].items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, equal_nan=True)
    again = load_exported(export_module(module, tmp_path / "out"), MLP([4]))
    assert again.network.structure == module.network.structure
    inputs = torch.rand(3, 1, 8, 8)
    for task in (0, 1):
        assert torch.equal(again(inputs, task=task), module(inputs, task=task))


@pytest.mark.parametrize(
    ("schema", "writer", "said"),
    [
        (
            SCHEMA + 1,
            "9.8.7",
            (
                f"schema {SCHEMA + 1}, written by bpn_lightning 9.8.7. Use bpn_lightning 9.8.7 for it, or a "
                "newer one."
            ),
        ),
        (
            None,
            None,
            "schema 1, written by bpn_lightning 0.1.0. Use bpn_lightning 0.1.0 for it, or train again.",
        ),
        (
            SCHEMA - 1,
            "0.1.5",
            (
                f"schema {SCHEMA - 1}, written by bpn_lightning 0.1.5. Use bpn_lightning 0.1.5 for it, or "
                "train again."
            ),
        ),
    ],
)
def test_another_schema_is_refused_by_name(
    schema: int | None, writer: str | None, said: str, tmp_path: Path
) -> None:
    saved = torch.load(GOLDEN, weights_only=True)
    entry = {k: v for k, v in saved["continual"].items() if k not in ("schema", "bpn_lightning")}
    named = {"schema": schema, "bpn_lightning": writer} if schema else {}
    torch.save({**saved, "continual": {**named, **entry}}, tmp_path / "other.ckpt")
    expected = f"Expected a checkpoint of schema {SCHEMA}, but got {said}"
    with pytest.raises(CheckpointError) as caught:
        ContinualModule.load_from_checkpoint(tmp_path / "other.ckpt", backbone=MLP([4]))
    assert str(caught.value) == expected
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path, ckpt_path=tmp_path / "other.ckpt")
    assert str(caught.value) == expected


if __name__ == "__main__":
    run(Path("build"), [Save()])
