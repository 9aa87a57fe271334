"""The panels of the page, one a file: ``build`` turns a run into a :class:`~minidiff.explain.panel.Panel`, or into the
reason why it is left out."""
