"""Moments of a stream, by hand."""

from bpn_lightning.run.moments import Moments, mean_of_known, moments, tasks_learned

MATRIX = [[0.1, 0.2], [0.9, 0.3], [0.4, 0.8]]


def test_moments_of_a_matrix() -> None:
    began = [[0.1, None], [0.9, 0.3], [0.4, 0.8]]  # task 2 starts where task 1 ends
    assert moments(MATRIX, epochs_per_task=[2, 3]) == Moments(
        "epochs", [0, 2, 5], began, [0, 2], [2, 5], [0.9, 0.6000000000000001]
    )
    assert moments(MATRIX).at == [0, 1, 2]
    assert moments(MATRIX).unit == "tasks learned"


def test_moments_of_a_curve_begin_before_training() -> None:
    points = [
        {"epoch": 1, "task": 0, "accuracy": [0.8, 0.2]},
        {"epoch": 2, "task": 0, "accuracy": [0.9, 0.3]},
        {"epoch": 3, "task": 1, "accuracy": [0.5, None]},
    ]
    found = moments(MATRIX, points)
    assert found.at == [0, 1, 2, 3]
    assert found.accuracy == [[0.1, None], [0.8, None], [0.9, 0.3], [0.5, None]]
    assert (found.starts, found.ends) == ([0, 2], [2, 3])


def test_a_stream_that_ended_early() -> None:
    early = [[0.1, 0.2], [0.9, 0.3], [None, None]]
    assert tasks_learned(early) == 1
    assert moments(early).means == [0.9]
    assert moments([[None], [None]]) == Moments("tasks learned", [0], [[None]], [], [], [])


def test_no_mean_is_taken_over_fewer() -> None:
    assert mean_of_known([1.0, None]) is None
    assert mean_of_known([]) is None
    assert mean_of_known([0.25, 0.75]) == 0.5
