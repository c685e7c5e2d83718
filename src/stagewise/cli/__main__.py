"""``python -m stagewise.cli``."""

from stagewise.cli import app

app()
