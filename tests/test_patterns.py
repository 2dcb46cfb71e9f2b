"""Names of files and folders that look like patterns: what exists by exactly that name is taken, and only the rest matches."""

import re
from pathlib import Path

import fsspec
import pytest

from mutransformer.config.data import SourceConfig
from mutransformer.data.sources.files import find
from mutransformer.data.sources.hub import hub_shards
from mutransformer.errors import ConfigError

ODD = "[D] a,b é"
PLAIN = ["a::b {1,2}/%20 .h/1.txt", "trail. #/1.txt", "~no-user/1.txt", "star/*.txt", "star/1.txt", "hide/.h.txt", "hide/1.txt"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder: [D] a,b é has deep/x.txt and y.txt, and beside it lies what its name matches as a pattern."""
    for name in (
        f"{ODD}/deep/x.txt",
        f"{ODD}/y.txt",
        "D a,b é/y.txt",
        "w*/1.txt",
        "wide/1.txt",
        "in/[1]/z.txt",
        "in/1/z.txt",
        *PLAIN,
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


CASES = {
    f"{ODD}/**/*.txt": {"deep/x.txt": f"{ODD}/deep/x.txt", "y.txt": f"{ODD}/y.txt"},
    f"{ODD}/*.txt": {"y.txt": f"{ODD}/y.txt"},
    f"{ODD}/d??p/[wx].txt": {"deep/x.txt": f"{ODD}/deep/x.txt"},
    f"{ODD}/y.txt": {"y.txt": f"{ODD}/y.txt"},
    "w*/*.txt": {"1.txt": "w*/1.txt"},
    "w?de/*.txt": {"wide/1.txt": "wide/1.txt"},
    "a::b {1,2}/%20 .h/*.txt": {"1.txt": "a::b {1,2}/%20 .h/1.txt"},
    "a::b {1,2}/**/1.txt": {"%20 .h/1.txt": "a::b {1,2}/%20 .h/1.txt"},
    "trail. #/*": {"1.txt": "trail. #/1.txt"},
    "~no-user/*": {"1.txt": "~no-user/1.txt"},
    "star/*.txt": {"*.txt": "star/*.txt"},
    "star/?.txt": {"*.txt": "star/*.txt", "1.txt": "star/1.txt"},
    "hide/*.txt": {"1.txt": "hide/1.txt"},
    "**/y.txt": {f"{ODD}/y.txt": f"{ODD}/y.txt", "D a,b é/y.txt": "D a,b é/y.txt"},
}


@pytest.mark.parametrize("at", ["{}/", "~/", "file://{}/", "file://~/"])
@pytest.mark.parametrize("pattern", CASES)
def test_a_folder_of_that_name_is_taken_literally(pattern: str, at: str, folder: Path) -> None:
    found = find([at.format(folder) + pattern], "data.files")
    assert {file.name: Path(file.path.removeprefix("file://")).read_text() for file in found} == CASES[pattern]


def test_below_a_pattern_a_name_may_have_brackets(folder: Path) -> None:
    (file,) = find([f"{folder}/i*/[1]/*.txt"], "data.files")
    assert Path(file.path).read_text() == "in/[1]/z.txt"


def test_a_relative_pattern(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert [file.name for file in find([f"{ODD}/*.txt", "wide/*"], "data.files")] == ["1.txt", "y.txt"]


def test_a_store_behind_a_url(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for name in ("[D]/a.txt", "D/a.txt", "d?/b.txt", "de/b.txt"):
        fs.pipe_file(f"/{tmp_path.name}/{name}", name.encode())
    found = find([f"memory://{tmp_path.name}/[D]/*.txt", f"memory://{tmp_path.name}/d?/*"], "data.files")
    with found[0].open() as a, found[1].open() as b:
        assert (found[0].name, a.read(), found[1].name, b.read()) == ("a.txt", b"[D]/a.txt", "b.txt", b"d?/b.txt")


def test_a_folder_of_the_hub_that_its_library_cannot_read(folder: Path) -> None:
    (folder / ODD / "train.jsonl").write_text('{"text": "a"}\n')
    config = SourceConfig(source="hub", path=str(folder / ODD))
    with pytest.raises(ConfigError, match=re.escape(f"data.path = {folder / ODD}: the library datasets takes a [ for a pattern")):
        next(iter(hub_shards(config, "data")))
