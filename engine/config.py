"""Strict configuration: YAML files over a `base:`, `key=value` on top, checked by a pydantic model.

Files merge key by key, except `optimizer` and `schedule`: each is a name and its settings, taken whole from the last
file that gives it, so that nothing is inherited from another method. Every error is one line that names where the value
came from (a file or the command line), the key, and what would be right.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from yaml.constructor import ConstructorError

from engine.errors import UserError, nearest

TAKEN_WHOLE = ("optimizer", "schedule")
COMMAND_LINE = "command line"


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; the message is one line."""


class Strict(BaseModel):
    """Base of every config model: unknown keys and wrong types are errors (an int may stand for a float)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Named(BaseModel):
    """A name and its settings, e.g. `{name: apollo, lr: 0.5}`; whoever is named checks the settings."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    name: str

    @model_validator(mode="after")
    def _finite(self) -> "Named":
        for key, value in self.settings.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} must be a finite number, not {value}")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class CheckpointConfig(Strict):
    minutes: NonNegativeFloat = 10.0  # between saves in mid-epoch; the end of every epoch saves too
    keep: PositiveInt = 2  # files kept


class RunConfig(Strict):
    """The keys that every task's config has; a task adds its own (data, model, epochs or updates, ...)."""

    table: str  # the table of the paper, or any name for runs of one's own
    row: str  # the method's name in that table
    optimizer: Named
    schedule: Named = Named(name="constant")
    seed: NonNegativeInt = 1
    run_dir: str | None = None  # default: runs/<table>/<row>_<schedule>/seed<seed>
    batch: PositiveInt  # what one forward-backward pass sees: images, rows of text, or (in translation) tokens
    passes: PositiveInt = 1  # that make an update; the ranks divide them
    precision: Literal["fp32", "tf32", "bf16", "fp16", "apex-O1", "apex-O2"] = "fp32"
    compile: bool = False  # torch.compile
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: PositiveInt = 50  # updates
    tensorboard: bool = False
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def folder(self) -> Path:
        default = Path("runs") / self.table / f"{self.row}_{self.schedule.name}" / f"seed{self.seed}"
        return Path(self.run_dir) if self.run_dir else default


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_config(model: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `path` and the files below it (`base:`), apply `key=value` overrides, and check the whole against `model`.

    Override keys may be dotted (`optimizer.lr=0.1`); values are read as YAML. Raises ConfigError.
    """
    sources: dict[str, str] = {}
    values = _read_with_bases(Path(path), sources, seen=())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"command line: '{override}' is not of the form key=value")
        try:
            value = yaml.load(text, Loader=_Loader) if text else None
        except yaml.YAMLError as error:
            raise ConfigError(f"command line: cannot read the value of {key}: {_flat(error)}") from None
        _set_dotted(values, key, value, sources)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, model, sources, str(path))) from None


def save_config(config: BaseModel, path: str | Path) -> None:
    """Write the resolved config as YAML that `load_config` reads back to the same values."""
    Path(path).write_text(dump_config(config))


def dump_config(config: BaseModel) -> str:
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, default_flow_style=None)


def differences(ours: Any, theirs: Any, ignore: Sequence[str] = (), prefix: str = "") -> list[str]:
    """The dotted keys whose values differ between two nested mappings, those in `ignore` (and below) left out."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = list(ours) + [key for key in theirs if key not in ours]
        dotted = [(key, f"{prefix}{key}") for key in keys]
        kept = [(key, name) for key, name in dotted if name not in ignore]
        return [
            found for key, name in kept for found in differences(ours.get(key), theirs.get(key), ignore, f"{name}.")
        ]
    return [] if ours == theirs else [prefix.rstrip(".")]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 5e-4 as a number, as everyone expects, and refuses a key given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping_without_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise ConstructorError(None, None, f"the key '{key}' is given twice", node.value[index][0].start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes floats so that every YAML 1.1 reader takes them for floats (1.0e-08, not 1e-08)."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _represent_float)


def _read_with_bases(path: Path, sources: dict[str, str], seen: tuple[Path, ...]) -> dict:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: the chain of base: files comes back to this file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a UTF-8 text file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_flat(error)}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, not a {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        merged = {}
    elif isinstance(base, str):
        merged = _read_with_bases(path.parent / base, sources, (*seen, path.resolve()))
    else:
        raise ConfigError(f"{path}: base must be the name of a file, not {base!r}")
    _merge(merged, values, sources, str(path))
    return merged


def _merge(into: dict, values: dict, sources: dict[str, str], source: str, prefix: str = "") -> None:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        sources[dotted] = source
        if isinstance(value, dict) and isinstance(into.get(key), dict) and dotted not in TAKEN_WHOLE:
            _merge(into[key], value, sources, source, f"{dotted}.")
        else:
            into[key] = value


def _set_dotted(values: dict, key: str, value: Any, sources: dict[str, str]) -> None:
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"command line: {key}: {'.'.join(parents[: depth + 1])} has no keys of its own")
    values[last] = value
    sources[key] = COMMAND_LINE


def _explain(error: ValidationError, model: type[BaseModel], sources: dict[str, str], path: str) -> str:
    """The first problem that pydantic found, in one line."""
    problem = error.errors()[0]
    dotted = ".".join(str(part) for part in problem["loc"])
    source = _source_of(dotted, sources) or path
    if problem["type"] == "extra_forbidden":
        *parents, last = (str(part) for part in problem["loc"])
        valid = list(_model_at(model, parents).model_fields)
        return f"{source}: unknown key '{dotted}'{nearest(last, valid)}; valid keys: {', '.join(valid)}"
    if problem["type"] == "missing":
        return f"{source}: the key '{dotted}' is missing"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "value_error":  # one of our own validators: its words say it all
        if COMMAND_LINE in (place for key, place in sources.items() if key.startswith(f"{dotted}.")):
            source = COMMAND_LINE
        return f"{source}: {dotted}: {problem['ctx']['error']}{more}"
    return f"{source}: {dotted}: {problem['msg'].removeprefix('Input ')}, not {problem['input']!r}{more}"


def _source_of(dotted: str, sources: dict[str, str]) -> str | None:
    """Where the key, or the nearest key above it, was last given."""
    while dotted and dotted not in sources:
        dotted = dotted.rpartition(".")[0]
    return sources.get(dotted)


def _model_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    for part in path:
        model = model.model_fields[part].annotation
    return model


def _flat(error: object) -> str:
    return " ".join(str(error).split())
