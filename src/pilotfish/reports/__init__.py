"""Evaluations in, one self-contained HTML page or Markdown out.

`pilotfish.reports.section` reads the folder of a bank; it needs torch, and is imported from there.
"""

from pilotfish.reports.heads import Section, render_heads_page, write_heads_page
from pilotfish.reports.heads_markdown import heads_markdown
from pilotfish.reports.page import render_page, write_page

__all__ = ["Section", "heads_markdown", "render_heads_page", "render_page", "write_heads_page", "write_page"]
