"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from jaxrl.config import ConfigError, LoraConfig
from jaxrl.model.folders import read_json, replaced_folder, write_json
from jaxrl.model.lora import A, Adapters
from jaxrl.model.placement import whole_tensor
from jaxrl.model.spec import ParamSpec, Specs
from jaxrl.model.tensor_files import TYPES, several, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_WANTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""Values of adapter_config.json with which an adapter is what is computed here; keys that are absent count as usual.
Other initialisations (PiSSA, OLoRA, LoftQ, CorDA) subtract the adapter from the weights it stands on."""


_FROZEN = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
"""Ends of the names of copies that PEFT puts beside the adapters of embedding and output head; those are frozen."""


def save_adapter(
    path: str | os.PathLike[str],
    config: LoraConfig,
    specs: Specs,
    adapters: Adapters,
    base: str = "",
    also: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained`` puts on the model it was trained on.

    Args:
        path: of the new folder; what may stand there is said by ``folders.replaced_folder``.
        specs: from ``lora.adapter_specs``.
        adapters: float32, on the host or on devices; all processes that share them call this together.
        base: name or path of the model it was trained on, for whoever loads the adapter without naming one.
        also: given the unfinished folder, writes more files into it.

    Raises:
        ConfigError: something else stands at ``path``, or PEFT would load the adapter as another one.
        OSError: the folder cannot be written.
    """
    _check_known_to_peft(config, specs)
    modules = {_module(spec) for spec in flax.traverse_util.flatten_dict(specs).values()}
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rank_stabilized,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors, leaves = {}, flax.traverse_util.flatten_dict(adapters)
    for key, spec in flax.traverse_util.flatten_dict(specs).items():
        tensors |= {name: whole_tensor(spec, leaves[key], place) for place, name in spec.hf_names.items()}
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with replaced_folder(path, needed_bytes=needed, known_by=CONFIG) as staging:
        if jax.process_index() == 0:
            write_json(staging / CONFIG, document)
            write_tensors(staging / WEIGHTS, tensors)
            if also is not None:
                also(staging)


def load_adapter(path: str | os.PathLike[str], config: LoraConfig, specs: Specs) -> Adapters:
    """The adapter in a folder, as float32 numpy arrays.

    Args:
        config: which the adapter must agree with, so that a resumed run needs the folder no more.
        specs: from ``lora.adapter_specs``, for ``config``.

    Raises:
        ConfigError: no readable folder, a kind of adapter that is not computed here, another rank or scale, or tensors
            that are not those of ``specs``. The message names what was found, what was wanted and the remedy.
    """
    folder = pathlib.Path(path)
    _check_document(folder, read_json(folder / CONFIG), config)
    tensors = _read_tensors(folder)
    flat = flax.traverse_util.flatten_dict(specs)
    _check_tensors(folder, tensors, list(flat.values()))
    adapters = {}
    for key, spec in flat.items():
        adapters[key] = np.empty(spec.shape, spec.dtype)
        for place, name in spec.hf_names.items():
            adapters[key][place] = spec.from_hf(tensors[name])
    return flax.traverse_util.unflatten_dict(adapters)


def _module(spec: ParamSpec) -> str:
    """The last name of the adapted module's path: what PEFT's target_modules are compared with."""
    return spec.hf_name.split(".lora_")[0].rpartition(".")[2]


def _check_known_to_peft(config: LoraConfig, specs: Specs) -> None:
    """Refuse what PEFT, up to 0.21, does not load as what it is.

    transformers 5 has gate and up of all experts in one tensor. PEFT reads their names in ``target_modules`` as that
    tensor's, wherever the matrices are; it takes both and ``down`` or neither, and doubles their rank and alpha.
    """
    experts = {name for name in ("expert_gate", "expert_up", "expert_down") if name in specs}
    beside = [name for name in ("gate", "up", "down") if name in specs and specs[name][A].layers is not None]
    problem = ""
    if beside:
        problem = f"adapters of {', '.join(beside)} in layers without experts, of a model that has experts in others"
    elif experts not in (set(), {"expert_down"}, {"expert_gate", "expert_up", "expert_down"}):
        problem = f"adapters of {' and '.join(sorted(experts))} without the other matrices of the experts"
    elif "expert_gate" in experts and config.rank_stabilized:
        problem = "LoraConfig.rank_stabilized=True for gate and up of experts, which it would scale by another root"
    if problem:
        raise ConfigError(
            f"peft does not load {problem}; export the model with its adapter merged (leave out --adapter)"
        )


def _check_document(folder: pathlib.Path, document: dict[str, Any], config: LoraConfig) -> None:
    for key, usual in _WANTED.items():
        value = document.get(key, usual[0])
        if value not in usual:
            raise ConfigError(
                f"{folder / CONFIG} has {key}={value!r}, which is not supported (only {usual[0]!r}); merge this "
                "adapter into its model with peft and start from the merged folder"
            )
    found = LoraConfig(
        rank=document.get("r", 0),
        alpha=document.get("lora_alpha", 0),
        rank_stabilized=bool(document.get("use_rslora", False)),
    )
    for field in ("rank", "alpha", "rank_stabilized"):
        have, wanted = getattr(found, field), getattr(config, field)
        if have != wanted:
            raise ConfigError(
                f"{folder} has an adapter of {field} {have}, but LoraConfig.{field}={wanted}; set "
                f"LoraConfig.{field}={have}"
            )


def _read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    file = folder / WEIGHTS
    if not file.is_file():
        raise ConfigError(f"{folder} has no {WEIGHTS}; only safetensors are read: save the adapter again with peft")
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            names = [name for name in list(opened.keys()) if not name.endswith(_FROZEN)]
            mistyped = [
                f"{name} is {kind}" for name in names if (kind := opened.get_slice(name).get_dtype()) not in TYPES
            ]
            if mistyped:
                raise ConfigError(f"{file} has types other than {', '.join(TYPES)}: {several(mistyped)}")
            return {name: opened.get_tensor(name).astype(jnp.float32) for name in names}
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{file} is damaged ({error}); fetch it again") from error


def _check_tensors(folder: pathlib.Path, tensors: dict[str, np.ndarray], specs: list[ParamSpec]) -> None:
    wanted = {name: spec.hf_shape for spec in specs for name in spec.hf_names.values()}
    missing = [f"{name} {shape}" for name, shape in wanted.items() if name not in tensors]
    extra = sorted(set(tensors) - set(wanted))
    misshaped = [
        f"{name} is {tensors[name].shape}, wanted {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{title}: {several(names)}"
        for title, names in (("missing", missing), ("not asked for", extra), ("wrong shapes", misshaped))
        if names
    ]
    if problems:
        raise ConfigError(
            f"{folder} does not hold the adapters of LoraConfig.targets on this model; {'; '.join(problems)}. Set "
            f"LoraConfig.targets to the target_modules of its {CONFIG}, and start from the model it was trained on"
        )
