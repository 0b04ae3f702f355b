"""Settings: schema defaults < configs/base.yaml < stage < preset < ``key=value`` arguments.

The only importer of OmegaConf. What comes out are the frozen dataclasses of ``schema``.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tiny_onn.config.schema import Config, SubmitConfig
from tiny_onn.errors import UserError

BUDGETS = ("minutes", "epochs", "steps")
T = TypeVar("T", Config, SubmitConfig)


def configs_folder() -> Path:
    """configs/ of the checkout, or its copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "base.yaml").is_file():
            return folder
    raise UserError(f"got no configs/base.yaml beside or in '{package}'; expected one; reinstall")


def choices(kind: str) -> list[str]:
    """Names of the YAML files in configs/<kind> (stage or preset)."""
    return sorted(path.stem for path in (configs_folder() / kind).glob("*.yaml"))


def key_paths(schema: type) -> list[str]:
    """Every key of a schema, dotted."""
    paths = []
    for entry in fields(schema):
        nested = entry.default_factory if is_dataclass(entry.default_factory) else None
        if nested is None:
            paths.append(entry.name)
        else:
            paths += [f"{entry.name}.{path}" for path in key_paths(nested)]
    return paths


def nearest(word: str, known: Sequence[str]) -> str:
    """"; did you mean X" for the most similar known word, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def _nearest_key(path: str, known: Sequence[str]) -> str:
    by_leaf = {k.rsplit(".", 1)[-1]: k for k in known}
    direct = difflib.get_close_matches(path, known, n=1, cutoff=0.7)
    leaf = difflib.get_close_matches(path.rsplit(".", 1)[-1], list(by_leaf), n=1, cutoff=0.6)
    if direct or leaf:
        return f"; did you mean {direct[0] if direct else by_leaf[leaf[0]]}?"
    return "; --help lists every key"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"cannot read '{path}' ({line}); expected YAML; mend the file") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds a {type(content).__name__}; expected keys and values")
    return content


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for name, value in tree.items():
        path = f"{prefix}{name}"
        paths += _flatten(value, f"{path}.") if isinstance(value, dict) else [path]
    return paths


def _arguments(argv: Sequence[str], schema: type) -> DictConfig:
    known = key_paths(schema)
    for word in argv:
        path, equals, _ = word.partition("=")
        if not equals:
            raise UserError(
                f"got argument '{word}', expected key=value{_nearest_key(word.lstrip('-'), known)}"
            )
        if path not in known:
            raise UserError(f"got unknown key '{path}'{_nearest_key(path, known)}")
    try:
        return OmegaConf.from_dotlist(list(argv))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(
            f"cannot read arguments {' '.join(argv)} ({_first_line(error)}); expected key=value"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _merge(schema: type[T], layers: Sequence[tuple[str, Any]]) -> T:
    """Merge (where, layer) on the schema, in order; errors name key and origin."""
    config = OmegaConf.structured(schema)
    known = key_paths(schema)
    for where, layer in layers:
        plain = OmegaConf.to_container(layer) if isinstance(layer, DictConfig) else layer
        for path in _flatten(plain):
            if path not in known:
                raise UserError(f"{where}: got unknown key '{path}'{_nearest_key(path, known)}")
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            path = getattr(error, "full_key", None) or "?"
            raise UserError(
                f"{where}: {path}: {_first_line(error)}; --help lists what {path} takes"
            ) from error
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(f"got no {missing[0]}; expected {missing[0]}=...; --help explains it")
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(f"settings: {_first_line(error)}; --help lists every key") from error


def _one_budget(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer that sets one kind of budget clears the kinds of the layers below it."""
    given = layer.get("budget")
    if not isinstance(given, dict) or all(given.get(k) is None for k in BUDGETS):
        return layer
    return {**layer, "budget": {k: given.get(k) for k in BUDGETS} | given}


