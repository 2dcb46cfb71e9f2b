"""The pages of the documentation, and the blocks of code in them."""

import re
import textwrap
from pathlib import Path

from short_runs import ROOT

LAUNCH = ROOT / "docs/launch.md"
README, CHANGES = ROOT / "README.md", ROOT / "CHANGELOG.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", CHANGES, ROOT / "results/README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Values for what a recipe leaves to its reader.
SET = {
    "REPO_URL": "https://git.example/mutransformer",
    "PROJECT": "project",
    "ZONE": "zone",
    "TPU": "tpu",
    "BUCKET": "bucket",
    "NFS": "server:/export",
    "IMAGE": "registry.example/image:1",
    "CLAIM": "claim",
    "CLUSTER": "cluster",
}


def blocks(page: Path, language: str = "bash") -> list[tuple[str, str]]:
    """(heading, code) of each block in a language."""
    heading, found = "", []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^#+ ([^\n]*)|^ *```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
        if match[1]:
            heading = match[1]
        elif match[2] == language:
            found.append((heading, textwrap.dedent(match[3])))
    return found
