"""An artifact's shards, shared out among the processes that work on one store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from preferences.errors import ServiceError
from preferences.store import Artifact, DiskFull, Shard, Store


def work_through(
    store: Store,
    artifact: Artifact,
    owed: Sequence[Shard],
    make: Callable[[Shard], None],
    kind: str = "part",
) -> None:
    """Have every owed shard made once, by this process or by another that works on the same store.

    Shards that another process holds are left to it and looked at again when ours are done; if it
    dies, its claim falls free and the shard is made here. A shard whose engine fails is left owed
    and the others go on; ServiceError then tells how many failed and why. A full disk stops all:
    what the others would ask for could not be kept.
    """
    waiting, failures = list(owed), []
    while waiting:
        held_elsewhere = []
        for shard in waiting:
            with store.claim(f"{artifact}/{shard.suffix}") as ours:
                if not ours:
                    held_elsewhere.append(shard)
                elif not store.has_part(artifact, shard, kind):
                    store.sweep(artifact, shard)
                    try:
                        make(shard)
                    except DiskFull:
                        raise
                    except ServiceError as error:
                        failures.append(error)
        if len(held_elsewhere) == len(waiting):
            time.sleep(0.2)
        waiting = held_elsewhere
    if failures:
        raise ServiceError(
            f"{artifact.stage}: {len(failures)} of {len(owed)} shards failed ({failures[0]}); "
            "the others are kept, run the same again"
        )
