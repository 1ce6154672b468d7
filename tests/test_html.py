"""Tests of chatreid_plugin.html: what comes from outside is escaped, and what a template misses is an error."""

from pathlib import Path

import jinja2
import pytest

from chatreid_plugin.html import render_template


def test_values_are_escaped_and_missing_ones_are_errors(tmp_path: Path) -> None:
    template = tmp_path / "page.html.j2"
    template.write_text("{% for name in names %}\n<b>{{ name }}</b>\n{% endfor %}")
    assert render_template(template, names=["a", "<script>"]) == "<b>a</b>\n<b>&lt;script&gt;</b>\n"
    with pytest.raises(jinja2.UndefinedError, match="names"):
        render_template(template)
