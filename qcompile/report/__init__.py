"""What quantization did to a model: every site, its numbers, and the reason for what was left alone."""

from qcompile.report.report import Report, SiteReport, merge

__all__ = ["Report", "SiteReport", "merge"]
