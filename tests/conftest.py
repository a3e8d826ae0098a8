"""No test asks the Hub or calls home."""

from __future__ import annotations

import os

from flows import prefect_settings

os.environ["HF_HUB_OFFLINE"] = "1"
prefect_settings.apply()
