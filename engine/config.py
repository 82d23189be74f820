"""Strict configuration: YAML files over a `base:`, `key=value` on top, checked by a pydantic model.

Files merge key by key. But `optimizer`, `schedule` and `average` are taken whole from the last file that gives them,
because their settings belong to one method. Every error names in one line the file or command line, the key, and what
would be right.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from engine.core_yaml import read_yaml, write_yaml
from engine.errors import UserError, nearest, one_line
from engine.files import write_atomically

TAKEN_WHOLE = ("optimizer", "schedule", "average")
COMMAND_LINE = "command line"
FORMER_KEYS = {  # and what replaces them
    "global_batch": "an update is passes x batch: batch is what one pass sees, and the ranks divide the passes",
    "accumulation": "passes is the number of passes that make an update, over all ranks",
    "sync_batchnorm": "batchnorm_group is the number of images behind one statistic",
}


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used."""


class Strict(BaseModel):
    """Unknown keys and wrong types are errors (an int may stand for a float)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class WithSettings(BaseModel):
    """All other keys are `settings`, checked by whoever takes them."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _finite(self) -> "WithSettings":
        for key, value in self.settings.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} must be a finite number, not {value}")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class Named(WithSettings):
    """A name and its settings, e.g. `{name: apollo, lr: 0.5}`."""

    name: str


class GroupConfig(WithSettings):
    """Parameters with settings of their own, or another optimizer, `name`."""

    match: str | NonNegativeInt  # a regular expression for names, or a number of dimensions
    name: str | None = None

    @field_validator("match")
    @classmethod
    def _compiles(cls, match: str | int) -> str | int:
        try:
            re.compile(str(match))
        except re.error as error:
            raise ValueError(f"{match!r} is no regular expression: {error}") from None
        return match


