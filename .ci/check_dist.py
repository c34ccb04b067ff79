"""Fails unless wheel and sdist hold what they should, and nothing else. Usage: check_dist.py DIST..."""

import email
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator

IN_WHEEL = ("smartreg/__init__.py", "smartreg/py.typed")
IN_SDIST = (
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "PKG-INFO", "README.md", "mkdocs.yml"),
    *("pyproject.toml", ".ci/run", ".github/workflows/tests.yml", "docs/index.md", "smartreg/py.typed"),
    *("examples/minbert_multitask.py", "examples/minbert/sample/README.md", "tests/reference.py"),
)
MOST_BYTES = 4_000_000
LEFTOVER = re.compile(r"__pycache__|\.pyc$|(^|/)(runs|site|build|dist|\.git|[^/]*\.egg-info)/")
CORE = {"torch", "typing-extensions"}


def of_wheel(path: str) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        yield from of_metadata(archive.read(metadata).decode())
    yield from (f"foreign: {n}" for n in names if not n.startswith("smartreg/") and ".dist-info/" not in n)
    yield from (f"missing: {n}" for n in IN_WHEEL if n not in names)
    if not any(n.endswith("/licenses/LICENSE") for n in names):
        yield "missing: LICENSE"


def of_sdist(path: str) -> Iterator[str]:
    with tarfile.open(path) as archive:
        members = {m.name.partition("/")[2]: m.size for m in archive if m.isfile()}
        yield from of_metadata(
            archive.extractfile(path.rsplit("/", 1)[-1].removesuffix(".tar.gz") + "/PKG-INFO").read().decode()
        )
    yield from (f"missing: {n}" for n in IN_SDIST if n not in members)
    yield from (f"left over: {n}" for n in members if LEFTOVER.search(n))
    if sum(members.values()) > MOST_BYTES:
        yield f"{sum(members.values())} bytes unpacked, more than {MOST_BYTES}"


def of_metadata(text: str) -> Iterator[str]:
    message = email.message_from_string(text)
    wanted = {"Name": "smartreg", "License-Expression": "MIT", "Requires-Python": ">=3.10"}
    yield from (f"{k} is {message[k]}, not {v}" for k, v in wanted.items() if message[k] != v)
    required = {re.match(r"[\w-]+", r)[0] for r in message.get_all("Requires-Dist", []) if "extra ==" not in r}
    if required != CORE:
        yield f"needs {sorted(required)}, not {sorted(CORE)}"
    # An index shows the README without the repository around it.
    yield from (f"a relative link: {t}" for t in re.findall(r"\]\((?!https://)([^)]+)\)", message.get_payload()))


def main(paths: list[str]) -> int:
    wrong = 0
    for path in paths:
        complaints = list(of_wheel(path) if path.endswith(".whl") else of_sdist(path))
        wrong += len(complaints)
        print(f"{path.rsplit('/', 1)[-1]}: {'; '.join(complaints) or 'as it should be'}")
    if {path.rsplit(".", 1)[-1] for path in paths} != {"whl", "gz"}:
        sys.exit("expected a wheel and an sdist")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
