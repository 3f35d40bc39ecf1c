"""Results on disk: one JSON record a line, written whole after every cell, so that a kill loses one cell."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def write_text(path: Path, text: str) -> None:
    """Through a temporary file, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


class Store:
    """The records of one folder; those of other commits, drivers or versions stay and are not used.

    A record is `{"kind": bandwidth | check | cell, "environment": number, "config": …, "passed": …, …metrics}`.
    """

    def __init__(self, folder: Path, environment: dict[str, Any], again: bool = False) -> None:
        self.path = folder / "results.json"
        self.folder = folder
        self.environments: list[dict[str, Any]] = []
        self.records: list[Record] = []
        if self.path.exists():
            saved = json.loads(self.path.read_text())
            self.environments, self.records = saved["environments"], saved["records"]
        environment = json.loads(json.dumps(environment))
        if environment not in self.environments:
            self.environments.append(environment)
        self.number = self.environments.index(environment)
        if again:
            self.records = [record for record in self.records if record["environment"] != self.number]

    @property
    def environment(self) -> dict[str, Any]:
        return self.environments[self.number]

    def current(self, kind: str | None = None) -> list[Record]:
        """Records of this environment, of one kind if it is named."""
        return [r for r in self.records if r["environment"] == self.number and kind in (None, r["kind"])]

    def find(self, kind: str, config: dict[str, Any]) -> Record | None:
        wanted = json.loads(json.dumps(config))
        return next((record for record in self.current(kind) if record["config"] == wanted), None)

    def put(self, kind: str, config: dict[str, Any], values: dict[str, Any]) -> Record:
        """Add a record, in place of one with the same config; `save` writes it."""
        record = json.loads(json.dumps({"kind": kind, "environment": self.number, "config": config, **values}))
        old = self.find(kind, config)
        self.records = [one for one in self.records if one is not old] + [record]
        return record

    def save(self) -> None:
        lines = ",\n".join(json.dumps(record) for record in self.records)
        environments = ",\n".join(json.dumps(one) for one in self.environments)
        write_text(self.path, f'{{"environments": [\n{environments}\n],\n"records": [\n{lines}\n]}}\n')
