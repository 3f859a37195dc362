"""Code comes only from where the config says.

The files of a model name classes and kernels. They may come from anyone, so only models and tokenizers of
transformers are looked up by these names. Code of the model's own folder or repository runs only with
`trust_remote_code`, and kernels of the hub are fetched only with `use_kernels`. Nobody is asked.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError
from trainers.config.text import first_line
from trainers.rank.library_patches import replace_in

if TYPE_CHECKING:
    from types import ModuleType


def refuse_foreign_code(use_kernels: bool) -> None:
    """Let transformers ask nothing and load no kernel that the config does not ask for, in this process.

    Some models and quantisations load kernels when they are built or first used, whatever their config says.
    """
    from transformers import dynamic_module_utils
    from transformers.integrations import hub_kernels

    # The seconds to wait for an answer to "Do you wish to run the custom code?". 0: an error, no question.
    replace_in(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0)
    if not use_kernels:
        replace_in(hub_kernels, "_kernels_enabled", False)  # then an installed package is used, or torch
        replace_in(hub_kernels, "get_kernel", _refuse_kernel)


def refuse_kernels_at_imports() -> None:
    """Let no library but transformers fetch a kernel of the hub. Call it before the libraries are imported.

    bitsandbytes fetches one when it is imported on some CPUs, and peft imports it in every run. It works
    without. refuse_foreign_code() decides for transformers.
    """
    if importlib.util.find_spec("kernels") is None:
        return
    kernels = importlib.import_module("kernels")  # an optional package
    fetch = kernels.get_kernel
    if fetch.__module__ == __name__:  # a forked rank has it from its parent
        return

    def get_kernel(name: str, *arguments: Any, **named: Any) -> Any:
        frame = inspect.currentframe()
        caller = frame.f_back.f_globals.get("__name__", "") if frame and frame.f_back else ""
        if caller.partition(".")[0] != "transformers":
            raise ConfigError(f"{caller} asks for {name}, a kernel of the hub, which is not fetched.")
        return fetch(name, *arguments, **named)

    replace_in(kernels, "get_kernel", get_kernel)


def _refuse_kernel(kernel_name: str, *_: Any, **__: Any) -> ModuleType:
    raise ConfigError(
        f"the model asks for {kernel_name}, a kernel of the hub. Kernels are fetched only with use_kernels: "
        "true, and without trust_remote_code only from kernels-community."
    )


def check_config(name: str, values: dict[str, Any], use_kernels: bool) -> None:
    """Check what the config.json of a model names, before an object is built from it.

    `name` is the model's. All levels are checked: a model may have configs for its parts.

    Raises:
        ConfigError: it names something that is not a model, or a kernel of the hub without `use_kernels`.
    """
    import transformers

    for place, word in _named(values):
        if place.endswith("_implementation") and "/" in word and not use_kernels:
            raise ConfigError(
                f"{name}: {place} of its config.json is {word}, a kernel of the hub, which is not fetched. "
                "Remove the key, or use use_kernels: true."
            )
        if place.endswith("tokenizer_class"):
            check_tokenizer(name, word)
        if place.endswith("architectures"):
            found = getattr(transformers, word, None)  # not there: nothing is looked up by this name
            if found is not None and not _is_a(found, transformers.PreTrainedModel):
                raise ConfigError(f"{name}: {place} of its config.json is {word}, which is not a model.")


def check_tokenizer(name: str, word: str) -> None:
    """Check the name of the tokenizer's class in a file of a model.

    Raises:
        ConfigError: transformers would find something that is not a tokenizer by this name.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    found = tokenizer_class_from_name(word)
    if found is not None and not _is_a(found, PreTrainedTokenizerBase):
        raise ConfigError(f"{name}: its tokenizer_class is {word}, which is not a tokenizer.")


def why_not_loaded(error: BaseException) -> str:
    """Return the reason why a model or tokenizer could not be loaded, in one line."""
    own_code = " Its own code runs only with trust_remote_code: true." if "custom code" in str(error) else ""
    return f"{first_line(error)}{own_code}"


def model_named(path: object, architectures: Any) -> type:
    """Return the class of transformers for `architectures` of a config.json, the file `path`.

    Only the models that the trainers load are known. The library has many other things of a name.

    Raises:
        ConfigError: there is no such model.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    from trainers.config.kinds import KINDS

    known: set[str] = set()
    for auto in {kind.auto_class for kind in KINDS.values()}:
        for names in getattr(modeling_auto, _MAPPINGS[auto]).values():
            known |= {names} if isinstance(names, str) else set(names)
    name = architectures[0] if isinstance(architectures, list) and architectures else "(none named)"
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{path}: transformers has no model {name}. Remote code is not run.")
    found: type = getattr(transformers, name)
    return found


_MAPPINGS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}


def _named(values: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text in a value of JSON with the keys that lead to it.

    The keys below `attn_implementation` are parts of the model, so the place ends with that key.
    """
    if isinstance(values, str):
        yield place, values
    elif isinstance(values, list):
        for value in values:
            yield from _named(value, place)
    elif isinstance(values, dict):
        for key, value in values.items():
            inside = place if place.endswith("_implementation") else f"{place}.{key}".lstrip(".")
            yield from _named(value, inside)


def _is_a(found: Any, kind: type) -> bool:
    """Whether something is a class of a kind, or stands for a class whose package is missing."""
    return isinstance(found, type) and (issubclass(found, kind) or getattr(found, "is_dummy", False))
