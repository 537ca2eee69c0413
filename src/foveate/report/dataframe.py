"""Dataframe: the table of an evaluation as pandas has it, which a notebook shows with methods down and columns across."""

from __future__ import annotations

from typing import Any

from foveate.errors import required
from foveate.evaluation.results import MODEL
from foveate.registry import is_control, title_of
from foveate.report import tables
from foveate.report.page import filled

required("a table", "pandas")
import pandas as pd  # noqa: E402


class Table(pd.DataFrame):  # type: ignore[misc]
    """A DataFrame in everything but how a notebook shows it; what is computed from it is a plain one."""

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame  # type: ignore[no-any-return]

    def _repr_html_(self) -> str | None:
        """Each method with its mean and interval in each column, what leads in bold, and the findings below."""
        if not isinstance(self.index, pd.MultiIndex) or not {"mean", "low", "high", "n"} <= set(self.columns):
            return super()._repr_html_()  # type: ignore[no-any-return]
        shown = tables.columns(self)
        content: dict[str, Any] = {
            "columns": [(tables.title(column), self._words(column)) for column in shown],
            "lines": [
                (
                    title_of(method),
                    is_control(method),
                    [(*tables.cell(self, method, column), tables.is_best(self, method, column)) for column in shown],
                )
                for method in tables.methods(self)
            ],
            "model": [
                (tables.title(column), tables.cell(self, MODEL, column)[0]) for column in tables.columns(self, model=True)
            ],
            "findings": self.attrs.get("findings", []),
        }
        return filled("table_fragment.html.j2", content)

    @staticmethod
    def _words(column: str) -> str:
        known = tables.heading(column)
        return f"{known.title}: {known.about} {known.better} is better" if known.about else known.title
