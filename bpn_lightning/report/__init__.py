"""Finished runs as one page that a browser opens from disk: the command ``bpn-report``.

::

    reading      what lies in a folder: runs, and what could not be read as one
    settings     in which settings runs differ
    summary      what was found in plain words, with what was not shown
    tables       the page's tables
    pictures     matplotlib's figures as SVGs whose marks carry their values
    page         all of it as one HTML file, of page.html with page.css and page.js inside
    cli          the command

Rows, intervals and tests are those of :mod:`bpn_lightning.analysis`. :mod:`bpn_lightning.bench.report`
makes Markdown and pictures of one grid for the repository; this page is for looking at whatever there
is. No torch is imported.
"""