def _check(config: Config) -> None:
    positive = {
        "data.batch_tokens": config.data.batch_tokens,
        "data.max_tokens": config.data.max_tokens,
        "data.views_per_example": config.data.views_per_example,
        "model.width": config.model.width,
        "model.layers": config.model.layers,
        "model.loops": config.model.loops,
        "model.heads": config.model.heads,
        "model.kv_heads": config.model.kv_heads,
        "model.ffn_width": config.model.ffn_width,
        "trainer.devices": config.trainer.devices,
        "trainer.nodes": config.trainer.nodes,
        "trainer.log_every_steps": config.trainer.log_every_steps,
    }
    for name, value in positive.items():
        if value <= 0:
            raise UserError(f"got {name}={value}; expected a number above 0; change it")
    model = config.model
    if model.heads % model.kv_heads:
        raise UserError(
            f"got model.kv_heads={model.kv_heads}; expected a divisor of model.heads={model.heads}"
        )
    if model.head_width % 2 or model.head_width < 8:
        raise UserError(f"got model.head_width={model.head_width}; expected an even number >= 8")
    if model.vocab_size != 14:
        raise UserError(f"got model.vocab_size={model.vocab_size}; expected 14, the ARC tokens")
    if config.data.loss_on_inputs and model.mask == "prefix":
        raise UserError(
            "got data.loss_on_inputs=true with model.mask=prefix, where inputs see themselves; "
            "expected model.mask=causal; set it"
        )
    given = {k: v for k in BUDGETS if (v := getattr(config.budget, k)) is not None}
    if len(given) != 1:
        got = ", ".join(f"budget.{k}={v}" for k, v in given.items()) or "no budget"
        raise UserError(f"got {got}; expected one of budget.minutes, budget.epochs, budget.steps")
    ((name, value),) = given.items()
    if not 0 < value < float("inf"):
        raise UserError(f"got budget.{name}={value}; expected a number above 0; give more")


def _chosen(arguments: DictConfig, kind: str, default: str) -> str:
    name = str(arguments.get(kind, default))
    known = choices(kind)
    if name not in known:
        raise UserError(
            f"got unknown {kind} '{name}'; expected one of {', '.join(known)}{nearest(name, known)}"
        )
    return name


def load_train_config(argv: Sequence[str]) -> Config | None:
    """The configuration of ``python train.py ARGV``; None after printing help.

    Raises:
        UserError: unknown keys, stages or presets, values of a wrong type, impossible settings.
    """
    if {"-h", "--help"} & set(argv):
        from tiny_onn.config.help import train_help

        print(train_help())
        return None
    arguments = _arguments(argv, Config)
    folder = configs_folder()
    stage = _chosen(arguments, "stage", "pretrain")
    preset = _chosen(arguments, "preset", "nano")
    layers: list[tuple[str, Any]] = [
        (str(path), _one_budget(_read_yaml(path)))
        for path in (
            folder / "base.yaml",
            folder / "stage" / f"{stage}.yaml",
            folder / "preset" / f"{preset}.yaml",
        )
    ]
    plain = OmegaConf.to_container(arguments)
    given = {**_one_budget(plain), "stage": stage, "preset": preset}
    config = _merge(Config, [*layers, ("arguments", given)])
    _check(config)
    return config


def load_submit_config(argv: Sequence[str]) -> SubmitConfig | None:
    """The configuration of ``python submit.py ARGV``; None after printing help.

    Raises:
        UserError: as :func:`load_train_config`.
    """
    if {"-h", "--help"} & set(argv):
        from tiny_onn.config.help import submit_help

        print(submit_help())
        return None
    arguments = _arguments(argv, SubmitConfig)
    path = configs_folder() / "submit.yaml"
    layers = [(str(path), _read_yaml(path)), ("arguments", arguments)]
    config = _merge(SubmitConfig, layers)
    predict = config.predict
    if predict.views is None and predict.minutes is None:
        raise UserError("got neither predict.views nor predict.minutes; expected one; set it")
    for name, value in (("views", predict.views), ("minutes", predict.minutes)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"got predict.{name}={value}; expected a number above 0; give more")
    if predict.batch_tokens <= 0:
        raise UserError(f"got predict.batch_tokens={predict.batch_tokens}; expected above 0")
    return config


def dump_config(config: Config | SubmitConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def load_saved_config(path: str | Path) -> Config:
    """A configuration written by :func:`dump_config` (a run's or a checkpoint's config.yaml).

    Raises:
        UserError: missing, torn, or of another version's schema.
    """
    return _merge(Config, [(str(path), _read_yaml(Path(path)))])
