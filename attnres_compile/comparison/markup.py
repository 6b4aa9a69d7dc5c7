"""HTML and SVG from Python values, escaped."""

from __future__ import annotations

import html
import re


def text(value: object) -> str:
    """Any text as HTML and XML alike; what neither can hold becomes U+FFFD."""
    return html.escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(value)))


def element(tag: str, *content: str, **attributes: object) -> str:
    """An element around ``content``, which is markup. Attributes are escaped; ``class_`` stands for class, ``_`` for a dash."""
    given = "".join(f' {name.rstrip("_").replace("_", "-")}="{text(number(value))}"' for name, value in attributes.items())
    return f"<{tag}{given}>{''.join(content)}</{tag}>"


def number(value: object) -> object:
    """A float with one decimal, or none if that is zero; anything else as it is."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
