"""Command line and YAML to a frozen configuration, and back.

Later layers win: schema defaults < configs/base.yaml < configs/preset/<preset>.yaml <
configs/network/<network>.yaml < configs/stage/<stage>.yaml < ``key=value`` arguments (submit:
schema < configs/submit.yaml < arguments). The stage comes last because a second stage moves the
weights of any preset less. The only file that knows OmegaConf, and PyYAML for the error type
OmegaConf raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tiny_onn.config.check import check_convert, check_inspect, check_submit, check_train
from tiny_onn.config.check_network import check_k24, check_model, check_moe, check_nsa
from tiny_onn.config.help import convert_help, inspect_help, submit_help, train_help
from tiny_onn.config.keys import Key, keys_of, suggestion
from tiny_onn.config.layer import Layer, displaced, flatten, in_origin
from tiny_onn.config.ranges import check_ranges
from tiny_onn.config.schema import Config, ConvertConfig, InspectConfig, SubmitConfig
from tiny_onn.errors import UserError

AnyConfig = TypeVar("AnyConfig", Config, SubmitConfig, ConvertConfig, InspectConfig)

KINDS = ("preset", "network", "stage")
"""Settings that name a file of other settings; later ones win."""

SHORT = {"weights": "model.weights", "ffn": "model.ffn"}
"""What may be typed for a key of the network's parts."""

_HELP_FLAGS = frozenset({"-h", "--help", "help"})


def configs_folder() -> Path:
    """The YAML files: beside the package's modules in a wheel, else of the source tree."""
    here = Path(__file__).resolve()
    for folder in (here.parents[1] / "configs", here.parents[2] / "configs"):
        if (folder / "base.yaml").is_file():
            return folder
    raise UserError(
        f"configs/base.yaml is missing beside '{here.parents[1]}'; expected the repository or a "
        "complete installation; install again"
    )


def names_in(kind: str) -> list[str]:
    """Names of the files of a kind (stage, network or preset), sorted."""
    return sorted(path.stem for path in (configs_folder() / kind).glob("*.yaml"))


def _files_of(kind: str) -> dict[str, Path]:
    return {name: configs_folder() / kind / f"{name}.yaml" for name in names_in(kind)}


def load_train_config(arguments: Sequence[str]) -> Config | None:
    """What ``train.py`` was asked for; None when it was help, which is printed.

    Raises:
        UserError: an unknown stage, network, preset or key, a wrong type or value, settings that
            do not fit together.
    """
    if _HELP_FLAGS.intersection(arguments):
        print(train_help({kind: _files_of(kind) for kind in KINDS}))
        return None
    return load_config(arguments)


def load_submit_config(arguments: Sequence[str]) -> SubmitConfig | None:
    """What ``submit.py`` was asked for; None when it was help, which is printed.

    Raises:
        UserError: as :func:`load_train_config`.
    """
    if _HELP_FLAGS.intersection(arguments):
        print(submit_help())
        return None
    return load_submit(arguments)


def load_inspect_config(arguments: Sequence[str]) -> InspectConfig | None:
    """The same for ``python -m tiny_onn.inspect``."""
    if _HELP_FLAGS.intersection(arguments):
        print(inspect_help())
        return None
    keys = keys_of(InspectConfig)
    config = _build(InspectConfig, keys, [_argument_layer(arguments, keys)])
    check_inspect(config)
    return config


def load_convert_config(arguments: Sequence[str]) -> ConvertConfig | None:
    """The same for ``python -m tiny_onn.convert``."""
    if _HELP_FLAGS.intersection(arguments):
        print(convert_help())
        return None
    keys = keys_of(ConvertConfig)
    config = _build(ConvertConfig, keys, [_argument_layer(arguments, keys)])
    check_convert(config)
    return config


def load_config(arguments: Sequence[str] = ()) -> Config:
    """The frozen :class:`Config` of ``key=value`` arguments, all interpolations resolved.

    Raises:
        UserError: as :func:`load_train_config`.
    """
    keys = keys_of(Config)
    asked = _argument_layer(arguments, keys)
    layers = [_file_layer(configs_folder() / "base.yaml", keys)]
    for kind in KINDS:
        name, names = asked.values.get(kind, keys[kind].default), names_in(kind)
        if name not in names:
            raise UserError(
                f"unknown {kind} '{name}'; expected one of {', '.join(names)}; "
                + suggestion(str(name), names, "choose one of them")
            )
        layers.append(_file_layer(configs_folder() / kind / f"{name}.yaml", keys))
    config = _build(Config, keys, [*layers, asked])
    check_train(config)
    return config


def load_submit(arguments: Sequence[str] = ()) -> SubmitConfig:
    """The frozen :class:`SubmitConfig` of ``key=value`` arguments.

    Raises:
        UserError: as :func:`load_train_config`.
    """
    keys = keys_of(SubmitConfig)
    asked = _argument_layer(arguments, keys)
    base = _file_layer(configs_folder() / "submit.yaml", keys)
    config = _build(SubmitConfig, keys, [base, asked])
    check_submit(config)
    return config


