"""What meets the outside: publishing, export, conversion of checkpoints, a search index, and the Space.

`from modeling_dclip.hub import SearchIndex` opens an index. It is imported when it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeling_dclip.hub.index import SearchIndex

__all__ = ["SearchIndex"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from modeling_dclip.hub.index import SearchIndex

    return SearchIndex
