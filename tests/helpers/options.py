"""Option files as mappings, with what they build on laid beneath."""

from typing import Any

import yaml

from helpers.paths import CONF


def option(group: str, name: str) -> dict[str, Any]:
    """The content of an option file, and beneath it that of the options in its defaults."""
    content = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    merged: dict[str, Any] = {}
    for base in content.pop("defaults", []):
        if isinstance(base, dict):  # such as /model@net: resnet8
            ((place, chosen),) = base.items()
            other, _, key = place.lstrip("/").partition("@")
            merged[key] = option(other, chosen)
        elif base != "_self_":
            merged |= option(group, base)
    return merged | content
