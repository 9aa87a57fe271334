"""``python -m minidiff``: the same as the ``minidiff`` command."""

from minidiff.cli import command

if __name__ == "__main__":
    command()
