"""Kit of the HTML reports: one file each, nothing fetched, nothing that needs a script to be read.

* :mod:`~minidiff.page.html`: elements whose text is escaped, data that a script reads, and the whole document;
* :mod:`~minidiff.page.languages`: texts in English and Chinese, both in the page, one of them shown;
* :mod:`~minidiff.page.svg`: curves, points and bars as inline SVG;
* ``kit.css`` and ``kit.js``: the look of all reports, light and dark, and the switches between them.
"""
