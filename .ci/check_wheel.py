"""Fails unless the wheel holds the typed package and its licence, and nothing else."""

import sys
import zipfile


def main(path: str) -> int:
    names = zipfile.ZipFile(path).namelist()
    foreign = [n for n in names if not n.startswith("smartreg/") and ".dist-info/" not in n]
    wanted = ("smartreg/__init__.py", "smartreg/py.typed")
    missing = [n for n in wanted if n not in names]
    if not any(n.endswith("/licenses/LICENSE") for n in names):
        missing.append("LICENSE")
    print(f"{path.rsplit('/', 1)[-1]}: {len(names)} files; foreign: {foreign or 'none'}; missing: {missing or 'none'}")
    return 1 if foreign or missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
