"""What other tools make of a delta where their mathematics is not the formula; see ``RULES``."""

from __future__ import annotations

from loratools.deltas.compat.table import RULES, TOOLS, Rule, read_as_tool

__all__ = ["RULES", "TOOLS", "Rule", "read_as_tool"]
