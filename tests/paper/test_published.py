"""The paper's numbers agree with each other where its text says how."""

import pytest

from bpn_lightning.costs import bias_unit_bytes
from bpn_lightning.paper.published import TABLE_1, TABLE_1_FROM_TEXT, TABLE_2


@pytest.mark.parametrize("method", [name for name, row in TABLE_2.items() if row[0][0] is not None])
def test_averages_of_table_2_are_the_means_of_their_rows(method: str) -> None:
    row, average, _ = TABLE_2[method]
    assert sum(value for value in row if value) / 8 == pytest.approx(average, abs=0.0075)


def test_percentages_of_the_text_are_relative() -> None:
    last = {name: row[1] for name, row in TABLE_2.items()}
    for method, percent in (("psp", 7.52), ("slnid", 8.02), ("mas", 11.73), ("imm", 35.62)):
        assert 100 * (last["bd+psp"] / last[method] - 1) == pytest.approx(percent, abs=0.01)
    cifar = {name: row.first_task for name, row in TABLE_1["cifar100_inc"].items()}
    for method, percent in (("psp", 1.80), ("gem_256", 6.96)):
        assert 100 * (cifar["bd+ewc"] / cifar[method] - 1) == pytest.approx(percent, abs=0.01)
    # BD+PSP over GEM (10): the other percentage about it gives the same figure.
    assert TABLE_1_FROM_TEXT["cifar100_inc"]["gem_10"].first_task * 1.231 == pytest.approx(
        cifar["bd+psp"], abs=0.001
    )


def test_bytes_of_table_1_follow_its_own_formulas() -> None:
    for rows in TABLE_1.values():
        assert rows["bd+ewc"].bytes == bias_unit_bytes([300] * 4, classes=2)
    rows = TABLE_1["cifar100_inc"]
    assert rows["bd+psp"].bytes == rows["bd+ewc"].bytes + rows["psp"].bytes  # type: ignore[operator]
    for experiment, pixels in (("mnist_inc", 784), ("cifar10_inc", 3072), ("cifar100_inc", 3072)):
        for name, row in TABLE_1[experiment].items():
            if name.startswith("gem_"):
                assert row.bytes == 2 * int(name[4:]) * pixels * 3
