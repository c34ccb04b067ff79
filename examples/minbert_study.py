"""Compares configurations over seeds: means, paired bootstrap intervals, and the three figures of the RO-BERT report.

    python examples/minbert_study.py --output-dir runs/study --seeds 0,1,2

A study that was cut off goes on with the same command; runs that are done are not made again.
"""

import sys

from minbert.study.cli import main

if __name__ == "__main__":
    sys.exit(main())