def dump_config(config: Config | SubmitConfig) -> str:
    """YAML text of every key, that :func:`load_saved_config` reads back equal."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def config_from_dict(saved: Mapping[str, Any], origin: str = "saved configuration") -> Config:
    """A :class:`Config` from nested plain values that hold every key and no other.

    Missing keys are errors, not defaults: a torn file must not become another model. Budget and
    data are not checked, for a checkpoint is used, not trained again.

    Raises:
        UserError: an unknown, missing or wrong value; ``origin`` names where.
    """
    keys = keys_of(Config)
    values = dict(flatten(saved, keys, origin))
    references = [name for name, value in values.items() if "${" in str(value)]
    if references:
        raise UserError(
            f"got {references[0]}={values[references[0]]} in {origin}; expected a plain value; "
            "write what the reference stands for"
        )
    missing = [name for name in keys if name not in values]
    if missing:
        raise UserError(
            f"{origin} lacks {missing[0]} (and {len(missing) - 1} more); expected every key; "
            "it is torn or of another version: train again"
        )
    config = _build(Config, keys, [Layer(values, origin)])
    try:
        check_model(config.model)
        check_moe(config.moe, config.model)
        check_nsa(config.nsa, config.model)
        check_k24(config.k24, config.model, config.moe)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    return config


def load_saved_config(path: str | Path) -> Config:
    """The configuration that :func:`dump_config` wrote to ``path``.

    Raises:
        UserError: no such file, not YAML, or not a whole configuration.
    """
    origin = f"configuration '{path}'"
    return config_from_dict(_read_yaml(Path(path), origin), origin)


def _read_yaml(path: Path, origin: str) -> dict[str, Any]:
    try:
        node = OmegaConf.load(path)
    except OSError as error:
        raise UserError(
            f"{origin} cannot be read ({error.strerror}); expected a YAML file; check the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(
            f"{origin} is not YAML ({_first_line(error)}); expected key: value lines; mend it"
        ) from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{origin} holds a list; expected key: value lines; mend it")
    return OmegaConf.to_container(node, resolve=False)


def _file_layer(path: Path, keys: Mapping[str, Key]) -> Layer:
    origin = f"configs/{path.relative_to(configs_folder())}"
    return Layer(dict(flatten(_read_yaml(path, origin), keys, origin)), origin)


def _argument_layer(arguments: Sequence[str], keys: Mapping[str, Key]) -> Layer:
    values: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or not name or name.startswith("-"):
            bare = argument.strip("-=") or "key"
            example = bare if "=" in bare else f"{bare}=VALUE"
            raise UserError(f"got '{argument}'; expected key=value; write {example} or see --help")
        name = SHORT.get(name, name) if SHORT.get(name) in keys else name
        values |= flatten({name: _parse(name, text, keys)}, keys, "")
    return Layer(values, "")


def _parse(name: str, text: str, keys: Mapping[str, Key]) -> Any:
    """Text as the key's type wants it: strings as they are, all else as YAML."""
    key = keys.get(name)
    if key is not None and (key.hint is str or key.choices):
        return None if key.optional and text in ("null", "") else text
    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        expected = key.expected if key else "a value in YAML"
        raise UserError(f"got {name}={text}; expected {expected}; {_first_line(error)}") from error


def _build(schema: type[AnyConfig], keys: Mapping[str, Key], layers: list[Layer]) -> AnyConfig:
    """Merge the layers over the schema's defaults, resolve, check ranges, freeze."""
    tree = _writable(OmegaConf.structured(schema), keys)
    for layer in layers:
        for name, value in (displaced(layer.values) | layer.values).items():
            _assign(tree, keys[name], value, layer.origin)
    for name in keys:
        if OmegaConf.is_missing(*_parent(tree, name)):
            raise UserError(f"{name} is missing; expected {keys[name].help}; give {name}=VALUE")
    try:
        OmegaConf.resolve(tree)
        config = OmegaConf.to_object(tree)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(
            f"a ${{...}} reference cannot be resolved ({_first_line(error)}); expected the full "
            "name of another key; mend it"
        ) from error
    assert isinstance(config, schema)
    check_ranges({name: OmegaConf.select(tree, name) for name in keys})
    return config


def _assign(tree: DictConfig, key: Key, value: Any, origin: str) -> None:
    strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
    try:
        if key.is_list and not strings:
            raise TypeError("not a list of texts")
        if isinstance(value, bool) and key.hint is not bool:
            raise TypeError("a truth value")
        if key.hint is bool and not isinstance(value, bool) and not _is_reference(value):
            raise TypeError("not a truth value")
        if key.hint is str and isinstance(value, list | dict):
            raise TypeError("not a text")
        OmegaConf.update(tree, key.name, value, merge=False)
    except (TypeError, OmegaConfBaseException) as error:
        remedy = "change it"
        if key.choices:
            remedy = suggestion(str(value), key.choices, "choose one of them")
        elif key.is_list and isinstance(value, str):
            remedy = f"write {key.name}=[{value}]"
        raise UserError(
            f"got {key.name}={_as_written(value)}{in_origin(origin)}; "
            f"expected {key.expected}; {remedy}"
        ) from error


def _as_written(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _writable(tree: DictConfig, keys: Mapping[str, Key]) -> DictConfig:
    """Frozen dataclasses make read-only nodes; open them while the layers are merged."""
    OmegaConf.set_readonly(tree, False)
    for group in dict.fromkeys(name.rpartition(".")[0] for name in keys if "." in name):
        OmegaConf.set_readonly(OmegaConf.select(tree, group), False)
    return tree


def _parent(tree: DictConfig, name: str) -> tuple[DictConfig, str]:
    *groups, last = name.split(".")
    for group in groups:
        tree = tree[group]
    return tree, last


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
