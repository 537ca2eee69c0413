"""Rows of earlier runs: those of the same machine, versions, source and data are gone on with."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any


class Kept:
    """Rows in a file of their own for each machine line, written whole after every row.

    Args:
        folder: made where it is not there.
        machine: what a row depends on, in words (:func:`benchmarks.peers.page.machine`).
        commit: of the source, which each row is marked with.
    """

    def __init__(self, folder: Path, device: str, machine: str, commit: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.place = folder / f"rows_{device}_{hashlib.sha256(machine.encode()).hexdigest()[:8]}.json"
        self.machine, self.commit = machine, commit
        self.rows: dict[str, dict[str, Any]] = {}
        if self.place.exists():
            try:
                document = json.loads(self.place.read_text(encoding="utf-8"))
                self.rows = {one["title"]: one for one in document["rows"]}
            except (ValueError, KeyError, TypeError):
                sys.exit(f"{self.place} is damaged: move it away, and all rows are measured again")

    def add(self, row: dict[str, Any]) -> None:
        """Put a row there; killed meanwhile, the file is as it was."""
        self.rows[row["title"]] = {**row, "commit": self.commit}
        text = json.dumps({"machine": self.machine, "rows": list(self.rows.values())}, indent=1)
        written = self.place.with_suffix(".new")
        written.write_text(text, encoding="utf-8")
        os.replace(written, self.place)
