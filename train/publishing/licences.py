"""The licence that an author chooses for weights, of those that the Hub knows."""

import difflib
import re

from .known_data import Licence

# https://huggingface.co/docs/hub/repositories-licenses, 2026-08-22
HUB = frozenset("""
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
    epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0
    postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3
    llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
""".split())


def chosen(id: str, name: str | None, link: str | None) -> Licence:
    """An author's own choice. Raises SystemExit with a sentence for what the Hub would refuse.

    name, link: of "other", an identifier like those above and the address of its text.
    """
    if id not in HUB:
        close = difflib.get_close_matches(id.lower().replace(" ", "-"), HUB, n=1)
        meant = f"did you mean {close[0]}?" if close else "take one of these, or other with a name and a link of its own:"
        raise SystemExit(
            f"--licence: the Hub knows no {id}, {meant} https://huggingface.co/docs/hub/repositories-licenses lists them."
        )
    if id != "other":
        return Licence(id=id, text=f"`{id}`")
    if not (name and re.fullmatch(r"[a-z0-9.-]+", name) and link and re.match("https?://", link)):
        raise SystemExit(
            "--licence other needs --licence-name, of small letters, digits, dots and hyphens (my-licence-1.0), and "
            "--licence-link, the http(s) address of its text."
        )
    return Licence(id=id, text=f"`{name}` ({link})", name=name, link=link)
