"""The command line. Torch is imported inside the commands, so that help appears at once."""

from stagewise.cli import runs, sharing  # noqa: F401  (commands register themselves)
from stagewise.cli.application import app

__all__ = ["app"]
