"""Plain operators -> the one operator of the native dialect that says the same.

The legacy dialect spells norms, rotary embedding, cache and attention out; so does the native one
where a runtime lacks the operator. Afterwards all other rewrites meet one spelling. What is not
recognised stays as it is and is refused by them, by name.
"""

from __future__ import annotations

from remora_agent.engine.ort.rewrite.edit import Editor
from remora_agent.engine.ort.rewrite.plain.attention import join_attention
from remora_agent.engine.ort.rewrite.plain.cache import join_cache
from remora_agent.engine.ort.rewrite.plain.norms import join_norms
from remora_agent.engine.ort.rewrite.plain.rotary import join_rotary


def join_plain(editor: Editor) -> None:
    """Changes the graph in place. Raises EngineFault naming a node that is nearly one of them."""
    join_norms(editor)
    join_rotary(editor)
    join_cache(editor)
    join_attention(editor)
