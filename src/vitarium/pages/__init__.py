"""Self-contained HTML pages: one file that opens offline, with sortable tables, plots and embedded images.

A package that writes a report provides a template that extends "page", the style and script of its page, and plain values.
"""

from vitarium.pages.page import Cell, Column, Row, embed_image, render_page
from vitarium.pages.words import counted, dated, lasting, listed, percent, three

__all__ = ["Cell", "Column", "Row", "counted", "dated", "embed_image", "lasting", "listed", "percent", "render_page", "three"]
