"""Reads settings from YAML files and `key=value` overrides, and prints them. Does not import JAX."""

import difflib
import textwrap
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import yaml

from mutransformer.config import yaml_text
from mutransformer.config.data import FilesConfig, MixedSourceConfig
from mutransformer.config.schema import Config, all_settings
from mutransformer.config.setting import limits, to_text, type_name
from mutransformer.config.tree import Tree, build, kind_of, merge, typed
from mutransformer.config.values import BadValue, Given, UnknownKey
from mutransformer.errors import ConfigError, check, is_url, redact, translate_errors

RUN_CONFIG = "config.yaml"  # in a run's folder

# Keys of earlier versions, and their names now.
RENAMED = {
    "mesh.slices": "mesh.replicas",
    "mesh.streams": "mesh.overlap_groups",
    "mesh.exchange": "mesh.reduce_scatter_via_all_to_all",
    "optim.accumulate": "optim.grad_accumulation_steps",
    "optim.reduce": "optim.grad_sync (part is now microbatch)",
    "optim.schedule_floor": "optim.min_lr_ratio",
    "precision.reduce": "precision.grad_reduce_dtype",
    "precision.moment1": "precision.mu_dtype",
    "data.rows": "data.packing",
    "data.documents": "data.intra_document_mask (join is now false, apart is now true)",
    "data.validation_share": "data.validation_fraction",
    "data.test_share": "data.test_fraction",
    "data.processes": "data.tokenize_workers",
    "model.gains": "model.norm_scale",
}


def load(args: Sequence[str]) -> Config:
    """Reads YAML files, run folders, shipped configs by name and `key=value` overrides, merged left to right over the defaults.

    A text may refer to other settings, ${model.d_model}: it gets their final values.

    Raises:
        ConfigError: a file is missing, empty or not YAML; a key is unknown or given twice; a value is of the wrong type or out of
            range.
    """
    tree = deepcopy(_defaults())
    first = next((arg for arg in args if is_file(arg)), None)
    if first:
        tree["name"] = Path(first).stem
    for arg in args:
        given = _read(arg)
        tree = merge(tree, given)
        if "warmup_steps" in given.get("optim", {}) and "warmup_fraction" not in given["optim"]:
            tree["optim"]["warmup_fraction"] = None  # it would count, though it was set earlier
    for group, kind in ((tree["data"]["sources"], MixedSourceConfig), (tree["eval"]["sets"], FilesConfig)):
        group |= {name: asdict(kind()) | given for name, given in group.items()}
    try:
        return build(Config, tree, tree)
    except UnknownKey as error:  # in a ${...}
        raise ConfigError(f"{error.at}{_unknown(error.key)}") from None


@cache
def _defaults() -> Tree:
    return asdict(Config())


def is_file(arg: str) -> bool:
    """Whether an argument names a YAML file, a run's folder or a shipped config rather than being an override."""
    try:
        return "=" not in arg or Path(arg).is_file() or (Path(arg) / RUN_CONFIG).is_file()  # a run may be called lr=0.1
    except OSError:  # longer than any path
        return False


def list_configs(width: int) -> str:
    """The shipped configs that can be trained, with the first words of the comments that they begin with, as lines of a width."""
    paths = {name: path for name, path in shipped_configs().items() if not name.startswith("presets/")}
    widest = max(map(len, paths), default=0)
    lines = []
    for name, path in paths.items():
        comment = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines.append(f"  {name:{widest}}  {textwrap.shorten(comment, width - widest - 5, placeholder=' ...')}")
    return "\n".join(lines)


@cache
def shipped_configs() -> dict[str, Path]:
    """The YAML files that come with the package by name, such as small or paper/width128: the source tree's, else the wheel's."""
    above = Path(__file__).parents[2]
    if (above / "pyproject.toml").is_file():
        folders = [above / "configs"]
    else:
        listed = (file for wheel in metadata.distributions(name="mutransformer") for file in wheel.files or [])
        folders = [Path(str(file.locate())).parent for file in listed if file.match("configs/small.yaml")]
        folders.append(above / "share/mutransformer/configs")  # of `pip install --target`, whose list of files is wrong
    folder = next((folder for folder in folders if folder.is_dir()), None)
    paths = sorted(folder.rglob("*.yaml")) if folder else []
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths if folder}


def check_not_renamed(keys: Iterable[str], source: str) -> None:
    """Raises ConfigError if any of the keys, which are from `source`, has another name now."""
    renamed = [f"{key}: renamed to {RENAMED[key]}" for key in keys if key in RENAMED]
    check(not renamed, f"{source}: {'; '.join(renamed)}")


