"""What cannot be collected on every Python that is supported."""

import sys

# TRL wants Python 3.11.
needs_trl = ["smartreg/integrations/trl.py", "tests/sft_tools.py", "tests/integrations/test_smart_trl.py"]
collect_ignore = [] if sys.version_info >= (3, 11) else needs_trl
