"""No test asks the Hub or calls home, and none shares Prefect's database with another process."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

from flows import prefect_settings

os.environ["HF_HUB_OFFLINE"] = "1"
# Kept from run to run: to make a database anew takes half a minute.
worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
home = Path(tempfile.gettempdir()) / f"pairwright-tests-{getpass.getuser()}" / worker
home.mkdir(parents=True, exist_ok=True)
os.environ["PREFECT_HOME"] = str(home)
prefect_settings.apply()
