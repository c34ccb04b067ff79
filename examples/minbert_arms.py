"""Does it help? SMART and other regularizers at equal budgets of search, judged on rows that no arm trained on.

    python examples/minbert_arms.py run first --data-dir DATA --results runs/arms
    python examples/minbert_arms.py status
    python examples/minbert_arms.py report

The protocol is in docs/study.md. A stage that was cut off goes on with the same command. Without `--results` these are
the committed records, which go on only with the code and the torch that made them.
"""

import sys

from minbert.study.arms_cli import main

if __name__ == "__main__":
    sys.exit(main())
