"""YAML by the core schema of YAML 1.2; PyYAML alone follows YAML 1.1.

So 010 is ten, 5e-4 a number, and 1:30, 1_000, 2020-01-01 and yes are text. The merge key `<<` of 1.1 works too.
"""

import re
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

MOST_VALUES = 10_000  # aliases of aliases could stand for more than memory holds
TAG = "tag:yaml.org,2002:"
# YAML 1.2.2, section 10.3.2: pattern, first characters and conversion, tried in this order.
SCALARS: dict[str, tuple[str, list[str], Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda text: None),
    "bool": (
        r"true|True|TRUE|false|False|FALSE",
        list("tTfF"),
        lambda text: {"true": True, "false": False}[text.lower()],
    ),
    "int": (
        r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
        list("-+0123456789"),
        lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    ),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
}


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _checked_size(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
        return _unshared(loader.construct_document(node))
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()


def _unshared(value: Any) -> Any:
    """`value` with copies of what aliases repeat: an override changes one place alone."""
    if isinstance(value, dict):
        return {key: _unshared(child) for key, child in value.items()}
    return [_unshared(child) for child in value] if isinstance(value, list) else value


def write_yaml(value: Any) -> str:
    """Text that YAML 1.1 and 1.2 read alike: floats as 1.0e-08, quotes where either would misread."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None)


def _checked_size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values `node` stands for, with aliases written out.

    Raises ConstructorError for a key that is no text, or repeated.
    """
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = 1  # for a node within itself, which PyYAML refuses later
    children = node.value if isinstance(node, yaml.CollectionNode) else ()
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in children]
        for index, (key, _) in enumerate(children):
            if isinstance(key, yaml.ScalarNode) and key.tag not in (f"{TAG}str", f"{TAG}merge"):
                raise ConstructorError(None, None, f"the key {key.value} is not text: quote it", key.start_mark)
            if isinstance(key, yaml.ScalarNode) and key.value in keys[:index]:
                raise ConstructorError(None, None, f"the key '{key.value}' is given twice", key.start_mark)
        children = [child for pair in children for child in pair]
    known[id(node)] += sum(_checked_size(child, known) for child in children)
    return known[id(node)]


class _Loader(yaml.SafeLoader):
    """Refuses tags beyond the core schema."""

    yaml_implicit_resolvers: ClassVar[dict] = {}
    yaml_constructors: ClassVar[dict] = {None: yaml.SafeLoader.construct_undefined}

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put the keys of merged mappings, `<<: *a` or `<<: [*a, *b]`, before the mapping's own, which override them.

        PyYAML's own method takes a value that a merged mapping itself overrides.
        """
        merged = [value for key, value in node.value if key.tag == f"{TAG}merge"]
        node.value = own = [pair for pair in node.value if pair[0].tag != f"{TAG}merge"]
        given, added = [key.value for key, _ in own], []
        lists = [value.value if isinstance(value, yaml.SequenceNode) else [value] for value in merged]
        for source in chain.from_iterable(lists):
            if not isinstance(source, yaml.MappingNode):
                raise ConstructorError(None, None, "<< takes a mapping, or a list of mappings", source.start_mark)
            self.flatten_mapping(source)
            new = [pair for pair in source.value if pair[0].value not in given]
            given += [key.value for key, _ in new]
            added += new
        node.value = added + own


class _Dumper(yaml.SafeDumper):
    """Knows the scalars of YAML 1.1 and 1.2."""


def _construct(convert: Callable[[str], Any], loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    text = loader.construct_scalar(node)
    try:
        return convert(text)
    except (ValueError, KeyError):  # a wrong tag, or more digits than Python converts
        kind = node.tag.removeprefix(TAG)
        raise ConstructorError(None, None, f"{text[:40]!r} cannot be read as {kind}", node.start_mark) from None


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar(f"{TAG}float", text)


for _kind, (_pattern, _first, _convert) in SCALARS.items():
    _Loader.add_constructor(TAG + _kind, partial(_construct, _convert))
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(TAG + _kind, re.compile(f"^(?:{_pattern})$"), _first)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(f"{TAG}merge", re.compile("^<<$"), ["<"])
_Loader.add_constructor(f"{TAG}str", partial(_construct, str))
_Loader.add_constructor(f"{TAG}seq", lambda loader, node: loader.construct_sequence(node, deep=True))
_Loader.add_constructor(f"{TAG}map", lambda loader, node: loader.construct_mapping(node, deep=True))
_Dumper.add_representer(float, _represent_float)
