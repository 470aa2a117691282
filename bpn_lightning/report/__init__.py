"""Finished runs as one page that a browser opens from disk: the command ``bpn-report``.

::

    reading      what lies in a folder: runs, and what could not be read as one
    comparison   rows of runs that differ by their seed alone: intervals, tests, settings that differ
    summary      the same in plain words, with what was not shown
    page         all of it as one HTML file, with page.css and page.js inside
    cli          the command

:mod:`bpn_lightning.bench.report` makes Markdown and pictures of one grid for the repository; this page
is for looking at whatever there is. No torch is imported.
"""
