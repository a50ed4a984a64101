"""`pilotfish report`: folders of banks in, a page and Markdown on how good their heads are out."""

from __future__ import annotations

from pilotfish.cli.verbs import Report
from pilotfish.reports import heads_markdown, write_heads_page
from pilotfish.reports.section import read_sections
from pilotfish.runs import write_text


def run(config: Report) -> int:
    sections = [section for folder in config.folders for section in read_sections(folder)]
    print(f"The page: {write_heads_page(config.out, sections).resolve()}")
    if config.markdown is not None:
        write_text(config.markdown, heads_markdown(sections))
        print(f"Markdown: {config.markdown.resolve()}")
    return 0
