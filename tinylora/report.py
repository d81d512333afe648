"""python -m tinylora.report: one page of runs and studies; the command is `studies.report`."""

from tinylora.cli import run_command
from tinylora.studies.report import main

if __name__ == "__main__":
    run_command(main)
