"""Fails when a test was skipped for a reason other than a missing device, browser or missing real data."""

import sys
import xml.etree.ElementTree as ET

ALLOWED = ("CUDA", "MPS", "shared", "browser")


def main(path: str) -> int:
    skips = [
        (f"{case.get('classname')}::{case.get('name')}", skip.get("message", ""))
        for case in ET.parse(path).iter("testcase")
        for skip in case.iter("skipped")
    ]
    refused = [(name, reason) for name, reason in skips if not any(word in reason for word in ALLOWED)]
    for name, reason in refused:
        print(f"skipped without an allowed reason: {name}: {reason}", file=sys.stderr)
    print(f"{len(skips)} skipped, {len(refused)} of them for no allowed reason")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
