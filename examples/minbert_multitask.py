"""Fine-tunes a BERT encoder on sentiment, paraphrase and similarity at once, with SMART.

    python examples/minbert_multitask.py            # t-smart on the sample data, in minutes on two cores
    python examples/minbert_multitask.py --help

The parts are in `examples/minbert/`; `objective.py` there has the lines that add SMART to a training step.
"""

import sys

from minbert.cli import main

if __name__ == "__main__":
    sys.exit(main())
