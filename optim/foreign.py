"""Finds classes by a dotted path, and makes them from settings."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

MOST_LISTED = 30  # names in an error; pytorch_optimizer has some 140 classes
EXTRA = ("pytorch_optimizer", "schedulefree")  # the packages of setup.py's extra `optimizers`


def find(what: str, path: str, base: type) -> Callable[..., Any]:
    """The class or function with the dotted `path`. ValueError, which begins with `what`, if there is none.

    If the attribute is missing, the error names the subclasses of `base` in the module.
    """
    module_path, _, attribute = path.rpartition(".")
    if not module_path or not attribute:
        raise ValueError(f"{what} is no dotted path, package.module.Class")
    try:
        module = importlib.import_module(module_path)
        found = getattr(module, attribute, None)
    except Exception as error:  # foreign code, which may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRA:
            raise ValueError(
                f"{what} needs the package {error.name}: pip install {error.name} (the extra `optimizers` of setup.py)"
            ) from error
        raise ValueError(f"{what} cannot be imported: {type(error).__name__}: {error}; is it on PYTHONPATH?") from error
    if found is None:
        kinds = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
        raise ValueError(f"{what} cannot be imported: {module_path} has no {attribute!r}{suggest(attribute, kinds)}")
    if not callable(found):
        raise ValueError(f"{what} is not a class or function")
    return found


def construct(what: str, maker: Callable[..., Any], subject: Any, settings: dict[str, Any]) -> Any:
    """`maker(subject, **settings)`. ValueError for an unknown, missing or refused setting."""
    accepted = list(inspect.signature(maker).parameters.values())[1:]
    named = {parameter.name: parameter.default for parameter in accepted if parameter.kind != parameter.VAR_KEYWORD}
    for key in settings:
        if key not in named and len(named) == len(accepted):
            raise ValueError(f"{what} has no setting {key!r}{suggest(key, named)}")
    for key, default in named.items():
        if default is inspect.Parameter.empty and key not in settings:
            raise ValueError(f"{what} needs the setting {key!r}")
    try:
        return maker(subject, **settings)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    except Exception as error:  # foreign classes may check settings in any way, or not at all
        raise ValueError(f"{what}: {error or type(error).__name__}; its settings: {settings}") from error


def suggest(name: object, valid: Iterable[str]) -> str:
    """'; did you mean X? valid: X, Y' for an unknown `name`, without a very long list."""
    valid = list(valid)
    near = difflib.get_close_matches(str(name).lower(), [v.lower() for v in valid], n=1)
    parts = [f"did you mean {next(v for v in valid if v.lower() == near[0])!r}?"] if near else []
    parts += [f"valid: {', '.join(valid)}"] if len(valid) <= MOST_LISTED else []
    return f"; {' '.join(parts)}" if parts else ""