class OptimizerConfig(Named):
    needs: Literal["closure", "create_graph"] | None = None  # engine/needs.py
    groups: list[GroupConfig] = []  # engine/parameter_groups.py

    @model_serializer(mode="wrap")
    def _as_given(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = [key for key in ("needs", "groups") if not getattr(self, key)]
        return {key: value for key, value in write(self).items() if key not in unused}


class CheckpointConfig(Strict):
    minutes: NonNegativeFloat = 10.0  # between saves within an epoch; its end saves too
    keep: PositiveInt = 2  # files kept


class AverageConfig(Strict):
    """The average of weights that is evaluated: an exponential one (`decay`), or the mean of the `last` kept ones.

    The first, a <- decay * a + (1 - decay) * w, begins with the weights after the first update. The second is formed at
    the end.
    """

    decay: float | None = Field(None, gt=0, lt=1)
    every: PositiveInt | None = None  # updates between kept weights; None: an epoch
    last: PositiveInt = 10  # number kept and averaged

    @model_validator(mode="after")
    def _one_form(self) -> "AverageConfig":
        if self.decay and (self.every or self.last != 10):
            raise ValueError("decay, or every and last: an exponential average keeps no weights")
        return self


class RunConfig(Strict):
    """The keys of every task's config."""

    DIFFERENTIABLE_TWICE: ClassVar[bool] = False  # whether the task's models are

    table: str  # of the paper, or any name
    row: str  # the method's name in that table
    optimizer: OptimizerConfig
    schedule: Named = Named(name="constant")
    seed: NonNegativeInt = 1
    run_dir: str | None = None  # default: runs/<table>/<row>_<schedule>/seed<seed>
    batch: PositiveInt  # per forward-backward pass: images, rows of text, or (in translation) tokens
    passes: PositiveInt = 1  # per update; the ranks divide them
    precision: Literal["fp32", "tf32", "bf16", "fp16", "apex-O1", "apex-O2"] = "fp32"
    compile: bool = False  # torch.compile
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False  # torch's deterministic algorithms: on a GPU a resumed run repeats bit for bit
    log_every: PositiveInt = 50  # updates
    tensorboard: bool = False
    checkpoint: CheckpointConfig = CheckpointConfig()
    average: AverageConfig | None = None

    @property
    def folder(self) -> Path:
        default = Path("runs") / self.table / f"{self.row}_{self.schedule.name}" / f"seed{self.seed}"
        return Path(self.run_dir) if self.run_dir else default


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_config(model: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `path` over its `base:` files, apply overrides (`optimizer.lr=0.1`, values are YAML), and check.

    Raises ConfigError.
    """
    sources: dict[str, str] = {}
    values = _read_with_bases(Path(path), sources, seen=())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"command line: '{override}' is not of the form key=value")
        try:
            value = read_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"command line: cannot read the value of {key}: {one_line(error)}") from None
        _set_dotted(values, key, value, sources)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, model, sources, str(path))) from None


def save_config(config: BaseModel, path: str | Path) -> None:
    """Write the resolved config as YAML. An equal file is kept."""
    path, text = Path(path), dump_config(config)
    if not (path.exists() and path.read_bytes() == text.encode()):
        write_atomically(path, text)


def dump_config(config: BaseModel) -> str:
    return write_yaml(config.model_dump(mode="json"))


def differences(ours: Any, theirs: Any, ignore: Sequence[str] = (), prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, without those in `ignore` and below."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [prefix.rstrip(".")]
    found = []
    for key in ours | theirs:
        if f"{prefix}{key}" not in ignore:
            found += differences(ours.get(key), theirs.get(key), ignore, f"{prefix}{key}.")
    return found


def value_at(values: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _read_with_bases(path: Path, sources: dict[str, str], seen: tuple[Path, ...]) -> dict:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: the chain of base: files comes back to this file")
    try:
        values = read_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a UTF-8 text file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {one_line(error)}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, not a {type(values).__name__}")
    base = values.pop("base", None)
    if not isinstance(base, str | None):
        raise ConfigError(f"{path}: base must be the name of a file, not {base!r}")
    merged = {} if base is None else _read_with_bases(path.parent / base, sources, (*seen, path.resolve()))
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
    problem = error.errors()[0]
    keys, holder = _place(model, problem["loc"])
    if problem["type"].startswith("union_tag"):
        keys += ["name"]
    dotted = ".".join(keys)
    source = _source_of(dotted, sources) or path
    if problem["type"] == "extra_forbidden":
        if dotted in FORMER_KEYS:
            return f"{source}: unknown key '{dotted}': {FORMER_KEYS[dotted]}"
        valid = list(holder.model_fields)
        return f"{source}: unknown key '{dotted}'{nearest(keys[-1], valid)}; valid keys: {', '.join(valid)}"
    if problem["type"] in ("missing", "union_tag_not_found"):
        return f"{source}: the key '{dotted}' is missing"
    if problem["type"] == "union_tag_invalid":
        about = problem["ctx"]
        return f"{source}: {dotted} should be one of {about['expected_tags']}, not '{about['tag']}'"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "value_error":  # from a validator of this file
        if COMMAND_LINE in (place for key, place in sources.items() if key.startswith(f"{dotted}.")):
            source = COMMAND_LINE
        return f"{source}: {dotted}: {problem['ctx']['error']}{more}"
    return f"{source}: {dotted}: {problem['msg'].removeprefix('Input ')}, not {problem['input']!r}{more}"


def _source_of(dotted: str, sources: dict[str, str]) -> str | None:
    """Where the key, or the nearest above it, was last given."""
    while dotted and dotted not in sources:
        dotted = dotted.rpartition(".")[0]
    return sources.get(dotted)


def _place(model: type[BaseModel], loc: Sequence[str | int]) -> tuple[list[str], type[BaseModel]]:
    """The keys that lead to a problem, and the model that has or lacks the last one.

    Where `name` selects a model, pydantic puts it into `loc` like a key.
    """
    keys, holder, kind = [], model, model
    for part in loc:
        models = [one for one in get_args(kind) if hasattr(one, "model_fields")] if isinstance(kind, UnionType) else []
        if len(models) > 1:
            kind = next(one for one in models if part in get_args(one.model_fields["name"].annotation))
            continue
        kind = models[0] if models else kind  # a model or None
        keys.append(str(part))
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            holder = kind
            kind = kind.model_fields[part].annotation if part in kind.model_fields else None
        else:
            kind = None
    return keys, holder
