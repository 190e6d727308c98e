"""The JSON Schema of a spec: completion and checks while typing.

It accepts whatever the loader accepts. What it cannot say stays with the loader: relations between numbers (top_k and
experts, widths and group sizes, token ids and the vocabulary), and 4.0 where an integer belongs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moec.compiler.spec.device import Device, isa_names
from moec.compiler.spec.model import NAME_PATTERN, Spec
from moec.compiler.spec.sources import find_source, source_keys
from moec.compiler.spec.targets import options_class, target_packages


def spec_schema(targets: Iterable[str] | None = None) -> dict[str, Any]:
    """The schema with the options of `targets` (default: every installed one)."""
    schema = Spec.model_json_schema()
    schema["properties"]["quantization"] = {"anyOf": [{"const": "none"}, {"$ref": "#/$defs/Quantization"}]}
    schema["properties"]["name"]["pattern"] = f"^{NAME_PATTERN}$"
    definitions = schema.setdefault("$defs", {})
    forms = []
    for key in source_keys():
        section = find_source(key).section
        form = section.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= form.pop("$defs", {})
        definitions[section.__name__] = form
        forms.append({"$ref": f"#/$defs/{section.__name__}"})
    schema["properties"]["model"] = {"anyOf": forms}
    schema["$defs"] = definitions = dict(sorted(definitions.items()))
    properties: dict[str, Any] = {}
    for name in sorted(target_packages() if targets is None else targets):
        options = options_class(name).model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        for inner, definition in options.pop("$defs", {}).items():
            definitions[f"{name}.{inner}"] = definition
        definitions[f"{name}.Options"] = options
        properties[name] = {"anyOf": [{"$ref": f"#/$defs/{name}.Options"}, {"type": "null"}]}
    mapping = {"type": "object", "properties": properties, "additionalProperties": False, "minProperties": 1}
    names = {"enum": sorted(properties)}
    item = {"anyOf": [names, {**mapping, "maxProperties": 1}]}
    schema["properties"]["targets"] = {
        "title": "Targets",
        "description": "a target's name, a list of names, or a mapping of target to its options",
        "anyOf": [names, {"type": "array", "items": item, "minItems": 1}, mapping],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "moec spec"}


def device_schema() -> dict[str, Any]:
    """The schema of a device file."""
    schema = Device.model_json_schema()
    schema["properties"]["backend"]["enum"] = sorted(target_packages())
    isas = list(isa_names())
    schema["properties"]["isa"]["items"]["enum"] = schema["$defs"]["KernelRates"]["properties"]["isa"]["enum"] = isas
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "moec device"}
