"""What a model is: the identity of its weights, and whether it is there at all."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from generation.engine import EngineConfig
from preferences.errors import InputError
from preferences.fingerprint import fingerprint
from preferences.tables import folder_fingerprint


def model_identity(config: EngineConfig) -> str:
    """Content identity of what answers: engine, weights at their revision, adapter and numbers.

    A folder is identified by its content, so moving it changes nothing and retraining it does.
    A Hub model is its name and revision. Raises InputError if the model is not there.
    """
    weights = (
        f"{config.model}@{config.revision or 'main'}"
        if config.engine == "openai"
        else weights_identity(config.model, config.revision)
    )
    adapter = weights_identity(config.adapter, None) if config.adapter else None
    return fingerprint(
        [config.engine, weights, adapter, config.dtype, config.max_length, config.trust_remote_code]
    )


def weights_identity(model: str, revision: str | None) -> str:
    """Identity of a folder's weights or of a Hub model; raises InputError if there are none."""
    folder = Path(model)
    if folder.is_dir():
        if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            raise InputError(f"{model}: no config.json in this folder; name a folder with a model")
        return _folder_identity(folder.resolve(), _newest(folder))
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"{model}: no such folder; check the path of the model")
    return _hub_identity(model, revision)


def _newest(folder: Path) -> float:
    return max(path.stat().st_mtime for path in folder.iterdir())


@lru_cache
def _folder_identity(folder: Path, newest: float) -> str:
    return folder_fingerprint(folder)


@lru_cache
def _hub_identity(model: str, revision: str | None) -> str:
    """The commit a revision means now, so that a moved branch is another model."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = HfApi().model_info(model, revision=revision, timeout=20)
        return f"{model}@{info.sha}"
    except HFValidationError as error:
        raise InputError(f"{model}: neither a folder nor a Hub id; check the name") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403, 404):
            raise InputError(
                f"{model}: the Hub has no such model for you at {revision or 'main'}; check the "
                "name, or log in with `hf auth login`"
            ) from error
        unreachable: Exception = error
    except Exception as error:  # Which one depends on the HTTP library of the Hub's client.
        unreachable = error
    # Without the Hub, a model that was fetched before is still good.
    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    if isinstance(cached, str):
        return f"{model}@{Path(cached).parent.name}"
    raise InputError(
        f"{model}: no such folder here, and the Hub cannot be reached "
        f"({type(unreachable).__name__}); check the path, or the network"
    ) from unreachable
