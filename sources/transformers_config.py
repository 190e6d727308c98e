"""A config.json as the transformers library reads it, and the class of its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moec.checkpoints.config_json import read_json
from moec.checkpoints.folder import GGUF, foreign_folder, gguf_refused
from moec.compiler.errors import CheckpointError, CompileError, MissingExtra
from moec.sources.config_limits import check_config


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(
            "reading this model needs transformers", remedy="pip install 'moec[transformers]'"
        ) from error
    return transformers


def home_of(path: Path) -> Path:
    """The folder of a model: `path`, or that of the config.json which it names. CheckpointError for another file."""
    if path.is_file() and path.name != "config.json":
        if path.suffix == GGUF:
            raise gguf_refused(path)
        raise CheckpointError("is a file", place=str(path), remedy="name the folder with config.json and the weights")
    return path if path.is_dir() else path.parent


def read_config(folder: Path) -> Any:
    """The transformers config of a folder, or of its config.json."""
    transformers = _transformers()
    path = home_of(folder)
    if not (path / "config.json").is_file():
        foreign = foreign_folder(path)
        if foreign is not None:
            raise foreign
        raise CheckpointError("there is no config.json", place=str(folder), remedy="name a folder that holds one")
    # bounded: what transformers reads afterwards is a small JSON mapping of numbers that a model can have
    raw = read_json(path / "config.json")
    check_config(raw, str(path / "config.json"))
    if "configuration_files" in raw:  # transformers would read another file instead, which nothing here has looked at
        raise CheckpointError(
            "names other files as its configuration",
            place=str(path / "config.json"),
            remedy="put the one that is meant in its place, without `configuration_files`",
        )
    try:
        return transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"transformers {transformers.__version__} does not read it: {first[0][:300]}",
            place=str(path / "config.json"),
        ) from error


def config_from_keys(keys: Mapping[str, Any], place: str) -> Any:
    """The config of the keys that a config.json would have, `model_type` among them; CheckpointError if refused."""
    transformers = _transformers()
    check_config(keys, place)
    given = dict(keys)
    kind = given.pop("model_type")
    try:
        return transformers.AutoConfig.for_model(kind, **given)
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"transformers {transformers.__version__} does not take it as {kind}: {first[0][:300]}", place=place
        ) from error


def auto_model(config: Any) -> Any:
    """The factory of `config`'s model that writes text: of one that reads images too, the text part is exported."""
    transformers = _transformers()
    for factory, mapping in (
        ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
        ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
        ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING"),
    ):
        if type(config) in getattr(transformers, mapping, ()):
            return getattr(transformers, factory)
    raise CompileError(
        f"transformers {transformers.__version__} has no model of {config.model_type} that writes text",
        remedy="give the config.json of a whole language model",
    )


def build_model(config: Any, place: Path, experts: str | None = None) -> Any:
    """The float32 module of a config. CheckpointError where transformers cannot build it, whatever it raises.

    Which kernel computes attention and experts is no property of a checkpoint: a config may name one, even one to fetch
    and run from a hub. All such keys are set aside, and transformers takes its own, or for experts what `experts` says.
    """
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        for key in [k for k in vars(part) if "_implementation" in k] if part is not None else ():
            setattr(part, key, None)
    if experts is not None:
        config._experts_implementation = experts
    try:
        return auto_model(config).from_config(config, dtype=torch.float32)
    except CompileError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        what = f"{type(error).__name__}: {first[0][:300]}" if isinstance(error, KeyError) else first[0][:300]
        raise CheckpointError(f"transformers cannot build it: {what}", place=str(place)) from error
