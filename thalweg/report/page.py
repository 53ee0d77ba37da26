"""The page: one file that holds all it needs and asks nothing of a network."""

from __future__ import annotations

import base64
import hashlib
import os
from importlib.resources import files
from pathlib import Path

from thalweg.report import figures, sections
from thalweg.report.folder import Run, read_run
from thalweg.report.markup import tag, wrap


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all; the same folder gives the same page.

    Args:
        folder: a run folder, of a run that ended or one that goes on.

    Returns:
        The page's path.

    Raises:
        RunFolderError: if the folder holds no run.
    """
    target, part = folder / "report.html", folder / "report.html.part"
    part.write_text(page(read_run(folder)), encoding="utf-8", errors="backslashreplace")
    os.replace(part, target)
    return target


def page(run: Run) -> str:
    """The page of a run, as HTML."""
    style, script = _resource("style.css"), _resource("script.js")
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    head = (
        '<meta charset="utf-8">\n'
        f"{_meta('Content-Security-Policy', policy)}\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"{tag('title', f'{run.plan.task}: run folder {run.name}')}\n"
        f"<style>{style}</style>\n"
    )
    main = (
        figures.header(run)
        + figures.key_figures(run)
        + figures.charts(run)
        + sections.events(run)
        + sections.sample(run)
        + sections.decisions(run)
        + sections.recipe(run)
        + sections.parameters(run)
        + wrap(
            "div",
            sections.memory(run) + sections.goodput(run) + sections.machine(run) + sections.data(run),
            class_="columns",
        )
    )
    body = wrap("main", main) + f"\n<script>{script}</script>\n"
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}</head>\n<body>\n{body}</body>\n</html>\n'


def _meta(name: str, content: str) -> str:
    return f'<meta http-equiv="{name}" content="{content}">'


def _resource(name: str) -> str:
    return (files("thalweg.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy knows an inline text by; any other style or script in the page is refused."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
