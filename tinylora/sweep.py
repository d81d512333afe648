"""python -m tinylora.sweep: a grid of training runs; the command is `studies.sweep`."""

from tinylora.cli import run_command
from tinylora.studies.sweep import main

if __name__ == "__main__":
    run_command(main)
