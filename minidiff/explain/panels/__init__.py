"""The panels of the page: ``build`` of each turns a run into a :class:`~minidiff.explain.panel.Panel`, or into the
reason why it is left out.

A panel is NAME.py with its texts in NAME.json, the controls that a script adds in NAME.js, and the style of what only
it has in NAME.css. The page holds the scripts and styles of the panels that are shown. All scripts run as one, so each
is a block of its own.
"""