def _read(arg: str) -> Tree:
    """The settings of a file or an override."""
    named = f"{arg}/{RUN_CONFIG}" if is_file(arg) and (Path(arg) / RUN_CONFIG).exists() else arg
    try:
        return typed(Config, _file(arg) if is_file(arg) else _override(*arg.split("=", 1)))
    except UnknownKey as error:
        at = f"{named}: " if is_file(arg) or not error.key else ""
        raise ConfigError(f"{at}{_unknown(error.key)}") from None
    except BadValue as error:
        at = "" if arg.startswith(f"{error.key}=") else f"{error.key}: "
        raise ConfigError(f"{named}: {at}{error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}" if mark and is_file(arg) else ""
        raise ConfigError(f"{named}{where}: not valid YAML: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        if isinstance(error, UnicodeDecodeError):
            reason = f"not UTF-8 at byte {error.start}"
        hint = f"; the shipped configs are {', '.join(shipped_configs())}; an override is written key=value"
        raise ConfigError(f"{named}: cannot read it: {reason}{'' if Path(named).suffix else hint}") from None


def _file(arg: str) -> dict[Any, Given]:
    """What a file holds, or a shipped config of that name, or the config of a run whose folder is given.

    A run is where its config lies, and has the name of its folder, whatever the config says: it may have been copied or moved.
    """
    if is_url(arg):
        return _at_url(arg)
    in_folder = Path(arg) / RUN_CONFIG
    path = in_folder if in_folder.is_file() else Path(arg) if Path(arg).is_file() else Path(shipped_configs().get(arg, arg))
    given = _parse(str(path) if path == in_folder else arg, path.read_text(encoding="utf-8"))
    for at in (path, path.resolve()):  # a link may lead to it
        if at.name == RUN_CONFIG and (at.parent / "checkpoints").is_dir():
            folder = at.parent if at.parent.name.strip(".") else at.parent.resolve()
            return _with_own_tokenizer(given, folder) | {"workdir": str(folder.parent), "name": folder.name}
    return given


def _with_own_tokenizer(given: dict[Any, Given], folder: Path) -> dict[Any, Given]:
    """A tokenizer file in a run's folder, where an import puts it, moves with the run."""
    data = given.get("data")
    file = data.get("tokenizer_file") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(file, str):
        return given
    recorded, here = Path(file), (folder / Path(file).name).absolute()
    moved = recorded.parent.name == given.get("name") and not recorded.exists() and here.is_file()
    return {**given, "data": {**data, "tokenizer_file": str(here)}} if moved else given


def _at_url(url: str) -> dict[Any, Given]:
    """What a file at a URL holds, or the config of a run whose folder is there."""
    import fsspec  # takes longer to import than all of this module

    file = url if url.endswith((".yaml", ".yml")) else f"{url.rstrip('/')}/{RUN_CONFIG}"
    with translate_errors(f"{url}: cannot read it"):  # each file system has its own errors
        with fsspec.open(file, "rb") as handle:
            text = handle.read().decode()  # pyright: ignore[reportAttributeAccessIssue]  # fsspec's types are too wide
    given = _parse(url, text)
    if file.endswith(f"/{RUN_CONFIG}"):
        workdir, _, name = file.removesuffix(f"/{RUN_CONFIG}").rpartition("/")
        given |= {"workdir": workdir, "name": name}
    return given


def _parse(arg: str, text: str) -> dict[Any, Given]:
    given = yaml_text.parse(text)
    check(given is not None, f"{arg}: holds no settings; write `key: value` lines, or leave it out")
    check(isinstance(given, dict), f"{arg}: must hold `key: value` lines")
    return given


def _override(key: str, text: str) -> dict[str, Given]:
    """The value of an override, nested in groups as in a file."""
    given: Any = _text(text.strip()) if kind_of(Config, key) in (str, Optional[str]) else yaml_text.parse(text)
    for name in reversed(key.split(".")):
        given = {name: given}
    return given


def _text(text: str) -> Given:
    """A text as it was typed, unless YAML marks it as quoted, null or tagged, or reads a list or mapping."""
    if text.startswith(("'", '"', "!!")):
        return yaml_text.parse(text)
    try:
        given = yaml_text.parse(text) if text.startswith(("[", "{")) else None
    except yaml.YAMLError:
        return text  # such as [::1]:80
    return given if given is not None or yaml_text.NULL.fullmatch(text) else text


def _unknown(key: str) -> str:
    """What is wrong with a key that the schema does not have."""
    if key in RENAMED:
        return f"{key}: renamed to {RENAMED[key]}"
    if key in all_settings():  # with a dot in a YAML file
        group, _, name = key.rpartition(".")
        return f"{key}: in a file this is written {group}: {{{name}: ...}}"
    close = similar_keys(key)
    return f"{key}: no such key" + (f"; did you mean {' or '.join(close)}?" if close else "")


def similar_keys(key: str) -> list[str]:
    """The keys that may be meant by one: itself; else those whose name or meaning it is; else of a similar name, or whose meaning
    begins with it."""
    known = {one.key: one.key.rpartition(".")[2] for one in all_settings().values()}
    if key in known:
        return [key]
    last = key.rpartition(".")[2]
    meant = {one.key for one in all_settings().values() if one.field.metadata["meaning"] == last}
    close = [other for other, name in known.items() if name == last or other in meant]
    close = close or difflib.get_close_matches(key, known, 1, 0.75)
    close = close or [other for other, name in known.items() if difflib.get_close_matches(last, [name], 1, 0.8)]
    return close or [one.key for one in all_settings().values() if one.field.metadata["meaning"].split(" ")[0] == last]


def to_yaml(config: Config) -> str:
    """Every setting as YAML, defaults included: `load` gives the same config back, but for secrets, which are redacted."""
    return yaml.safe_dump(redact(asdict(config)), sort_keys=False, allow_unicode=True, width=10**6)


def describe(prefix: str = "") -> str:
    """Every setting with its default, type, bounds and meaning, as lines of text; a group with its meaning.

    With a prefix only this key, or those of this group, such as optim. Raises ConfigError if there is no such key.
    """
    found = [one for key, one in all_settings().items() if f"{key}.".startswith(f"{prefix}." if prefix else "")]
    check(bool(found), _unknown(prefix))
    lines: list[str] = []
    for one in found:
        title, text = one.key, one.field.metadata["meaning"]
        if one.field.type is not one.group:
            about = type_name(one.field.type), limits(one.field.metadata["bounds"]), "free on resume" if one.free else ""
            title, text = f"{title} = {to_text(one.default)}", f"[{', '.join(filter(None, about))}] {text}"
        indent = " " * 4
        lines += [title, textwrap.fill(text, 110, initial_indent=indent, subsequent_indent=indent, break_long_words=False)]
    return "\n".join(lines)
