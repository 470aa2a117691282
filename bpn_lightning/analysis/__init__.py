"""What runs are and what they show, for whatever makes reports of them: tables, pictures, comparisons.

::

    record       a finished run, read from its folder
    collection   what is kept of a grid's runs (cells.json), as records
    statistics   intervals, paired tests, Holm's correction
    comparison   records that differ by their seed alone as one row; tests between rows
    table        a table as Markdown and CSV
    pictures     the kinds of pictures
    artifact     a table with its picture and caption

:mod:`bpn_lightning.bench` makes Markdown of it and :mod:`bpn_lightning.report` a page;
:mod:`bpn_lightning.paper` has the tables and figures of Wen et al. No torch is imported here.
"""
