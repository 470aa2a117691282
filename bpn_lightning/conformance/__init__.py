"""The promises of a continual-learning strategy, as tests that authors run on their own.

::

    pytest --pyargs bpn_lightning.conformance --strategy my_lab.MyStrategy

Each test in :mod:`bpn_lightning.conformance.promises` is one promise; those of ``gate_promises`` are made
by gates alone. The options, the strategies that were named and what tests share are in ``plugin``,
``cases``, ``scenarios``, ``runs``, ``pair`` and ``ranks``. Digits that come with scikit-learn are all the
data; nothing is downloaded.
"""
