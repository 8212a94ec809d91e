"""YAML as recipes and sweeps are written in."""

from typing import Any

import yaml

from epalm.errors import EpalmError


def read_yaml(text: str, source: str) -> Any:
    """What the text says.

    Raises:
        EpalmError: not YAML, or a key that stands twice in one mapping, of which YAML would
            silently take the last; `source` names the text in the message.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}" if mark and "\n" in text else ""
        raise EpalmError(f"{source}{place}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2023-02-30, say
        raise EpalmError(f"{source}: not valid YAML: {error}") from None
    except RecursionError:
        raise EpalmError(f"{source}: not valid YAML: nested too deeply") from None


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # `<<` is not replaced yet
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                what = f"the key {key.value} stands twice; put what is under it together"
                raise yaml.MarkedYAMLError(problem=what, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node
