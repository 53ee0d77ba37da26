"""Run folders to pages. Does not know torch."""

from thalweg.report.page import write_report

__all__ = ["write_report"]
