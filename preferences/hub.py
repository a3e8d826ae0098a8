"""Sending a folder to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from preferences.errors import ServiceError


def push_to_hub(
    folder: Path, repository: str, kind: Literal["dataset", "model"], private: bool
) -> str:
    """Upload a folder as a data set or model; returns its URL. The token is the environment's."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        url = api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, repo_type=kind)
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ServiceError(
            f"{repository}: not pushed ({reason}); check the name, the network and `hf auth login`"
        ) from error
    return str(url)
