"""The JSON Schema of a spec: completion and checks while typing. The loader stays the judge."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moec.compiler.spec.device import Device
from moec.compiler.spec.model import Spec
from moec.compiler.spec.targets import options_class, target_packages


def spec_schema(targets: Iterable[str] | None = None) -> dict[str, Any]:
    """The schema with the options of `targets` (default: every installed one)."""
    schema = Spec.model_json_schema()
    schema["properties"]["quantization"] = {"anyOf": [{"const": "none"}, {"$ref": "#/$defs/Quantization"}]}
    definitions = schema.setdefault("$defs", {})
    properties: dict[str, Any] = {}
    for name in sorted(target_packages() if targets is None else targets):
        options = options_class(name).model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        for inner, definition in options.pop("$defs", {}).items():
            definitions[f"{name}.{inner}"] = definition
        definitions[f"{name}.Options"] = options
        properties[name] = {"anyOf": [{"$ref": f"#/$defs/{name}.Options"}, {"type": "null"}]}
    mapping = {"type": "object", "properties": properties, "additionalProperties": False, "minProperties": 1}
    item = {"anyOf": [{"enum": sorted(properties)}, {**mapping, "maxProperties": 1}]}
    schema["properties"]["targets"] = {
        "title": "Targets",
        "description": "target names, or a mapping of target to its options",
        "anyOf": [{"type": "array", "items": item, "minItems": 1}, mapping],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "moec spec"}


def device_schema() -> dict[str, Any]:
    """The schema of a device file."""
    schema = Device.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "moec device"}
