"""Evaluations in, one self-contained HTML page out."""

from pilotfish.reports.page import render_page, write_page

__all__ = ["render_page", "write_page"]
